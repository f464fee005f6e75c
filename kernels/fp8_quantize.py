"""Activations to e4m3 with what makes them: a norm (after an addition), a gate, or nothing. One program a row.

Meaning: `fp8_reference.quantize_rows`, `norm_and_quantize`, `gate_and_quantize`. The row stays in registers from its
first load to the store of a quarter of the bytes that the two kernels in a row would have moved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.fp8_reference import E4M3, Fp8Rows, Rounding

FEW_TOKENS = 16  # whose sizes are chosen within a decode step


@triton.jit(do_not_specialize=["stride_scale"])
def _quantize_kernel(
    x_ptr, residual_ptr, norm_ptr, static_ptr, out_ptr, scale_ptr, stride_x, stride_residual, stride_scale, eps,
    stride_piece,
    PIECES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr, GELU: tl.constexpr, STATIC: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    if NORM:
        weight = tl.load(norm_ptr + column, inside, other=0.0).to(tl.float32)  # no kernel writes it: before the wait
    if PDL:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    x = tl.load(x_ptr + row * stride_x + column, inside, other=0.0).to(tl.float32)
    if PIECES > 1:  # of a sum, whose rounding is that of the product it comes from
        for piece in tl.static_range(1, PIECES):
            x += tl.load(x_ptr + piece * stride_piece + row * stride_x + column, inside, other=0.0)
        x = x.to(residual_ptr.dtype.element_ty).to(tl.float32)
    if ADD:
        here = residual_ptr + row * stride_residual + column
        total = (x + tl.load(here, inside, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(here, total, inside)
        x = total.to(tl.float32)
    if NORM:
        x *= 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + eps) * weight
    if GATE:
        up = tl.load(x_ptr + row * stride_x + WIDTH + column, inside, other=0.0).to(tl.float32)
        if GELU:
            x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # as in `activation`
        else:
            x *= tl.sigmoid(x)
        x *= up
    if STATIC:
        scale = tl.load(static_ptr).to(tl.float32)
        tl.store(scale_ptr + row, scale)
        x = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
    elif GROUP > 0:
        COUNT: tl.constexpr = BLOCK // GROUP
        groups = tl.reshape(x, (COUNT, GROUP))
        scale = tl.maximum(tl.max(tl.abs(groups), 1) / 448.0, 1e-10)
        group = tl.arange(0, COUNT)
        tl.store(scale_ptr + group * stride_scale + row, scale, group < (WIDTH + GROUP - 1) // GROUP)
        x = tl.reshape(groups / scale[:, None], (BLOCK,))
    else:
        scale = tl.maximum(tl.max(tl.abs(x), 0) / 448.0, 1e-10)
        tl.store(scale_ptr + row, scale)
        x = x / scale
    tl.store(out_ptr + row * WIDTH + column, x.to(tl.float8e4nv), inside)


def quantize(
    x_TI: Tensor,
    rounding: Rounding,
    *,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    residual_TI: Tensor | None = None,
    gate: str | None = None,
) -> Fp8Rows:
    """One launch. `gate`: "silu" or "gelu" for x = [gate | up], half as wide afterwards. Rows of x have unit stride.

    Where it is added to a residual, x may be float32 pieces of a sum, [P, T, I], as `fp8_ring.linear` leaves them.
    """
    num_tokens, width = x_TI.shape[-2:]
    num_pieces = x_TI.shape[0] if x_TI.dim() == 3 else 1
    width = width // 2 if gate else width
    group = 0 if rounding.scale is not None else rounding.group
    assert x_TI.stride(-1) == 1
    assert num_pieces == 1 or (residual_TI is not None and not gate)
    assert not group or group & (group - 1) == 0
    assert residual_TI is None or (residual_TI.shape == x_TI.shape[-2:] and residual_TI.stride(1) == 1)
    device = x_TI.device
    out = torch.empty((num_tokens, width), dtype=E4M3, device=device)
    num_groups = -(-width // group) if group else 1
    scale_GT = torch.empty((num_groups, num_tokens), dtype=torch.float32, device=device)
    if num_tokens:
        block = max(tuning.next_power_of_two(width), group)
        most = 32 if num_tokens <= 2 * tuning.device_facts(device).num_sms else 16  # latency is all there is
        sizes = tuning.pick("fp8_quantize", f"{width}x{FEW_TOKENS}", device) if num_tokens <= FEW_TOKENS else None
        sizes = sizes or {"warps": most, "early": 0}
        residual = x_TI if residual_TI is None else residual_TI
        _quantize_kernel[(num_tokens,)](
            x_TI, residual, x_TI if norm_weight_I is None else norm_weight_I,
            scale_GT if rounding.scale is None else rounding.scale, out, scale_GT,
            x_TI.stride(-2), residual.stride(0), num_tokens, eps, x_TI.stride(0),
            PIECES=num_pieces, WIDTH=width, BLOCK=block, GROUP=group, NORM=norm_weight_I is not None,
            ADD=residual_TI is not None,
            GATE=gate is not None, GELU=gate == "gelu", STATIC=rounding.scale is not None,
            EARLY=bool(sizes["early"]), num_warps=min(sizes["warps"], max(1, block // 512)), **tuning.overlap(device),
        )  # fmt: skip
    return Fp8Rows(out, scale_GT.t(), group)
