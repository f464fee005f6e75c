"""Mixtures of experts on a GPU: tokens grouped by expert on the device, then one product for all experts.

Meaning: `moe_reference`. Nothing is read back on the host and all launches have shapes that follow from tensor shapes,
so that a decode step can be recorded: the worst case of blocks is launched, and blocks that no expert has end at once.

    group   choices sorted by expert, each expert's padded to whole blocks of ROWS rows
    gemm    a program a block of rows and a tile of outputs: rows are gathered through the sorted places
    gate    silu(gate) * up, or gpt-oss's clamped form
    gemm    the same with the down weights; weighted by the router on the way out
    sum     over each token's K rows, leaving out choices of other ranks
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import fp8_quantize, moe_int, moe_packed, tuning
from argosy.kernels.fp8_reference import Fp8Rows, Rounding
from argosy.kernels.moe_parts import own_rows, own_tile
from argosy.kernels.moe_reference import IntExpertWeight, most_blocks

CHUNK = 1024  # ids that a program of the grouping reads at once
PLAIN, E4M3_BLOCKS, MXFP4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how weights are stored


@triton.jit(do_not_specialize=["num_choices"])
def _count_kernel(ids_ptr, counts_ptr, num_choices, CHUNK: tl.constexpr, PDL: tl.constexpr):
    expert = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, num_choices, CHUNK):
        place = start + tl.arange(0, CHUNK)
        total += (tl.load(ids_ptr + place, place < num_choices, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["num_choices", "num_blocks"])
def _group_kernel(
    ids_ptr, counts_ptr, places_ptr, expert_of_block_ptr, num_choices, num_experts, num_blocks,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, COUNTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if COUNTED:
        counts = tl.load(counts_ptr + every, every < num_experts, other=0)
    else:  # there is one chunk, which each program counts for itself; the last bin is nobody's
        place = tl.arange(0, CHUNK)
        chosen = tl.load(ids_ptr + place, place < num_choices, other=-1)
        counts = tl.histogram(tl.where(chosen >= 0, chosen, EXPERTS - 1), EXPERTS)
        counts = tl.where(every < num_experts, counts, 0)
    blocks = (counts + ROWS - 1) // ROWS
    first = tl.sum(tl.where(every < expert, blocks, 0), axis=0)
    own = tl.sum(tl.where(every == expert, blocks, 0), axis=0)
    if expert == num_experts:  # one program more than experts: the blocks that are left are nobody's
        own = num_blocks - first
        for start in range(0, own, CHUNK):
            block = start + tl.arange(0, CHUNK)
            tl.store(expert_of_block_ptr + first + block, tl.full((CHUNK,), -1, tl.int32), block < own)
    else:
        for start in range(0, own, CHUNK):
            block = start + tl.arange(0, CHUNK)
            mark = tl.zeros((CHUNK,), tl.int32) + expert
            tl.store(expert_of_block_ptr + first + block, mark, block < own)
        at = first * ROWS
        for start in range(0, num_choices, CHUNK):
            place = start + tl.arange(0, CHUNK)
            is_own = (tl.load(ids_ptr + place, place < num_choices, other=-1) == expert).to(tl.int32)
            where = at + tl.cumsum(is_own, axis=0) - 1
            tl.store(places_ptr + where, place, is_own == 1)
            at += tl.sum(is_own, axis=0)
        end = (first + own) * ROWS
        rest = at + tl.arange(0, ROWS)  # less than a block of padding
        tl.store(places_ptr + rest, tl.zeros((ROWS,), tl.int32) + num_choices, rest < end)


def group_tokens(ids_TK: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """See `moe_reference.group_tokens`; places of blocks that are nobody's are undefined."""
    num_choices, device = ids_TK.numel(), ids_TK.device
    num_blocks = most_blocks(num_choices, num_experts, rows)
    places = torch.empty(num_blocks * rows, dtype=torch.int32, device=device)
    expert_of_block = torch.empty(num_blocks, dtype=torch.int32, device=device)
    chunk, overlap = min(CHUNK, tuning.next_power_of_two(num_choices)), tuning.overlap(device)
    counts = ids_TK
    if num_choices > CHUNK:
        counts = torch.empty(num_experts, dtype=torch.int32, device=device)
        _count_kernel[(num_experts,)](ids_TK, counts, num_choices, CHUNK=chunk, num_warps=4, **overlap)
    _group_kernel[(num_experts + 1,)](
        ids_TK, counts, places, expert_of_block, num_choices, num_experts, num_blocks, ROWS=rows,
        EXPERTS=tuning.next_power_of_two(num_experts + 1), CHUNK=chunk, COUNTED=num_choices > CHUNK, num_warps=4,
        **overlap,
    )  # fmt: skip
    return places, expert_of_block


@triton.jit(do_not_specialize=["num_choices", "shared", "num_blocks", "first_expert", "num_experts"])
def _gemm_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, weight_ptr, out_ptr, places_ptr, expert_of_block_ptr,
    num_choices, num_outputs, num_inputs, stride_x, stride_we, stride_wo, stride_se, stride_so, shared, num_blocks,
    first_expert, num_experts,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, BAND: tl.constexpr, HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr, FORMAT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block, tile = own_tile(num_blocks, tl.cdiv(num_outputs, OUTPUTS), BAND)
    expert = tl.load(expert_of_block_ptr + block) - first_expert
    if (expert >= 0) & (expert < num_experts):
        place, is_row, source = own_rows(places_ptr, block, num_choices, shared, ROWS)
        output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        is_output = output < num_outputs
        safe_output = tl.minimum(output, num_outputs - 1).to(tl.int64)
        x_row = x_ptr + source[:, None] * stride_x
        w_row = w_ptr + expert.to(tl.int64) * stride_we + safe_output[None, :] * stride_wo
        acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
        if FORMAT == MXFP4:
            # two numbers a byte: those of even columns are multiplied apart from those of odd ones
            s_row = scale_ptr + expert.to(tl.int64) * stride_se + safe_output[None, :] * stride_so
            byte = tl.arange(0, INPUTS // 2)
            for start in range(0, num_inputs // 2, INPUTS // 2):
                at = start + byte
                inside = at < num_inputs // 2
                even = tl.load(x_row + 2 * at[None, :], is_row[:, None] & inside[None, :], other=0.0)
                odd = tl.load(x_row + 2 * at[None, :] + 1, is_row[:, None] & inside[None, :], other=0.0)
                both = tl.load(w_row + at[:, None], inside[:, None], other=0).to(tl.uint16)
                exponent = tl.load(s_row + (at // 16)[:, None], inside[:, None], other=127).to(tl.int32)
                # the bits of e2m1 in the places of a float16 are the number times 2^-14, also where it is 0.5
                power = (exponent << 23).to(tl.float32, bitcast=True) * 16384.0
                low = (((both & 7) << 9) | ((both & 8) << 12)).to(tl.uint16).to(tl.float16, bitcast=True)
                high = (((both & 112) << 5) | ((both & 128) << 8)).to(tl.uint16).to(tl.float16, bitcast=True)
                acc = tl.dot(even, (low.to(tl.float32) * power).to(even.dtype), acc, input_precision="ieee")
                acc = tl.dot(odd, (high.to(tl.float32) * power).to(odd.dtype), acc, input_precision="ieee")
        else:
            column = tl.arange(0, INPUTS)
            s_here = scale_ptr + expert.to(tl.int64) * stride_se + (safe_output // 128) * stride_so
            for start in range(0, num_inputs, INPUTS):
                inside = start + column < num_inputs
                x = tl.load(x_row + (start + column)[None, :], is_row[:, None] & inside[None, :], other=0.0)
                w = tl.load(w_row + (start + column)[:, None], inside[:, None], other=0.0)
                if FORMAT == E4M3_BLOCKS:
                    # each number is exact in 16 bits, and 128 columns share a scale
                    scale = tl.load(s_here + start // 128)
                    acc += tl.dot(x, w.to(x.dtype)) * scale[None, :]
                else:
                    acc = tl.dot(x, w, acc, input_precision="ieee")
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert * num_outputs + output, is_output, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        if WEIGHTED:
            acc *= tl.load(weight_ptr + place, is_row, other=0.0)[:, None]
        where = out_ptr + place.to(tl.int64)[:, None] * num_outputs + output[None, :]
        tl.store(where, acc.to(out_ptr.dtype.element_ty), is_row[:, None] & is_output[None, :])


def grouped_gemm(
    x: Tensor,
    w_EOI: Tensor,
    places: Tensor,
    expert_of_block: Tensor,
    num_choices: int,
    *,
    shared: int,
    bias_EO: Tensor | None = None,
    weights: Tensor | None = None,
    scale_EOI: Tensor | None = None,
    tile: tuple[int, int, int, int] | None = None,
    first_expert: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Row c of the result is w[expert of c] · x[c // shared], for each choice c that some expert here has: [C, O].

    `scale_EOI`: of e4m3 weights, one for 128 x 128 of them; of MXFP4 (uint8 [E, O, I / 2]), a byte for 32 inputs.
    `weights`: by choice, multiplied in float32. `tile`: (outputs, inputs, warps, stages) other than the rule's.
    `first_expert`: which one `w_EOI` begins with, where it has some of them; `out` then keeps the rows of the others.
    """
    num_experts, num_outputs, num_inputs = w_EOI.shape
    kind = (PLAIN if scale_EOI is None else MXFP4 if w_EOI.dtype == torch.uint8 else E4M3_BLOCKS).value
    if kind == MXFP4.value:
        num_inputs *= 2
    assert w_EOI.stride(2) == 1
    num_blocks = expert_of_block.shape[0]
    rows = places.shape[0] // num_blocks
    if out is None:
        out = torch.empty((num_choices, num_outputs), dtype=x.dtype, device=x.device)
    outputs, inputs, warps, stages = tile or _tile(rows, x.element_size(), kind)
    grid = (num_blocks * triton.cdiv(num_outputs, outputs),)
    scale = x if scale_EOI is None else scale_EOI
    _gemm_kernel[grid](
        x, w_EOI, scale, x if bias_EO is None else bias_EO, x if weights is None else weights, out, places,
        expert_of_block, num_choices, num_outputs, num_inputs, x.stride(0), w_EOI.stride(0), w_EOI.stride(1),
        0 if scale_EOI is None else scale_EOI.stride(0), 0 if scale_EOI is None else scale_EOI.stride(1),
        shared, num_blocks, first_expert, num_experts, ROWS=rows, OUTPUTS=outputs, INPUTS=inputs, BAND=8,
        HAS_BIAS=bias_EO is not None, WEIGHTED=weights is not None, FORMAT=kind, num_warps=warps, num_stages=stages,
        **tuning.overlap(x.device),
    )  # fmt: skip
    return out


def _by_slices(
    x: Tensor,
    weight: IntExpertWeight,
    places: Tensor,
    expert_of_block: Tensor,
    num_choices: int,
    *,
    bias_EO: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`grouped_gemm`, with some experts at a time made plain: so many rows that unpacking for each block costs more."""
    out = torch.empty((num_choices, weight.packed.num_outputs), dtype=x.dtype, device=x.device)
    for first, some_NOI in moe_int.slices(weight, x.dtype):
        bias_NO = None if bias_EO is None else bias_EO[first : first + len(some_NOI)]
        grouped_gemm(
            x, some_NOI, places, expert_of_block, num_choices, bias_EO=bias_NO, first_expert=first, out=out, **options
        )
    return out


def _tile(rows: int, item_bytes: int, kind: int) -> tuple[int, int, int, int]:
    """(outputs, inputs, warps, stages): few rows wait for weights and want many loads in flight, many want reuse."""
    if item_bytes == 4:
        return 32, 32, 4, 2
    if rows == 16:
        return (64, 256, 4, 3) if kind != E4M3_BLOCKS.value else (64, 128, 4, 4)
    if rows == 32:
        return 128, 128, 4, 3
    return (256 if rows == 128 and kind == PLAIN.value else 128), (64 if kind == PLAIN.value else 128), 8, 3


def block_rows(average: int) -> int:
    """Rows of a block by what an expert gets on average, as measured on an H200 for 8 to 256 experts.

    Between a tensor core's 16 and the 128 that keep one busy; experts get more and less than the average, and a second
    block reads the weights again.
    """
    return 16 if average <= 8 else 32 if average <= 24 else 64 if average <= 48 else 128


@triton.jit
def _gate_kernel(
    both_ptr, out_ptr, width, stride_out, limit, alpha, CLAMPED: tl.constexpr, TURNED: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(both_ptr + row * 2 * width + column, inside, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * 2 * width + width + column, inside, other=0.0).to(tl.float32)
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        made = gate * tl.sigmoid(alpha * gate) * up
    else:
        made = gate * tl.sigmoid(gate) * up
    where = out_ptr + row * stride_out
    if TURNED:
        made = tl.where(inside, made, 0.0)
        tl.store(where + moe_packed.turned_column(column), made.to(out_ptr.dtype.element_ty), column < stride_out)
    else:
        tl.store(where + column, made.to(out_ptr.dtype.element_ty), inside)


def _gate(both: Tensor, limit: float, alpha: float, *, turned: bool) -> Tensor:
    """silu(gate) * up of [C, gate | up], or gpt-oss's clamped form; `turned` as `moe_packed.turn` does."""
    num_choices, inner = both.shape[0], both.shape[1] // 2
    width = moe_packed.span(inner) if turned else inner
    gated = torch.empty((num_choices, width), dtype=both.dtype, device=both.device)
    block = min(1024, tuning.next_power_of_two(width))
    _gate_kernel[(num_choices, triton.cdiv(width, block))](
        both, gated, inner, width, limit, alpha, CLAMPED=bool(limit), TURNED=turned, BLOCK=block, num_warps=4,
        **tuning.overlap(both.device),
    )  # fmt: skip
    return gated


@triton.jit
def _sum_kernel(rows_ptr, ids_ptr, out_ptr, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for place in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + token * TOP_K + place)
        row = tl.load(rows_ptr + (token * TOP_K + place) * width + column, inside, other=0.0).to(tl.float32)
        total += tl.where(expert >= 0, row, 0.0)  # what nobody wrote may be anything
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), inside)


def experts(
    x_TD: Tensor,
    gate_up_EID: Tensor | IntExpertWeight,
    down_EDI: Tensor | IntExpertWeight,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    gate_up_bias_EI: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    limit: float = 0.0,
    alpha: float = 1.0,
    average: int | None = None,
    out_TD: Tensor | None = None,
) -> Tensor:
    """See `moe_reference.experts`; `average` and `out_TD` in `moe_ops`."""
    num_tokens, top_k = ids_TK.shape
    num_experts = gate_up_EID.num_experts if isinstance(gate_up_EID, IntExpertWeight) else gate_up_EID.shape[0]
    width = x_TD.shape[1]
    assert x_TD.stride(1) == 1
    if out_TD is None:
        out_TD = torch.empty((num_tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    assert out_TD.is_contiguous()
    if num_tokens == 0:
        return out_TD
    average = num_tokens * top_k // num_experts if average is None else average
    weights = (gate_up_EID, down_EDI)
    sliced = average >= moe_int.SLICES_FROM and all(isinstance(w, Tensor) or moe_int.can_slice(w) for w in weights)
    if all(isinstance(w, IntExpertWeight) for w in weights) and not sliced:
        rows = moe_int.block_rows(average)
    else:
        rows = block_rows(average) if gate_up_scale is None else moe_packed.block_rows(average)
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
    chosen = (*group_tokens(ids_TK, num_experts, rows), num_tokens * top_k)

    def product(
        x: Tensor | Fp8Rows, weight_EOI: Tensor | IntExpertWeight, scale: Tensor | None, **options: Any
    ) -> Tensor:  # fmt: skip
        if scale is not None and (turned or isinstance(x, Fp8Rows)):
            assert isinstance(weight_EOI, Tensor)
            return moe_packed.grouped_gemm(x, weight_EOI, scale, *chosen, dtype=x_TD.dtype, **options)
        assert isinstance(x, Tensor)
        if isinstance(weight_EOI, Tensor):
            return grouped_gemm(x, weight_EOI, *chosen, scale_EOI=scale, **options)
        if weight_EOI.order_EJ is not None and (sliced or rows >= moe_int.PICKED_FROM):
            x, weight_EOI = moe_int.pick(x, weight_EOI, *chosen, shared=options["shared"])
            options["shared"] = 1
        return (_by_slices if sliced else moe_int.grouped_gemm)(x, weight_EOI, *chosen, **options)

    stored = None if isinstance(gate_up_EID, IntExpertWeight) else gate_up_EID.dtype
    turned = stored == torch.uint8 and x_TD.dtype == torch.bfloat16  # MXFP4
    # one token keeps its 16 bits, as everywhere: it waits for weights, not for products
    rounds = stored == torch.float8_e4m3fn and num_tokens > 1 and x_TD.itemsize == 2 and not limit
    rows_x: Tensor | Fp8Rows = x_TD
    if turned:
        rows_x = moe_packed.turn(x_TD)
    elif rounds:
        rows_x = fp8_quantize.quantize(x_TD, Rounding(moe_packed.GROUP))
    both = product(rows_x, gate_up_EID, gate_up_scale, shared=top_k, bias_EO=gate_up_bias_EI)
    if rounds:
        gated: Tensor | Fp8Rows = fp8_quantize.quantize(both, Rounding(moe_packed.GROUP), gate="silu")
    else:
        gated = _gate(both, limit, alpha, turned=turned)
    made = product(gated, down_EDI, down_scale, shared=1, bias_EO=down_bias_ED, weights=weights_TK)
    block = min(1024, tuning.next_power_of_two(width))
    _sum_kernel[(num_tokens, triton.cdiv(width, block))](
        made, ids_TK, out_TD, width, TOP_K=top_k, BLOCK=block, num_warps=4, **tuning.overlap(x_TD.device)
    )
    return out_TD
