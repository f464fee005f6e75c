"""What the FP8 operations mean, in plain torch: the path of CPU tensors, and the judge of the kernels.

An e4m3 number has 3 bits of mantissa and ends at 448, so numbers are stored as value · scale with float32 scales: of a
weight by output row or by block, of activations by token (row), by group of columns within a token, or one for all.

T = tokens, I = inputs, O = outputs, G = groups of columns. A block of a weight is `block[0]` rows by `block[1]`
columns; blocks at the end may be cut off.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from argosy.kernels import reference

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = 1e-10  # of a row of zeros


class Fp8Weight(NamedTuple):
    """A weight [O, I] of e4m3 and its scales: [O] by row, or [ceil(O / block[0]), ceil(I / block[1])]."""

    values_OI: Tensor
    scale: Tensor
    block: tuple[int, int] | None = None


class Fp8Rows(NamedTuple):
    """Activations [T, I] of e4m3 and their scales: [T, 1], or [T, G] for `group` columns each (in memory [G, T])."""

    values_TI: Tensor
    scale_TG: Tensor
    group: int = 0

    @property
    def shape(self) -> torch.Size:
        """[T, I]."""
        return self.values_TI.shape

    @property
    def is_cuda(self) -> bool:
        """Where they lie."""
        return self.values_TI.is_cuda


class Rounding(NamedTuple):
    """How activations become e4m3: `group` columns share a scale (0: the whole token), or all have the same `scale`."""

    group: int = 0
    scale: Tensor | None = None  # one number


def to_e4m3(x: Tensor) -> Tensor:
    """Nearest e4m3; what lies beyond the largest becomes the largest, as on the GPU."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def quantize_rows(x_TI: Tensor, rounding: Rounding) -> Fp8Rows:
    """Activations to e4m3."""
    num_tokens, num_inputs = x_TI.shape
    x = x_TI.float()
    if rounding.scale is not None:
        scale_T1 = rounding.scale.float().reshape(1, 1).expand(num_tokens, 1).contiguous()
        return Fp8Rows(to_e4m3(x / scale_T1), scale_T1)
    if not rounding.group:
        scale_T1 = (x.abs().amax(1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
        return Fp8Rows(to_e4m3(x / scale_T1), scale_T1)
    x_TGC = F.pad(x, (0, -num_inputs % rounding.group)).view(num_tokens, -1, rounding.group)
    scale_TG = (x_TGC.abs().amax(2) / LARGEST).clamp(min=SMALLEST_SCALE)
    values = to_e4m3(x_TGC / scale_TG[:, :, None]).view(num_tokens, -1)[:, :num_inputs]
    return Fp8Rows(values.contiguous(), scale_TG.t().contiguous().t(), rounding.group)


def norm_and_quantize(
    x_TI: Tensor, weight_I: Tensor, eps: float, rounding: Rounding, residual_TI: Tensor | None = None
) -> Fp8Rows:
    """RMS norm, of `residual += x` (in place) where there is a residual; then e4m3."""
    if residual_TI is not None:
        x_TI = residual_TI.add_(x_TI)
    return quantize_rows(reference.rms_norm(x_TI.float(), weight_I.float(), eps), rounding)


def gate_and_quantize(x_TX: Tensor, rounding: Rounding, *, gelu: bool = False) -> Fp8Rows:
    """act(gate) · up of [gate | up]; then e4m3."""
    gate = reference.gelu_and_mul if gelu else reference.silu_and_mul
    return quantize_rows(gate(x_TX.float()), rounding)


def dequantize_rows(rows: Fp8Rows, dtype: torch.dtype = torch.float32) -> Tensor:
    """The activations that are meant. [T, I]."""
    scale = rows.scale_TG
    if rows.group:
        scale = scale.repeat_interleave(rows.group, 1)[:, : rows.values_TI.shape[1]]
    return (rows.values_TI.float() * scale).to(dtype)


def quantize_weight(weight_OI: Tensor, block: tuple[int, int] | None = None, *, per_tensor: bool = False) -> Fp8Weight:
    """A weight to e4m3: scales by output row, one for all (repeated for each row), or by block."""
    weight = weight_OI.float()
    if block is None:
        largest = weight.abs().amax().expand(weight.shape[0]) if per_tensor else weight.abs().amax(1)
        scale_O = (largest / LARGEST).clamp(min=SMALLEST_SCALE)
        return Fp8Weight(to_e4m3(weight / scale_O[:, None]), scale_O.contiguous())
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    scale = (blocks.abs().amax((1, 3)) / LARGEST).clamp(min=SMALLEST_SCALE)
    values = to_e4m3(blocks / scale[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return Fp8Weight(values.contiguous(), scale, block)


def dequantize_weight(weight: Fp8Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that is meant: value · scale in float32, rounded once to `dtype`. [O, I]."""
    values_OI, scale, block = weight
    if block is None:
        return (values_OI.float() * scale[:, None]).to(dtype)
    rows, columns = values_OI.shape
    scale = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (values_OI.float() * scale).to(dtype)


def linear(rows: Fp8Rows, weight: Fp8Weight, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias of what both mean, summed in float32. [T, O] in `dtype`."""
    bias = None if bias_O is None else bias_O.float()
    return F.linear(dequantize_rows(rows), dequantize_weight(weight), bias).to(dtype)


def fused_linear(
    x_TI: Tensor,
    weight: Fp8Weight,
    bias_O: Tensor | None = None,
    *,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    out_TO: Tensor | None = None,
) -> Tensor:
    """`reference.fused_linear` with the weight that is meant: activations are not rounded to e4m3."""
    made_TO = reference.fused_linear(
        x_TI, dequantize_weight(weight, x_TI.dtype), bias_O, norm_weight_I=norm_weight_I, eps=eps,
        residual_TO=residual_TO, gated=gated,
    )  # fmt: skip
    return made_TO if out_TO is None else out_TO.copy_(made_TO)
