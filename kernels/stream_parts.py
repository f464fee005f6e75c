"""Pieces of `packed_stream`'s kernel: what a warp asks for, how inputs come to the tensor cores, and the way out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from argosy.kernels.packed_parts import (
    BASE_BF16,
    BASE_FP16,
    BOTH_BF16,
    BOTH_FP16,
    BOTH_OPERANDS,
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
def ask(words_ptrs, pairs_ptrs, step, there, has_pairs, SPLIT: gl.constexpr, PLANES: gl.constexpr, ROWS: gl.constexpr):
    """A warp's block: (words, its high plane, pairs of a row, of the one eight below, both of the high plane)."""
    here = words_ptrs + step * (SPLIT * 256 * PLANES)
    pairs_here = pairs_ptrs + step * (SPLIT * 16 * PLANES)
    low = gl.load(here, there, cache_modifier=".cg")
    pair = gl.load(pairs_here, has_pairs)
    under = pair
    if ROWS == 2:
        under = gl.load(pairs_here + 8, has_pairs)
    if PLANES == 1:
        return low, low, pair, under, pair, under
    else:
        high = gl.load(here + 256, there, cache_modifier=".cg")
        over = gl.load(pairs_here + 16, has_pairs)
        over_under = over
        if ROWS == 2:
            over_under = gl.load(pairs_here + 24, has_pairs)
        return low, high, pair, under, over, over_under


@gluon.jit
def inputs(
    x_smem, step, X_IN: gl.constexpr, words_in: gl.constexpr, wide: gl.constexpr, W: gl.constexpr,
    SPLIT: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Pairs of a step's inputs as the tensor cores take them: columns 0 to 31 and 32 to 63 of each unit, [2 W, 128]."""
    x = x_smem.index(step).load(X_IN)
    if TOKENS == 1:  # lies as it is read: [unit, lane % 4, half, pair]
        xa, xb = gl.split(gl.permute(gl.reshape(x, [2 * SPLIT, 4, 2, 4]), [0, 1, 3, 2]))
        own: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, wide))
        xa = gl.convert_layout(gl.reshape(xa, [2 * SPLIT, 16]), own, assert_trivial=True)[:, None, :]
        xb = gl.convert_layout(gl.reshape(xb, [2 * SPLIT, 16]), own, assert_trivial=True)[:, None, :]
    else:
        xa, xb = gl.split(gl.permute(gl.reshape(x, [2 * SPLIT, 8, 2, 4, 4]), [0, 1, 4, 3, 2]))
        xa = gl.convert_layout(gl.reshape(xa, [2 * SPLIT, 8, 16]), gl.SliceLayout(0, wide), assert_trivial=True)
        xb = gl.convert_layout(gl.reshape(xb, [2 * SPLIT, 8, 16]), gl.SliceLayout(0, wide), assert_trivial=True)
    nothing = gl.zeros([W // SPLIT, 2 * SPLIT, 8, 16], gl.int32, wide)
    xa = gl.reshape(xa[None, :, :, :] + nothing, [2 * W, 128])
    xb = gl.reshape(xb[None, :, :, :] + nothing, [2 * W, 128])
    return (
        gl.convert_layout(xa, words_in, assert_trivial=True),
        gl.convert_layout(xb, words_in, assert_trivial=True),
    )


@gluon.jit
def four(part, W: gl.constexpr, lanes_in: gl.constexpr):
    """Of a lane's four sums over both units: (a row's two columns, those of the row eight below), [W, 32] each."""
    first, second = gl.split(gl.permute(gl.reshape(part, [W, 2, 32, 2, 2]), [0, 2, 3, 4, 1]))
    left, right = gl.split(first + second)
    a, c = gl.split(left)
    b, d = gl.split(right)
    return (
        gl.convert_layout(a, lanes_in, assert_trivial=True), gl.convert_layout(b, lanes_in, assert_trivial=True),
        gl.convert_layout(c, lanes_in, assert_trivial=True), gl.convert_layout(d, lanes_in, assert_trivial=True),
    )  # fmt: skip


@gluon.jit
def add(
    sums, block, xa, xb, total, after, based, based_after, is_lower, W: gl.constexpr, TOKENS: gl.constexpr,
    PLANES: gl.constexpr, FP16: gl.constexpr, HALF: gl.constexpr, HALF_SCALES: gl.constexpr, lanes_in: gl.constexpr,
):  # fmt: skip
    """A tile's sums with one block more; `total`, `after`: the inputs' sums of a lane's two columns, and with HALF
    `based`, `based_after`: those of BASE times the inputs.
    """
    BASE: gl.constexpr = 0.0 if HALF else -128.0 if PLANES == 2 else BASE_FP16 if FP16 else BASE_BF16
    if HALF:
        made = gl.inline_asm_elementwise(
            HALF_UNIT, UNIT_OPERANDS, [block[0], xa, xb], dtype=gl.float32, is_pure=True, pack=4
        )
    elif PLANES == 1:
        source: gl.constexpr = UNIT_FP16 if FP16 else UNIT_BF16
        made = gl.inline_asm_elementwise(
            source, UNIT_OPERANDS, [block[0], xa, xb], dtype=gl.float32, is_pure=True, pack=4
        )
    else:
        both: gl.constexpr = BOTH_FP16 if FP16 else BOTH_BF16
        made = gl.inline_asm_elementwise(
            both, BOTH_OPERANDS, [block[0], xa, xb, block[1]], dtype=gl.float32, is_pure=True, pack=4
        )
    a, b, c, d = four(made, W, lanes_in)
    if HALF:
        a, b, c, d = a - based, b - based_after, c - based, d - based_after
    scale, zero = scale_of(block[2], HALF_SCALES), zero_of(block[2], HALF_SCALES)
    if PLANES == 2:
        zero += 16 * zero_of(block[4], HALF_SCALES)
    zero += BASE
    if TOKENS == 1:  # every column is the same: a lane has one row, lanes beside it the one eight below
        return (sums[0] + scale * (gl.where(is_lower, c, a) - zero * total),)
    else:
        under, less = scale_of(block[3], HALF_SCALES), zero_of(block[3], HALF_SCALES)
        if PLANES == 2:
            less += 16 * zero_of(block[5], HALF_SCALES)
        less += BASE
        return (
            sums[0] + scale * (a - zero * total), sums[1] + scale * (b - zero * after),
            sums[2] + under * (c - less * total), sums[3] + under * (d - less * after),
        )  # fmt: skip


@gluon.jit
def over_warps(sums, W: gl.constexpr, SPLIT: gl.constexpr, TOKENS: gl.constexpr):
    """[tiles, lanes, places] of a tile, added up over its warps."""
    if TOKENS == 1:
        y = gl.reshape(sums[0], [W // SPLIT, SPLIT, 32])
    else:
        y = gl.join(gl.join(sums[0], sums[2]), gl.join(sums[1], sums[3]))
        y = gl.reshape(y, [W // SPLIT, SPLIT, 128])
    return gl.sum(y, 1)


@gluon.jit
def bring(
    x_ptr, norm_ptr, x_smem, part, num_tokens, stride_x, eps, W: gl.constexpr, SPLIT: gl.constexpr,
    STEPS: gl.constexpr, TOKENS: gl.constexpr, NORM: gl.constexpr, FP16: gl.constexpr,
):  # fmt: skip
    """All inputs of the program to shared memory, normed; tokens that are not there as zeros.

    As many steps at once as are a power of two: between copies all warps meet.
    """
    AT_ONCE: gl.constexpr = min(STEPS & -STEPS, W // SPLIT)
    TURNS: gl.constexpr = STEPS // AT_ONCE
    UNITS: gl.constexpr = 2 * SPLIT * AT_ONCE
    SIZE: gl.constexpr = 32 * UNITS
    if TOKENS == 1:
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
        else:
            for turn in range(TURNS):
                copy_in(to.index(turn), x_ptr + columns + (part * TURNS + turn) * SIZE)
    else:
        rows_in: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 4, 8], [W // 2, 2, 1], [2, 1, 0])
        of_unit: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, rows_in))
        of_token: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, rows_in))
        of_pair: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, rows_in))
        unit = gl.arange(0, UNITS, of_unit)[:, None, None]
        token = gl.arange(0, 8, of_token)[None, :, None]
        pair = gl.arange(0, 32, of_pair)[None, None, :]
        here = x_ptr + token * stride_x + unit * 32 + pair
        present = (token < num_tokens) & (unit >= 0) & (pair >= 0)
        to = reinterpret(x_smem, gl.int32, [TURNS, UNITS, 8, 32], x_smem.layout)
        if NORM:
            squares = gl.zeros([8], gl.float32, of_token)
            for turn in gl.static_range(TURNS):
                x = gl.load(here + turn * SIZE, present, other=0)
                squares += gl.sum(gl.sum(_squares(x, FP16), 2), 0)
            scale = 1.0 / gl.sqrt(squares / (2 * SIZE * TURNS) + eps)
            for turn in gl.static_range(TURNS):
                x = gl.load(here + turn * SIZE, present, other=0)
                weight = gl.load(norm_ptr + unit * 32 + pair + turn * SIZE)
                to.index(turn).store(_scaled(x, scale[None, :, None], weight, FP16))
        else:
            for turn in range(TURNS):
                copy_in(to.index(turn), here + (part * TURNS + turn) * SIZE, mask=present)
    if NORM:
        wait_for_all()
    else:
        async_copy.commit_group()
        async_copy.wait_group(0)


@gluon.jit
def bring_half(
    x_ptr, norm_ptr, x_smem, part, num_tokens, stride_x, eps, W: gl.constexpr, SPLIT: gl.constexpr,
    STEPS: gl.constexpr, TOKENS: gl.constexpr, NORM: gl.constexpr, FP16: gl.constexpr,
):  # fmt: skip
    """`bring` as float16, in pairs of columns 16 apart, times a power of two; returns what the product is to be
    multiplied by. It is exact but for what is 2^26 times smaller than the largest, or if normed, 2^10 times.
    """
    AT_ONCE: gl.constexpr = min(STEPS & -STEPS, W // SPLIT)
    TURNS: gl.constexpr = STEPS // AT_ONCE
    UNITS: gl.constexpr = 2 * SPLIT * AT_ONCE
    SIZE: gl.constexpr = 32 * UNITS
    ROWS: gl.constexpr = 1 if TOKENS == 1 else 8
    pairs_in: gl.constexpr = (
        gl.BlockedLayout([1, 1, 1], [2, 1, 16], [W, 1, 1], [2, 1, 0])
        if TOKENS == 1
        else gl.BlockedLayout([1, 1, 4], [1, 8, 4], [W, 1, 1], [2, 1, 0])
    )
    of_unit: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, pairs_in))
    of_token: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, pairs_in))
    of_pair: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, pairs_in))
    unit = gl.arange(0, UNITS, of_unit)[:, None, None]
    token = gl.arange(0, ROWS, of_token)[None, :, None]
    pair = gl.arange(0, 16, of_pair)[None, None, :]
    column = unit * 32 + pair // 8 * 16 + pair % 8  # and eight pairs further on
    here = x_ptr + token * stride_x + column + part * (SIZE * TURNS)
    present = (token < num_tokens) & (unit >= 0) & (pair >= 0)
    found = gl.zeros([UNITS, ROWS, 16], gl.float32, pairs_in)
    if NORM or not FP16:
        for turn in gl.static_range(TURNS):
            one = gl.load(here + turn * SIZE, present, other=0)
            other = gl.load(here + (turn * SIZE + 8), present, other=0)
            if NORM:
                found += _squares(one, FP16) + _squares(other, FP16)
            else:
                found = gl.maximum(found, gl.maximum(_largest(one), _largest(other)))
    if NORM:
        scale = 0.0625 / gl.sqrt(gl.sum(gl.sum(found, 2), 0) / (2 * SIZE * TURNS) + eps)
        back = 16.0
    elif FP16:
        scale = gl.full([ROWS], 1.0, gl.float32, of_token)
        back = 1.0
    else:
        exponent = gl.maximum(gl.max(gl.max(gl.max(found, 2), 0), 0).to(gl.int32, bitcast=True) >> 23, 20)
        scale = gl.full([ROWS], 1.0, gl.float32, of_token) * ((265 - exponent) << 23).to(gl.float32, bitcast=True)
        back = ((exponent - 11) << 23).to(gl.float32, bitcast=True)
    scale = scale[None, :, None]
    if TOKENS == 1:
        to = reinterpret(x_smem, gl.int32, [TURNS, UNITS, 32], x_smem.layout)
    else:
        to = reinterpret(x_smem, gl.int32, [TURNS, UNITS, 8, 32], x_smem.layout)
    for turn in gl.static_range(TURNS):
        one = gl.load(here + turn * SIZE, present, other=0)
        other = gl.load(here + (turn * SIZE + 8), present, other=0)
        a, b = scale_of(one, FP16) * scale, zero_of(one, FP16) * scale
        c, d = scale_of(other, FP16) * scale, zero_of(other, FP16) * scale
        if NORM:
            weight = gl.load(norm_ptr + column + turn * SIZE)
            further = gl.load(norm_ptr + column + (turn * SIZE + 8))
            a, b = a * scale_of(weight, FP16), b * zero_of(weight, FP16)
            c, d = c * scale_of(further, FP16), d * zero_of(further, FP16)
        both = gl.join(_halves(a, c), _halves(b, d))
        if TOKENS == 1:
            both = gl.permute(gl.reshape(both, [UNITS, 2, 2, 4, 2]), [0, 3, 1, 4, 2])
            to.index(turn).store(gl.reshape(both, [UNITS, 32]))
        else:
            both = gl.permute(gl.reshape(both, [UNITS, 8, 2, 2, 4, 2]), [0, 1, 2, 5, 3, 4])
            to.index(turn).store(gl.reshape(both, [UNITS, 8, 32]))
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
    y, up, tile, row, token, one, num_tiles, bias_ptr, residual_ptr, out_ptr, num_outputs, stride_out,
    BIAS: gl.constexpr, GATED: gl.constexpr, RESIDUAL: gl.constexpr,
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
    at = token.to(gl.int64)[None, :] * stride_out + to
    if RESIDUAL:
        y += gl.load(residual_ptr + at, kept, other=0.0).to(gl.float32)
        gl.store(residual_ptr + at, y.to(T), kept)
    else:
        gl.store(out_ptr + at, y.to(T), kept)
