"""Products of some dozens or hundreds of tokens with weights of 4 or 8 bits; and weights brought back to 16 bits.

Meaning: `packed_reference.linear`. Again the weight is the left side of the tensor cores' product: it comes from memory
as it is stored, becomes 16 bits in the registers that the product reads, and goes nowhere else; the tokens come through
shared memory, where all warps find them. Where there are few tiles, the inputs are cut into pieces as well, and the
piece that is done last adds up all of its tile, in order.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import pieces
from argosy.kernels.packed_parts import BASE_BF16, BASE_FP16, fields, joined, made_fields, prefetch, scale_of, zero_of


@triton.jit
def _rows(a, b, c, d, e, f, g, h, TILES: tl.constexpr, UNITS: tl.constexpr):
    """[16 * TILES, 64 * UNITS] in the order of inputs: only names of registers change."""
    v = tl.reshape(joined(a, b, c, d, e, f, g, h), (TILES, UNITS, 8, 4, 2, 2, 2, 2, 2))
    return tl.reshape(tl.permute(v, (0, 7, 2, 1, 4, 8, 6, 3, 5)), (16 * TILES, 64 * UNITS))


@triton.jit
def _rows_of_warps(
    a, b, c, d, e, f, g, h, TILES: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """[WARPS, 16 * TILES / WARPS, 64 * UNITS]: a warp has each WARPS-th tile, as it has loaded them."""
    v = tl.reshape(joined(a, b, c, d, e, f, g, h), (TILES // WARPS, WARPS, UNITS, 8, 4, 2, 2, 2, 2, 2))
    v = tl.permute(v, (1, 0, 8, 3, 2, 5, 9, 7, 4, 6))
    return tl.reshape(v, (WARPS, 16 * TILES // WARPS, 64 * UNITS))


@triton.jit
def _to_words(pairs, TILES: tl.constexpr, UNITS: tl.constexpr, TIMES: tl.constexpr):
    """[TILES, UNITS, 128] of pairs that TIMES words after each other share."""
    wide = tl.broadcast_to(pairs[:, :, :, None], (TILES, UNITS, 128 // TIMES, TIMES))
    return tl.reshape(wide, (TILES, UNITS, 128))


@triton.jit
def _as_activations(pairs, FP16: tl.constexpr, HALF_SCALES: tl.constexpr):
    """Pairs of float16 as pairs of bfloat16, or the other way round."""
    if FP16 == HALF_SCALES:
        return pairs
    else:
        T: tl.constexpr = tl.float16 if FP16 else tl.bfloat16
        scale = scale_of(pairs, HALF_SCALES).to(T).to(tl.int16, bitcast=True).to(tl.int32)
        zero = zero_of(pairs, HALF_SCALES).to(T).to(tl.int16, bitcast=True).to(tl.int32)
        return (scale & 0xFFFF) | (zero << 16)


@triton.jit
def add_step(
    acc, words, upper, lower, x, scales_ptr, one, num_inputs,
    TILES: tl.constexpr, UNITS: tl.constexpr, HALVES: tl.constexpr, HALF_SCALES: tl.constexpr, WARPS: tl.constexpr,
    TOKENS: tl.constexpr, SYNC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The sum with a step's product: of words [TILES, UNITS, 128] with `x` [TOKENS, 64 UNITS].

    `upper` and `lower`: pairs of a word's two rows, `scales_ptr`: those of all rows; `one`: 1.0, not known when this is
    compiled.
    """
    FP16: tl.constexpr = x.dtype == tl.float16
    WIDTH: tl.constexpr = UNITS * 64
    TIMES: tl.constexpr = 4 // HALVES  # words after each other of one group: those of a lane, or half of them
    upper = _to_words(_as_activations(upper, FP16, HALF_SCALES), TILES, UNITS, TIMES)
    lower = _to_words(_as_activations(lower, FP16, HALF_SCALES), TILES, UNITS, TIMES)
    a, b, c, d, e, f, g, h = made_fields(words, upper, lower, HALVES == 2 or not SYNC, FP16, ASM)
    if SYNC:
        made = tl.dot(_rows(a, b, c, d, e, f, g, h, TILES, UNITS), tl.trans(x))
        if HALVES == 2:
            acc += made * one
        else:
            acc += made * scale_of(tl.load(scales_ptr), HALF_SCALES)[:, None]
    else:
        both = tl.broadcast_to(tl.trans(x)[None, :, :], (WARPS, WIDTH, TOKENS))
        # as in `packed_few`: both sides are the same
        if num_inputs > 0:
            v = _rows_of_warps(a, b, c, d, e, f, g, h, TILES, UNITS, WARPS)
        else:
            v = _rows_of_warps(a, b, c, d, e, f, g, h, TILES, UNITS, WARPS)
        acc = tl.dot(v, both, acc)
    return acc


@triton.jit
def in_rows(acc, TILES: tl.constexpr, WARPS: tl.constexpr, TOKENS: tl.constexpr, SYNC: tl.constexpr):
    """[16 TILES, TOKENS] of a sum as `add_step` keeps it."""
    if not SYNC:
        acc = tl.permute(tl.reshape(acc, (WARPS, TILES // WARPS, 16, TOKENS)), (1, 0, 2, 3))
        acc = tl.reshape(acc, (16 * TILES, TOKENS))
    return acc


@triton.jit(do_not_specialize=["num_tokens"])
def many_kernel(
    x_ptr, words_ptr, pairs_ptr, bias_ptr, out_ptr, part_ptr, counter_ptr,
    num_tokens, num_inputs, num_outputs, num_tiles, num_blocks, stride_x, stride_out,
    UNITS: tl.constexpr, HALVES: tl.constexpr, PLANES: tl.constexpr, HALF_SCALES: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    SYNC: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A step is a block of UNITS units, of one plane; a program has TILES tiles of rows and a piece of the blocks.

    By warp groups (SYNC), every step's product is added to the sum by the ordinary units. Left to run on, it reads the
    registers of its left side while the next step already makes new ones there: seen on an H200 as wrong sums where
    programs share a multiprocessor. So scales may as well come in with that addition, in float32; but a group of 32 is
    half a step. The other way is products of a warp each, of TILES / WARPS tiles, with scales on the left side.
    """
    T: tl.constexpr = x_ptr.dtype.element_ty
    WIDTH: tl.constexpr = UNITS * 64
    ROWS: tl.constexpr = TILES * 16
    TIMES: tl.constexpr = 4 // HALVES  # as in `add_step`
    split = tl.program_id(2)
    piece = tl.cdiv(num_blocks, SPLITS)
    begin = split * piece
    end = tl.minimum(begin + piece, num_blocks)
    tile = tl.minimum(tl.program_id(1) * TILES + tl.arange(0, TILES), num_tiles - 1).to(tl.int64)
    unit = tl.arange(0, UNITS)
    words_here = words_ptr + (
        ((tile * (num_blocks * UNITS))[:, None, None] + unit[None, :, None]) * 128 + tl.arange(0, 128)[None, None, :]
    )
    word = tl.arange(0, 128 // TIMES)
    pairs_here = pairs_ptr + (
        (tile * (num_blocks * HALVES * 16))[:, None, None]
        + unit[None, :, None] * 0  # units of a block share their group
        + (word % HALVES * 16 + word // (4 * HALVES))[None, None, :]
    )
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, WIDTH)
    x_here = x_ptr + tl.minimum(token, num_tokens - 1).to(tl.int64)[:, None] * stride_x + column[None, :]
    row = tl.arange(0, ROWS)
    tile_of_row = tl.minimum(tl.program_id(1) * TILES + row // 16, num_tiles - 1).to(tl.int64)
    scales_here = pairs_ptr + (tile_of_row * (num_blocks * HALVES * 16) + row % 16)
    one = tl.where(num_inputs > 0, 1.0, 0.0)  # not known to be one when this is compiled
    acc = tl.zeros((ROWS, TOKENS) if SYNC else (WARPS, ROWS // WARPS, TOKENS), tl.float32)
    if PREFETCH > 0:
        line = tl.minimum(begin * (UNITS * 4) + tl.arange(0, PREFETCH), end * (UNITS * 4) - 1)
        prefetch(words_ptr + ((tile * (num_blocks * UNITS * 128))[:, None] + (line * 32)[None, :]))
    if PDL:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
    for block in tl.range(begin, end, num_stages=STAGES):
        words = tl.load(words_here + block * (UNITS * 128))
        upper = tl.load(pairs_here + block * (HALVES * 16))
        lower = tl.load(pairs_here + block * (HALVES * 16) + 8)
        first = block // PLANES * WIDTH
        if EVEN:
            x = tl.load(x_here + first)
        else:
            x = tl.load(x_here + first, (first + column < num_inputs)[None, :], other=0.0)
        acc = add_step(
            acc, words, upper, lower, x, scales_here + block * 16, one, num_inputs,
            TILES, UNITS, HALVES, HALF_SCALES, WARPS, TOKENS, SYNC, ASM,
        )  # fmt: skip
    acc = in_rows(acc, TILES, WARPS, TOKENS, SYNC)
    if PDL and not EARLY:
        gdc_launch_dependents()
    if SPLITS > 1:
        index = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if pieces.leave(acc, part_ptr, counter_ptr, index, split, SPLITS, ROWS, TOKENS) < SPLITS - 1:
            return
        acc = pieces.join(part_ptr, counter_ptr, index, SPLITS, ROWS, TOKENS)
    row += tl.program_id(1) * ROWS
    if BIAS:
        acc += tl.load(bias_ptr + tl.minimum(row, num_outputs - 1)).to(tl.float32)[:, None]
    to = out_ptr + token.to(tl.int64)[:, None] * stride_out + row[None, :]
    tl.store(to, tl.trans(acc).to(T), (token < num_tokens)[:, None] & (row < num_outputs)[None, :])


@triton.jit
def unpack_kernel(
    words_ptr, pairs_ptr, out_ptr, num_inputs, num_tiles, num_blocks, first_tile, last_row, stride_out,
    UNITS: tl.constexpr, HALVES: tl.constexpr, PLANES: tl.constexpr, HALF_SCALES: tl.constexpr, FP16: tl.constexpr,
    TILES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A block of columns of some tiles of rows in 16 bits: (q - zero) * scale, rounded as scales are, then as `out`."""
    WIDTH: tl.constexpr = UNITS * 64
    ROWS: tl.constexpr = TILES * 16
    S: tl.constexpr = tl.float16 if HALF_SCALES else tl.bfloat16
    BASE: tl.constexpr = BASE_FP16 if FP16 else BASE_BF16
    place = tl.program_id(0) * TILES + tl.arange(0, TILES)
    tile = tl.minimum(first_tile + place, num_tiles - 1).to(tl.int64)
    block = tl.program_id(1) * PLANES
    unit = tl.arange(0, UNITS)
    words_here = words_ptr + (
        ((tile * num_blocks + block)[:, None, None] * UNITS + unit[None, :, None]) * 128
        + tl.arange(0, 128)[None, None, :]
    )
    row = tl.arange(0, ROWS)
    tile_of_row = tl.minimum(first_tile + tl.program_id(0) * TILES + row // 16, num_tiles - 1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    group = column // (WIDTH // HALVES)
    pairs_here = pairs_ptr + (
        ((tile_of_row * num_blocks + block) * (HALVES * 16) + row % 16)[:, None] + (group * 16)[None, :]
    )
    pair = tl.load(pairs_here)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for plane in tl.static_range(PLANES):
        words = tl.load(words_here + plane * (UNITS * 128))
        zero = zero_of(tl.load(pairs_here + plane * (HALVES * 16)), HALF_SCALES)
        a, b, c, d, e, f, g, h = fields(words, FP16, ASM)
        number = _rows(a, b, c, d, e, f, g, h, TILES, UNITS).to(tl.float32)
        total += (number - BASE - zero) * (16**plane)
    made = (total * scale_of(pair, HALF_SCALES)).to(S)
    at_row = tl.program_id(0).to(tl.int64) * ROWS + row
    at_column = tl.program_id(1) * WIDTH + column
    kept = (at_row < last_row)[:, None] & (at_column < num_inputs)[None, :]
    tl.store(out_ptr + at_row[:, None] * stride_out + at_column[None, :], made.to(out_ptr.dtype.element_ty), kept)
