"""Sizes of the products of decode steps with weights of 4 or 8 bits, chosen by the time of a whole recorded step.

    python benchmarks/gpu/tune_vector.py --model 8b --format int4 --rows 1 --out kernels/tuned/nvidia_h200.json

A product alone says little: it begins to fetch while attention and norms before it run, and holds room that they want.
So all are timed alone first, and checked; then one product's sizes are changed at a time, the best few of those, the
step is recorded anew, and what is faster stays; logits must be those of the sizes before. Kernels are compiled in many
processes before. Prints every try.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import cache
from typing import Any

import torch
from bench_gpu import COMMON, SHAPES
from compare_methods import FORMATS
from profile_step import decode, make_runner, start_rows, timed, timeline
from timing import copies_for, microseconds
from trials import read_table, write_table
from tune_packed import LARGEST_ERROR, weights_of

from argosy.kernels import packed_hopper, packed_linear, packed_reference, packed_stream, tuning
from argosy.kernels.packed_linear import FEW, HOPPER, STREAM, VECTOR
from argosy.workers.recording import Recorder
from argosy.workers.step_recording import make_graphs

Sizes = dict[str, int]
WAYS = [(8, 2), (8, 1), (16, 2)]  # warps, blocks of each, of `packed_vector`
# tokens at once, of a piece at least, stages, warps: what holds less shared memory begins while the product before runs
ATTENTION, ATTENTION_OF_MORE = (
    [
        {"block_l": block_l, "min_piece": piece, "stages": 3, "warps": warps, "per_sm": per_sm, "late": late}
        for block_l, piece, warps, per_sm, late in tried
    ]
    for tried in (
        (
            (16, 16, 1, 1, 1), (16, 16, 1, 4, 0), (32, 32, 1, 4, 0), (32, 32, 1, 1, 0), (32, 32, 2, 1, 0),
            (64, 64, 4, 1, 0),
        ),
        ((64, 128, 4, 1, 0), (64, 64, 4, 1, 0), (32, 128, 2, 1, 0), (32, 64, 2, 1, 0)),
    )
)  # fmt: skip
KEEP = 0.998  # of the time before, or a change is noise
PROCESSES = 14
WORST = 0.2  # of the logits, beside the sizes before: the token before may be another one


# warps, those of a tile, blocks ahead, programs of a multiprocessor
STREAMS = {
    "gate_up": ((16, 2, 2, 1), (8, 2, 2, 2), (8, 2, 3, 2), (4, 2, 2, 4), (4, 4, 2, 4)),
    "down": ((8, 8, 2, 2), (8, 8, 3, 2), (4, 4, 4, 4)),
    "qkv": ((16, 4, 4, 1), (8, 4, 4, 2), (4, 4, 4, 4), (4, 4, 3, 4), (4, 2, 4, 4)),
    "o": ((16, 8, 4, 1), (16, 8, 2, 1), (8, 8, 4, 2), (4, 4, 4, 4), (4, 4, 3, 4)),
}
# tiles, warps that share the inputs, wide, ahead, stages, early: of `packed_few`, for several tokens
FEWS = (
    (2, 4, 1, 0, 4, 0), (2, 4, 1, 0, 3, 0), (2, 4, 2, 1, 3, 0), (2, 8, 1, 1, 3, 0), (2, 8, 1, 0, 4, 0),
    (1, 8, 1, 1, 3, 0), (1, 4, 2, 1, 3, 0), (1, 8, 2, 1, 3, 0),
)  # fmt: skip
# groups of warps, tiles of each, tokens at once, places in the ring, 2 programs a multiprocessor
HOPPERS = {
    64: ((2, 4, 64, 8, 1), (2, 4, 64, 5, 1), (2, 4, 64, 7, 2), (4, 4, 64, 8, 1), (2, 8, 64, 8, 1)),
    256: ((2, 4, 256, 5, 1), (2, 8, 128, 7, 1), (2, 4, 128, 8, 1), (2, 4, 64, 8, 1), (2, 4, 64, 7, 2)),
}
PROGRAMS = (0, 132, 128)  # 0: one for each tile; else so many share all work evenly


def ways_for(name: str, shape: tuple[int, int], rows: int, bits: int) -> list[Sizes]:
    """What is tried for a product."""
    num_in, num_out = shape
    if rows > packed_linear.MOST_FUSED:
        weight = weights_at_nowhere(num_in, num_out, bits)
        ways = []
        for wgs, tiles, tokens, stages, sharing in HOPPERS[rows][: 3 if bits == 8 else None]:
            for programs in PROGRAMS:
                ring = {"wgs": wgs, "tiles": tiles, "tokens": tokens}
                room = packed_hopper.RING_BYTES // sharing // packed_hopper.place_bytes(weight, ring)
                sizes = {"kernel": HOPPER, **ring, "stages": min(stages, room), "programs": programs * sharing}
                if sharing == 1 or room >= 4:
                    ways.append(sizes | ({"sharing": 2} if sharing == 2 else {}))
        return ways
    ways = [
        {"kernel": VECTOR, "warps": warps, "blocks": blocks}
        for warps, blocks in WAYS
        if rows == 1 and num_in // 128 % (warps * blocks) == 0
    ]
    kept = weights_at_nowhere(num_in, num_out, bits)
    for warps, split, depth, per_sm in STREAMS[name] if rows == 1 and bits == 4 else ():
        sizes = {"kernel": STREAM, "warps": warps, "split": split, "depth": depth, "per_sm": per_sm, "early": 0}
        if packed_stream.fits(kept, sizes):
            ways += [sizes, {**sizes, "half": 1}]
    for tiles, split, wide, ahead, stages, early in FEWS if rows > 1 else ():
        if (tiles > 1 or name != "gate_up") and not (bits == 8 and tiles * wide > 2):
            ways.append({"kernel": FEW, "tiles": tiles, "split": split, "wide": wide, "ahead": ahead, "stages": stages,
                         "early": early, "prefetch": 0})  # fmt: skip
    return ways


def changes_of(sizes: Sizes, name: str) -> list[Sizes]:
    """What is tried with sizes that were the best: when kernels begin, and the norm in the same launch."""
    if sizes["kernel"] == HOPPER:
        return [{**sizes, "late": 1 - sizes.get("late", 0)}]
    if sizes["kernel"] == STREAM:
        normed = [{**sizes, "norm": 1}] if name in ("qkv", "gate_up") else []
        return [*normed, {**sizes, "early": 1}]
    return []


def weights_at_nowhere(num_in: int, num_out: int, bits: int) -> packed_reference.PackedWeight:
    """The shape of a weight."""
    words, pairs = packed_reference.shapes(num_out, num_in, bits=bits, group=128)
    return packed_reference.PackedWeight(
        torch.empty(words, dtype=torch.int32, device="meta"), torch.empty(pairs, dtype=torch.bfloat16, device="meta"),
        bits, 128, num_in, num_out,
    )  # fmt: skip


def shapes_of(model: str) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the products of a layer."""
    facts: dict[str, Any] = {**COMMON, **SHAPES[model]}
    width, inner, heads = facts["hidden_size"], facts["intermediate_size"], facts["num_attention_heads"]
    size = facts.get("head_dim") or width // heads
    return {"gate_up": (width, 2 * inner), "down": (inner, width),
            "qkv": (width, (heads + 2 * facts["num_key_value_heads"]) * size), "o": (heads * size, width)}  # fmt: skip


@cache
def made_once(rows: int, columns: int, value: float) -> torch.Tensor:
    """Making it would be timed, too."""
    return torch.full((rows, columns), value, device="cuda", dtype=torch.bfloat16)


def run_as_in_a_layer(
    name: str, x: torch.Tensor, weight: packed_reference.PackedWeight, sizes: Sizes | None
) -> torch.Tensor:
    """With the gate or the residual that it has there."""
    if len(x) > packed_linear.MOST_FUSED:
        return packed_linear.linear(x, weight, sizes=sizes)
    residual = made_once(len(x), weight.num_outputs, 0.0) if name in ("o", "down") else None
    norm = made_once(1, weight.num_inputs, 1.0)[0] if sizes and sizes.get("norm") else None
    return packed_linear.linear(
        x, weight, norm_weight_I=norm, residual_TO=residual, gated=name == "gate_up", sizes=sizes
    )  # fmt: skip


def compile_part(shapes: dict[str, tuple[int, int]], bits: int, rows: int, part: int) -> None:
    """Every n-th kernel, into the cache that the measuring process reads: first what is tried alone."""
    first = [(name, sizes) for name, shape in shapes.items() for sizes in ways_for(name, shape, rows, bits)]
    then = [(name, changed) for name, sizes in first for changed in changes_of(sizes, name)]
    for name, sizes in [*first[part::PROCESSES], *then[part::PROCESSES]]:
        num_in, num_out = shapes[name]
        words, pairs = packed_reference.shapes(num_out, num_in, bits=bits, group=128)
        weight = packed_reference.PackedWeight(
            torch.zeros(words, dtype=torch.int32, device="cuda"),
            torch.zeros(pairs, dtype=torch.bfloat16, device="cuda"), bits, 128, num_in, num_out,
        )  # fmt: skip
        try:
            run_as_in_a_layer(name, torch.zeros(rows, num_in, device="cuda").bfloat16(), weight, sizes)
        except Exception as error:  # what does not fit is left out when it is measured, too
            print("skipped", sizes, str(error)[:80], flush=True)


def fresh(run: Any, name: str, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """What it makes of a residual of zeros."""
    if name in ("o", "down"):
        made_once(len(x), rest[0].num_outputs, 0.0).zero_()
    made: torch.Tensor = run(name, x, *rest)
    return made


def rank_alone(name: str, shape: tuple[int, int], rows: int, bits: int) -> list[Sizes]:
    """All that is right, the fastest alone first."""
    weights = weights_of(*shape, copies_for(shape[0] * shape[1] * bits // 8, 12), bits=bits, group=128)
    x = torch.randn(rows, shape[0], device="cuda").bfloat16()
    want = (x.double() @ packed_reference.dequantize(weights[0]).double().t()).chunk(2, -1)
    is_gated = name == "gate_up" and rows <= packed_linear.MOST_FUSED
    right = torch.nn.functional.silu(want[0]) * want[1] if is_gated else torch.cat(want, -1)
    del want
    found: list[tuple[float, str]] = []
    for sizes in [None, *ways_for(name, shape, rows, bits)]:
        try:
            off = max(
                float((fresh(run_as_in_a_layer, name, x, weights[0], sizes).double() - right).norm() / right.norm())
                for _ in range(3)
            )
            calls = [lambda w=w, s=sizes: run_as_in_a_layer(name, x, w, s) for w in weights]  # type: ignore[misc]  # bound now
            us = microseconds(calls, launches=max(len(weights), 24), replays=3)[0]
        except Exception as error:  # sizes that the card refuses are named and left out
            print("   skipped", sizes, str(error)[:100], flush=True)
            continue
        is_right = off < 2 * LARGEST_ERROR
        print(
            f"   {name} {rows} alone {us:6.2f} us {sizes or 'as it is'}{'' if is_right else ' WRONG'} {off:.5f}",
            flush=True,
        )
        if sizes and is_right:
            found.append((us, json.dumps(sizes)))
    return [json.loads(sizes) for _, sizes in sorted(found)]


class Tuner:
    """A rank whose table of sizes is changed between recordings."""

    def __init__(self, runner: Any, bits: int, rows: int, context: int):
        self.runner, self.bits, self.rows, self.context = runner, bits, rows, context
        self.table: Any = tuning._tuned(tuning.device_facts(torch.device("cuda", 0)).slug)
        self.wanted: torch.Tensor | None = None
        self.off = 0.0

    def key(self, shape: tuple[int, int]) -> str:
        """In the tuned file."""
        return f"{shape[0]}x{shape[1]}x{self.rows}" + ("" if self.bits == 4 else "_8g128")

    def measure(self) -> float:
        """Milliseconds of a replay with the table as it is; infinite where it does not run or is wrong."""
        try:
            rows = self.rows
            self.runner.warm_up([(rows, 1)])
            graphs = make_graphs(self.runner, rows, [])
            graphs.sizes, graphs.shared_sizes = [rows], []  # no other is looked at
            graphs.even_sizes = [size for size in graphs.even_sizes if size == rows]
            graphs.record(Recorder(self.runner.device))
            self.runner.graphs = graphs
            self.runner.execute(start_rows(self.runner, rows, self.context))
            self.runner.execute(decode(rows, 0))
            self.runner.batch.last_token_N.fill_(5)  # rounding may choose another, which proves nothing
            logits = self.runner.graphs.run(rows).float().clone()
            torch.cuda.synchronize()
        except Exception as error:  # sizes that the card refuses are named and left out
            print("   skipped:", str(error)[:100], flush=True)
            return float("inf")
        if self.wanted is None:
            self.wanted = logits
        off = float((logits - self.wanted).norm() / self.wanted.norm())
        self.off = off
        if not off < WORST:
            print(f"   WRONG: logits are off by {off}", flush=True)
            return float("inf")
        return min(timed(lambda: self.runner.graphs.run(rows), 15)[0] for _ in range(3))

    def try_all(
        self, name: str, table: dict[str, Sizes], key: str, candidates: list[Sizes], best: float, deadline: float
    ) -> float:
        """Leaves what was fastest in the table; its time."""
        for sizes in candidates:
            if time.perf_counter() > deadline:
                break
            before = table.get(key)
            table[key] = sizes
            found = self.measure()
            print(f"{found:.4f} ms {'*' if found < best * KEEP else ' '} {name} {sizes} off {self.off:.4f}", flush=True)
            if found < best * KEEP:
                best = found
            elif before is None:
                del table[key]
            else:
                table[key] = before
        return best

    def try_attention(self, best: float, deadline: float) -> float:
        """Sizes for so few rows beside packed weights."""
        kind, few = ("h128_one", ATTENTION) if self.rows <= 4 else ("h128_lean", ATTENTION_OF_MORE)
        best = self.try_all("attention", self.table["paged_attention"], kind, few, best, deadline)
        print("attention:", kind, self.table["paged_attention"].get(kind))
        return best


def main() -> int:
    """Load once, then try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b")
    parser.add_argument("--format", default="int4", choices=("int4", "int8"))
    parser.add_argument("--out", help="put what came out into this table")
    parser.add_argument("--seconds", type=float, default=60.0, help="then what was best so far is written")
    parser.add_argument("--attention", action="store_true", help="also sizes of attention for few rows")
    parser.add_argument("--rows", type=int, default=1, choices=(1, 2, 4, 8, 64, 256))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--products", nargs="*", choices=("gate_up", "down", "qkv", "o"), help="all without")
    parser.add_argument("--best", type=int, default=3, help="sizes of each product that are tried in steps")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # "i:json": compile every n-th kernel of the shapes
    args = parser.parse_args()
    bits, rows = int(args.format[3:]), args.rows
    if args.part:
        part, shapes = args.part.split(":", 1)
        compile_part(json.loads(shapes), bits, rows, int(part))
        return 0
    began = time.perf_counter()
    shapes = shapes_of(args.model)
    if args.products is not None:
        shapes = {name: shapes[name] for name in args.products}
    command = [sys.executable, __file__, "--format", args.format, "--rows", str(rows), "--part"]
    others = [
        subprocess.Popen([*command, f"{i}:{json.dumps(shapes)}"], env={**os.environ, "OMP_NUM_THREADS": "1"})
        for i in range(PROCESSES)
    ]
    quantization, config = FORMATS[args.format]
    runner = make_runner(args.model, rows, args.context, quantization=quantization, checkpoint=config)
    tuner = Tuner(runner, bits, rows, args.context)
    packed: dict[str, Sizes] = tuner.table["packed"]
    best = tuner.measure()
    print(f"as it is: {best:.4f} ms, ready after {time.perf_counter() - began:.0f} s", flush=True)
    timeline(lambda: runner.graphs.run(rows))  # type: ignore[union-attr]  # recorded before
    for other in others:
        other.wait()
    print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    deadline = began + args.seconds
    ranked = {name: rank_alone(name, shape, rows, bits) for name, shape in shapes.items()}
    torch.cuda.empty_cache()
    if args.attention and rows > 4:
        best = tuner.try_attention(best, deadline)
    for name, shape in shapes.items():
        key = tuner.key(shape)
        best = tuner.try_all(name, packed, key, ranked[name][: args.best], best, deadline)
        tries = changes_of(packed[key], name) if key in packed else []
        if ranked[name] and packed.get(key, {}).get("kernel") not in (STREAM, HOPPER):
            tries = changes_of(ranked[name][0], name)  # what alone was not faster may be so with these
        if rows == 1 and name in ("qkv", "gate_up"):  # with the norm another may be the fastest
            tries += [{"half": 0, **sizes, "norm": 1} for sizes in ranked[name][:3] if sizes["kernel"] == STREAM]
        for changed in tries:
            now = {**packed[key], **changed} if packed.get(key, {}).get("kernel") == changed["kernel"] else changed
            if now == packed.get(key):
                continue
            best = tuner.try_all(name, packed, key, [now], best, deadline)
    if args.attention and rows <= 4:
        best = tuner.try_attention(best, deadline)
    tuner.measure()
    print(f"all: {best:.4f} ms", flush=True)
    timeline(lambda: runner.graphs.run(rows))  # type: ignore[union-attr]  # recorded before
    chosen = {key: packed[key] for key in map(tuner.key, shapes.values()) if key in packed}
    print(json.dumps(chosen), flush=True)
    if args.out:
        whole = read_table(args.out)
        whole.setdefault("packed", {}).update(chosen)
        for kind in ("h128_one", "h128_lean"):
            if kind in tuner.table["paged_attention"]:
                whole["paged_attention"][kind] = tuner.table["paged_attention"][kind]
        write_table(args.out, whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
