"""Products of up to 16 tokens with weights of 4 or 8 bits: bound by reading them, fused with what stands behind.

Meaning: `packed_reference.linear`. The weight is the left side of tensor core products of 16 rows, of which a program
has TILES; its warps share out the inputs, so that each unpacks words that nobody else does, and add up at the end. A
group's product is of the numbers as they are unpacked, BASE + q, in float32; (BASE + zero) times the sum of the inputs
goes off it, which is one more product, with ones. Words come a step early to registers (AHEAD), or STAGES early through
shared memory; and before the kernel before this one is done, the second-level cache is asked for the first of them.

A decode step of 8b at one token spends 1 KB of weights a warp in about 140 instructions; the card takes 216 to read it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels.packed_parts import BASE_BF16, BASE_FP16, both_fields, fields, joined, prefetch, scale_of, zero_of


@triton.jit
def _fragments(
    a, b, c, d, e, f, g, h,
    HALVES: tl.constexpr, SPLIT: tl.constexpr, TILES: tl.constexpr, WIDE: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """[HALVES * WIDE * SPLIT, 16 * TILES, columns of a group] in the order of inputs: only names of registers move."""
    v = tl.reshape(joined(a, b, c, d, e, f, g, h), (SPLIT, TILES, WIDE, UNITS, 8, 4, 2, 2, 2, 2, 2))
    if HALVES == 2:
        v = tl.permute(v, (6, 2, 0, 1, 9, 4, 3, 10, 8, 5, 7))
    else:
        v = tl.permute(v, (2, 0, 1, 9, 4, 3, 6, 10, 8, 5, 7))
    return tl.reshape(v, (HALVES * WIDE * SPLIT, 16 * TILES, UNITS * 64 // HALVES))


@triton.jit(do_not_specialize=["num_tokens"])
def few_kernel(
    x_ptr, words_ptr, pairs_ptr, bias_ptr, residual_ptr, out_ptr,
    num_tokens, num_inputs, num_outputs, num_tiles, num_blocks, stride_x, stride_out,
    UNITS: tl.constexpr, HALVES: tl.constexpr, PLANES: tl.constexpr, HALF_SCALES: tl.constexpr,
    SPLIT: tl.constexpr, TILES: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, AHEAD: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    PREFETCH: tl.constexpr, EARLY: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A step is WIDE blocks, of UNITS units, of each of SPLIT warps.

    Products of a group wait for each other; those of WIDE groups stand side by side. Numbers of 8 bits are made of both
    planes first, less 128. (The norm of the inputs in here, too, took longer than a launch of its own.)
    """
    T: tl.constexpr = x_ptr.dtype.element_ty
    FP16: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    BASE: tl.constexpr = -128.0 if PLANES == 2 else (BASE_FP16 if FP16 else BASE_BF16)
    WIDTH: tl.constexpr = UNITS * 64
    WORDS: tl.constexpr = UNITS * PLANES * 128  # of a tile's block
    PAIRS: tl.constexpr = 16 * PLANES * HALVES
    GROUP: tl.constexpr = WIDTH // HALVES
    PARTS: tl.constexpr = HALVES * WIDE * SPLIT
    steps = tl.cdiv(num_blocks, SPLIT * WIDE)
    piece = tl.arange(0, TILES * WIDE * UNITS)
    place = piece // (WIDE * UNITS)
    row = tl.arange(0, 16 * TILES)
    place_of_row = row // 16
    if GATED:  # in turn a tile of gates and that of their ups
        half = num_tiles // 2
        first = tl.program_id(0) * (TILES // 2)
        tile = tl.minimum(first + place // 2, half - 1) + place % 2 * half
        tile_of_row = tl.minimum(first + place_of_row // 2, half - 1) + place_of_row % 2 * half
    else:
        first = tl.program_id(0) * TILES
        tile = tl.minimum(first + place, num_tiles - 1)
        tile_of_row = tl.minimum(first + place_of_row, num_tiles - 1)
    warp = tl.arange(0, SPLIT)
    block = warp * (steps * WIDE)
    last_block = tl.minimum(block + steps * WIDE, num_blocks)
    unit = tile.to(tl.int64) * (num_blocks * UNITS * PLANES)
    unit += piece // UNITS % WIDE * (UNITS * PLANES) + piece % UNITS
    own_block = block[:, None, None] + (piece // UNITS % WIDE)[None, :, None]
    here = words_ptr + (unit[None, :, None] * 128 + (block * WORDS)[:, None, None] + tl.arange(0, 128)[None, None, :])
    group = tl.arange(0, PARTS)
    group_block = group % SPLIT * (steps * WIDE) + group // SPLIT % WIDE
    group_half = group // (SPLIT * WIDE)
    pairs_here = pairs_ptr + ((tile_of_row * (num_blocks * PAIRS) + row % 16)[None, :] + (group_half * 16)[:, None])
    token = tl.arange(0, TOKENS)
    present = (token < num_tokens)[None, None, :]
    column = (group_half * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    ones = tl.full((PARTS, 16, GROUP), 1.0, T)
    acc = tl.zeros((PARTS, 16 * TILES, TOKENS), tl.float32)
    if PREFETCH > 0:
        line = tl.minimum(
            (block * (WORDS // 32))[:, None] + tl.arange(0, PREFETCH)[None, :], num_blocks * (WORDS // 32) - 1
        )
        every = tl.arange(0, TILES)
        own = tl.minimum(first + every, num_tiles - 1)
        if GATED:
            own = tl.minimum(first + every // 2, num_tiles // 2 - 1) + every % 2 * (num_tiles // 2)
        row_of_tiles = own.to(tl.int64) * (num_blocks * WORDS)
        prefetch(words_ptr + (row_of_tiles[:, None, None] + (line * 32)[None, :, :]))
    if AHEAD:
        words = tl.load(here) if EVEN else tl.load(here, own_block < num_blocks, other=0)
        high = words
        if PLANES == 2:
            high = tl.load(here + UNITS * 128) if EVEN else tl.load(here + UNITS * 128, own_block < num_blocks, other=0)
    if PDL:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
    out = first * 16 + (tl.arange(0, 8 * TILES) if GATED else row)
    stored = (out < num_outputs)[:, None] & (token < num_tokens)[None, :]
    to = out[:, None] + token[None, :].to(tl.int64) * stride_out
    if RESIDUAL:  # it comes while the products are made
        before = tl.load(residual_ptr + to, stored, other=0.0)
    for i in tl.range(0, steps, num_stages=STAGES):
        if AHEAD:
            left = own_block + (i + 1) * WIDE < last_block[:, None, None]
            latest = tl.load(here + (i + 1) * (WIDE * WORDS), left, other=0)
            latest_high = latest
            if PLANES == 2:
                latest_high = tl.load(here + (i + 1) * (WIDE * WORDS) + UNITS * 128, left, other=0)
        else:
            left = EVEN | (own_block + i * WIDE < last_block[:, None, None])
            words = tl.load(here + i * (WIDE * WORDS)) if EVEN else tl.load(here + i * (WIDE * WORDS), left, other=0)
            high = words
            if PLANES == 2:
                next_plane = here + i * (WIDE * WORDS) + UNITS * 128
                high = tl.load(next_plane) if EVEN else tl.load(next_plane, left, other=0)
        if PLANES == 2:
            a, b, c, d, e, f, g, h = both_fields(words, high, FP16, ASM)
        else:
            a, b, c, d, e, f, g, h = fields(words, FP16, ASM)
        # Both sides are the same. Joins right before a product make Triton choose an order of inputs that is not ours.
        if num_inputs > 0:
            v = _fragments(a, b, c, d, e, f, g, h, HALVES, SPLIT, TILES, WIDE, UNITS)
        else:
            v = _fragments(a, b, c, d, e, f, g, h, HALVES, SPLIT, TILES, WIDE, UNITS)
        at = group_block + i * WIDE
        k = (at * WIDTH)[:, None] + column
        inside = (at < num_blocks)[:, None]
        kept = (inside & (k < num_inputs))[:, :, None]
        here_pairs = pairs_here + (at * PAIRS)[:, None]
        if EVEN:
            x = tl.load(x_ptr + k[:, :, None] + token[None, None, :] * stride_x, present, other=0.0)
            pair = tl.load(here_pairs)
        else:
            x = tl.load(x_ptr + k[:, :, None] + token[None, None, :] * stride_x, present & kept, other=0.0)
            pair = tl.load(here_pairs, inside, other=0)
        scale, zero = scale_of(pair, HALF_SCALES), zero_of(pair, HALF_SCALES)
        if PLANES == 2:
            pair = tl.load(here_pairs + HALVES * 16) if EVEN else tl.load(here_pairs + HALVES * 16, inside, other=0)
            zero += 16 * zero_of(pair, HALF_SCALES)
        part = tl.dot(v, x)
        total = tl.dot(ones, x)
        total = tl.broadcast_to(total[:, None, :, :], (PARTS, TILES, 16, TOKENS))
        total = tl.reshape(total, (PARTS, 16 * TILES, TOKENS))
        acc += scale[:, :, None] * (part - (zero + BASE)[:, :, None] * total)
        if AHEAD:
            words, high = latest, latest_high
    if PDL and not EARLY:
        gdc_launch_dependents()
    y = tl.sum(acc, 0)
    if BIAS:
        at_row = tl.minimum(tile_of_row * 16 + row % 16, num_outputs * (2 if GATED else 1) - 1)
        y += tl.load(bias_ptr + at_row).to(tl.float32)[:, None]
    if GATED:
        both = tl.permute(tl.reshape(y, (TILES // 2, 2, 16, TOKENS)), (0, 2, 3, 1))
        gate, up = tl.split(both)
        y = tl.reshape(gate * tl.sigmoid(gate) * up, (8 * TILES, TOKENS))
    if RESIDUAL:
        y += before.to(tl.float32)
        tl.store(residual_ptr + to, y.to(T), stored)
    else:
        tl.store(out_ptr + to, y.to(T), stored)
