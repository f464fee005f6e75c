"""Pieces of `packed_stream`'s kernel: what a warp asks for, how inputs come to the tensor cores, and the way out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from argosy.kernels.packed_parts import (
    BASE_BF16,
    BASE_FP16,
    HALF_UNIT,
    UNIT_BF16,
    UNIT_FP16,
    UNIT_OPERANDS,
    scale_of,
    zero_of,
)

# Triton 3.9 calls them otherwise than 3.6
wait_for_all = getattr(gl, "thread_barrier", None) or gl.barrier
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
copy_in = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def ask(words_ptrs, pairs_ptrs, step, there, has_pairs, SPLIT: gl.constexpr):
    """A warp's block: its words, and a pair of scale and zero for each row."""
    here, pairs_here = words_ptrs + step * (SPLIT * 256), pairs_ptrs + step * (SPLIT * 16)
    return gl.load(here, there, cache_modifier=".cg"), gl.load(pairs_here, has_pairs)


@gluon.jit
def inputs(
    x_smem, step, X_IN: gl.constexpr, words_in: gl.constexpr, wide: gl.constexpr, W: gl.constexpr, SPLIT: gl.constexpr
):  # fmt: skip
    """Pairs of a step's inputs as the tensor cores take them: columns 0 to 31 and 32 to 63 of each unit, [2 W, 128]."""
    x = x_smem.index(step).load(X_IN)
    # lies as it is read: [unit, lane % 4, half, pair]
    xa, xb = gl.split(gl.permute(gl.reshape(x, [2 * SPLIT, 4, 2, 4]), [0, 1, 3, 2]))
    own: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, wide))
    xa = gl.convert_layout(gl.reshape(xa, [2 * SPLIT, 16]), own, assert_trivial=True)[:, None, :]
    xb = gl.convert_layout(gl.reshape(xb, [2 * SPLIT, 16]), own, assert_trivial=True)[:, None, :]
    nothing = gl.zeros([W // SPLIT, 2 * SPLIT, 8, 16], gl.int32, wide)
    xa = gl.reshape(xa[None, :, :, :] + nothing, [2 * W, 128])
    xb = gl.reshape(xb[None, :, :, :] + nothing, [2 * W, 128])
    return (
        gl.convert_layout(xa, words_in, assert_trivial=True),
        gl.convert_layout(xb, words_in, assert_trivial=True),
    )


@gluon.jit
def two(part, W: gl.constexpr, lanes_in: gl.constexpr):
    """Of a lane's sums over both units, whose columns are all the same token: (a row's, the row's eight below),
    [W, 32] each.
    """
    first, second = gl.split(gl.permute(gl.reshape(part, [W, 2, 32, 2, 2]), [0, 2, 3, 4, 1]))
    column, _ = gl.split(first + second)
    row, below = gl.split(column)
    return gl.convert_layout(row, lanes_in, assert_trivial=True), gl.convert_layout(
        below, lanes_in, assert_trivial=True
    )


@gluon.jit
def add(
    sums, block, xa, xb, total, based, is_lower, W: gl.constexpr, FP16: gl.constexpr, HALF: gl.constexpr,
    HALF_SCALES: gl.constexpr, lanes_in: gl.constexpr,
):  # fmt: skip
    """A tile's sums with one block more; `total`: the inputs' sum, and with HALF `based`: that of BASE times them."""
    BASE: gl.constexpr = 0.0 if HALF else BASE_FP16 if FP16 else BASE_BF16
    source: gl.constexpr = HALF_UNIT if HALF else UNIT_FP16 if FP16 else UNIT_BF16
    made = gl.inline_asm_elementwise(source, UNIT_OPERANDS, [block[0], xa, xb], dtype=gl.float32, is_pure=True, pack=4)
    row, below = two(made, W, lanes_in)
    if HALF:
        row, below = row - based, below - based
    scale, zero = scale_of(block[1], HALF_SCALES), zero_of(block[1], HALF_SCALES) + BASE
    # every column is the same: a lane has one row, lanes beside it the one eight below
    return sums + scale * (gl.where(is_lower, below, row) - zero * total)


@gluon.jit
def bring(
    x_ptr, norm_ptr, x_smem, eps, W: gl.constexpr, SPLIT: gl.constexpr, STEPS: gl.constexpr, NORM: gl.constexpr,
    FP16: gl.constexpr,
):  # fmt: skip
    """All inputs to shared memory, normed.

    As many steps at once as are a power of two: between copies all warps meet.
    """
    AT_ONCE: gl.constexpr = min(STEPS & -STEPS, W // SPLIT)
    TURNS: gl.constexpr = STEPS // AT_ONCE
    UNITS: gl.constexpr = 2 * SPLIT * AT_ONCE
    SIZE: gl.constexpr = 32 * UNITS
    flat_in: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [W, 1], [1, 0])
    unit = gl.arange(0, UNITS, gl.SliceLayout(1, flat_in))
    at = gl.arange(0, 32, gl.SliceLayout(0, flat_in))
    columns = (unit * 32)[:, None] + (at % 8 * 4 + at // 8)[None, :]
    to = reinterpret(x_smem, gl.int32, [TURNS, UNITS, 32], x_smem.layout)
    if NORM:
        total = gl.zeros([UNITS, 32], gl.float32, flat_in)
        for turn in gl.static_range(TURNS):
            x = gl.load(x_ptr + columns + turn * SIZE)
            total += _squares(x, FP16)
        scale = 1.0 / gl.sqrt(gl.sum(gl.sum(total, 1), 0) / (2 * SIZE * TURNS) + eps)
        for turn in gl.static_range(TURNS):
            x = gl.load(x_ptr + columns + turn * SIZE)
            to.index(turn).store(_scaled(x, scale, gl.load(norm_ptr + columns + turn * SIZE), FP16))
        wait_for_all()
    else:
        for turn in range(TURNS):
            copy_in(to.index(turn), x_ptr + columns + turn * SIZE)
        async_copy.commit_group()
        async_copy.wait_group(0)


@gluon.jit
def bring_half(
    x_ptr, norm_ptr, x_smem, eps, W: gl.constexpr, SPLIT: gl.constexpr, STEPS: gl.constexpr, NORM: gl.constexpr,
    FP16: gl.constexpr,
):  # fmt: skip
    """`bring` as float16, in pairs of columns 16 apart, times a power of two; returns what the product is to be
    multiplied by. It is exact but for what is 2^26 times smaller than the largest, or if normed, 2^10 times.
    """
    AT_ONCE: gl.constexpr = min(STEPS & -STEPS, W // SPLIT)
    TURNS: gl.constexpr = STEPS // AT_ONCE
    UNITS: gl.constexpr = 2 * SPLIT * AT_ONCE
    SIZE: gl.constexpr = 32 * UNITS
    pairs_in: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [W, 1], [1, 0])
    unit = gl.arange(0, UNITS, gl.SliceLayout(1, pairs_in))[:, None]
    pair = gl.arange(0, 16, gl.SliceLayout(0, pairs_in))[None, :]
    column = unit * 32 + pair // 8 * 16 + pair % 8  # and eight pairs further on
    found = gl.zeros([UNITS, 16], gl.float32, pairs_in)
    if NORM or not FP16:
        for turn in gl.static_range(TURNS):
            one = gl.load(x_ptr + column + turn * SIZE)
            other = gl.load(x_ptr + column + (turn * SIZE + 8))
            if NORM:
                found += _squares(one, FP16) + _squares(other, FP16)
            else:
                found = gl.maximum(found, gl.maximum(_largest(one), _largest(other)))
    if NORM:
        scale = 0.0625 / gl.sqrt(gl.sum(gl.sum(found, 1), 0) / (2 * SIZE * TURNS) + eps)
        back = 16.0
    elif FP16:
        scale = 1.0
        back = 1.0
    else:
        exponent = gl.maximum(gl.max(gl.max(found, 1), 0).to(gl.int32, bitcast=True) >> 23, 20)
        scale = ((265 - exponent) << 23).to(gl.float32, bitcast=True)
        back = ((exponent - 11) << 23).to(gl.float32, bitcast=True)
    to = reinterpret(x_smem, gl.int32, [TURNS, UNITS, 32], x_smem.layout)
    for turn in gl.static_range(TURNS):
        one = gl.load(x_ptr + column + turn * SIZE)
        other = gl.load(x_ptr + column + (turn * SIZE + 8))
        a, b = scale_of(one, FP16) * scale, zero_of(one, FP16) * scale
        c, d = scale_of(other, FP16) * scale, zero_of(other, FP16) * scale
        if NORM:
            weight = gl.load(norm_ptr + column + turn * SIZE)
            further = gl.load(norm_ptr + column + (turn * SIZE + 8))
            a, b = a * scale_of(weight, FP16), b * zero_of(weight, FP16)
            c, d = c * scale_of(further, FP16), d * zero_of(further, FP16)
        both = gl.join(_halves(a, c), _halves(b, d))
        both = gl.permute(gl.reshape(both, [UNITS, 2, 2, 4, 2]), [0, 3, 1, 4, 2])
        to.index(turn).store(gl.reshape(both, [UNITS, 32]))
    wait_for_all()
    return back


@gluon.jit
def _largest(x):
    """Of each pair of bfloat16."""
    return gl.maximum(gl.abs(scale_of(x, False)), gl.abs(zero_of(x, False)))


@gluon.jit
def _halves(low, high):
    """A pair of float16."""
    lower = low.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return lower | (high.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) << 16)


@gluon.jit
def _squares(x, FP16: gl.constexpr):
    """The sum of both squares of each pair."""
    low, high = scale_of(x, FP16), zero_of(x, FP16)
    return low * low + high * high


@gluon.jit
def _scaled(x, scale, weight, FP16: gl.constexpr):
    """Pairs times the token's scale and the norm's weights, rounded once."""
    T: gl.constexpr = gl.float16 if FP16 else gl.bfloat16
    low = (scale_of(x, FP16) * scale * scale_of(weight, FP16)).to(T).to(gl.int16, bitcast=True)
    high = (zero_of(x, FP16) * scale * zero_of(weight, FP16)).to(T).to(gl.int16, bitcast=True)
    return (low.to(gl.int32) & 0xFFFF) | (high.to(gl.int32) << 16)


@gluon.jit
def finish(
    y, up, tile, row, one, bias_ptr, residual_ptr, out_ptr, num_outputs, BIAS: gl.constexpr,
    GATED: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Bias, gate and residual, and out it goes."""
    T: gl.constexpr = out_ptr.dtype.element_ty
    to = (tile * 16)[:, None] + row[None, :]
    kept = (to < num_outputs) & one[None, :]
    if BIAS:
        of = gl.minimum(to, num_outputs - 1)
        y += gl.load(bias_ptr + of).to(gl.float32)
        if GATED:
            up += gl.load(bias_ptr + num_outputs + of).to(gl.float32)
    if GATED:
        y = y * (1.0 / (1.0 + gl.exp(-y))) * up
    if RESIDUAL:
        y += gl.load(residual_ptr + to, kept, other=0.0).to(gl.float32)
        gl.store(residual_ptr + to, y.to(T), kept)
    else:
        gl.store(out_ptr + to, y.to(T), kept)
