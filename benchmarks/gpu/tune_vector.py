"""Sizes of the products of one token with weights of 4 or 8 bits, chosen by the time of a whole recorded step.

    python benchmarks/gpu/tune_vector.py --model 8b --format int4 --out kernels/tuned/nvidia_h200.json

A product alone says little: it begins to fetch while attention and norms before it run, and holds room that they want.
So one product's sizes are changed at a time, the step is recorded anew, and what is faster stays; logits must be those
of the kernel for few tokens. Kernels are compiled in many processes before. Prints every try.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_gpu import COMMON, SHAPES
from compare_methods import FORMATS
from profile_step import decode, make_runner, start_rows, timed, timeline

from argosy.kernels import packed_linear, packed_reference, tuning
from argosy.kernels.packed_linear import FEW, VECTOR

Sizes = dict[str, int]
WAYS = [(8, 2), (8, 1), (16, 1), (4, 2), (4, 1), (16, 2)]  # warps, blocks of each
# tokens at once, of a piece at least, stages, warps: what holds less shared memory begins while the product before runs
ATTENTION = [
    {"block_l": block_l, "min_piece": piece, "per_sm": 1, "stages": stages, "warps": warps}
    for block_l, piece, stages, warps in ((32, 32, 5, 4), (32, 32, 3, 2), (64, 64, 3, 4), (32, 64, 4, 4))
]
KEEP = 0.998  # of the time before, or a change is noise
PROCESSES = 14
WORST = 0.2  # of the logits, beside the kernel for few tokens: the token before may be another one


def ways_for(num_in: int) -> list[Sizes]:
    """What is tried for a product: warps that share its blocks evenly."""
    return [
        {"kernel": VECTOR, "warps": warps, "blocks": blocks}
        for warps, blocks in WAYS
        if num_in // 128 % (warps * blocks) == 0
    ]


def shapes_of(model: str) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the products of a layer."""
    facts: dict[str, Any] = {**COMMON, **SHAPES[model]}
    width, inner, heads = facts["hidden_size"], facts["intermediate_size"], facts["num_attention_heads"]
    size = facts.get("head_dim") or width // heads
    return {"gate_up": (width, 2 * inner), "down": (inner, width),
            "qkv": (width, (heads + 2 * facts["num_key_value_heads"]) * size), "o": (heads * size, width)}  # fmt: skip


def compile_part(shapes: dict[str, tuple[int, int]], bits: int, part: int) -> None:
    """Every n-th kernel, into the cache that the measuring process reads."""
    jobs = [(name, shape, sizes) for name, shape in shapes.items() for sizes in ways_for(shape[0])]
    for name, (num_in, num_out), sizes in itertools.islice(jobs, part, None, PROCESSES):
        words, pairs = packed_reference.shapes(num_out, num_in, bits=bits, group=128)
        weight = packed_reference.PackedWeight(
            torch.zeros(words, dtype=torch.int32, device="cuda"),
            torch.zeros(pairs, dtype=torch.bfloat16, device="cuda"), bits, 128, num_in, num_out,
        )  # fmt: skip
        residual = torch.zeros(1, num_out, device="cuda").bfloat16() if name in ("o", "down") else None
        try:
            packed_linear.linear(
                torch.zeros(1, num_in, device="cuda").bfloat16(), weight, residual_TO=residual, gated=name == "gate_up",
                sizes=sizes,
            )  # fmt: skip
        except Exception as error:  # what does not fit is left out when it is measured, too
            print("skipped", sizes, str(error)[:80], flush=True)


class Tuner:
    """A rank whose table of sizes is changed between recordings."""

    def __init__(self, runner: Any, bits: int):
        self.runner, self.bits = runner, bits
        self.table: Any = tuning._tuned(tuning.device_facts(torch.device("cuda", 0)).slug)
        self.wanted: torch.Tensor | None = None
        self.off = 0.0

    def key(self, shape: tuple[int, int]) -> str:
        """In the tuned file."""
        return f"{shape[0]}x{shape[1]}x1" + ("" if self.bits == 4 else "_8g128")

    def measure(self) -> float:
        """Milliseconds of a replay with the table as it is; infinite where it does not run or is wrong."""
        try:
            self.runner.warm_up([(1, 1)])
            self.runner.record_graphs()
            self.runner.execute(start_rows(self.runner, 1, 256))
            self.runner.execute(decode(1, 0))
            self.runner.batch.last_token_N.fill_(5)  # rounding may choose another, which proves nothing
            logits = self.runner.graphs.run(1).float().clone()
            torch.cuda.synchronize()
        except Exception as error:
            print("   skipped:", str(error)[:100], flush=True)
            return float("inf")
        if self.wanted is None:
            self.wanted = logits
        off = float((logits - self.wanted).norm() / self.wanted.norm())
        self.off = off
        if not off < WORST:
            print(f"   WRONG: logits are off by {off}", flush=True)
            return float("inf")
        return min(timed(lambda: self.runner.graphs.run(1), 15)[0] for _ in range(3))

    def try_all(
        self, name: str, table: dict[str, Sizes], key: str, candidates: list[Sizes], best: float, deadline: float
    ) -> float:
        """Leaves what was fastest in the table; its time."""
        for sizes in candidates:
            if time.perf_counter() > deadline:
                break
            before, table[key] = table[key], sizes
            found = self.measure()
            print(f"{found:.4f} ms {'*' if found < best * KEEP else ' '} {name} {sizes} off {self.off:.4f}", flush=True)
            if found < best * KEEP:
                best = found
            else:
                table[key] = before
        return best


def main() -> int:
    """Load once, then try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b")
    parser.add_argument("--format", default="int4", choices=("int4", "int8"))
    parser.add_argument("--out", help="put what came out into this table")
    parser.add_argument("--seconds", type=float, default=60.0, help="then what was best so far is written")
    parser.add_argument("--attention", action="store_true", help="also sizes of attention for few rows")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # "i:json": compile every n-th kernel of the shapes
    args = parser.parse_args()
    bits = int(args.format[3:])
    if args.part:
        part, shapes = args.part.split(":", 1)
        compile_part(json.loads(shapes), bits, int(part))
        return 0
    began = time.perf_counter()
    shapes = shapes_of(args.model)
    command = [sys.executable, __file__, "--format", args.format, "--part"]
    others = [
        subprocess.Popen([*command, f"{i}:{json.dumps(shapes)}"], env={**os.environ, "OMP_NUM_THREADS": "1"})
        for i in range(PROCESSES)
    ]
    quantization, config = FORMATS[args.format]
    runner = make_runner(args.model, 1, 256, quantization=quantization, checkpoint=config)
    tuner = Tuner(runner, bits)
    packed: dict[str, Sizes] = tuner.table["packed"]
    for shape in shapes.values():
        if packed.get(tuner.key(shape), {"kernel": VECTOR})["kernel"] == VECTOR:
            packed[tuner.key(shape)] = {"kernel": FEW, "tiles": 2, "split": 4, "wide": 1, "ahead": 1}
    best = tuner.measure()
    print(f"few tokens' kernel: {best:.4f} ms, ready after {time.perf_counter() - began:.0f} s", flush=True)
    for other in others:
        other.wait()
    print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    deadline = began + args.seconds
    if args.attention:
        best = tuner.try_all("attention", tuner.table["paged_attention"], "h128_one", ATTENTION, best, deadline)
        print("attention:", tuner.table["paged_attention"]["h128_one"])
    for name, shape in shapes.items():
        best = tuner.try_all(name, packed, tuner.key(shape), ways_for(shape[0]), best, deadline)
    tuner.measure()
    timeline(lambda: runner.graphs.run(1))  # type: ignore[union-attr]
    chosen = {tuner.key(shape): packed[tuner.key(shape)] for shape in shapes.values()}
    print(json.dumps(chosen), flush=True)
    if args.out:
        path = Path(args.out)
        whole = json.loads(path.read_text()) if path.exists() else {}
        whole.setdefault("packed", {}).update(chosen)
        path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
