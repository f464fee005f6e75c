"""Sizes of products of 1 to 64 tokens on one card, chosen by the time of a step.

    python benchmarks/kernels/tune_step.py --model 8b --out FILE

Each product of a layer alone first, with what stands around it (cuBLAS, the kernel for 16 tokens,
and `gemv_split`), then the best few of each in a step of six layers, where neighbours share the card.
Compiled in many processes before. Prints every try and writes the table with what came out.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from bench_kernels import STEPS, Step, rand
from few_sizes import LIBRARY, ahead_sizes, short
from timing import copies_for, microseconds
from torch import Tensor
from trials import compile_apart, part_of, read_table, try_table, write_table

from argosy.kernels import gemv, ops, tuning

Sizes = dict[str, int]
LAYERS = 6
KEEP = 0.997  # of the time before, or a change is noise
Shape = tuple[str, int, int]  # name, inputs, weight rows
SPLITS = (  # rows, width, stages, pieces of the inputs: those that were among the best of `tune_group.py`
    (128, 128, 4, 1), (128, 64, 6, 1), (128, 256, 3, 1), (64, 128, 6, 1), (64, 256, 4, 1), (64, 128, 4, 1),
    (64, 128, 6, 2), (64, 256, 4, 2), (64, 128, 4, 2), (64, 128, 6, 4), (64, 256, 3, 2),
)  # fmt: skip


def candidates(rows: int, shape: Shape) -> Iterator[Sizes]:
    """What may be the fastest for so many tokens."""
    _, num_in, num_out = shape
    if rows == 1:
        yield from ahead_sizes(num_in)
        return
    if rows <= gemv.MAX_TOKENS:
        tuned = tuning.pick("gemv", f"{num_in}x{num_out}x{gemv.MAX_TOKENS}", torch.device("cuda", 0))
        if tuned:
            yield {**tuned, "library": 0}
    for height, width, stages, splits in SPLITS:
        programs = -(-num_out // height) * splits
        if (
            num_in % width == 0
            and num_in // splits >= 2 * width
            and programs >= 60
            and (splits == 1 or programs < 1200)
        ):
            yield {"kernel": gemv.SPLIT, "rows": height, "width": width, "stages": stages, "warps": 4,
                   "splits": splits, "prefetch": 512, "early": 0, "library": 0}  # fmt: skip


def call_of(shape: Shape, x: Tensor, w: Tensor, sizes: Sizes) -> Callable[[], object]:
    """The product as a decoder's layer runs it."""
    name, num_in, num_out = shape
    if name in ("o", "down"):
        residual = torch.zeros(len(x), num_out, device="cuda", dtype=x.dtype)
        if sizes.get("library"):
            return lambda: residual.addmm_(x, w.t())
        return lambda: gemv.fused_linear(x, w, residual_TO=residual, sizes=sizes)
    norm, gated = NORMS[num_in], name == "gate_up"
    if not sizes.get("library"):
        return lambda: gemv.fused_linear(x, w, norm_weight_I=norm, gated=gated, sizes=sizes)

    def library() -> object:
        y = F.linear(ops.rms_norm(x, norm, 1e-6), w)
        return ops.silu_and_mul(y) if gated else y

    return library


NORMS: dict[int, Tensor] = {}


def shapes_of(model: str) -> list[Shape]:
    hidden, _, heads, kv_heads, wide, vocabulary, _ = STEPS[model]
    NORMS[hidden] = rand(hidden)
    return [("gate_up", hidden, 2 * wide), ("down", wide, hidden), ("qkv", hidden, (heads + 2 * kv_heads) * 128),
            ("o", heads * 128, hidden), ("head", hidden, vocabulary)]  # fmt: skip


def compile_part(index: int, of: int, args: argparse.Namespace) -> None:
    """Every kernel that will be timed, run once; this process does each `of`-th."""
    seen: set[str] = set()
    for shape in shapes_of(args.model):
        weight: Tensor | None = None
        for rows in args.rows:
            for sizes in candidates(rows, shape):
                facts = sizes | {"splits": int(sizes.get("splits", 1) > 1), "tokens": gemv.bucket(rows), "per_sm": 0}
                kind = [shape[0] == "gate_up", shape[0] in ("o", "down"), shape[1] % sizes["width"] == 0]
                key = json.dumps([facts, kind])
                if key in seen:
                    continue
                seen.add(key)
                if len(seen) % of == index:
                    weight = rand(shape[2], shape[1]) if weight is None else weight
                    try:
                        call_of(shape, rand(rows, shape[1]), weight, sizes)()
                    except Exception as error:  # too large a program
                        print("skipped", sizes, str(error)[:80], flush=True)
    torch.cuda.synchronize()


def rank_alone(rows: int, shape: Shape, best: int) -> list[Sizes]:
    """The best few, and the library."""
    name, num_in, num_out = shape
    weights = [rand(num_out, num_in) / 64 for _ in range(copies_for(num_in * num_out * 2, 24))]
    x, times = rand(rows, num_in), {}
    for sizes in (LIBRARY, *candidates(rows, shape)):
        try:
            calls = [call_of(shape, x, w, sizes) for w in weights]
            times[json.dumps(sizes)] = microseconds(calls, launches=max(len(calls), 20), replays=3)[0]
        except Exception as error:  # sizes that the card refuses are named and left out
            print("skipped", sizes, str(error)[:80], flush=True)
    ranked = sorted(times, key=times.__getitem__)
    shown = "  ".join(f"{times[r]:.1f} {short(json.loads(r))}" for r in ranked[:3])
    library = times[json.dumps(LIBRARY)]
    print(f"{name} {rows} rows: floor {num_in * num_out * 2 / 4.44e6:.1f}, library {library:.1f}; {shown}", flush=True)
    return [json.loads(r) for r in ranked[:best]] + [LIBRARY]


def tune(chain: Step, rows: int, table: dict[str, dict[str, Sizes]], ranked: dict[str, list[Sizes]]) -> None:
    """Replace entries where the step becomes faster."""
    run = chain.of(rows)
    now = before = microseconds([run], launches=1, replays=9)[0]
    for name in ("gate_up", "down", "qkv", "o", "head"):
        num_in, num_out = chain.shapes[name]
        key = f"{num_in}x{num_out}x{gemv.bucket(rows)}"
        for turn in range(2):
            old = table["gemv"].get(key)
            tries = ranked[f"{name} {rows}"]
            if turn:
                tries = [] if old is None or old.get("library") else [{**old, **c} for c in changes_of(old)]
            for sizes in tries:
                old = table["gemv"].get(key)
                table["gemv"][key] = sizes
                us = microseconds([run], launches=1, replays=9)[0]
                kept = us < now * KEEP
                if kept:
                    now = us
                elif old is None:
                    del table["gemv"][key]
                else:
                    table["gemv"][key] = old
                print(f"    {name} {us:.1f} {short(sizes)}{' kept' if kept else ''}", flush=True)
    print(f"{rows} rows: {before:.1f} -> {now:.1f} us of {LAYERS} layers and a head", flush=True)


def changes_of(sizes: Sizes) -> tuple[Sizes, ...]:
    """What is tried with sizes that were the best: when weights are asked for, and when a successor may start."""
    if sizes["kernel"] == gemv.AHEAD:
        return ({"early": 1}, {"early": 2})
    return ({"prefetch": 0}, {"prefetch": 2048}, {"early": 1})


def main() -> int:
    """Compile, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(STEPS), default="8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--best", type=int, default=5, help="sizes of each product that are tried in steps")
    parser.add_argument("--out", required=True, help="the table to read and write")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)  # "i/n": be one of the compiling processes
    args = parser.parse_args()
    if args.compile_part:
        compile_part(*part_of(args.compile_part), args)
        return 0
    began = time.perf_counter()
    compile_apart(14)()
    table = read_table(args.out)
    shapes = shapes_of(args.model)
    ranked = {f"{s[0]} {rows}": rank_alone(rows, s, args.best) for rows in args.rows for s in shapes}
    torch.cuda.empty_cache()
    try_table(table)
    hidden, _, *rest = STEPS[args.model]
    chain = Step(hidden, LAYERS, *rest)
    for rows in args.rows:
        tune(chain, rows, table, ranked)
        write_table(args.out, table)
    print(f"all: {time.perf_counter() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
