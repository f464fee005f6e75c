"""A linear layer for 2 to 64 tokens on Hopper's tensor cores, its first weights on their way before the wait.

Meaning: `reference.fused_linear`, without a norm, and `fp8_reference.linear` with scales by row. As in `gemv_split` the
weight is the left side of the product, from memory to the tensor cores without a register in between, and what
`gemv_ahead` says of weights, which nobody has to be waited for, holds here. A program has one warp that fetches and
four that multiply:

    fetch      by the copy engine, as far ahead as the ring has places: 128 bytes of a tile's weight rows and of all
               tokens. Of the first places the weights come before the kernel before is done, the tokens when it is
    multiply   one product is under way while the next place is waited for

Work is cut into such blocks of columns of a tile: a program takes `per` of them after each other, whichever tiles they
belong to, so that few tiles keep all multiprocessors at work. Tiles that several programs share are added up by the one
that is done last, in the order of the inputs. Written in Triton's lower language (Gluon): in Triton all warps of a
program wait together. T = tokens, I = inputs, O = weight rows.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import group_push, tuning
from argosy.kernels.outlet import Outlet

# Triton 3.9 calls them otherwise than 3.6
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
wait_for_all = getattr(gl, "thread_barrier", None) or gl.barrier
INBOX_ROWS = gl.constexpr(group_push.MAX_ROWS)
LINE = 128  # bytes of a row in a place of the ring
MAX_TOKENS = 64
FETCH_REGISTERS = 24
# Of all threads while they start (those that multiply then share what those that fetch give back): few enough that
# programs of the kernels before and after have room on the same multiprocessor.
START_REGISTERS, MORE_REGISTERS, MANY_SUMS = 64, 96, 2048


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    """The next place of the ring, and its phase."""
    slot += 1
    wraps = slot == STAGES
    return gl.where(wraps, 0, slot), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _before(slot, STAGES: gl.constexpr):
    """The place before. (A name for it would not be carried from turn to turn where it begins as the same value.)"""
    return gl.where(slot == 0, STAGES - 1, slot - 1)


@gluon.jit
def _ask(
    w_desc, w_smem, full, slot, tile, block, num_outputs,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """A place's weights: of the tile's rows, or of the gate rows and the up rows of half as many outputs."""
    if GATED:
        HALF: gl.constexpr = ROWS // 2
        column = block * COLUMNS
        copy_in(w_desc, [tile * HALF, column], full.index(slot), w_smem.index(slot).slice(0, HALF, 0))
        copy_in(w_desc, [tile * HALF + num_outputs, column], full.index(slot), w_smem.index(slot).slice(HALF, HALF, 0))
    else:
        copy_in(w_desc, [tile * ROWS, block * COLUMNS], full.index(slot), w_smem.index(slot))


@gluon.jit
def _fetch(
    x_desc, w_desc, x_smem, w_smem, full, empty, per, total, num_blocks, num_outputs,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
    EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = (ROWS + TOKENS) * 128
    begin = gl.program_id(0) * per
    end = gl.minimum(begin + per, total)
    ready = gl.minimum(end - begin, STAGES)
    for n in range(ready):
        mbarrier.expect(full.index(n), BYTES)
        tile = (begin + n) // num_blocks
        _ask(w_desc, w_smem, full, n, tile, begin + n - tile * num_blocks, num_outputs, ROWS, COLUMNS, GATED)
    if PDL:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    slot = 0
    phase = 1
    tile = begin // num_blocks
    block = begin - tile * num_blocks
    for n in range(end - begin):
        if n >= ready:
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), BYTES)
            _ask(w_desc, w_smem, full, slot, tile, block, num_outputs, ROWS, COLUMNS, GATED)
        copy_in(x_desc, [0, block * COLUMNS], full.index(slot), x_smem.index(slot))
        block += 1
        ends = block == num_blocks  # no division: one warp does all of this
        tile = gl.where(ends, tile + 1, tile)
        block = gl.where(ends, 0, block)
        slot, phase = _next(slot, phase, STAGES)
    if PDL and not EARLY:
        gdc_launch_dependents()  # all of this program's weights are asked for


@gluon.jit
def _send(
    made, turn, tile, num_tokens, num_outputs, bases_ptr, inbox, rank,
    TOKENS: gl.constexpr, OUTPUTS: gl.constexpr, WORLD: gl.constexpr, SCATTER: gl.constexpr,
):  # fmt: skip
    """A tile's sums to all ranks or to those who sum the rows, two numbers and their turn in a word: `group_push`."""
    bits = gl.reshape(made.to(gl.int16, bitcast=True).to(gl.int64) & 0xFFFF, [OUTPUTS // 2, 2, TOKENS])
    low, high = gl.split(gl.permute(bits, (0, 2, 1)))
    in_words: gl.constexpr = low.type.layout
    word = low | (high << 16)
    pair = tile * (OUTPUTS // 2) + gl.arange(0, OUTPUTS // 2, gl.SliceLayout(1, in_words))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, in_words))
    word |= (gl.convert_layout(turn, gl.SliceLayout(0, in_words)).to(gl.int64) << 32)[None, :]
    num_pairs = num_outputs // 2
    place = ((rank * INBOX_ROWS + token) * num_pairs)[None, :] + pair[:, None]
    kept = (token < num_tokens)[None, :] & (pair < num_pairs)[:, None]
    if SCATTER:
        box = gl.load(bases_ptr + token % WORLD).to(gl.pointer_type(gl.int64)) + inbox
        gl.store(box[None, :] + place, word, mask=kept)
    else:
        for peer in gl.static_range(WORLD):
            box = gl.load(bases_ptr + peer).to(gl.pointer_type(gl.int64)) + inbox
            gl.store(box + place, word, mask=kept)


@gluon.jit
def _multiply(
    out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, part_ptr, counter_ptr, bases_ptr, turn_ptr, inbox, rank, x_smem,
    w_smem, full, empty, per, total, num_blocks, num_tokens, num_outputs, stride_out,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr, BIAS: gl.constexpr,
    GATED: gl.constexpr, RESIDUAL: gl.constexpr, SHARED: gl.constexpr, WORLD: gl.constexpr,
    SCATTER: gl.constexpr,
):  # fmt: skip
    STEP: gl.constexpr = 256 // x_smem.dtype.primitive_bitwidth
    acc_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, STEP])
    out_in: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    OUTPUTS: gl.constexpr = ROWS // 2 if GATED else ROWS
    program = gl.program_id(0)
    begin = program * per
    end = gl.minimum(begin + per, total)
    at = begin
    slot = 0
    phase = 0
    if WORLD:
        mbarrier.wait(full.index(0), 0)  # tokens have come, so all kernels before are done
        sent = gl.arange(0, TOKENS, gl.SliceLayout(0, out_in))
        turn = gl.load(turn_ptr + sent, mask=sent < num_tokens, other=0, cache_modifier=".cg") + 1
    while at < end:
        tile = at // num_blocks
        count = gl.minimum((tile + 1) * num_blocks, end) - at
        acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_in)
        for i in range(count):
            mbarrier.wait(full.index(slot), phase)
            acc = warpgroup_mma(w_smem.index(slot), x_smem.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(_before(slot, STAGES)), pred=i > 0)
            slot, phase = _next(slot, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(_before(slot, STAGES)))
        whole = count == num_blocks
        if SHARED and count < num_blocks:
            here = gl.arange(0, ROWS, gl.SliceLayout(1, acc_in))[:, None] * TOKENS
            here += gl.arange(0, TOKENS, gl.SliceLayout(0, acc_in))[None, :]
            own = program * 2 + (at > begin).to(gl.int32)
            gl.store(part_ptr + own.to(gl.int64) * (ROWS * TOKENS) + here, acc)
            wait_for_all()  # every thread's stores come before the one thread's release below
            first = tile * num_blocks // per
            final = ((tile + 1) * num_blocks - 1) // per
            if gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == final - first:
                gl.atomic_xchg(counter_ptr + tile, 0, sem="relaxed")  # ready for the next launch
                acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_in)
                for other in range(first, final + 1):  # .cg: past the first-level cache, which does not see others'
                    place = other * 2 + (other * per < tile * num_blocks).to(gl.int32)
                    acc += gl.load(part_ptr + place.to(gl.int64) * (ROWS * TOKENS) + here, cache_modifier=".cg")
                whole = count < num_blocks
        if whole:
            if SCALED:
                row = gl.minimum(tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, acc_in)), num_outputs - 1)
                token = gl.minimum(gl.arange(0, TOKENS, gl.SliceLayout(0, acc_in)), num_tokens - 1)
                acc *= gl.load(w_scale_ptr + row)[:, None] * gl.load(x_scale_ptr + token)[None, :]
            if BIAS:
                row = tile * OUTPUTS + gl.arange(0, ROWS, gl.SliceLayout(1, acc_in))
                if GATED:
                    up_row = gl.arange(0, ROWS, gl.SliceLayout(1, acc_in)) >= OUTPUTS
                    row = gl.where(up_row, gl.minimum(row - OUTPUTS, num_outputs - 1) + num_outputs, row)
                    row = gl.minimum(row, 2 * num_outputs - 1)
                else:
                    row = gl.minimum(row, num_outputs - 1)
                acc += gl.load(bias_ptr + row).to(gl.float32)[:, None]
            output = tile * OUTPUTS + gl.arange(0, OUTPUTS, gl.SliceLayout(1, out_in))
            token = gl.arange(0, TOKENS, gl.SliceLayout(0, out_in))
            to = out_ptr + (token.to(gl.int64) * stride_out)[None, :] + output[:, None]
            kept = (token < num_tokens)[None, :] & (output < num_outputs)[:, None]
            if GATED:  # a thread has both rows of an output
                gate, up = gl.split(gl.permute(gl.reshape(acc, [2, OUTPUTS, TOKENS]), [1, 2, 0]))
                y = gate / (1.0 + gl.exp2(gate * -1.4426950408889634)) * up
            else:
                y = acc
            if RESIDUAL:
                before = gl.load(to, mask=kept, other=0.0)
                y += gl.convert_layout(before, y.type.layout).to(gl.float32)
            made = gl.convert_layout(y.to(out_ptr.dtype.element_ty), out_in)
            if WORLD:
                _send(
                    made, turn, tile, num_tokens, num_outputs, bases_ptr, inbox, rank, TOKENS, OUTPUTS, WORLD, SCATTER
                )
            else:
                gl.store(to, made, mask=kept)
        at += count


@gluon.jit(do_not_specialize=["num_tokens", "per", "total", "rank"])
def _gemv_hopper_kernel(
    x_desc, w_desc, out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, part_ptr, counter_ptr, bases_ptr, turn_ptr, inbox,
    rank, per, total, num_blocks, num_tokens, num_outputs, stride_out,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
    BIAS: gl.constexpr, GATED: gl.constexpr, RESIDUAL: gl.constexpr, SHARED: gl.constexpr, WORLD: gl.constexpr,
    SCATTER: gl.constexpr, EARLY: gl.constexpr, FETCH_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TOKENS, COLUMNS], x_desc.layout)
    w_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, ROWS, COLUMNS], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize([
        (_multiply, (
            out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, part_ptr, counter_ptr, bases_ptr, turn_ptr, inbox, rank,
            x_smem, w_smem, full, empty, per, total, num_blocks, num_tokens, num_outputs, stride_out, ROWS, TOKENS,
            STAGES, SCALED, BIAS, GATED, RESIDUAL, SHARED, WORLD, SCATTER,
        )),
        (_fetch, (
            x_desc, w_desc, x_smem, w_smem, full, empty, per, total, num_blocks, num_outputs, ROWS, TOKENS, COLUMNS,
            STAGES, GATED, EARLY, PDL,
        )),
    ], [1], [FETCH_REGISTERS])  # fmt: skip


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether these can be multiplied here: up to 64 tokens in rows that the copy engine can fetch, whole blocks."""
    return (
        x_TI.is_cuda
        and x_TI.shape[0] <= MAX_TOKENS
        and x_TI.shape[1] * x_TI.element_size() % LINE == 0
        and x_TI.stride(0) * x_TI.element_size() % 16 == weight_OI.stride(0) * x_TI.element_size() % 16 == 0
        and x_TI.data_ptr() % 16 == weight_OI.data_ptr() % 16 == 0
        and _is_hopper(x_TI.device)
    )


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    out_TO: Tensor,
    sizes: tuning.Sizes,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    gated: bool = False,
    residual: bool = False,
    outlet: Outlet | None = None,
) -> Tensor:
    """x W^T (times `scales` of tokens and of weight rows, if e4m3) + bias; gated (`out_TO` is half as wide then),
    written or (`residual`) added to `out_TO`, or sent (`outlet`); one launch. Ask `takes` first.

    `sizes`: weight `rows` of a tile (64 or 128), places of the ring (`stages`), `programs` (0: one a tile; else so many
    share all work evenly), whether the successor may start at once (`early`) or when the last weights are asked for.
    """
    num_tokens, num_inputs = x_TI.shape
    num_outputs = weight_OI.shape[0] // 2 if gated else weight_OI.shape[0]
    rows, tokens = 128 if gated else sizes["rows"], max(16, tuning.next_power_of_two(num_tokens))
    columns = LINE // x_TI.element_size()
    blocks = num_inputs // columns
    assert scales is None or not gated
    tiles = triton.cdiv(num_outputs, rows // 2 if gated else rows)
    total = tiles * blocks
    per = triton.cdiv(total, sizes["programs"]) if sizes["programs"] and tiles <= tuning.MAX_COUNTERS else blocks
    programs = triton.cdiv(total, per)
    shared = per % blocks != 0
    part, counters = out_TO, out_TO
    if shared:
        part = torch.empty(programs * 2 * rows * tokens, dtype=torch.float32, device=x_TI.device)
        counters = tuning.counters(x_TI.device)
    where: tuple[Tensor, Tensor, int, int] = (out_TO, out_TO, 0, 0)
    if outlet is not None:
        assert num_outputs % 2 == 0
        assert not residual
        where = outlet.bases_W, outlet.counters, outlet.inbox_at // 8, outlet.rank
        outlet.sent = True
    layout = gl.NVMMASharedLayout(LINE, 8 * x_TI.element_size(), 2)
    x_scale, w_scale = scales or (out_TO, out_TO)
    _gemv_hopper_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_TI, [tokens, columns], layout),
        TensorDescriptor.from_tensor(weight_OI, [rows // 2 if gated else rows, columns], layout),
        out_TO, x_scale, w_scale, out_TO if bias_O is None else bias_O, part, counters, *where, per, total, blocks,
        num_tokens, num_outputs, out_TO.stride(0),
        ROWS=rows, TOKENS=tokens, COLUMNS=columns, STAGES=sizes["stages"], SCALED=scales is not None,
        BIAS=bias_O is not None, GATED=gated, RESIDUAL=residual, SHARED=shared,
        WORLD=0 if outlet is None else outlet.bases_W.shape[0], SCATTER=outlet is not None and outlet.scatter,
        EARLY=bool(sizes.get("early", 0)),
        FETCH_REGISTERS=FETCH_REGISTERS, num_warps=4,
        maxnreg=MORE_REGISTERS if rows * tokens > MANY_SUMS else START_REGISTERS, **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO
