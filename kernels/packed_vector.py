"""The product of one token with weights of 4 or 8 bits, for Hopper: a ring that is filled before others are done.

Meaning: `packed_reference.linear`. A program takes whole tiles of 16 rows after each other. The copy engine brings the
words of the next PLACES steps, of whichever tile they are, into shared memory, the first of them while kernels before
this one still run. A step is BLOCKS blocks of each warp: words become BASE + q in registers that the tensor cores take
as they are, with the token in all eight columns; (BASE + zero) times the sum of a block's inputs goes off it. Warps add
up at the end of a tile. Rows of gates and of their ups follow each other in one program.

What is taken little of, registers and shared memory, is what lets the kernel after this one begin to fetch.
"""

from functools import cache

import torch
from torch import Tensor
from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.packed_parts import (
    BASE_BF16,
    BASE_FP16,
    BOTH_BF16,
    BOTH_FP16,
    BOTH_OPERANDS,
    UNIT_BF16,
    UNIT_FP16,
    UNIT_OPERANDS,
    scale_of,
    zero_of,
)
from argosy.kernels.packed_reference import ROWS, PackedWeight

copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.9 calls it otherwise
GROUP = 128


@constexpr_function
def _rows_of(first: int, last: int) -> list[list[int]]:
    """Steps by powers of two along the rows, for a layout."""
    found = []
    while first < last:
        found.append([first, 0])
        first *= 2
    return found


@gluon.jit
def _ask(
    words_desc, pairs_desc, words_smem, pairs_smem, full, slot, item, step, steps, num_blocks, num_tiles, count,
    OWN: gl.constexpr, PLANES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Begin to fetch a step of the program's item into a place."""
    tile = _tile(item, num_tiles, GATED)
    block = (tile * num_blocks + step * OWN) * PLANES
    here = full.index(slot)
    mbarrier.expect(here, OWN * PLANES * (1024 + 64), pred=item < count)
    copy_in(words_desc, [block * 2, 0], here, words_smem.index(slot), pred=item < count)
    copy_in(pairs_desc, [block, 0], here, pairs_smem.index(slot), pred=item < count)


@gluon.jit
def _tile(item, num_tiles, GATED: gl.constexpr):
    """Which tile a program's item is."""
    if GATED:
        return gl.program_id(0) + item // 2 * gl.num_programs(0) + item % 2 * (num_tiles // 2)
    else:
        return gl.program_id(0) + item * gl.num_programs(0)


@gluon.jit
def vector_kernel(
    words_desc, pairs_desc, x_ptr, bias_ptr, residual_ptr, out_ptr, num_tiles, num_blocks, num_outputs,
    PLANES: gl.constexpr, W: gl.constexpr, BLOCKS: gl.constexpr, PLACES: gl.constexpr, HALF_SCALES: gl.constexpr,
    FP16: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr, RESIDUAL: gl.constexpr, EARLY: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """`x_ptr`: int32, a pair of inputs each. A block is 128 inputs, two units."""
    T: gl.constexpr = out_ptr.dtype.element_ty
    BASE: gl.constexpr = -128.0 if PLANES == 2 else BASE_FP16 if FP16 else BASE_BF16
    OWN: gl.constexpr = W * BLOCKS
    words_in: gl.constexpr = gl.BlockedLayout([2 * BLOCKS, 4], [1, 32], [W, 1], [1, 0])
    lanes_in: gl.constexpr = gl.BlockedLayout([BLOCKS, 1], [1, 32], [W, 1], [1, 0])
    wide: gl.constexpr = gl.BlockedLayout([BLOCKS, 1, 1, 1], [1, 8, 2, 2], [W, 1, 1, 1], [3, 2, 1, 0])
    halves_in: gl.constexpr = gl.BlockedLayout([2 * BLOCKS * PLANES, 4], [1, 32], [W, 1], [1, 0])
    pairs_in: gl.constexpr = gl.DistributedLinearLayout(
        _rows_of(1, BLOCKS * PLANES), [[0, 8], [0, 0], [0, 1], [0, 2], [0, 4]],
        _rows_of(BLOCKS * PLANES, OWN * PLANES), [], [OWN * PLANES, 16],
    )  # fmt: skip
    words_smem = gl.allocate_shared_memory(gl.int32, [PLACES, 2 * OWN * PLANES, 128], words_desc.layout)
    pairs_smem = gl.allocate_shared_memory(gl.int32, [PLACES, OWN * PLANES, 16], pairs_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(full.index(i), count=1)
    steps = num_blocks // OWN
    if GATED:
        count = 2 * ((num_tiles // 2 - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0))
    else:
        count = (num_tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    next_item = 0
    next_step = 0
    for i in gl.static_range(PLACES):
        _ask(
            words_desc, pairs_desc, words_smem, pairs_smem, full, i, next_item, next_step, steps, num_blocks, num_tiles,
            count, OWN, PLANES, GATED,
        )  # fmt: skip
        next_step += 1
        wraps = next_step == steps
        next_item = gl.where(wraps, next_item + 1, next_item)
        next_step = gl.where(wraps, 0, next_step)
    if PDL:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    unit = gl.arange(0, 2 * OWN, gl.SliceLayout(1, words_in))
    place = gl.arange(0, 128, gl.SliceLayout(0, words_in))
    x_here = x_ptr + (unit * 32)[:, None] + (place % 4 * 4 + place // 4 % 4)[None, :]
    lane = gl.arange(0, 32, gl.SliceLayout(0, lanes_in))
    is_lower = (lane % 2 == 1)[None, :]
    nothing = gl.zeros([OWN, 8, 2, 2], gl.int32, wide)
    gate = gl.zeros([32], gl.float32, gl.SliceLayout(0, lanes_in))
    slot = 0
    phase = 0
    for item in range(count):
        acc = gl.zeros([OWN, 32], gl.float32, lanes_in)
        for step in range(steps):
            xa = gl.load(x_here + step * (OWN * 64))
            xb = gl.load(x_here + (step * (OWN * 64) + 16))
            mbarrier.wait(full.index(slot), phase)
            words = words_smem.index(slot).load(halves_in)
            pairs = pairs_smem.index(slot).load(pairs_in)
            _ask(
                words_desc, pairs_desc, words_smem, pairs_smem, full, slot, next_item, next_step, steps, num_blocks,
                num_tiles, count, OWN, PLANES, GATED,
            )  # fmt: skip
            next_step += 1
            wraps = next_step == steps
            next_item = gl.where(wraps, next_item + 1, next_item)
            next_step = gl.where(wraps, 0, next_step)
            slot += 1
            phase = gl.where(slot == PLACES, phase ^ 1, phase)
            slot = gl.where(slot == PLACES, 0, slot)
            if PLANES == 1:
                source: gl.constexpr = UNIT_FP16 if FP16 else UNIT_BF16
                part, total = gl.inline_asm_elementwise(
                    source, UNIT_OPERANDS, [words, xa, xb], dtype=(gl.float32, gl.float32), is_pure=False, pack=4
                )
                scale, zero = _scale_and_zero(pairs, nothing, OWN, lanes_in, wide, HALF_SCALES)
            else:
                both: gl.constexpr = BOTH_FP16 if FP16 else BOTH_BF16
                low, high = gl.split(gl.permute(gl.reshape(words, [OWN, 2, 2, 128]), [0, 2, 3, 1]))
                low = gl.convert_layout(gl.reshape(low, [2 * OWN, 128]), words_in, assert_trivial=True)
                high = gl.convert_layout(gl.reshape(high, [2 * OWN, 128]), words_in, assert_trivial=True)
                part, total = gl.inline_asm_elementwise(
                    both, BOTH_OPERANDS, [low, xa, xb, high], dtype=(gl.float32, gl.float32), is_pure=False, pack=4
                )
                low_pairs, high_pairs = gl.split(gl.permute(gl.reshape(pairs, [OWN, 2, 16]), [0, 2, 1]))
                scale, zero = _scale_and_zero(low_pairs, nothing, OWN, lanes_in, wide, HALF_SCALES)
                _, over = _scale_and_zero(high_pairs, nothing, OWN, lanes_in, wide, HALF_SCALES)
                zero += 16 * over
            upper, lower = _sums(part, OWN, lanes_in)
            total, _ = _sums(total, OWN, lanes_in)
            acc += scale * (gl.where(is_lower, lower, upper) - (zero + BASE) * total)
        y = gl.sum(acc, 0)
        tile = _tile(item, num_tiles, GATED)
        row = lane // 4 + 8 * (lane % 2)
        if BIAS:
            y += gl.load(bias_ptr + gl.minimum(tile * 16 + row, num_outputs * (2 if GATED else 1) - 1)).to(gl.float32)
        if GATED:
            out = gate * (1.0 / (1.0 + gl.exp(-gate))) * y
            to = (tile - num_tiles // 2) * 16 + row
            kept = (to < num_outputs) & (lane % 4 < 2) & (item % 2 == 1)
            gate = y
        else:
            out = y
            to = tile * 16 + row
            kept = (to < num_outputs) & (lane % 4 < 2)
        if RESIDUAL:
            out += gl.load(residual_ptr + to, kept, other=0.0).to(gl.float32)
            gl.store(residual_ptr + to, out.to(T), kept)
        else:
            gl.store(out_ptr + to, out.to(T), kept)


@gluon.jit
def _scale_and_zero(
    pairs, nothing, OWN: gl.constexpr, lanes_in: gl.constexpr, wide: gl.constexpr, HALF_SCALES: gl.constexpr
):  # fmt: skip
    """Of a lane's row: the upper one for even lanes. [OWN, 32] each."""
    own = gl.permute(gl.reshape(pairs, [OWN, 2, 8]), [0, 2, 1])
    own = gl.convert_layout(own, gl.SliceLayout(2, wide), assert_trivial=True)
    own = gl.reshape(own[:, :, None, :] + nothing, [OWN, 32])
    own = gl.convert_layout(own, lanes_in, assert_trivial=True)
    return scale_of(own, HALF_SCALES), zero_of(own, HALF_SCALES)


@gluon.jit
def _sums(part, OWN: gl.constexpr, lanes_in: gl.constexpr):
    """(upper row, lower row) of a lane's first column, over both units of each block: [OWN, 32] each."""
    first, second = gl.split(gl.permute(gl.reshape(part, [OWN, 2, 32, 2, 2]), [0, 2, 3, 4, 1]))
    column, _ = gl.split(first + second)
    upper, lower = gl.split(column)
    return (
        gl.convert_layout(upper, lanes_in, assert_trivial=True),
        gl.convert_layout(lower, lanes_in, assert_trivial=True),
    )


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(x_TI: Tensor, weight: PackedWeight) -> bool:
    """Whether these can be multiplied here: one token, groups of 128 that eight warps can share evenly."""
    return (
        x_TI.is_cuda
        and x_TI.shape[0] == 1
        and x_TI.element_size() == 2
        and x_TI.data_ptr() % 4 == 0
        and weight.group == GROUP
        and weight.num_inputs % (8 * GROUP) == 0
        and _is_hopper(x_TI.device)
    )


def linear(
    x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, residual_TO: Tensor | None, gated: bool, out_TO: Tensor,
    sizes: tuning.Sizes,
) -> Tensor:  # fmt: skip
    """x W^T + bias, gated, added to the residual, into `out_TO`. Ask `takes` first.

    `sizes`: warps (4, 8 or 16), blocks (of a warp and step), places (of the ring), early, per_sm (programs).
    """
    words, pairs = weight.words_MUW, weight.pairs_MKR2
    own = sizes["warps"] * sizes["blocks"]
    blocks = weight.num_inputs // GROUP
    assert blocks % own == 0
    tiles = words.shape[0]
    programs = min(tuning.device_facts(x_TI.device).num_sms * sizes.get("per_sm", 1), tiles // 2 if gated else tiles)
    planes, flat = weight.planes, gl.NVMMASharedLayout(0, 32, 2)
    vector_kernel[(programs,)](
        TensorDescriptor.from_tensor(words.view(-1, 128), [2 * own * planes, 128], flat),
        TensorDescriptor.from_tensor(pairs.view(torch.int32).view(-1, ROWS), [own * planes, ROWS], flat),
        x_TI.view(torch.int32), out_TO if bias_O is None else bias_O, out_TO, out_TO, tiles, blocks, out_TO.shape[1],
        PLANES=planes, W=sizes["warps"], BLOCKS=sizes["blocks"], PLACES=sizes["places"],
        HALF_SCALES=pairs.dtype == torch.float16, FP16=x_TI.dtype == torch.float16, BIAS=bias_O is not None,
        GATED=gated, RESIDUAL=residual_TO is not None, EARLY=bool(sizes.get("early", 1)), num_warps=sizes["warps"],
        **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO
