"""The grouped product with weights of 4 and 8 bits, turned: weights are the first operand of the tensor cores.

Few rows and many outputs make a tile that is high and narrow. Turned, a packed weight becomes a number in registers on
its way to the tensor core (MXFP4), or goes there as it is (e4m3, with rows rounded to e4m3 in groups of 128, too); the
other way round each tile of weights was unpacked, stored and read again. Of MXFP4 a thread reads 16 bytes, a group that
shares a scale; in which order their numbers meet those of x is free as long as x is in the same one (`turn`). Measured
on an H200, as parts of the memory's rate: e4m3 60 % as it was, 79 % turned. MXFP4 17 % as it was and by
`tl.dot_scaled`, 36 % so: unpacking takes longer than reading. Meaning and grouping: `moe_gemm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.fp8_reference import Fp8Rows
from argosy.kernels.moe_parts import own_rows, own_tile, store_turned

GROUP = 128  # columns of an e4m3 row or weight that share a scale


@triton.jit
def _unpack(w, power):
    """Bytes of two e2m1 numbers, times a power of two, to (low halves, high halves) in bfloat16.

    The bits of e2m1 in the places of a bfloat16 are the number times 2^-126, also where it is 0.5; so the power comes
    as 2^126 times what is meant, and the product is exact (plus -0, since cards before Hopper have no product alone).
    Two numbers an instruction; products of integers are done beside the logic, which is what there is too little of.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 p, a, b, z;
        mov.b32 z, 0x80008000;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        and.b32 p, a, 0x000F000F;
        mul.lo.u32 p, p, 0x1040;
        and.b32 p, p, 0x81C081C0;
        fma.rn.bf16x2 $0, p, $5, z;
        and.b32 p, b, 0x000F000F;
        mul.lo.u32 p, p, 0x1040;
        and.b32 p, p, 0x81C081C0;
        fma.rn.bf16x2 $1, p, $6, z;
        and.b32 p, a, 0x00F000F0;
        mul.lo.u32 p, p, 0x104;
        and.b32 p, p, 0x81C081C0;
        fma.rn.bf16x2 $2, p, $5, z;
        and.b32 p, b, 0x00F000F0;
        mul.lo.u32 p, p, 0x104;
        and.b32 p, p, 0x81C081C0;
        fma.rn.bf16x2 $3, p, $6, z;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r", [w, power], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def turned_column(column):
    """Where an input of a row goes for `_packed_kernel`, in its span of 128: inputs of low halves of bytes first, and
    the 16 bytes that a thread has of a row where the tensor core wants them.
    """
    half, byte = column % 2, column % 128 // 2
    here = (byte // 4 % 4) * 16 + (byte // 2 % 2) * 8 + byte // 16 * 2 + byte % 2
    return column // 128 * 128 + half * 64 + here


@triton.jit
def _turn_kernel(x_ptr, out_ptr, width, stride_x, stride_out, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * stride_x + column, column < width, other=0.0)
    tl.store(out_ptr + row * stride_out + turned_column(column), x, column < stride_out)


def turn(x_TD: Tensor) -> Tensor:
    """Rows in the order that the product with MXFP4 wants, up to a whole span of 128 with zeros."""
    num_tokens, width = x_TD.shape
    out = torch.empty((num_tokens, span(width)), dtype=x_TD.dtype, device=x_TD.device)
    block = tuning.next_power_of_two(out.shape[1])
    overlap = tuning.overlap(x_TD.device)
    _turn_kernel[(num_tokens,)](x_TD, out, width, x_TD.stride(0), out.shape[1], BLOCK=block, num_warps=8, **overlap)
    return out


def span(width: int) -> int:
    """Columns of a turned row."""
    return -(-width // 128) * 128


@triton.jit(do_not_specialize=["num_choices", "shared", "num_blocks"])
def _packed_kernel(
    x_ptr, x_scale_ptr, w_ptr, scale_ptr, bias_ptr, weight_ptr, out_ptr, places_ptr, expert_of_block_ptr,
    num_choices, num_outputs, num_inputs, stride_x, stride_xs, stride_xg, stride_we, stride_wo, stride_se, stride_so,
    shared, num_blocks,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, BAND: tl.constexpr, HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr, MXFP4: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block, tile = own_tile(num_blocks, tl.cdiv(num_outputs, OUTPUTS), BAND)
    expert = tl.load(expert_of_block_ptr + block)
    if expert >= 0:
        place, is_row, source = own_rows(places_ptr, block, num_choices, shared, ROWS)
        output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        safe_output = tl.minimum(output, num_outputs - 1).to(tl.int64)
        x_row = x_ptr + source[None, :] * stride_x
        w_row = w_ptr + expert.to(tl.int64) * stride_we + safe_output[:, None] * stride_wo
        s_row = scale_ptr + expert.to(tl.int64) * stride_se
        acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
        if MXFP4:
            # a step of 128 inputs is 64 bytes: 4 neighbours in a row of the tensor core's tile have 16 of them each
            SPANS: tl.constexpr = INPUTS // 128
            HALF: tl.constexpr = INPUTS // 2
            group, byte = tl.arange(0, INPUTS // 32), tl.arange(0, 16)
            where_w = w_row[:, :, None] + (group[:, None] * 16 + byte[None, :])[None, :, :]
            where_s = s_row + safe_output[:, None] * stride_so + group[None, :]
            both = tl.arange(0, HALF)
            for start in range(0, num_inputs, INPUTS):
                is_group = start // 32 + group < num_inputs // 32
                w = tl.load(where_w + start // 2, is_group[None, :, None], other=0)
                s = tl.load(where_s + start // 32, is_group[None, :], other=127)
                power = ((s.to(tl.uint16) + 126) << 7).to(tl.bfloat16, bitcast=True)
                low, high = _unpack(w, tl.broadcast_to(power[:, :, None], (OUTPUTS, INPUTS // 32, 16)))
                low = tl.permute(tl.reshape(low, (OUTPUTS, SPANS, 4, 4, 2, 2)), (0, 1, 3, 4, 2, 5))
                high = tl.permute(tl.reshape(high, (OUTPUTS, SPANS, 4, 4, 2, 2)), (0, 1, 3, 4, 2, 5))
                here = start + both // 64 * 128 + both % 64
                inside = (here < stride_x)[:, None]
                x = tl.load(x_row + here[:, None], inside, other=0.0)
                acc = tl.dot(tl.reshape(low, (OUTPUTS, HALF)), x, acc)
                x = tl.load(x_row + (here + 64)[:, None], inside, other=0.0)
                acc = tl.dot(tl.reshape(high, (OUTPUTS, HALF)), x, acc)
        else:
            s_row += (safe_output // 128) * stride_so
            column = tl.arange(0, INPUTS)
            xs_row = x_scale_ptr + source * stride_xs
            for start in range(0, num_inputs, INPUTS):
                inside = start + column < num_inputs
                w = tl.load(w_row + (start + column)[None, :], inside[None, :], other=0.0)
                x = tl.load(x_row + (start + column)[:, None], inside[:, None], other=0.0)
                s = tl.load(s_row + start // 128)
                xs = tl.load(xs_row + start // 128 * stride_xg)
                acc += tl.dot(w, x) * s[:, None] * xs[None, :]
        store_turned(acc, bias_ptr, weight_ptr, out_ptr, expert, output, place, is_row, num_outputs, HAS_BIAS, WEIGHTED)


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
    """See `moe_gemm.grouped_gemm`; rows turned and in bfloat16 for MXFP4, e4m3 in groups of 128 for e4m3.

    Gives `dtype`. Scales of MXFP4 are to be at most 2 (a byte of 128).
    """
    is_mxfp4 = w_EOI.dtype == torch.uint8
    num_outputs, num_inputs = w_EOI.shape[1], w_EOI.shape[2] * (2 if is_mxfp4 else 1)
    if isinstance(x, Fp8Rows):
        assert x.group == GROUP
        values, x_scale = x.values_TI, x.scale_TG
        stride_xs, stride_xg = x_scale.stride()
    else:
        assert is_mxfp4
        assert x.shape[1] == span(num_inputs)
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
        MXFP4=is_mxfp4, num_warps=warps, num_stages=stages, **tuning.overlap(values.device),
    )  # fmt: skip
    return out


def default_tile(rows: int, is_mxfp4: bool) -> tuple[int, int, int, int]:
    """(outputs, inputs, warps, stages)."""
    if is_mxfp4:
        return 128, 128, 8, 4
    return (128, 128, 8, 4) if rows <= 32 else (128, 128, 4, 4)


def block_rows(average: int) -> int:
    """Rows of a block by what an expert gets on average: more than with plain weights would spill registers."""
    return 16 if average <= 16 else 32 if average <= 40 else 64
