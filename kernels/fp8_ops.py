"""The FP8 part of the door (`ops`): Triton and cuBLAS on CUDA tensors, plain torch elsewhere, chosen by the tensor.

Meanings stand in `fp8_reference`. Every operation may be captured in a CUDA graph.
"""

import torch
from torch import Tensor

from argosy.kernels import fp8_reference, ops
from argosy.kernels.fp8_reference import Fp8Rows, Fp8Weight, Rounding

# Up to so many, activations stay in 16 bits, but where rounding them was measured to be faster. On an H200, 8 tokens
# took 31 us of 4096 x 6144 so, where weights become 16 bits in registers, and 10 rounded, where they go to the tensor
# cores as they are.
FEW_TOKENS = 1
MOST_TOKENS = 16  # that the fused kernel takes, for checkpoints whose activations are not to be rounded


def has_e4m3(device: torch.device) -> bool:
    """Whether this GPU knows e4m3: from compute capability 8.9 (Ada, Hopper) on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_rows(x_TI: Tensor, rounding: Rounding) -> Fp8Rows:
    """Activations to e4m3."""
    if x_TI.is_cuda:
        from argosy.kernels import fp8_quantize

        return fp8_quantize.quantize(x_TI, rounding)
    return fp8_reference.quantize_rows(x_TI, rounding)


def norm_and_quantize(
    x_TI: Tensor, weight_I: Tensor, eps: float, rounding: Rounding, residual_TI: Tensor | None = None
) -> Fp8Rows:
    """RMS norm, of `residual += x` (in place) where there is a residual; then e4m3. One launch."""
    if x_TI.is_cuda:
        from argosy.kernels import fp8_quantize

        return fp8_quantize.quantize(x_TI, rounding, norm_weight_I=weight_I, eps=eps, residual_TI=residual_TI)
    return fp8_reference.norm_and_quantize(x_TI, weight_I, eps, rounding, residual_TI)


def gate_and_quantize(x_TX: Tensor, rounding: Rounding, *, gelu: bool = False) -> Fp8Rows:
    """act(gate) · up of [gate | up]; then e4m3. One launch."""
    if x_TX.is_cuda:
        from argosy.kernels import fp8_quantize

        return fp8_quantize.quantize(x_TX, rounding, gate="gelu" if gelu else "silu")
    return fp8_reference.gate_and_quantize(x_TX, rounding, gelu=gelu)


def linear(
    rows: Fp8Rows, weight: Fp8Weight, bias_O: Tensor | None, dtype: torch.dtype, *, pieces: bool = False
) -> Tensor:
    """x W^T + bias of rounded activations. [T, O] in `dtype`; with `pieces`, for `norm_and_quantize` to add to a
    residual, also float32 [P, T, O], the pieces of a sum."""
    if rows.is_cuda:
        from argosy.kernels import fp8_gemm

        return fp8_gemm.linear(rows, weight, bias_O, dtype, pieces=pieces)
    return fp8_reference.linear(rows, weight, bias_O, dtype)


def gated_linear(rows: Fp8Rows, weight: Fp8Weight, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """silu(gate) times up of x W^T + bias = [gate | up] in one launch; None where two were measured to be better."""
    if not rows.is_cuda:
        return None
    from argosy.kernels import fp8_gemm

    return fp8_gemm.gated_linear(rows, weight, bias_O, dtype)


def is_few(x_TX: Tensor, weight: Fp8Weight) -> bool:
    """Whether inputs of this weight, as many as the rows of x, are few enough to stay in 16 bits."""
    if x_TX.shape[0] > FEW_TOKENS or x_TX.element_size() != 2:
        return False
    if not x_TX.is_cuda:
        return True
    from argosy.kernels import fp8_gemv

    return not fp8_gemv.prefers_library(x_TX.shape[0], weight)


def keeps_16_bits(x_TI: Tensor, weight: Fp8Weight, most: int = FEW_TOKENS) -> bool:
    """Whether `fused_linear` is the way for these on their device: up to `most` tokens that it takes."""
    if x_TI.shape[0] > most or not x_TI.is_cuda:
        return False
    from argosy.kernels import fp8_gemv

    rounds = most <= FEW_TOKENS and fp8_gemv.prefers_library(x_TI.shape[0], weight)
    return not rounds and fp8_gemv.suits(x_TI, weight)


def fused_linear(
    x_TI: Tensor,
    weight: Fp8Weight,
    bias_O: Tensor | None = None,
    *,
    rounding: Rounding | None = None,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    out_TO: Tensor | None = None,
) -> Tensor:
    """`ops.fused_linear` with an e4m3 weight. Where the library was measured to be faster, activations are rounded."""
    if x_TI.is_cuda:
        from argosy.kernels import activation, fp8_gemv

        many = x_TI.shape[0] > FEW_TOKENS or fp8_gemv.prefers_library(x_TI.shape[0], weight)
        if rounding is not None and many:
            if norm_weight_I is None:
                rows = quantize_rows(x_TI, rounding)
            else:
                rows = norm_and_quantize(x_TI, norm_weight_I, eps, rounding)
            y_TO = linear(rows, weight, bias_O, x_TI.dtype)
            y_TO = activation.silu_and_mul(y_TO) if gated else y_TO
            if out_TO is not None:
                return out_TO.copy_(y_TO)
            return y_TO if residual_TO is None else residual_TO.add_(y_TO)
        if not fp8_gemv.suits(x_TI, weight):
            made_TO = ops.fused_linear(
                x_TI, fp8_reference.dequantize_weight(weight, x_TI.dtype), bias_O, norm_weight_I=norm_weight_I,
                eps=eps, residual_TO=residual_TO, gated=gated,
            )  # fmt: skip
            return made_TO if out_TO is None else out_TO.copy_(made_TO)
        return fp8_gemv.fused_linear(
            x_TI, weight, bias_O, norm_weight_I=norm_weight_I, eps=eps, residual_TO=residual_TO, gated=gated,
            out_TO=out_TO,
        )  # fmt: skip
    return fp8_reference.fused_linear(
        x_TI, weight, bias_O, norm_weight_I=norm_weight_I, eps=eps, residual_TO=residual_TO, gated=gated, out_TO=out_TO
    )
