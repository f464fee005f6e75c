"""The sizes of the FP8 kernels to try: parts of `tune_kernels.py`, which runs them and writes the file.

`fp8_gemv` (1 to 16 tokens; key inputs x outputs x 1 or 16, "b" for blocks) is tuned as a decoder runs it, with norm,
gate and residual; `library` says that rounded activations and a product for many tokens were faster. `fp8_gemm` (key
inputs x outputs x tokens, "b" for blocks) is tuned alone; `kernel` says by which of its four ways.
"""

# ruff: noqa: B023 - every closure here is called within the turn of the loop that made it
import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from bench_fp8 import BF16, LAYERS, Fp8Step, weights_of
from bench_kernels import STEPS, rand
from timing import microseconds
from trials import read_table, try_table, write_table

from argosy.kernels import fp8_gemm, fp8_gemv, fp8_ops, fp8_quantize, ops, tuning
from argosy.kernels.fp8_reference import Fp8Weight, Rounding

Sizes = dict[str, int]
SHARED_BYTES = 200 << 10


class Part(Protocol):
    """`tune_kernels.Part`."""

    def time(self, calls: list[Callable[[], object]]) -> float: ...


def few_sizes(tokens: int, num_inputs: int, blocks: bool) -> Iterator[Sizes]:
    """By `kernel`, an index of `fp8_gemv.KERNELS`."""
    if tokens > 1:
        for rows, warps in ((64, 4), (128, 4)):
            for width in (128,) if blocks else (128, 256, 512):
                for stages in (3, 5):
                    for swap in (1,):
                        held = stages * (rows + 32) * width
                        if num_inputs % width == 0 and 8 << 10 <= held <= SHARED_BYTES:
                            yield {"kernel": 1, "rows": rows, "width": width, "stages": stages, "warps": warps,
                                   "swap": swap, "per_sm": 0}  # fmt: skip
        return
    width = tuning.next_power_of_two(num_inputs)
    for rows in () if blocks else (2, 4, 8):
        for warps in (4, 8) if width < 16384 else (8, 16):
            for stages in (2, 3):
                for per_sm in (1, 2, 4):
                    each = rows * width // (32 * warps)
                    held = stages * rows * width * per_sm
                    if 16 <= each <= 128 and SHARED_BYTES // 6 <= held <= SHARED_BYTES:
                        yield {"kernel": 0, "rows": rows, "width": width, "stages": stages, "warps": warps,
                               "per_sm": per_sm}  # fmt: skip
    for rows in (4, 8, 16):
        for width in (512, 1024, 2048):
            for warps in (4, 8):
                if 16 <= rows * width // (32 * warps) <= 64 and num_inputs % width == 0:
                    for stages in (1, 3):
                        yield {"kernel": 2, "rows": rows, "width": width, "stages": stages, "warps": warps, "per_sm": 0}


def tune_few(part: Part) -> Mapping[str, Sizes]:
    """Each layer as a decoder runs it: qkv and gate_up with the norm, o and down with the residual."""
    best: dict[str, Sizes] = {}
    for name, (num_in, num_out, gated) in LAYERS.items():
        for block in (None, (128, 128)):
            weights = weights_of(num_out, num_in, block, 20)
            for tokens, label in ((1, 1), (8, fp8_gemv.MAX_TOKENS)):
                x, norm = rand(tokens, num_in), rand(num_in)
                adds = name.endswith((" o", "down"))
                residual = rand(tokens, num_out) if adds else None
                rounding = Rounding(block[1] if block else 0)
                options = {"norm_weight_I": None if adds else norm, "residual_TO": residual, "gated": gated}
                times: dict[str, float] = {}
                for sizes in few_sizes(tokens, num_in, block is not None):
                    sizes = {"prefetch": 4096, "early": 0, "library": 0, "swap": 0} | sizes
                    calls = [lambda w=w, s=sizes: fp8_gemv.fused_linear(x, w, sizes=s, **options) for w in weights]
                    try:
                        times[json.dumps(sizes)] = part.time(calls)
                    except Exception as error:  # a size that does not fit is no failure of the search
                        print("skipped", sizes, str(error)[:80])

                def library(w: Fp8Weight) -> object:
                    if adds:
                        return residual.add_(fp8_ops.linear(fp8_ops.quantize_rows(x, rounding), w, None, BF16))
                    y = fp8_ops.linear(fp8_ops.norm_and_quantize(x, norm, 1e-6, rounding), w, None, BF16)
                    return ops.silu_and_mul(y) if gated else y

                by_library = part.time([lambda w=w: library(w) for w in weights])
                ranked = sorted(times, key=times.__getitem__)
                key = f"{num_in}x{num_out}x{label}{'b' if block else ''}"
                best[key] = json.loads(ranked[0]) | {"library": int(by_library < times[ranked[0]])}
                print(
                    name, key, f"library {by_library:.2f}", *(f"{times[r]:.2f} {r}" for r in ranked[:4]), sep="\n    "
                )
    return best


def many_sizes(tokens: int, blocks: bool) -> Iterator[Sizes]:
    """By `kernel`: cuBLAS in its two forms, tiles, pieces."""
    yield {"kernel": fp8_gemm.LIBRARY}
    if not blocks:
        yield {"kernel": fp8_gemm.RESCALED}
    if tokens <= 256:
        for height in (16, 32, 64, 128):
            if height < min(64, tokens) or height > max(16, tokens):
                continue
            for width, stages in ((128, 4), (128, 6)) if blocks else ((128, 4), (128, 6), (256, 3), (256, 4)):
                for rows, warps in ((64, 4), (128, 4)) if height <= 64 else ((64, 4), (128, 8)):
                    for splits in (1, 2, 4, 7):
                        if stages * (height + rows) * width <= SHARED_BYTES:
                            yield {"kernel": fp8_gemm.SPLIT, "tokens": height, "rows": rows, "width": width,
                                   "stages": stages, "warps": warps, "splits": splits, "prefetch": 512}  # fmt: skip
    if tokens >= 128:
        for rows, warps, stages in ((128, 4, 4), (128, 8, 4), (256, 8, 3)):
            yield {"kernel": fp8_gemm.TILES, "tokens": 128, "rows": rows, "width": 128, "stages": stages,
                   "warps": warps, "band": 8}  # fmt: skip


def tune_many(part: Part) -> Mapping[str, Sizes]:
    """The product alone, by row and by block."""
    best: dict[str, Sizes] = {}
    for name, (num_in, num_out, _) in LAYERS.items():
        for block in (None, (128, 128)):
            weights = weights_of(num_out, num_in, block, 8)
            for tokens in (16, 64) if block else (16, 32, 64, 128, 256):
                rows = fp8_quantize.quantize(rand(tokens, num_in), Rounding(block[1] if block else 0))
                times: dict[str, float] = {}
                for sizes in many_sizes(tokens, block is not None):
                    calls = [lambda w=w, s=sizes: fp8_gemm.linear(rows, w, None, BF16, s) for w in weights]
                    try:
                        times[json.dumps(sizes)] = part.time(calls)
                    except Exception as error:  # does not fit
                        print("skipped", sizes, str(error)[:80])
                ranked = sorted(times, key=times.__getitem__)
                key = f"{num_in}x{num_out}x{fp8_gemm.bucket(tokens)}{'b' if block else ''}"
                best[key] = json.loads(ranked[0])
                kinds = {json.loads(r)["kernel"]: r for r in reversed(ranked)}
                shown = (f"{times[r]:.2f} {r}" for r in (*ranked[:3], *kinds.values()))
                print(name, key, *shown, sep="\n    ")
    return best


TUNERS: dict[str, Callable[[Part], Mapping[str, Sizes]]] = {"fp8_gemv": tune_few, "fp8_gemm": tune_many}

# what a layer's neighbours may like better than what is fastest alone
ONE: tuple[Sizes, ...] = (
    {"kernel": 0, "rows": 2, "width": 4096, "stages": 3, "warps": 4, "per_sm": 4},
    {"kernel": 0, "rows": 4, "width": 4096, "stages": 3, "warps": 4, "per_sm": 2},
    {"kernel": 2, "rows": 8, "width": 1024, "stages": 3, "warps": 4, "per_sm": 0},
    {"kernel": 2, "rows": 4, "width": 2048, "stages": 3, "warps": 4, "per_sm": 0},
    {"kernel": 2, "rows": 16, "width": 1024, "stages": 1, "warps": 8, "per_sm": 0},
    {"prefetch": 0}, {"prefetch": 1024}, {"prefetch": 8192}, {"early": 1},
)  # fmt: skip
PIECES: Sizes = {"kernel": fp8_gemm.SPLIT, "rows": 64, "width": 256, "stages": 4, "warps": 4, "splits": 1}
SEVERAL: tuple[Sizes, ...] = (
    PIECES, PIECES | {"splits": 2}, PIECES | {"splits": 4}, PIECES | {"width": 128, "stages": 6},
    PIECES | {"rows": 128, "stages": 3}, {"prefetch": 0}, {"prefetch": 1024}, {"prefetch": 2048}, {"early": 1},
)  # fmt: skip


def tune_step(table: dict[str, dict[str, Sizes]], rows_asked: Sequence[int] = (1, 8, 64)) -> None:
    """Choose by the time of six layers of the 8b shape, where neighbours share the card."""
    try_table(table)
    hidden, _, *shape = STEPS["8b"]
    chain = Fp8Step(hidden, 6, *shape)
    for rows in rows_asked:
        run = chain.of(rows)
        now = microseconds([run], launches=1)[0]
        print(f"step 8b rows {rows}: {now:.1f} us of 6 layers with the best alone", flush=True)
        kernel = "fp8_gemv" if rows == 1 else "fp8_gemm"
        for layer, (num_in, num_out) in chain.shapes.items():
            key = f"{num_in}x{num_out}x{1 if rows == 1 else fp8_gemm.bucket(rows)}"
            for change in ONE if rows == 1 else SEVERAL:
                before = table[kernel][key]
                if (change.get("kernel") == 0 and num_in > 4096) or before | change == before:
                    continue
                table[kernel][key] = {"tokens": fp8_gemm.bucket(rows), "prefetch": 512, **before} | change
                try:
                    us = microseconds([run], launches=1, replays=9)[0]
                except Exception as error:  # does not fit
                    print("skipped", change, str(error)[:80])
                    us = math.inf
                kept = us < now * 0.997
                print(f"    {layer} {us:.1f} us with {change}{' kept' if kept else ''}", flush=True)
                if kept:
                    now = us
                else:
                    table[kernel][key] = before


def main() -> None:
    """The step alone, from sizes that were tuned before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="the file of sizes to read and to write")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    args = parser.parse_args()
    table = read_table(args.out)
    for rows in args.rows:
        tune_step(table, [rows])
        write_table(args.out, table)


if __name__ == "__main__":
    main()
