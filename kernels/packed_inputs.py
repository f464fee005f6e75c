"""Inputs in the order that a packed weight takes them (GPTQ's `desc_act`). Meaning: `x_TI[:, order_J]`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning


@triton.jit
def _pick_kernel(x_ptr, order_ptr, out_ptr, num_picked, stride_x, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_picked
    if PDL:
        gdc_launch_dependents()
    column = tl.load(order_ptr + place, inside, other=0)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + token * stride_x + column, inside, other=0.0)
    tl.store(out_ptr + token * num_picked + place, x, inside)


def pick_inputs(x_TI: Tensor, order_J: Tensor) -> Tensor:
    """[T, J]; an input may be picked more than once."""
    assert x_TI.stride(1) == 1
    num_tokens, num_picked = x_TI.shape[0], order_J.shape[0]
    out_TJ = torch.empty((num_tokens, num_picked), dtype=x_TI.dtype, device=x_TI.device)
    if num_tokens:
        _pick_kernel[(num_tokens, triton.cdiv(num_picked, 1024))](
            x_TI, order_J, out_TJ, num_picked, x_TI.stride(0), BLOCK=1024, num_warps=4, **tuning.overlap(x_TI.device)
        )
    return out_TJ
