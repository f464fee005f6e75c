"""Measure weights of 4 bits: sizes of the kernels on this card, and their time beside cuBLAS on plain weights.

    python benchmarks/kernels/tune_packed.py --out kernels/tuned/nvidia_h200.json --report FILE

Prints a JSON line a shape and number of tokens; keeps what else the tuned file holds.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import copies_for, microseconds

from argosy.kernels import packed_linear, packed_reference, tuning

SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
TOKENS = (1, 8, 64, 256)


def sizes_for(tokens: int) -> Iterator[dict[str, int]]:
    """What is tried."""
    if tokens == 1:
        for rows, words, warps, stages in itertools.product((2, 4, 8, 16), (64, 128, 256, 512), (2, 4, 8), (2, 3, 4)):
            if 8 <= rows * words // (32 * warps) <= 32:
                yield {"rows": rows, "words": words, "warps": warps, "stages": stages}
    else:
        yield {}  # a slice of plain weight at a time has no sizes


def weights_of(num_in: int, num_out: int, count: int) -> list[packed_reference.PackedWeight]:
    """Random ones, enough of them that none is found in a cache."""
    made = []
    for _ in range(count):
        words = torch.randint(-(2**31), 2**31 - 1, (num_out, num_in // 8), device="cuda", dtype=torch.int32)
        pairs = torch.rand(num_out, num_in // 128, 2, device="cuda").bfloat16() / 64
        pairs[..., 1] = 8
        made.append(packed_reference.PackedWeight(words, pairs, 4, 128))
    return made


def main() -> None:
    """Compile in many processes, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--report", default=os.devnull)
    parser.add_argument("--part", help=argparse.SUPPRESS)  # "i/n": compile every n-th size only
    args = parser.parse_args()
    part = tuple(map(int, args.part.split("/"))) if args.part else None
    if part is None:
        others = [
            subprocess.Popen([sys.executable, *sys.argv, "--part", f"{i}/14"], stdout=subprocess.DEVNULL)
            for i in range(14)
        ]
        for other in others:
            other.wait()
    found: dict[str, dict[str, dict[str, int]]] = {"packed_vector": {}}
    turn = 0
    with Path(args.report).open("a", encoding="utf-8") as report:
        for name, (num_in, num_out) in SHAPES.items():
            count = copies_for(num_in * num_out // 2, 16)
            weights = weights_of(num_in, num_out, 1 if part else count)
            for tokens in TOKENS:
                x = torch.randn(tokens, num_in, device="cuda").bfloat16()
                times: dict[str, float] = {}
                for sizes in sizes_for(tokens):
                    turn += 1
                    if part is not None and turn % part[1] != part[0]:
                        continue
                    calls = [lambda w=w, s=sizes: packed_linear.linear(x, w, sizes=s or None) for w in weights]  # noqa: B023
                    try:
                        if part is not None:
                            calls[0]()
                        else:
                            times[json.dumps(sizes)] = microseconds(calls, launches=max(count, 40), replays=3)[0]
                    except Exception as error:  # a size that does not fit
                        print("skipped", sizes, str(error)[:60], file=sys.stderr)
                if part is not None:
                    continue
                best = min(times, key=times.__getitem__)
                if tokens == 1:
                    found["packed_vector"][f"{num_in}x{num_out}"] = json.loads(best)
                plain = [torch.randn(num_out, num_in, device="cuda").bfloat16() for _ in range(max(2, count // 4))]
                by_library = microseconds([lambda w=w: F.linear(x, w) for w in plain], launches=40, replays=3)[0]  # noqa: B023
                size = weights[0].num_bytes
                row = {
                    "kernel": "packed_linear", "bits": 4, "shape": name, "inputs": num_in, "outputs": num_out,
                    "tokens": tokens, "us": round(times[best], 2), "TBps": round(size / times[best] / 1e6, 2),
                    "cublas_bf16_us": round(by_library, 2), "times_faster": round(by_library / times[best], 2),
                    "sizes": json.loads(best), "device": torch.cuda.get_device_name(),
                }  # fmt: skip
                print(json.dumps(row), flush=True)
                report.write(json.dumps(row) + "\n")
                del plain
            del weights
            torch.cuda.empty_cache()
    if part is None:
        path = Path(args.out)
        table = json.loads(path.read_text()) if path.exists() else {}
        for kind, entries in found.items():
            table.setdefault(kind, {}).update(entries)
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        print(f"written for {tuning.device_facts(torch.device('cuda', 0)).slug}")


if __name__ == "__main__":
    main()
