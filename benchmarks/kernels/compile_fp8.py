"""What `compile_for.py` compiles of FP8: roundings, and products with e4m3 weights in all their ways."""

from collections.abc import Callable

import torch

from argosy.kernels import fp8_gemm, fp8_gemv, fp8_one, fp8_quantize, fp8_reference, fp8_ring, fp8_split, tuning
from argosy.kernels.fp8_reference import E4M3, Fp8Rows, Fp8Weight, Rounding

BF16 = torch.bfloat16
CPU = torch.device("cpu")


def fp8(report: Callable[..., None]) -> None:
    """Roundings and products with e4m3 weights."""
    for tokens in (1, 64, 512):
        x, wide = torch.zeros(tokens, 4096, dtype=BF16), torch.zeros(tokens, 28672, dtype=BF16)
        for group in (0, 128):
            name = f"{tokens} tokens, groups of {group}"
            options = {"norm_weight_I": x[0], "residual_TI": x}
            report(f"add, norm, round, {name}", fp8_quantize.quantize, x, Rounding(group), **options)
            report(f"gate, round, {name}", fp8_quantize.quantize, wide, Rounding(group), gate="silu")
    for num_in, num_out in ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)):
        for block in (None, (128, 128)):
            scale = torch.ones(num_out) if block is None else torch.ones(num_out // 128, num_in // 128)
            weight = Fp8Weight(torch.zeros(num_out, num_in, dtype=E4M3), scale, block)
            name = f"{num_in}x{num_out}{' by block' if block else ''}"
            if block is None:
                pieces, gated = num_in // 4096 + (num_in > 4096), num_out > 6144
                sizes = {"width": 256, "stages": 2 if gated else 5, "pieces": pieces, "programs": 0}
                report(f"e4m3 {name}, 1 token by itself", fp8_one.linear, torch.zeros(1, num_in, dtype=BF16), weight,
                       None, sizes, gated=gated)  # fmt: skip
            report(f"e4m3 {name}, 1 token", fp8_gemv.fused_linear, torch.zeros(1, num_in, dtype=BF16), weight)
            for tokens in (8, 32, 64, 128, 256):
                rows = fp8_reference.quantize_rows(torch.zeros(tokens, num_in), Rounding(128 if block else 0))
                key = f"{num_in}x{num_out}x{fp8_gemm.bucket(tokens)}{'b' if block else ''}"
                _product(report, f"e4m3 {name}, {tokens} tokens", rows, weight, tuning.pick("fp8_gemm", key, CPU))


def _product(
    report: Callable[..., None], name: str, rows: Fp8Rows, weight: Fp8Weight, sizes: tuning.Sizes | None
) -> None:
    """In pieces, in tiles and by a ring, by rule, and as measured."""
    report(f"{name}, pieces", fp8_split.linear, rows, weight, None, BF16)
    report(f"{name}, tiles", fp8_gemm.triton_linear, rows, weight, None, BF16)
    ring = {"rows": 64, "width": 256, "stages": 6, "programs": 0, "pieces": 2}
    if rows.shape[0] <= fp8_ring.MAX_TOKENS and not weight.block:
        report(f"{name}, ring", fp8_ring.linear, rows, weight, None, BF16, ring, pieces=True)
    runs = {fp8_gemm.SPLIT: fp8_split.linear, fp8_gemm.TILES: fp8_gemm.triton_linear, fp8_gemm.RING: fp8_ring.linear}
    if sizes and sizes["kernel"] in runs:
        report(f"{name}, tuned", runs[sizes["kernel"]], rows, weight, None, BF16, sizes)
