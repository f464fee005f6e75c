"""Steps of 1 to 16 rows on one card: what attention and each product may take, compared within a step.

    python benchmarks/kernels/tune_few.py --model 8b --rows 8 --out FILE

A step of six layers and a head is recorded with each size of one kernel, and the recordings are replayed in turn, over
and over, so that a clock that drifts meets all of them alike; the best stays, and the next kernel has its turn. Norms
come with the product before them where sizes say so (`norm_ahead`). Compiled in many processes before. Prints every
try and writes the table that came out.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_fp8 import Fp8Step, random_weight
from bench_kernels import STEPS, Step, rand
from few_sizes import short
from timing import Report
from trials import compile_apart, part_of, read_table, try_table, write_table

from argosy.kernels import fp8_gemm, fp8_quantize, gemv, gemv_split, paged_attention, tuning
from argosy.kernels.fp8_reference import Rounding
from argosy.kernels.norm_ahead import NormAhead

Sizes = dict[str, int]
LAYERS = 6
KEEP = 0.998  # of the time before, or a change is noise
ROUNDS = 15
CONTEXTS = (192, 320)  # decode rows of the benchmark go from 128 to 384
ATTENTION = (  # tokens of a tile, least piece, programs a multiprocessor, stages, warps, first tiles before the wait
    (128, 512, 1, 5, 4, 0), (64, 64, 4, 3, 2, 0), (128, 512, 1, 3, 8, 1), (128, 512, 1, 5, 8, 1),
    (128, 512, 1, 4, 4, 1), (64, 512, 1, 4, 8, 1), (64, 512, 1, 6, 8, 1), (16, 16, 1, 3, 1, 0), (32, 32, 1, 3, 1, 0),
    (64, 128, 1, 3, 4, 0), (64, 512, 1, 3, 4, 1), (32, 512, 1, 3, 4, 1), (32, 256, 1, 4, 2, 1), (64, 64, 4, 2, 2, 0),
)  # fmt: skip
FP8 = "8b-fp8"
PRODUCTS = {  # rows, width, stages, pieces of the inputs, first weights before the wait
    "8b": {
        "qkv": ((64, 128, 6, 1, 0),), "o": ((64, 256, 4, 1, 0),), "gate_up": ((128, 128, 4, 1, 0), (128, 64, 5, 1, 0)),
        "down": ((64, 128, 6, 2, 0), (64, 128, 4, 4, 0)),
    },
    "06b": {
        "qkv": ((64, 128, 6, 1, 0),), "o": ((64, 128, 4, 4, 1), (64, 128, 6, 4, 0)), "gate_up": ((64, 128, 6, 1, 0),),
        "down": ((64, 128, 6, 4, 0), (64, 256, 3, 4, 1)),
    },
    FP8: {"qkv": (), "o": (), "gate_up": (), "down": ()},  # as tuned, and RINGS
}  # fmt: skip
RINGS = {  # of e4m3: rows, width, stages, programs, pieces, gated; what was best first
    "qkv": ((64, 256, 6, 0, 1, 0), (64, 256, 12, 0, 1, 0), (64, 256, 9, 0, 1, 0), (64, 256, 6, 132, 1, 0)),
    "o": ((64, 256, 6, 0, 2, 0), (64, 256, 8, 0, 2, 0), (64, 256, 6, 0, 1, 0), (64, 256, 12, 0, 1, 0),
          (128, 256, 6, 0, 4, 0)),
    "gate_up": ((64, 256, 6, 0, 1, 0), (64, 256, 3, 0, 1, 1), (64, 128, 6, 0, 1, 1), (64, 256, 6, 0, 1, 1),
                (128, 128, 3, 0, 1, 1), (128, 256, 3, 0, 1, 0)),
    "down": ((64, 256, 12, 0, 2, 0), (64, 256, 6, 0, 2, 0), (64, 256, 9, 0, 2, 0), (128, 256, 6, 0, 4, 0)),
}  # fmt: skip
PLAIN_RINGS = {  # of 16 bits: width, stages, pieces of 64 rows a program; what was thought best first
    "8b": {
        "qkv": ((128, 6, 1), (128, 12, 1), (128, 6, 2), (256, 3, 1)),
        "o": ((128, 6, 2), (128, 6, 1), (128, 12, 1), (128, 12, 2), (256, 3, 2)),
        "gate_up": ((128, 3, 1), (64, 6, 1), (128, 6, 1)),
        "down": ((128, 12, 2), (128, 6, 2), (128, 6, 4), (256, 6, 2)),
    },
    "06b": {
        "qkv": ((128, 6, 1), (128, 8, 1), (128, 4, 2)), "o": ((128, 4, 4), (128, 8, 2), (128, 2, 8)),
        "gate_up": ((128, 3, 1), (128, 6, 1)), "down": ((128, 6, 4), (128, 4, 6), (128, 3, 8), (128, 8, 3)),
    },
}  # fmt: skip
ROUNDINGS = tuple({"warps": warps, "early": early} for warps in (16, 32) for early in (0, 1))


def plain_ring(width: int, stages: int, pieces: int, early: int) -> Sizes:
    """Sizes of `gemv_ring`."""
    return {"kernel": gemv.RING, "rows": 64, "width": width, "stages": stages, "pieces": pieces, "early": early,
            "library": 0}  # fmt: skip


def tries_of(model: str, name: str, num_in: int, num_out: int, *, only_rings: bool = False) -> Iterator[Sizes]:
    """What a product of 2 to 16 rows may take."""
    if model == FP8:
        tuned = tuning.pick("fp8_gemm", f"{num_in}x{num_out}x16", torch.device("cuda", 0))
        for early in (0, 1, 2):
            yield {**(tuned or {}), "early": early}
        for height, width, stages, programs, pieces, gated in RINGS[name]:
            for early in (2, 0, 1):
                yield {"kernel": fp8_gemm.RING, "rows": height, "width": width, "stages": stages,
                       "programs": programs, "pieces": pieces, "early": early, "gated": gated}  # fmt: skip
    for width, stages, pieces in PLAIN_RINGS.get(model, {}).get(name, ()):
        for early in (1, 2):
            sizes = plain_ring(width, stages, pieces, early)
            yield sizes
            if name in ("o", "down"):
                yield {**sizes, "norm": 1}
    for height, width, stages, splits, first in () if only_rings else PRODUCTS[model][name]:
        for early in (0, 1, 2):
            sizes = {"kernel": gemv.SPLIT, "rows": height, "width": width, "stages": stages, "warps": 4,
                     "splits": splits, "prefetch": 512, "first": first, "early": early, "library": 0}  # fmt: skip
            yield sizes
            if name in ("o", "down"):
                yield {**sizes, "norm": 1}


def attention_tries() -> Iterator[Sizes]:
    """What attention of a few rows may take."""
    for block_l, piece, per_sm, stages, warps, late in ATTENTION:
        yield {"block_l": block_l, "min_piece": piece, "per_sm": per_sm, "stages": stages, "warps": warps, "late": late}


def shapes_of(model: str) -> dict[str, tuple[int, int]]:
    """(inputs, weight rows) of each product, those with an addition first: what is before qkv may leave its norm."""
    hidden, _, heads, kv_heads, wide, *_ = STEPS[model.partition("-")[0]]
    return {"o": (heads * 128, hidden), "down": (wide, hidden), "qkv": (hidden, (heads + 2 * kv_heads) * 128),
            "gate_up": (hidden, 2 * wide)}  # fmt: skip


def compile_part(index: int, of: int, model: str, rows: int, *, only: bool, rings: bool) -> None:
    """Every kernel that will be timed, run once; this process does each `of`-th."""
    hidden, _, heads, kv_heads, _, _, qk_norm = STEPS[model.partition("-")[0]]
    norm, x = rand(hidden), rand(rows, hidden)
    squares = torch.ones(-(-hidden // 64), gemv_split.tile_of(rows), device="cuda")
    calls: list[Callable[[], object]] = [lambda s=sizes: attend(s) for sizes in attention_tries()]
    for name, (num_in, num_out) in () if only else shapes_of(model).items():
        for sizes in tries_of(model, name, num_in, num_out, only_rings=rings):
            calls.append(lambda a=(name, num_in, num_out, sizes): product(*a))

    def product(name: str, num_in: int, num_out: int, sizes: Sizes) -> None:
        if model == FP8:
            weight = random_weight(num_out, num_in)
            rounded = fp8_quantize.quantize(rand(rows, num_in), Rounding())
            if fp8_gemm.gated_linear(rounded, weight, None, x.dtype, sizes) is None:
                fp8_gemm.linear(rounded, weight, None, x.dtype, sizes, pieces=name in ("o", "down"))
            return
        plain = torch.zeros(num_out, num_in, device="cuda", dtype=torch.bfloat16)
        if name in ("o", "down"):
            ahead = gemv_split.ahead_for(x, norm, 1e-6, sizes) if sizes.get("norm") else None
            gemv.fused_linear(rand(rows, num_in), plain, residual_TO=x, ahead=ahead, sizes=sizes)
            return
        for normed in (None, NormAhead(x, squares, norm, 1e-6)):
            gemv.fused_linear(x, plain, normed=normed, gated=name == "gate_up", sizes=sizes)

    def attend(sizes: Sizes) -> None:
        caches = [rand(rows * 32, 16, kv_heads, 128) for _ in range(2)]
        blocks = torch.arange(rows * 32, device="cuda").view(rows, 32).int()
        lengths = torch.full((rows,), 100, device="cuda", dtype=torch.int32)
        more = {"q_norm_weight_H": rand(128), "k_norm_weight_H": rand(128)} if qk_norm else {}
        paged_attention.decode_attention(
            rand(rows, (heads + 2 * kv_heads) * 128), lengths.long(), torch.zeros(8192, 128, device="cuda"), *caches,
            lengths.long(), blocks, lengths, num_heads=heads, scale=0.1, max_context=8192, inputs_early=True,
            sizes=sizes, **more,
        )  # fmt: skip

    if model == FP8 and not only:
        calls += [lambda s=sizes, p=pieces: roundings(s, p) for sizes in ROUNDINGS for pieces in (1, 2, 4)]

    def roundings(sizes: Sizes, pieces: int) -> None:
        tuning.pick = lambda kernel, key, device: sizes  # type: ignore[assignment]  # the sizes under trial
        delta = torch.zeros(pieces, rows, hidden, device="cuda") if pieces > 1 else rand(rows, hidden)
        fp8_quantize.quantize(delta, Rounding(), norm_weight_I=norm, residual_TI=x)
        if pieces == 1:
            fp8_quantize.quantize(x, Rounding(), norm_weight_I=norm)
            fp8_quantize.quantize(x, Rounding())
            fp8_quantize.quantize(rand(rows, 28672), Rounding(), gate="silu")
            fp8_quantize.quantize(rand(rows, 14336), Rounding())

    for number, call in enumerate(calls):
        if number % of == index:
            try:
                call()
            except Exception as error:  # too large a program
                print("skipped", number, str(error)[:80], flush=True)
    torch.cuda.synchronize()


class Chain:
    """A step at several lengths of context, recorded with whatever the table says at that moment."""

    def __init__(self, model: str, rows: int):
        hidden, _, *rest = STEPS[model.partition("-")[0]]
        self.step: Any = (Fp8Step if model == FP8 else Step)(hidden, LAYERS, *rest)
        more = {"rounded": True} if model == FP8 else {}
        self.runs = [self.step.of(rows, context, **more) for context in CONTEXTS]
        self.recorded: list[Callable[[], object]] = []  # whose tensors recordings read

    def record(self, runs: list[Callable[[], object]] | None = None) -> list[torch.cuda.CUDAGraph]:
        """One recording for each context."""
        made = []
        self.recorded += runs or []
        for run in runs or self.runs:
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            made.append(graph)
        return made


def compare(recordings: list[list[torch.cuda.CUDAGraph]]) -> list[list[float]]:
    """Microseconds of each recording: medians of replays in turn, each right behind one that is not timed."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[list[list[float]]] = [[[] for _ in CONTEXTS] for _ in recordings]
    for _ in range(ROUNDS):
        for graphs, of_one in zip(recordings, times, strict=True):
            for graph, found in zip(graphs, of_one, strict=True):
                graph.replay()
                start.record()
                graph.replay()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                found.append(start.elapsed_time(end) * 500)
    return [[statistics.median(found) for found in of_one] for of_one in times]


def choose(chain: Chain, entries: dict[str, Sizes], key: str, name: str, tries: list[Sizes]) -> None:
    """Try these sizes beside those that the table has; keep the best."""
    before = entries.get(key)
    offered, recordings = [], []
    for sizes in (before, *(t for t in tries if t != before)):
        if sizes is None:
            entries.pop(key, None)
        else:
            entries[key] = sizes
        try:
            recordings.append(chain.record())
            offered.append(sizes)
        except Exception as error:  # too large a program
            print(f"    {name} {short(sizes or {})} {str(error)[:80]}", flush=True)
    times = compare(recordings)
    best = min(range(len(times)), key=lambda i: sum(times[i]))
    best = best if sum(times[best]) < sum(times[0]) * KEEP else 0
    for i, (sizes, of_one) in enumerate(zip(offered, times, strict=True)):
        told = " ".join(f"{t:.1f}" for t in of_one)
        print(f"    {name} {told} {short(sizes or {})}{' *' if i == best else ''}", flush=True)
    if offered[best] is None:
        entries.pop(key, None)
    else:
        entries[key] = offered[best]


def begin_with_rings(chain: Chain, table: dict[str, dict[str, Sizes]]) -> None:
    """All products of e4m3 by rings at once, which gain by what their neighbours leave: the best start stays."""
    before, tuned = chain.record(), {key: dict(table[key]) for key in ("fp8_gemm", "fp8_quantize")}
    offered, recordings = [tuned], [before]
    for early, gates in ((2, 0), (1, 0), (2, 1), (1, 1), (0, 1)):
        for rounding in ROUNDINGS:
            for name, (num_in, num_out) in shapes_of(FP8).items():
                height, width, stages, programs, pieces, gated = RINGS[name][gates if name == "gate_up" else 0]
                table["fp8_gemm"][f"{num_in}x{num_out}x16"] = {
                    "kernel": fp8_gemm.RING, "rows": height, "width": width, "stages": stages, "programs": programs,
                    "pieces": pieces, "early": early, "gated": gated,
                }  # fmt: skip
                table["fp8_quantize"][f"{num_in}x16"] = dict(rounding)
            offered.append({key: dict(table[key]) for key in tuned})
            recordings.append(chain.record())
    times = compare(recordings)
    for made, of_one in zip(offered, times, strict=True):
        told = made["fp8_gemm"]["4096x28672x16"]
        print(
            f"    all {of_one[0]:.1f} {of_one[1]:.1f} {short(told)} {made['fp8_quantize'].get('4096x16')}", flush=True
        )
    for key, entries in offered[min(range(len(times)), key=lambda i: sum(times[i]))].items():
        table[key].clear()
        table[key].update(entries)


def begin_with_plain_rings(chain: Chain, model: str, gemv_table: dict[str, Sizes]) -> None:
    """All products of 16 bits by rings at once; the best start stays."""
    before, tuned = chain.record(), dict(gemv_table)
    offered, recordings = [tuned], [before]
    for early in (1, 2):
        for norms in ((), ("o",), ("o", "down")):
            for name, (num_in, num_out) in shapes_of(model).items():
                sizes = plain_ring(*PLAIN_RINGS[model][name][0], early)
                gemv_table[f"{num_in}x{num_out}x16"] = {**sizes, "norm": 1} if name in norms else sizes
            recordings.append(chain.record())
            offered.append(dict(gemv_table))
            print(f"    all {len(offered) - 1}: early {early}, norms with {norms}", flush=True)
    times = compare(recordings)
    print("    all", [[round(t, 1) for t in of_one] for of_one in times], flush=True)
    gemv_table.update(offered[min(range(len(times)), key=lambda i: sum(times[i]))])


def main() -> int:
    """Compile, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PRODUCTS), default="8b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--out", required=True, help="the table to read and write")
    parser.add_argument("--seconds", type=float, default=60, help="what is not tried by then is left")
    parser.add_argument("--attention", action="store_true", help="nothing but attention, products as they are")
    parser.add_argument("--rings", action="store_true", help="of 16 bits: products by rings beside what was tuned")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)  # "i/n": be one of the compiling processes
    args = parser.parse_args()
    if args.compile_part:
        compile_part(*part_of(args.compile_part), args.model, args.rows, only=args.attention, rings=args.rings)
        return 0
    began, wait_for_others = time.perf_counter(), compile_apart(20)
    table = read_table(args.out)
    try_table(table)
    chain = Chain(args.model, args.rows)
    wait_for_others()
    first, first_tokens = chain.record(), chain.runs[0]()
    _, _, heads, kv_heads, *_ = STEPS[args.model.partition("-")[0]]
    kind = f"h128_some_g{heads // kv_heads}" if args.rows > 4 else "h128_few"
    slots = [(table["paged_attention"], kind, "attention", list(attention_tries()))]
    kernel = "fp8_gemm" if args.model == FP8 else "gemv"
    for name, shape in () if args.attention else shapes_of(args.model).items():
        key = f"{shape[0]}x{shape[1]}x16"
        slots.append((table[kernel], key, name, list(tries_of(args.model, name, *shape, only_rings=args.rings))))
    if args.model == FP8 and not args.attention:
        for width in sorted({shape[0] for shape in shapes_of(FP8).values()}):
            slots.append((table.setdefault("fp8_quantize", {}), f"{width}x16", f"rounding {width}", list(ROUNDINGS)))
        begin_with_rings(chain, table)
    if args.rings:
        begin_with_plain_rings(chain, args.model, table["gemv"])
    for turn in range(2):
        for slot in slots if turn else (*slots[1:3], *slots[:1], *slots[3:]):
            if time.perf_counter() - began < args.seconds:
                choose(chain, *slot)
        write_table(args.out, table)
    alike = (chain.runs[0]() == first_tokens).float().mean()
    before, after = compare([first, chain.record()])
    if args.model == FP8 and args.rows == 1:
        plain = compare([chain.record([chain.step.of(1, context) for context in CONTEXTS])])[0]
        print(f"one row in 16 bits: {plain} us", flush=True)
    print(f"{args.model} {args.rows} rows, contexts {CONTEXTS}: {before} -> {after} us of {LAYERS} layers and a head; "
          f"tokens alike: {alike:.2f}; {time.perf_counter() - began:.1f} s", flush=True)  # fmt: skip
    Report(None).profile("the step that came out", chain.runs[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
