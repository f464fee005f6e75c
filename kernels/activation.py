"""Gate and multiply over a fused [.., gate | up]. Meaning: `reference.silu_and_mul`, `reference.gelu_and_mul`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning

BLOCK = 1024


@triton.jit
def _gate_and_mul_kernel(x_ptr, out_ptr, stride_x, width, BLOCK: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(x_ptr + row * stride_x + column, inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + width + column, inside, other=0.0).to(tl.float32)
    if GELU:
        # gelu(x) = x/2 · (1 + tanh(√(2/π)(x + 0.044715 x³))), and (1 + tanh(y))/2 = sigmoid(2y)
        gate *= tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate *= tl.sigmoid(gate)
    tl.store(out_ptr + row * width + column, (gate * up).to(out_ptr.dtype.element_ty), inside)


def _launch(x: Tensor, gelu: bool) -> Tensor:
    width = x.shape[-1] // 2
    x_TD = x.reshape(-1, 2 * width)
    assert x_TD.stride(1) == 1
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (x_TD.shape[0], triton.cdiv(width, BLOCK))
        _gate_and_mul_kernel[grid](
            x_TD, out, x_TD.stride(0), width, BLOCK=BLOCK, GELU=gelu, num_warps=4, **tuning.overlap(x.device)
        )
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) · up. x: [..., 2 I], rows of unit stride. Returns [..., I]."""
    return _launch(x, gelu=False)


def gelu_and_mul(x: Tensor) -> Tensor:
    """gelu(gate) · up with the tanh approximation. x: [..., 2 I], rows of unit stride. Returns [..., I]."""
    return _launch(x, gelu=True)
