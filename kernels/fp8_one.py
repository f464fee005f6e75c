"""Products of one token with e4m3 weights, rounded where it comes in: no launch but the product's own.

Meaning: `fp8_reference.norm_and_quantize` (or `quantize_rows`) and then `linear`, with scales by row; the norm's input
may be a residual and what is still to be added to it, as pieces of a sum. As in `fp8_ring`, one warp fetches weights by
the copy engine before the kernel before this one is done, and both sides go to the tensor cores from shared memory.
Every program rounds the token for itself, since that takes less than a launch of its own. The tensor cores multiply
eight tokens at least: seven are whatever lies there, and nobody looks at their sums.

`pieces` of the inputs are multiplied by programs of their own, and their sums are left to the next product.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.fp8_reference import Fp8Weight
from argosy.kernels.fp8_ring import copy_in, is_hopper, multiply_place, next_place, wait_for_all
from argosy.kernels.stream_parts import reinterpret

ROWS = gl.constexpr(64)
TOKENS = gl.constexpr(8)
MOST_OWN = 8192  # inputs of a program, of 8 bytes each


@gluon.jit
def _fetch(
    w_desc, w_smem, full, empty, piece, first_tile, tile_step, num_tiles, num_outputs,
    OWN: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr, EARLY: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """EARLY: the kernel behind may start 1 at once, else with the last weights."""
    BLOCKS: gl.constexpr = OWN // WIDTH
    if PDL and EARLY == 1:
        gdc_launch_dependents()
    count = (num_tiles - first_tile + tile_step - 1) // tile_step * BLOCKS
    row = first_tile * ROWS
    block = 0
    slot = 0
    phase = 1
    for n in range(count):
        if n >= STAGES:
            mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), HALVES * ROWS * WIDTH)
        for half in gl.static_range(HALVES):
            copy_in(
                w_desc, [row + half * num_outputs, piece * OWN + block * WIDTH], full.index(slot),
                w_smem.index(slot * HALVES + half),
            )  # fmt: skip
        block += 1
        wraps = block == BLOCKS
        row = gl.where(wraps, row + tile_step * ROWS, row)
        block = gl.where(wraps, 0, block)
        slot, phase = next_place(slot, phase, STAGES)
    if PDL and EARLY != 1:
        gdc_launch_dependents()


@gluon.jit
def _load(
    x_ptr, parts_ptr, norm_ptr, kept_ptr, column, stride_part,
    INPUTS: gl.constexpr, PARTS: gl.constexpr, NORM: gl.constexpr, KEEPS: gl.constexpr,
):  # fmt: skip
    """(inputs with what is added to them, float32; the same times the norm's weight)."""
    inside = column < INPUTS
    x = gl.load(x_ptr + column, mask=inside, other=0.0, cache_modifier=".cg").to(gl.float32)
    if PARTS > 0:
        T: gl.constexpr = x_ptr.dtype.element_ty
        delta = gl.load(parts_ptr + column, mask=inside, other=0.0, cache_modifier=".cg")
        for part in gl.static_range(1, PARTS):
            delta += gl.load(parts_ptr + part * stride_part + column, mask=inside, other=0.0, cache_modifier=".cg")
        total = (x + delta.to(T).to(gl.float32)).to(T)
        if KEEPS:
            gl.store(kept_ptr + column, total, mask=inside & (gl.program_id(0) == 0))
        x = total.to(gl.float32)
    if NORM:
        return x, x * gl.load(norm_ptr + column, mask=inside, other=0.0).to(gl.float32)
    else:
        return x, x


@gluon.jit
def _bring(
    x_ptr, parts_ptr, norm_ptr, kept_ptr, x_smem, piece, stride_part, eps,
    INPUTS: gl.constexpr, OWN: gl.constexpr, OWN_POWER: gl.constexpr, PARTS: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """This program's inputs to shared memory, rounded; gives their scale."""
    CHUNK: gl.constexpr = OWN_POWER if OWN == INPUTS else 4096
    CHUNKS: gl.constexpr = (INPUTS + CHUNK - 1) // CHUNK
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    own_column = gl.arange(0, OWN_POWER, layout)
    column = gl.arange(0, CHUNK, layout)
    squares = gl.zeros([CHUNK], gl.float32, layout)
    most = gl.zeros([CHUNK], gl.float32, layout)
    for chunk in gl.static_range(CHUNKS):
        x, weighed = _load(
            x_ptr, parts_ptr, norm_ptr, kept_ptr, chunk * CHUNK + column, stride_part, INPUTS, PARTS, NORM, True
        )
        squares += x * x
        most = gl.maximum(most, gl.abs(weighed))
    length = 1.0
    if NORM:
        length = 1.0 / gl.sqrt(gl.sum(squares, 0) / INPUTS + eps)
    scale = gl.maximum(gl.max(most, 0) * length / 448.0, 1e-10)
    if OWN != INPUTS:
        _, weighed = _load(
            x_ptr, parts_ptr, norm_ptr, kept_ptr, piece * OWN + own_column, stride_part, INPUTS, PARTS, NORM, False
        )
    factor = length / scale
    rounded = gl.minimum(gl.maximum(weighed * factor, -448.0), 448.0).to(x_smem.dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    lines = reinterpret(x_smem, x_smem.dtype, [OWN_POWER // 128, 1024], flat)  # a token's 128 in each line
    lines.slice(0, 128, dim=1).store(gl.reshape(rounded, [OWN_POWER // 128, 128]))
    fence_async_shared()
    wait_for_all()
    return scale


@gluon.jit
def _multiply(
    x_ptr, parts_ptr, norm_ptr, kept_ptr, w_scale_ptr, bias_ptr, out_ptr, x_smem, w_smem, full, empty,
    piece, first_tile, tile_step, num_tiles, num_outputs, stride_part, eps,
    INPUTS: gl.constexpr, OWN: gl.constexpr, OWN_POWER: gl.constexpr, PARTS: gl.constexpr, NORM: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr, PIECES: gl.constexpr, BIAS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    acc_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, acc_in))
    is_first = gl.arange(0, TOKENS, gl.SliceLayout(0, acc_in)) == 0
    if PDL:
        gdc_wait()
    scale = _bring(
        x_ptr, parts_ptr, norm_ptr, kept_ptr, x_smem, piece, stride_part, eps, INPUTS, OWN, OWN_POWER, PARTS, NORM
    )
    slot = 0
    phase = 0
    for tile in range(first_tile, num_tiles, tile_step):
        here = tile * ROWS + row
        safe = gl.minimum(here, num_outputs - 1)
        w_scale = gl.load(w_scale_ptr + safe) * scale
        up_scale = w_scale
        if HALVES == 2:
            up_scale = gl.load(w_scale_ptr + num_outputs + safe) * scale
        acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_in)
        up = gl.zeros([ROWS, TOKENS], gl.float32, acc_in)
        for block in range(OWN // WIDTH):
            acc, up = multiply_place(acc, up, x_smem, w_smem, full, empty, block, slot, phase, HALVES)
            slot, phase = next_place(slot, phase, STAGES)
        y = acc * w_scale[:, None]
        if BIAS:
            y += gl.load(bias_ptr + safe).to(gl.float32)[:, None]
        if HALVES == 2:
            other = up * up_scale[:, None]
            if BIAS:
                other += gl.load(bias_ptr + num_outputs + safe).to(gl.float32)[:, None]
            y = y / (1.0 + gl.exp(-y)) * other
        to = out_ptr + here[:, None] + gl.zeros([ROWS, TOKENS], gl.int32, acc_in)
        if PIECES > 1:
            to += piece * num_outputs
        gl.store(to, y.to(out_ptr.dtype.element_ty), (here < num_outputs)[:, None] & is_first[None, :])


@gluon.jit(do_not_specialize=["num_tiles", "num_outputs", "stride_part"])
def one_kernel(
    w_desc, x_ptr, parts_ptr, norm_ptr, kept_ptr, w_scale_ptr, bias_ptr, out_ptr, num_tiles, num_outputs, stride_part,
    eps,
    INPUTS: gl.constexpr, OWN: gl.constexpr, OWN_POWER: gl.constexpr, PARTS: gl.constexpr, NORM: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr, PIECES: gl.constexpr, BIAS: gl.constexpr,
    EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    x_smem = gl.allocate_shared_memory(w_desc.dtype, [OWN_POWER // WIDTH, TOKENS, WIDTH], w_desc.layout)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * HALVES, ROWS, WIDTH], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    piece = gl.program_id(0) % PIECES
    first_tile = gl.program_id(0) // PIECES
    tile_step = gl.num_programs(0) // PIECES
    gl.warp_specialize([
        (_multiply, (
            x_ptr, parts_ptr, norm_ptr, kept_ptr, w_scale_ptr, bias_ptr, out_ptr, x_smem, w_smem, full, empty,
            piece, first_tile, tile_step, num_tiles, num_outputs, stride_part, eps, INPUTS, OWN, OWN_POWER, PARTS, NORM,
            WIDTH, STAGES, HALVES, PIECES, BIAS, PDL,
        )),
        (_fetch, (
            w_desc, w_smem, full, empty, piece, first_tile, tile_step, num_tiles, num_outputs, OWN, WIDTH, STAGES,
            HALVES, EARLY, PDL,
        )),
    ], [1], [32])  # fmt: skip


def takes(weight: Fp8Weight, sizes: tuning.Sizes) -> bool:
    """Whether one token can be multiplied so: scales by row, and inputs of whole places of the ring for each piece."""
    w_OI, pieces = weight.values_OI, sizes["pieces"]
    return (
        w_OI.is_cuda
        and weight.block is None
        and w_OI.shape[1] % (sizes["width"] * pieces) == 0
        and w_OI.shape[1] // pieces <= MOST_OWN
        and w_OI.shape[0] % 128 == 0
        and w_OI.stride(1) == 1
        and w_OI.data_ptr() % 16 == 0
        and is_hopper(w_OI.device)
    )


def linear(
    x_1I: Tensor,
    weight: Fp8Weight,
    bias_O: Tensor | None,
    sizes: tuning.Sizes,
    *,
    norm: tuple[Tensor, float] | None = None,
    parts_P1I: Tensor | None = None,
    kept_1I: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """norm(x + sum(parts)) rounded, times W^T, + bias, gated: [1, O]; float32 [P, 1, O] with `sizes["pieces"]` P > 1.

    `kept_1I`: where x + sum(parts) goes, not x itself, which others still read. Ask `takes` first. `sizes`: pieces,
    width (128 or 256) and stages of the ring, programs (0: one for each tile and piece), early (1: the kernel
    behind may start at once, else with the last weights).
    """
    w_OI, pieces = weight.values_OI, sizes["pieces"]
    num_rows, num_inputs = w_OI.shape
    num_outputs = num_rows // 2 if gated else num_rows
    assert not gated or (pieces == 1 and num_outputs % 64 == 0)
    assert bias_O is None or pieces == 1
    assert (parts_P1I is None) == (kept_1I is None)
    device, own, halves = x_1I.device, num_inputs // pieces, 1 + gated
    tiles = triton.cdiv(num_outputs, 64)
    programs = min(tiles, sizes["programs"] or tiles) * pieces
    if pieces > 1:
        out = torch.empty((pieces, 1, num_outputs), dtype=torch.float32, device=device)
    else:
        out = torch.empty((1, num_outputs), dtype=x_1I.dtype, device=device)
    one_kernel[(programs,)](
        TensorDescriptor.from_tensor(w_OI, [64, sizes["width"]], gl.NVMMASharedLayout(128, 8, 2)),
        x_1I, out if parts_P1I is None else parts_P1I, out if norm is None else norm[0],
        out if kept_1I is None else kept_1I, weight.scale, out if bias_O is None else bias_O, out, tiles, num_outputs,
        num_inputs, 0.0 if norm is None else norm[1],
        INPUTS=num_inputs, OWN=own, OWN_POWER=tuning.next_power_of_two(own),
        PARTS=0 if parts_P1I is None else len(parts_P1I), NORM=norm is not None, WIDTH=sizes["width"],
        STAGES=sizes["stages"], HALVES=halves,
        PIECES=pieces, BIAS=bias_O is not None, EARLY=sizes.get("early", 0), num_warps=4,
        maxnreg=sizes.get("registers", 80), **tuning.overlap(device),
    )  # fmt: skip
    return out
