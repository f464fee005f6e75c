"""The grouped product with weights of 4 and 8 bits, turned: weights are the first operand of the tensor cores.

Few rows and many outputs make a tile that is high and narrow. Turned, a packed weight becomes a number in registers on
its way to the tensor core (MXFP4), or goes there as it is (e4m3, with rows rounded to e4m3 in groups of 128, too); the
other way round each tile of weights was unpacked, stored and read again (measured on an H200: 17 and 60 % of the
memory's rate). Meaning and grouping: `moe_gemm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from argosy.kernels.fp8_reference import Fp8Rows

GROUP = 128  # columns of an e4m3 row or weight that share a scale


@triton.jit
def _packed_kernel(
    x_ptr, x_scale_ptr, w_ptr, scale_ptr, bias_ptr, weight_ptr, out_ptr, places_ptr, expert_of_block_ptr,
    num_choices, num_outputs, num_inputs, stride_x, stride_xs, stride_xg, stride_we, stride_wo, stride_se, stride_so,
    shared, num_blocks,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, BAND: tl.constexpr, HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr, MXFP4: tl.constexpr, X_FORMAT: tl.constexpr,
):  # fmt: skip
    tiles_o = tl.cdiv(num_outputs, OUTPUTS)
    band = tl.program_id(0) // (BAND * tiles_o)
    in_band = tl.minimum(num_blocks - band * BAND, BAND)
    inside_band = tl.program_id(0) % (BAND * tiles_o)
    block = band * BAND + inside_band % in_band
    tile = inside_band // in_band
    expert = tl.load(expert_of_block_ptr + block)
    if expert >= 0:
        place = tl.load(places_ptr + block * ROWS + tl.arange(0, ROWS))
        is_row = place < num_choices
        source = (tl.where(is_row, place, 0) // shared).to(tl.int64)
        output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        is_output = output < num_outputs
        safe_output = tl.minimum(output, num_outputs - 1).to(tl.int64)
        x_row = x_ptr + source[None, :] * stride_x
        w_row = w_ptr + expert.to(tl.int64) * stride_we + safe_output[:, None] * stride_wo
        s_row = scale_ptr + expert.to(tl.int64) * stride_se
        column = tl.arange(0, INPUTS)
        acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
        if MXFP4:
            s_row += safe_output[:, None] * stride_so
            byte, group = tl.arange(0, INPUTS // 2), tl.arange(0, INPUTS // 32)
            for start in range(0, num_inputs, INPUTS):
                w = tl.load(
                    w_row + (start // 2 + byte)[None, :], (start // 2 + byte < num_inputs // 2)[None, :], other=0
                )
                s = tl.load(
                    s_row + (start // 32 + group)[None, :], (start // 32 + group < num_inputs // 32)[None, :], other=127
                )
                x = tl.load(x_row + (start + column)[:, None], (start + column < num_inputs)[:, None], other=0.0)
                acc = tl.dot_scaled(w, s, "e2m1", x, None, X_FORMAT, acc)
        else:
            s_row += (safe_output // 128) * stride_so
            xs_row = x_scale_ptr + source * stride_xs
            for start in range(0, num_inputs, INPUTS):
                inside = start + column < num_inputs
                w = tl.load(w_row + (start + column)[None, :], inside[None, :], other=0.0)
                x = tl.load(x_row + (start + column)[:, None], inside[:, None], other=0.0)
                s = tl.load(s_row + start // 128)
                xs = tl.load(xs_row + start // 128 * stride_xg)
                acc += tl.dot(w, x) * s[:, None] * xs[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + expert * num_outputs + output, is_output, other=0.0).to(tl.float32)[:, None]
        if WEIGHTED:
            acc *= tl.load(weight_ptr + place, is_row, other=0.0)[None, :]
        where = out_ptr + place.to(tl.int64)[:, None] * num_outputs + output[None, :]
        tl.store(where, tl.trans(acc).to(out_ptr.dtype.element_ty), is_row[:, None] & is_output[None, :])


def grouped_gemm(
    x: Tensor | Fp8Rows,
    w_EOI: Tensor,
    scale_EOI: Tensor,
    places: Tensor,
    expert_of_block: Tensor,
    num_choices: int,
    *,
    shared: int,
    dtype: torch.dtype,
    bias_EO: Tensor | None = None,
    weights: Tensor | None = None,
    tile: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """See `moe_gemm.grouped_gemm`; rows in 16 bits for MXFP4, e4m3 in groups of 128 for e4m3. Gives `dtype`."""
    is_mxfp4 = w_EOI.dtype == torch.uint8
    num_outputs, num_inputs = w_EOI.shape[1], w_EOI.shape[2] * (2 if is_mxfp4 else 1)
    if isinstance(x, Fp8Rows):
        assert x.group == GROUP
        values, x_scale = x.values_TI, x.scale_TG
        stride_xs, stride_xg = x_scale.stride()
    else:
        assert is_mxfp4
        values = x_scale = x
        stride_xs = stride_xg = 0
    num_blocks = expert_of_block.shape[0]
    rows = places.shape[0] // num_blocks
    out = torch.empty((num_choices, num_outputs), dtype=dtype, device=values.device)
    outputs, inputs, warps, stages = tile or default_tile(rows, is_mxfp4)
    grid = (num_blocks * triton.cdiv(num_outputs, outputs),)
    _packed_kernel[grid](
        values, x_scale, w_EOI, scale_EOI, values if bias_EO is None else bias_EO,
        values if weights is None else weights, out, places, expert_of_block, num_choices, num_outputs,
        num_inputs, values.stride(0), stride_xs, stride_xg,
        w_EOI.stride(0), w_EOI.stride(1), scale_EOI.stride(0), scale_EOI.stride(1), shared, num_blocks,
        ROWS=rows, OUTPUTS=outputs, INPUTS=inputs, BAND=8, HAS_BIAS=bias_EO is not None, WEIGHTED=weights is not None,
        MXFP4=is_mxfp4, X_FORMAT="fp16" if values.dtype == torch.float16 else "bf16", num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out


def default_tile(rows: int, is_mxfp4: bool) -> tuple[int, int, int, int]:
    """(outputs, inputs, warps, stages)."""
    if is_mxfp4:
        return (128, 128, 4, 4) if rows <= 32 else (128, 128, 8, 3)
    return (64, 128, 4, 5) if rows <= 32 else (128, 128, 8, 3)
