"""RMSNorm, and add-then-RMSNorm: one program a row, the row in registers. Meaning: `reference.rms_norm`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    stride_x,
    stride_residual,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)  # no kernel writes weights: before the wait
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * stride_x + column, inside, other=0.0).to(tl.float32)
    if ADD:
        here = residual_ptr + row * stride_residual + column
        total = (x + tl.load(here, inside, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(here, total, inside)
        x = total.to(tl.float32)  # the norm of what was stored, as the next layer will read it
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    tl.store(out_ptr + row * WIDTH + column, (x * scale * weight).to(out_ptr.dtype.element_ty), inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    x_TD = x.reshape(-1, width)
    assert weight.shape == (width,)
    assert weight.is_contiguous()
    assert x_TD.stride(1) == 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x_TD.shape[0] == 0:
        return out
    block = tuning.next_power_of_two(width)
    residual_TD = x_TD if residual is None else residual
    _rms_norm_kernel[(x_TD.shape[0],)](
        x_TD, residual_TD, weight, out, x_TD.stride(0), residual_TD.stride(0), eps,
        WIDTH=width, BLOCK=block, ADD=residual is not None, num_warps=min(16, max(1, block // 512)),
        **tuning.overlap(x.device),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., D], rows of unit stride; weight: [D]. Returns [..., D], contiguous."""
    return _launch(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`residual += x` in place, then its norm, in one pass. Both [..., D]. Returns (normed, residual)."""
    assert residual.shape == x.shape
    residual_TD = residual.view(-1, residual.shape[-1])  # a view, not a copy: it is written
    return _launch(x, residual_TD, weight, eps), residual
