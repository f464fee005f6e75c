"""Decode attention over each kind of cache on this card: `python benchmarks/kernels/tune_kv.py [--write FILE]`.

For 8b (32 heads over 8, of 128) and rows and contexts from a few to a crowd: the time of the best sizes of each kind
of cache, beside what reading it alone takes. Sizes are compiled first in many processes, as in `tune_kernels.py`.
`--write` keeps the best sizes of caches in 8 bits in a file of `kernels/tuned`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from timing import copies_for
from torch import Tensor
from tune_kernels import Part

from argosy.kernels import kv_scales, paged_attention

HEADS, KV_HEADS, SIZE, BLOCK = 32, 8, 128, 16
CASES = {"many": ((64, 384), (64, 1024), (64, 4096)), "crowd": ((256, 256), (256, 640), (256, 1024))}
KINDS = {
    "bfloat16": (torch.bfloat16, False), "e4m3": (torch.float8_e4m3fn, False),
    "e4m3 with scales": (torch.float8_e4m3fn, True), "int8 with scales": (torch.int8, True),
}  # fmt: skip
PEAK = 4.8e6  # bytes a microsecond of an H200


def sizes_for(kind: str, dtype: torch.dtype) -> Iterator[dict[str, int]]:
    """Some that may do."""
    eight = dtype.itemsize == 1
    for staged in (0, 1) if eight else (0,):
        for block_l in (32, 64, 128):
            for warps in (1, 2, 4):
                for stages in (2, 3, 4):
                    if block_l // warps > 64 or (block_l // warps < 16):
                        continue
                    yield {"block_l": block_l, "warps": warps, "stages": stages, "per_sm": 1, "staged": staged}


def make_cache(num_blocks: int, dtype: torch.dtype, scaled: bool) -> Tensor:
    """Random numbers, and random scales around 1 where there are any."""
    if not scaled:
        return torch.randn(num_blocks, BLOCK, KV_HEADS, SIZE, device="cuda").to(dtype)
    shape = (num_blocks, kv_scales.block_bytes(BLOCK, KV_HEADS, SIZE))
    raw = torch.randint(0, 100, shape, device="cuda", dtype=torch.uint8)
    cache = kv_scales.as_scaled_cache(raw, BLOCK, KV_HEADS, SIZE, dtype)
    kv_scales.scales_of(cache).random_(168, 174)
    return cache


def main() -> int:
    """Print a JSON line for each kind and case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", help="file of tuned sizes to add to")
    parser.add_argument("--output", help="append the JSON lines to this file")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    part = Part(0, 0)
    if arguments.compile_part:
        part = Part(*map(int, arguments.compile_part.split("/")))
    else:
        workers = min(14, os.cpu_count() or 1)
        command = [sys.executable, *sys.argv, "--compile-part"]
        others = [subprocess.Popen([*command, f"{i}/{workers}"], stdout=subprocess.DEVNULL) for i in range(workers)]
        for other in others:
            other.wait()
        print("compiled", flush=True)
    best: dict[str, dict[str, int]] = {}
    for name in arguments.kind or KINDS:
        dtype, scaled = KINDS[name]
        for kind, shapes in CASES.items():
            scores: dict[str, list[float]] = {}
            for rows, context in shapes:
                per_row = context // BLOCK
                read = rows * context * KV_HEADS * 2 * (SIZE * dtype.itemsize + scaled)
                inputs = []
                for _ in range(1 if arguments.compile_part else copies_for(read, 4)):
                    caches = [make_cache(rows * per_row, dtype, scaled) for _ in range(2)]
                    inputs.append((*caches, torch.randperm(rows * per_row, device="cuda").view(rows, per_row).int()))
                lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
                q = torch.randn(rows, HEADS, SIZE, device="cuda").bfloat16()
                for sizes in sizes_for(kind, dtype):
                    calls = [
                        lambda a=a, s=sizes, q=q, n=lengths: paged_attention.paged_attention(
                            q, *a, n, scale=0.1, max_context=8192, sizes=s
                        )
                        for a in inputs
                    ]
                    try:
                        us = part.time(calls)
                    except Exception as error:  # does not fit
                        print("skipped", sizes, str(error)[:80])
                        us = math.inf
                    scores.setdefault(json.dumps(sizes), []).append(us)
                if arguments.compile_part:
                    break
                column = [values[-1] for values in scores.values()]
                chosen = min(scores, key=lambda s: scores[s][-1])
                row = {
                    "device": torch.cuda.get_device_name(), "what": "decode attention", "cache": name, "rows": rows,
                    "context": context, "us": round(min(column), 1), "read_us": round(read / PEAK, 1),
                    "sizes": json.loads(chosen),
                    "best_unstaged_us": round(min(v[-1] for s, v in scores.items() if '"staged": 0' in s), 1),
                }  # fmt: skip
                print(json.dumps(row), flush=True)
                if arguments.output:
                    with open(arguments.output, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
            if not arguments.compile_part:
                ranked = sorted(scores, key=lambda s: math.prod(scores[s]))
                best[f"h{SIZE}_{kind} {name}"] = json.loads(ranked[0])
                print(name, kind, *(f"{[round(x, 1) for x in scores[r]]} {r}" for r in ranked[:3]), sep="\n    ")
    if arguments.write and not arguments.compile_part:
        path = Path(arguments.write)
        table = json.loads(path.read_text()) if path.exists() else {}
        table.setdefault("paged_attention", {}).update(best)
        path.write_text(json.dumps(table, indent=1, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
