"""The sizes of the FP8 kernels to try: parts of `tune_kernels.py`, which runs them and writes the file.

`fp8_gemv` (1 to 16 tokens; key inputs x outputs x 1 or 16, "b" for blocks) is tuned as a decoder runs it, with norm,
gate and residual; `library` says that rounded activations and a product for many tokens were faster. `fp8_gemm` and
`fp8_block_gemm` (key inputs x outputs x tokens) are tuned alone; `library` says that cuBLAS was faster.
"""

# ruff: noqa: B023 - every closure here is called within the turn of the loop that made it
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from bench_fp8 import BF16, LAYERS, weights_of
from bench_kernels import rand

from argosy.kernels import fp8_gemm, fp8_gemv, fp8_ops, fp8_quantize, ops, tuning
from argosy.kernels.fp8_reference import Fp8Weight, Rounding

Sizes = dict[str, int]
SHARED_BYTES = 200 << 10
GEMM_TOKENS = (32, 64, 128, 256)


class Part(Protocol):
    """`tune_kernels.Part`."""

    def time(self, calls: list[Callable[[], object]]) -> float: ...


def few_sizes(tokens: int, num_inputs: int, blocks: bool) -> Iterator[Sizes]:
    """By `kernel`, an index of `fp8_gemv.KERNELS`."""
    if tokens > 1:
        for rows, warps in ((16, 2), (16, 4), (32, 4), (64, 4), (128, 4)):
            for width in (128,) if blocks else (128, 256, 512):
                for stages in (3, 5):
                    for swap in (0, 1) if rows >= 64 else (0,):
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
    """Tiles no higher than the tokens."""
    for height in (16, 32, 64, 128):
        if height > max(16, tokens) or height < min(64, tokens):
            continue
        for rows, warps in ((64, 4), (128, 4), (128, 8)):
            for width in (128,) if blocks else (128, 256):
                for stages in (3, 4, 5):
                    if stages * (height + rows) * width <= SHARED_BYTES and height * rows <= 8192 * warps // 4:
                        yield {"tokens": height, "rows": rows, "width": width, "stages": stages, "warps": warps,
                               "band": 8}  # fmt: skip


def _tune_many(part: Part, block: tuple[int, int] | None) -> Mapping[str, Sizes]:
    best: dict[str, Sizes] = {}
    for name, (num_in, num_out, _) in LAYERS.items():
        weights = weights_of(num_out, num_in, block, 8)
        for tokens in (*GEMM_TOKENS, *((2048,) if block else ())):
            rows = fp8_quantize.quantize(rand(tokens, num_in), Rounding(block[1] if block else 0))
            times: dict[str, float] = {}
            for sizes in many_sizes(tokens, block is not None):
                sizes = {"library": 0} | sizes
                calls = [lambda w=w, s=sizes: fp8_gemm.triton_linear(rows, w, None, BF16, s) for w in weights]
                try:
                    times[json.dumps(sizes)] = part.time(calls)
                except Exception as error:  # does not fit
                    print("skipped", sizes, str(error)[:80])
            ranked = sorted(times, key=times.__getitem__)
            by_library = math.inf
            if block is None:
                by_library = part.time([lambda w=w: fp8_gemm.library_linear(rows, w, None, BF16) for w in weights])
            key = f"{num_in}x{num_out}x{fp8_gemm.bucket(tokens)}"
            best[key] = json.loads(ranked[0]) | {"library": int(by_library < times[ranked[0]])}
            print(name, key, f"library {by_library:.2f}", *(f"{times[r]:.2f} {r}" for r in ranked[:3]), sep="\n    ")
    return best


def tune_many(part: Part) -> Mapping[str, Sizes]:
    """Scales by row: Triton where it beats cuBLAS."""
    return _tune_many(part, None)


def tune_blocks(part: Part) -> Mapping[str, Sizes]:
    """Scales by block."""
    return _tune_many(part, (128, 128))


TUNERS: dict[str, Callable[[Part], Mapping[str, Sizes]]] = {
    "fp8_gemv": tune_few, "fp8_gemm": tune_many, "fp8_block_gemm": tune_blocks,
}  # fmt: skip
