"""The product of one token with weights of 4 or 8 bits, for Hopper: every warp for itself, as little as can be held.

Meaning: `packed_reference.linear`. A program takes a tile of 16 rows (with a gate: that and the one of its ups), its
warps share out the inputs. Words, scales and the token come from memory right into the registers that the tensor cores
take, words a step before they are needed, the first of them while the kernel before this one still runs. The token is
in all eight columns of the product; (BASE + zero) times the sum of a block's inputs goes off it. Nothing passes shared
memory until warps add up at the end, so no warp waits for another.

`packed_few` brings its tokens through shared memory, eight of them where one is asked for. That is as fast where a
weight has many rows, and not where it has few.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.packed_parts import (
    BASE_BF16,
    BASE_FP16,
    BOTH_BF16,
    BOTH_FP16,
    BOTH_OPERANDS,
    SUMS_BF16,
    SUMS_FP16,
    SUMS_OPERANDS,
    UNIT_BF16,
    UNIT_FP16,
    UNIT_OPERANDS,
    scale_of,
    zero_of,
)
from argosy.kernels.packed_reference import PackedWeight

GROUP = 128


@gluon.jit
def _words(
    words_ptr, pairs_ptr, tile, step, steps, num_blocks, words_at, pairs_at, OWN: gl.constexpr, PLANES: gl.constexpr
):
    """(low plane, high plane, its pairs, pairs of the high one) of a step of a tile; zeros after the last."""
    block = tile.to(gl.int64) * num_blocks + step * OWN
    inside = step < steps
    here = words_ptr + block * (256 * PLANES) + words_at
    low = gl.load(here, inside, other=0, cache_modifier=".cg")  # the first-level cache is for the token
    pairs_here = pairs_ptr + block * (16 * PLANES) + pairs_at
    pair = gl.load(pairs_here, inside, other=0)
    high = low
    over = pair
    if PLANES == 2:
        high = gl.load(here + 256, inside, other=0, cache_modifier=".cg")
        over = gl.load(pairs_here + 16, inside, other=0)
    return low, high, pair, over


@gluon.jit
def _product(
    acc, low, high, pair, over, xa, xb, total, is_lower, OWN: gl.constexpr, PLANES: gl.constexpr, FP16: gl.constexpr,
    HALF_SCALES: gl.constexpr, lanes_in: gl.constexpr,
):  # fmt: skip
    """A tile's step more."""
    BASE: gl.constexpr = -128.0 if PLANES == 2 else BASE_FP16 if FP16 else BASE_BF16
    if PLANES == 1:
        source: gl.constexpr = UNIT_FP16 if FP16 else UNIT_BF16
        part = gl.inline_asm_elementwise(source, UNIT_OPERANDS, [low, xa, xb], dtype=gl.float32, is_pure=True, pack=4)
    else:
        both: gl.constexpr = BOTH_FP16 if FP16 else BOTH_BF16
        part = gl.inline_asm_elementwise(
            both, BOTH_OPERANDS, [low, xa, xb, high], dtype=gl.float32, is_pure=True, pack=4
        )
    upper, lower = _sums(part, OWN, lanes_in)
    zero = zero_of(pair, HALF_SCALES)
    if PLANES == 2:
        zero += 16 * zero_of(over, HALF_SCALES)
    return acc + scale_of(pair, HALF_SCALES) * (gl.where(is_lower, lower, upper) - (zero + BASE) * total)


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


@gluon.jit
def _finish(
    y, tile, row, lane, gate, bias_ptr, residual_ptr, out_ptr, num_outputs, BIAS: gl.constexpr, GATED: gl.constexpr,
    RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Store a tile's sums; GATED: those of the gates are in `gate`, and `tile` counts outputs."""
    T: gl.constexpr = out_ptr.dtype.element_ty
    to = tile * 16 + row
    kept = (to < num_outputs) & (lane % 4 < 2)
    if BIAS:
        at = gl.minimum(to, num_outputs - 1)
        if GATED:
            gate += gl.load(bias_ptr + at).to(gl.float32)
            y += gl.load(bias_ptr + num_outputs + at).to(gl.float32)
        else:
            y += gl.load(bias_ptr + at).to(gl.float32)
    if GATED:
        y = gate * (1.0 / (1.0 + gl.exp(-gate))) * y
    if RESIDUAL:
        y += gl.load(residual_ptr + to, kept, other=0.0).to(gl.float32)
        gl.store(residual_ptr + to, y.to(T), kept)
    else:
        gl.store(out_ptr + to, y.to(T), kept)


@gluon.jit
def vector_kernel(
    words_ptr, pairs_ptr, x_ptr, bias_ptr, residual_ptr, out_ptr, num_tiles, num_blocks, num_outputs,
    PLANES: gl.constexpr, W: gl.constexpr, BLOCKS: gl.constexpr, HALF_SCALES: gl.constexpr, FP16: gl.constexpr,
    BIAS: gl.constexpr, GATED: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """`x_ptr`: int32, a pair of inputs each. A block is 128 inputs, two units."""
    OWN: gl.constexpr = W * BLOCKS
    words_in: gl.constexpr = gl.BlockedLayout([2 * BLOCKS, 4], [1, 32], [W, 1], [1, 0])
    lanes_in: gl.constexpr = gl.BlockedLayout([BLOCKS, 1], [1, 32], [W, 1], [1, 0])
    steps = num_blocks // OWN
    tile = gl.program_id(0)
    ups = tile + num_tiles // 2
    unit = gl.arange(0, 2 * OWN, gl.SliceLayout(1, words_in))
    place = gl.arange(0, 128, gl.SliceLayout(0, words_in))
    words_at = (unit // 2 * (256 * PLANES) + unit % 2 * 128)[:, None] + place[None, :]
    x_here = x_ptr + (unit * 32)[:, None] + (place % 4 * 4 + place // 4 % 4)[None, :]
    lane = gl.arange(0, 32, gl.SliceLayout(0, lanes_in))
    row = lane // 4 + 8 * (lane % 2)
    is_lower = (lane % 2 == 1)[None, :]
    pairs_at = (gl.arange(0, OWN, gl.SliceLayout(1, lanes_in)) * (16 * PLANES))[:, None] + row[None, :]
    low, high, pair, over = _words(words_ptr, pairs_ptr, tile, 0, steps, num_blocks, words_at, pairs_at, OWN, PLANES)
    if GATED:
        up_low, up_high, up_pair, up_over = _words(
            words_ptr, pairs_ptr, ups, 0, steps, num_blocks, words_at, pairs_at, OWN, PLANES
        )
    if PDL:
        gdc_wait()
    acc = gl.zeros([OWN, 32], gl.float32, lanes_in)
    up_acc = acc
    for step in range(steps):
        xa = gl.load(x_here + step * (OWN * 64))
        xb = gl.load(x_here + (step * (OWN * 64) + 16))
        sums: gl.constexpr = SUMS_FP16 if FP16 else SUMS_BF16
        total = gl.inline_asm_elementwise(sums, SUMS_OPERANDS, [xa, xb], dtype=gl.float32, is_pure=True, pack=4)
        total, _ = _sums(total, OWN, lanes_in)
        now, now_high, now_pair, now_over = low, high, pair, over
        low, high, pair, over = _words(
            words_ptr, pairs_ptr, tile, step + 1, steps, num_blocks, words_at, pairs_at, OWN, PLANES
        )
        acc = _product(
            acc, now, now_high, now_pair, now_over, xa, xb, total, is_lower, OWN, PLANES, FP16, HALF_SCALES, lanes_in
        )
        if GATED:
            now, now_high, now_pair, now_over = up_low, up_high, up_pair, up_over
            up_low, up_high, up_pair, up_over = _words(
                words_ptr, pairs_ptr, ups, step + 1, steps, num_blocks, words_at, pairs_at, OWN, PLANES
            )
            up_acc = _product(
                up_acc, now, now_high, now_pair, now_over, xa, xb, total, is_lower, OWN, PLANES, FP16, HALF_SCALES,
                lanes_in,
            )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    y = gl.sum(acc, 0)
    if GATED:
        _finish(
            gl.sum(up_acc, 0), tile, row, lane, y, bias_ptr, residual_ptr, out_ptr, num_outputs, BIAS, True, RESIDUAL
        )
    else:
        _finish(y, tile, row, lane, y, bias_ptr, residual_ptr, out_ptr, num_outputs, BIAS, False, RESIDUAL)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(x_TI: Tensor, weight: PackedWeight) -> bool:
    """Whether these can be multiplied here: one token, groups of 128 that four warps can share evenly."""
    return (
        x_TI.is_cuda
        and x_TI.shape[0] == 1
        and x_TI.element_size() == 2
        and x_TI.data_ptr() % 4 == 0  # pairs of inputs
        and x_TI.stride(0) % 2 == 0
        and weight.group == GROUP
        and weight.num_inputs % (4 * GROUP) == 0
        and _is_hopper(x_TI.device)
    )


def default_sizes(weight: PackedWeight) -> dict[str, int]:
    """As measured best on an H200 for o and down of 8B, or what shares the blocks evenly."""
    blocks = weight.num_inputs // GROUP
    return {"warps": 8 if blocks % 8 == 0 else 4, "blocks": 2 if blocks % 16 == 0 and weight.planes == 1 else 1}


def linear(
    x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, residual_TO: Tensor | None, gated: bool, out_TO: Tensor,
    sizes: tuning.Sizes,
) -> Tensor:  # fmt: skip
    """x W^T + bias, gated, added to the residual, into `out_TO`. Ask `takes` first.

    `sizes`: warps (4, 8 or 16), blocks (of a warp and step).
    """
    words, pairs = weight.words_MUW, weight.pairs_MKR2
    blocks, tiles = weight.num_inputs // GROUP, words.shape[0]
    assert blocks % (sizes["warps"] * sizes["blocks"]) == 0
    each = 1 if gated else sizes["blocks"]  # of two tiles in registers
    vector_kernel[(tiles // 2 if gated else tiles,)](
        words, pairs.view(torch.int32), x_TI.view(torch.int32), out_TO if bias_O is None else bias_O, out_TO, out_TO,
        tiles, blocks, out_TO.shape[1], PLANES=weight.planes, W=sizes["warps"], BLOCKS=each,
        HALF_SCALES=pairs.dtype == torch.float16, FP16=x_TI.dtype == torch.float16, BIAS=bias_O is not None,
        GATED=gated, RESIDUAL=residual_TO is not None, num_warps=sizes["warps"], **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO
