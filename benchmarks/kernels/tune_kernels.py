"""Measure block sizes on this card and write them: `python benchmarks/kernels/tune_kernels.py --out FILE`.

The file belongs in `kernels/tuned/<gpu>.json`. Every size is compiled first, in as many processes as there are cores;
the timing afterwards finds the compiled kernels in Triton's cache.
"""

# ruff: noqa: B023 - every closure here is called within the turn of the loop that made it
import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from bench_kernels import LINEARS, STEPS, Step, rand
from timing import copies_for, microseconds
from trials import Table, compile_apart, part_of, read_table, try_table, write_table
from tune_fp8 import TUNERS as FP8_TUNERS
from tune_fp8 import tune_step as tune_fp8_step

from argosy.kernels import gemv, ops, paged_attention, prefill_attention, tuning

Sizes = dict[str, int]
SHARED_BYTES = 200 << 10


class Part:
    """The turns of one process when sizes are only compiled: every n-th, run once instead of timed."""

    def __init__(self, index: int, of: int):
        self._index, self._of, self._turn = index, of, -1

    def time(self, calls: list[Callable[[], object]]) -> float:
        self._turn += 1
        if self._of == 0:
            return microseconds(calls, launches=max(len(calls), 60), replays=3)[0]
        if self._turn % self._of == self._index:
            calls[0]()
        return 1.0


def linear_sizes(tokens: int, num_inputs: int, gated: bool) -> Iterator[Sizes]:
    """By `kernel`, an index of `gemv.KERNELS`."""
    if tokens > 1:
        for rows in (8, 16, 32, 64):
            for width in (128, 256, 512):
                for stages in (3, 5):
                    for warps in (2, 4):
                        held = stages * (rows + 16) * width * 2
                        if num_inputs % width or not 16 << 10 <= held <= SHARED_BYTES:
                            continue
                        yield {"kernel": 1, "rows": rows, "width": width, "stages": stages, "warps": warps}
        return
    width = tuning.next_power_of_two(num_inputs)
    for rows in (1, 2, 4, 8):
        for warps in (4, 8) if width < 16384 else (8, 16):
            for stages in (2, 3, 4) if rows > 1 or not gated else ():
                for per_sm in (1, 2, 3, 4, 6):
                    each = rows * width // (32 * warps)
                    held = stages * rows * width * 2 * per_sm
                    if 16 <= each <= 64 and SHARED_BYTES // 6 <= held <= SHARED_BYTES:
                        yield {"kernel": 0, "rows": rows, "width": width, "stages": stages, "warps": warps,
                               "per_sm": per_sm}  # fmt: skip
    for rows in (4, 8, 16):
        for width in (512, 1024):
            for warps in (4, 8):
                for stages in (1, 3) if 16 <= rows * width // (32 * warps) <= 64 and num_inputs % width == 0 else ():
                    yield {"kernel": 2, "rows": rows, "width": width, "stages": stages, "warps": warps}


SHAPES_ASKED: dict[str, tuple[int, int, bool]] = {}  # of `--shape`, instead of LINEARS
KINDS = ["few", "many", "crowd"]  # of rows, as asked for
RANKED: dict[str, list[Sizes]] = {}  # by key, the best sizes of each layer alone, for `tune_step` to choose from


def tune_linear(part: Part) -> Mapping[str, Sizes]:
    """Each layer as a decoder runs it: qkv, gate_up and head with the norm, o and down with the residual."""
    best: dict[str, Sizes] = {}
    for name, (num_in, num_out, gated) in (SHAPES_ASKED or LINEARS).items():
        weights = [rand(num_out, num_in) / 64 for _ in range(copies_for(num_in * num_out * 2, 30))]
        for tokens, label in ((1, 1), (8, gemv.MAX_TOKENS)):
            x, norm = rand(tokens, num_in), rand(num_in)
            adds = name.endswith((" o", "down"))
            residual = rand(tokens, num_out) if adds else None
            plain = name in SHAPES_ASKED  # the sum over a tensor-parallel group norms and adds
            options = {"norm_weight_I": None if adds or plain else norm, "residual_TO": residual, "gated": gated}
            times = {}
            for sizes in linear_sizes(tokens, num_in, gated):
                sizes = {"per_sm": 0, "prefetch": 4096, "early": 0, "library": 0} | sizes
                calls = [lambda w=w, s=sizes: gemv.fused_linear(x, w, sizes=s, **options) for w in weights]
                try:
                    times[json.dumps(sizes)] = part.time(calls)
                except Exception as error:  # a size that does not fit is no failure of the search
                    print("skipped", sizes, str(error)[:80])

            def library(w: torch.Tensor) -> object:
                if adds:
                    return residual.addmm_(x, w.t())
                y = F.linear(x if plain else ops.rms_norm(x, norm, 1e-6), w)
                return ops.silu_and_mul(y) if gated else y

            by_library = part.time([lambda w=w: library(w) for w in weights])
            ranked = sorted(times, key=times.__getitem__)
            first = json.loads(ranked[0])
            key = f"{num_in}x{num_out}x{label}"
            # the best of each kernel, and the best of all
            kinds = {json.loads(r)["kernel"]: json.loads(r) for r in reversed(ranked)}
            RANKED[key] = [*(json.loads(r) for r in ranked[:4]), *kinds.values(), first | {"library": 1}]
            best[key] = first | {"library": int(by_library < times[ranked[0]])}
            print(name, tokens, f"library {by_library:.2f}", *(f"{times[r]:.2f} {r}" for r in ranked[:4]), sep="\n    ")
    return best


def attention_sizes(kind: str, size: int) -> Iterator[Sizes]:
    few = kind == "few"
    for block_l in (32, 64, 128):
        for warps in (1, 2, 4) if few else (1, 2, 4, 8):
            for stages in (3, 5) if few else (2, 3, 5):
                if 2 * block_l * size * 2 * max(1, stages - 3) > SHARED_BYTES:
                    continue
                for min_piece in (128, 256, 512) if few else (128,):
                    for per_sm in (1, 2, 4) if few else (1, 4):
                        yield {"block_l": block_l, "warps": warps, "stages": stages, "per_sm": per_sm,
                               "min_piece": min_piece}  # fmt: skip


def tune_decode(part: Part) -> Mapping[str, Sizes]:
    """For each head size, the best geometric mean over cases of few rows, of many, and of more than the card holds."""
    best: dict[str, Sizes] = {}
    cases = {
        "few": ((1, 256), (1, 640), (1, 4096), (8, 256), (8, 640), (8, 2048)),
        "many": ((32, 384), (64, 384), (64, 1024)),
        "crowd": ((256, 256), (256, 640), (512, 640)),
    }  # fmt: skip
    rotations = torch.randn(8192, 128, device="cuda")
    for heads, kv_heads, size in ((32, 8, 128), (14, 2, 64)):
        for kind, shapes in cases.items():
            if kind not in KINDS:
                continue
            scores: dict[str, list[float]] = {}
            for rows, context in shapes:
                per_row = context // 16
                inputs = []
                for _ in range(copies_for(rows * context * kv_heads * size * 4, 8)):
                    caches = [rand(rows * per_row, 16, kv_heads, size) for _ in range(2)]
                    table = torch.randperm(rows * per_row, device="cuda").view(rows, per_row).int()
                    lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
                    positions = lengths.long() - 1
                    qkv = rand(rows, (heads + 2 * kv_heads) * size)
                    inputs.append(
                        (qkv, positions, rotations[:, :size].contiguous(), *caches, positions, table, lengths)
                    )
                q = rand(rows, heads, size)
                for sizes in attention_sizes(kind, size):
                    us = part.time([
                        lambda a=a, s=sizes: paged_attention.decode_attention(
                            *a, num_heads=heads, scale=0.1, max_context=8192, inputs_early=True, sizes=s)
                        if kind != "crowd" else paged_attention.paged_attention(
                            q, *a[3:5], *a[6:], scale=0.1, max_context=8192, sizes=s)
                        for a in inputs
                    ])  # fmt: skip
                    scores.setdefault(json.dumps(sizes), []).append(us)
            ranked = sorted(scores, key=lambda s: math.prod(scores[s]))
            best[f"h{size}_{kind}"] = json.loads(ranked[0])
            RANKED[f"h{size}_{kind}"] = [json.loads(r) for r in ranked[:6]]
            print("decode", kind, size, shapes, [round(min(x), 1) for x in zip(*scores.values(), strict=True)],
                  *(f"{[round(x, 1) for x in scores[r]]} {r}" for r in ranked[:5]), sep="\n    ")  # fmt: skip
    return best


def tune_prefill(part: Part) -> Mapping[str, Sizes]:
    """Tiles for long prompts, others, chunks after a long prefix, and a few tokens a row (speculation, ends)."""
    best: dict[str, Sizes] = {}
    cases = {
        "long": ((2, 4096, 4096), (4, 2048, 2048)), "many": ((16, 512, 512), (64, 128, 128)),
        "prefixed": ((128, 64, 2112), (4, 512, 4096)), "few": ((64, 16, 1024), (128, 2, 1024)),
    }  # fmt: skip
    for heads, kv_heads, size in ((32, 8, 128), (14, 2, 64)):
        for kind, shapes in cases.items():
            scores: dict[str, list[float]] = {}
            for rows, queries, context in shapes:
                per_row = context // 16
                caches = [rand(rows * per_row, 16, kv_heads, size) for _ in range(2)]
                table = torch.randperm(rows * per_row, device="cuda").view(rows, per_row).int()
                lengths = torch.full((rows,), context, device="cuda", dtype=torch.int32)
                starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * queries
                q = rand(rows * queries, heads, size)
                for block_m in (16, 32, 64) if kind == "few" else (64, 128):
                    for block_l in (32, 64, 128):
                        for warps in (4, 8):
                            for stages, one_loop in itertools.product((2, 3, 4), (0, 1)):
                                if warps * 16 > block_m * 2 or block_m * block_l > 8192 * warps // 4:
                                    continue
                                sizes = {"block_m": block_m, "block_l": block_l, "warps": warps, "stages": stages,
                                         "one_loop": one_loop}  # fmt: skip
                                call = lambda s=sizes: prefill_attention.prefill_attention(  # noqa: E731  # bound to these sizes
                                    q, *caches, starts, lengths, table, scale=0.1, sizes=s
                                )  # fmt: skip
                                try:
                                    us = part.time([call])
                                except Exception as error:  # does not fit
                                    print("skipped", sizes, str(error)[:80])
                                    us = math.inf
                                scores.setdefault(json.dumps(sizes), []).append(us)
                ranked = sorted(scores, key=lambda s: scores[s][-1])
                print("prefill", (heads, kv_heads, size, rows, queries, context),
                      *(f"{scores[r][-1]:.1f} {r}" for r in ranked[:4]), sep="\n    ")  # fmt: skip
            best[f"h{size}_{kind}"] = json.loads(min(scores, key=lambda s: math.prod(scores[s])))
    return best


CHANGES: dict[str, tuple[Sizes, ...]] = {  # what a layer's neighbour may like: attention follows qkv and precedes o
    "qkv": ({"early": 1},), "o": ({"prefetch": 8192}, {"prefetch": 8192, "ahead": 8}), "gate_up": ({"prefetch": 0},),
}  # fmt: skip


def tune_step(table: Table) -> None:
    """Choose among the best of each kernel alone by the time of a whole step, where neighbours share the card.

    A kernel that is fast alone may hold what its neighbour needs, or keep nothing for it to overlap with.
    """
    try_table(table)
    for name, (hidden, _, *shape) in STEPS.items():
        chain = Step(hidden, 6, *shape)
        for rows in (1, 8):
            run = chain.of(rows)
            now = microseconds([run], launches=1)[0]
            print(f"step {name} rows {rows}: {now:.1f} us of 6 layers with the best alone", flush=True)
            tries = []
            for layer, (num_in, num_out) in chain.shapes.items():
                key = f"{num_in}x{num_out}x{1 if rows == 1 else gemv.MAX_TOKENS}"
                tries += [("gemv", key, layer, sizes) for sizes in RANKED.get(key, [])]
                tries += [("gemv", key, layer, change) for change in CHANGES.get(layer, ())]
            tries += [("paged_attention", "h128_few", "attention", sizes) for sizes in RANKED.get("h128_few", [])]
            for kernel, key, layer, sizes in tries:
                before = table[kernel][key]
                table[kernel][key] = before | sizes
                us = microseconds([run], launches=1, replays=9)[0]
                kept = us < now * 0.997
                print(f"    {layer} {us:.1f} us with {sizes}{' kept' if kept else ''}", flush=True)
                if kept:
                    now = us
                else:
                    table[kernel][key] = before
        del chain, run
        torch.cuda.empty_cache()


TUNERS = {
    "gemv": tune_linear,
    "paged_attention": tune_decode,
    "prefill_attention": tune_prefill,
    **FP8_TUNERS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="file to write; kept entries of kernels that are not tuned now")
    parser.add_argument("--only", choices=TUNERS, action="append", help="tune only this kernel")
    parser.add_argument("--kind", choices=KINDS, help="decode attention for this kind of batch only")
    parser.add_argument(
        "--shape", nargs="+", default=[], metavar="INxOUT[g]",
        help="only products of these shapes (g: gated), without norm or residual, as a rank of a group does them",
    )  # fmt: skip
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)  # "i/n": be one of the compiling processes
    arguments = parser.parse_args()
    names = arguments.only or list(TUNERS)
    KINDS[:] = [arguments.kind] if arguments.kind else KINDS
    for shape in arguments.shape:
        num_in, num_out = map(int, shape.removesuffix("g").split("x"))
        SHAPES_ASKED[shape] = (num_in, num_out, shape.endswith("g"))
    names = ["gemv"] if SHAPES_ASKED else names
    if arguments.compile_part:
        for name in names:
            TUNERS[name](Part(*part_of(arguments.compile_part)))
        return
    compile_apart(14, quiet=True)()
    print(f"for {tuning.device_facts(torch.device('cuda', 0)).slug}", flush=True)
    table = read_table(arguments.out)
    for name in names:
        table.setdefault(name, {}).update(TUNERS[name](Part(0, 0)))
        write_table(arguments.out, table)
        torch.cuda.empty_cache()
    if "gemv" in names:
        tune_step(table)
    if "fp8_gemm" in names:
        tune_fp8_step(table)
    with open(arguments.out, "w") as file:
        json.dump(table, file, indent=1, sort_keys=True)


if __name__ == "__main__":
    main()
