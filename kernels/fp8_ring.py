"""Products of a few rounded tokens with e4m3 weights, whose weights are on their way before the tokens are there.

Meaning: `fp8_reference.linear` with scales by row. A program has four warps that multiply and one that fetches by the
copy engine, as far ahead as the ring has places: ROWS rows of WIDTH columns of the weight before the kernel before this
one is done, the tokens' columns behind its end. Both sides go from the ring to the tensor cores as they are, so that a
place is multiplied several times faster than memory fills it, and one token costs what eight cost.

Work is cut into blocks of WIDTH columns of a tile of rows; a program takes `per` of them after each other, whichever
tiles they belong to. Tiles that several programs share are added up by the one that is done last, in the order of the
inputs. Written in Triton's lower language.
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

from argosy.kernels import tuning
from argosy.kernels.fp8_reference import Fp8Rows, Fp8Weight

# Triton 3.9 calls them otherwise than 3.6
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
wait_for_all = getattr(gl, "thread_barrier", None) or gl.barrier
MAX_TOKENS = 32
RING_BYTES = 226 << 10  # of a multiprocessor's 227 KB for one program, less barriers and an atomic's answer
RUNS_HERE = triton.__version__.startswith(tuning.GLUON_VERSIONS)


@gluon.jit
def ring_of(
    x_desc, w_desc, ROWS: gl.constexpr, WIDTH: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """(places for tokens, for weights; barriers of those that are full, of those that are empty)."""
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TOKENS, WIDTH], x_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * HALVES, ROWS, WIDTH], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    return x_smem, w_smem, full, empty


@gluon.jit
def next_place(slot, phase, STAGES: gl.constexpr):
    """The next place of the ring, and its phase."""
    slot += 1
    wraps = slot == STAGES
    return gl.where(wraps, 0, slot), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def fetch(
    x_desc, w_desc, x_smem, w_smem, full, empty, per, total, num_blocks, num_outputs,
    ROWS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr, BYTES: gl.constexpr,
    EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """EARLY: the kernel behind may start 0 with this one's tokens, 1 at once, 2 with the last weights."""
    begin = gl.program_id(0) * per
    end = gl.minimum(begin + per, total)
    first_block = begin % num_blocks
    first_row = begin // num_blocks * ROWS
    ready = gl.minimum(end - begin, STAGES)
    columns = num_blocks * WIDTH
    if PDL and EARLY == 1:
        gdc_launch_dependents()
    row = first_row + 0
    column = first_block * WIDTH
    for n in range(ready):
        mbarrier.expect(full.index(n), BYTES)
        for half in gl.static_range(HALVES):
            copy_in(w_desc, [row + half * num_outputs, column], full.index(n), w_smem.index(n * HALVES + half))
        column += WIDTH
        wraps = column >= columns
        row = gl.where(wraps, row + ROWS, row)
        column = gl.where(wraps, 0, column)
    if PDL:
        gdc_wait()
        if EARLY == 0:
            gdc_launch_dependents()
    x_column = first_block * WIDTH
    for n in range(ready):
        copy_in(x_desc, [0, x_column], full.index(n), x_smem.index(n))
        x_column += WIDTH
        x_column = gl.where(x_column >= columns, 0, x_column)
    slot = 0
    phase = 0
    for _ in range(end - begin - ready):
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), BYTES)
        for half in gl.static_range(HALVES):
            copy_in(w_desc, [row + half * num_outputs, column], full.index(slot), w_smem.index(slot * HALVES + half))
        copy_in(x_desc, [0, column], full.index(slot), x_smem.index(slot))
        column += WIDTH
        wraps = column >= columns
        row = gl.where(wraps, row + ROWS, row)
        column = gl.where(wraps, 0, column)
        slot, phase = next_place(slot, phase, STAGES)
    if PDL and EARLY == 2:
        gdc_launch_dependents()


@gluon.jit
def multiply_place(acc, up, x_smem, w_smem, full, empty, place, slot, phase, HALVES: gl.constexpr):
    """(sums, sums of the ups) with the weights at `slot`, which is free afterwards, and the tokens at `place`."""
    mbarrier.wait(full.index(slot), phase)
    x = x_smem.index(place).permute((1, 0))
    acc = warpgroup_mma(w_smem.index(slot * HALVES), x, acc, is_async=True)
    if HALVES == 2:
        up = warpgroup_mma(w_smem.index(slot * HALVES + 1), x, up, is_async=True)
        acc, up = warpgroup_mma_wait(0, deps=[acc, up])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(slot))
    return acc, up


@gluon.jit
def _multiply(
    out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, part_ptr, counter_ptr, x_smem, w_smem, full, empty, per, total,
    num_blocks, num_tokens, num_outputs, stride_out,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr, SHARED: gl.constexpr,
    PIECES: gl.constexpr, HALVES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    AT_ONCE: gl.constexpr = 4
    acc_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    program = gl.program_id(0)
    begin = program * per
    end = gl.minimum(begin + per, total)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, acc_in))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, acc_in))
    if PDL:
        gdc_wait()
    x_scale = gl.load(x_scale_ptr + gl.minimum(token, num_tokens - 1))
    at = begin + 0
    slot = 0
    phase = 0
    while at < end:
        tile = at // num_blocks
        count = gl.minimum((tile + 1) * num_blocks, end) - at
        here = tile * ROWS + row
        safe = gl.minimum(here, num_outputs - 1)
        w_scale = gl.load(w_scale_ptr + safe)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_in)
        up = gl.zeros([ROWS, TOKENS], gl.float32, acc_in)
        for _ in range(count):
            acc, up = multiply_place(acc, up, x_smem, w_smem, full, empty, slot, slot, phase, HALVES)
            slot, phase = next_place(slot, phase, STAGES)
        whole = (count == num_blocks) | PIECES
        if SHARED and count < num_blocks:
            place = row[:, None] * TOKENS + token[None, :]
            own = program * 2 + (at > begin).to(gl.int32)
            gl.store(part_ptr + own.to(gl.int64) * (ROWS * TOKENS) + place, acc)
            wait_for_all()  # every thread's stores come before the one thread's release below
            first = tile * num_blocks // per
            last = ((tile + 1) * num_blocks - 1) // per
            if gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == last - first:
                gl.atomic_xchg(counter_ptr + tile, 0, sem="relaxed")  # ready for the next launch
                acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_in)
                for others in range(first, last + 1, AT_ONCE):  # .cg: past the first-level cache
                    for one in gl.static_range(AT_ONCE):
                        other = gl.minimum(others + one, last)
                        left = other * 2 + (other * per < tile * num_blocks).to(gl.int32)
                        share = gl.load(part_ptr + left.to(gl.int64) * (ROWS * TOKENS) + place, cache_modifier=".cg")
                        acc += gl.where(others + one <= last, share, 0.0)
                whole = count < num_blocks
        if whole:
            y = acc * w_scale[:, None] * x_scale[None, :]
            if BIAS:
                y += gl.load(bias_ptr + safe).to(gl.float32)[:, None]
            if HALVES == 2:
                other = up * gl.load(w_scale_ptr + num_outputs + safe)[:, None] * x_scale[None, :]
                if BIAS:
                    other += gl.load(bias_ptr + num_outputs + safe).to(gl.float32)[:, None]
                y = y / (1.0 + gl.exp(-y)) * other
            to = out_ptr + (token.to(gl.int64) * stride_out)[None, :] + here[:, None]
            if PIECES:
                to += (at - tile * num_blocks) // per * num_tokens * stride_out
            kept = (token < num_tokens)[None, :] & (here < num_outputs)[:, None]
            gl.store(to, y.to(out_ptr.dtype.element_ty), kept)
        at += count


@gluon.jit(do_not_specialize=["per", "total", "num_blocks", "num_tokens", "num_outputs", "stride_out"])
def ring_kernel(
    x_desc, w_desc, out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, part_ptr, counter_ptr, per, total, num_blocks,
    num_tokens, num_outputs, stride_out,
    ROWS: gl.constexpr, WIDTH: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr,
    SHARED: gl.constexpr, PIECES: gl.constexpr, HALVES: gl.constexpr, EARLY: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = (HALVES * ROWS + TOKENS) * WIDTH
    x_smem, w_smem, full, empty = ring_of(x_desc, w_desc, ROWS, WIDTH, TOKENS, STAGES, HALVES)
    gl.warp_specialize([
        (_multiply, (
            out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, part_ptr, counter_ptr, x_smem, w_smem, full, empty, per, total,
            num_blocks, num_tokens, num_outputs, stride_out, ROWS, TOKENS, STAGES, BIAS, SHARED,
            PIECES, HALVES, PDL,
        )),
        (fetch, (
            x_desc, w_desc, x_smem, w_smem, full, empty, per, total, num_blocks, num_outputs, ROWS, WIDTH, STAGES,
            HALVES, BYTES, EARLY, PDL,
        )),
    ], [1], [FETCH_REGISTERS])  # fmt: skip


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is a card with warp groups' products, and a Triton whose lower language is known."""
    return RUNS_HERE and torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(rows: Fp8Rows, weight: Fp8Weight, dtype: torch.dtype) -> bool:
    """Whether these can be multiplied here: a few tokens, scales by row, addresses that the copy engine can fetch."""
    x_TI, w_OI = rows.values_TI, weight.values_OI
    return (
        x_TI.is_cuda
        and 0 < x_TI.shape[0] <= MAX_TOKENS
        and weight.block is None
        and dtype in (torch.bfloat16, torch.float16)
        and all(v.stride(1) == 1 and v.stride(0) % 16 == 0 and v.data_ptr() % 16 == 0 for v in (x_TI, w_OI))
        and is_hopper(x_TI.device)
    )


def linear(
    rows: Fp8Rows,
    weight: Fp8Weight,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    sizes: tuning.Sizes,
    *,
    pieces: bool = False,
    gated: bool = False,
) -> Tensor:
    """x W^T + bias, and with `gated` silu(gate) times up of [gate | up]. Ask `takes` first.

    `sizes`: rows (64 or 128) and width (128 or 256) of a place in the ring, stages, programs (0: each takes one tile;
    else so many share all work evenly), early (when the kernel behind may start, `fetch`), pieces: into how many the
    inputs are cut. With `pieces` their sums are not added up: float32 [pieces, T, O], of no bias.
    """
    x_TI, w_OI = rows.values_TI, weight.values_OI
    num_tokens, num_inputs = x_TI.shape
    halves, height, width = 1 + gated, sizes["rows"], sizes["width"]
    num_outputs = w_OI.shape[0] // halves
    tokens = -(-num_tokens // 8) * 8
    blocks, tiles = triton.cdiv(num_inputs, width), triton.cdiv(num_outputs, height)
    total = tiles * blocks
    count = 1 if gated else sizes.get("pieces", 1)
    if count > 1 and blocks % count == 0:
        per = blocks // count
    else:
        per = triton.cdiv(total, sizes["programs"]) if sizes["programs"] and not gated else blocks
    if tiles > tuning.MAX_COUNTERS:
        per = blocks
    pieces = pieces and bias_O is None and per < blocks and blocks % per == 0
    programs = triton.cdiv(total, per)
    shared = per % blocks != 0 and not pieces
    if pieces:
        out = torch.empty((blocks // per, num_tokens, num_outputs), dtype=torch.float32, device=x_TI.device)
    else:
        out = torch.empty((num_tokens, num_outputs), dtype=dtype, device=x_TI.device)
    part, counters = out, out
    if shared:
        part = torch.empty(programs * 2 * height * tokens, dtype=torch.float32, device=x_TI.device)
        counters = tuning.counters(x_TI.device)
    stages = min(sizes["stages"], RING_BYTES // ((halves * height + tokens) * width))
    layout = gl.NVMMASharedLayout(128, 8, 2)
    ring_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_TI, [tokens, width], layout),
        TensorDescriptor.from_tensor(w_OI, [height, width], layout),
        out, rows.scale_TG, weight.scale, out if bias_O is None else bias_O, part, counters, per, total, blocks,
        num_tokens, num_outputs, out.stride(-2),
        ROWS=height, WIDTH=width, TOKENS=tokens, STAGES=stages, BIAS=bias_O is not None, SHARED=shared,
        PIECES=pieces, HALVES=halves, EARLY=sizes.get("early", 0), FETCH_REGISTERS=32, num_warps=4,
        maxnreg=sizes.get("registers", 80), **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out
