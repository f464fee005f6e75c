"""Packed words in shared memory become the left side of a product, in registers alone: for `packed_hopper`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from argosy.kernels.packed_parts import (
    ASM_PLANES_BF16,
    ASM_PLANES_FP16,
    ASM_SCALED_BF16,
    ASM_SCALED_FP16,
    EIGHT_BF16,
    EIGHT_FP16,
    PLANES_AND_PAIRS,
    WORDS_AND_PAIRS,
)


@gluon.jit
def _as_activations(pairs, FP16: gl.constexpr, HALF_SCALES: gl.constexpr):
    """Pairs of float16 as pairs of bfloat16, or the other way round."""
    if FP16 == HALF_SCALES:
        return pairs
    else:
        S: gl.constexpr = gl.float16 if HALF_SCALES else gl.bfloat16
        T: gl.constexpr = gl.float16 if FP16 else gl.bfloat16
        scale = pairs.to(gl.int16).to(S, bitcast=True).to(gl.float32).to(T).to(gl.int16, bitcast=True)
        zero = (pairs >> 16).to(gl.int16).to(S, bitcast=True).to(gl.float32).to(T).to(gl.int16, bitcast=True)
        return (scale.to(gl.int32) & 0xFFFF) | (zero.to(gl.int32) << 16)


@gluon.jit
def _pairs_of_words(
    pairs, words_in: gl.constexpr, wide: gl.constexpr, TILES: gl.constexpr, FP16: gl.constexpr,
    HALF_SCALES: gl.constexpr,
):  # fmt: skip
    """(upper, lower): the pairs of both rows of each word. Only names of registers change."""
    pairs = _as_activations(pairs, FP16, HALF_SCALES)
    upper, lower = gl.split(gl.permute(gl.reshape(pairs, [TILES, 2, 8]), [0, 2, 1]))
    upper = gl.convert_layout(upper, gl.SliceLayout(2, wide), assert_trivial=True)
    lower = gl.convert_layout(lower, gl.SliceLayout(2, wide), assert_trivial=True)
    nothing = gl.zeros([TILES, 8, 16], gl.int32, wide)
    upper = gl.convert_layout(gl.reshape(upper[:, :, None] + nothing, [TILES, 128]), words_in, assert_trivial=True)
    lower = gl.convert_layout(gl.reshape(lower[:, :, None] + nothing, [TILES, 128]), words_in, assert_trivial=True)
    return upper, lower


@gluon.jit
def unpacked(
    words_smem, pairs_smem, slot, left_in: gl.constexpr, G: gl.constexpr, PLANES: gl.constexpr, TILES: gl.constexpr,
    FP16: gl.constexpr, HALF_SCALES: gl.constexpr,
):  # fmt: skip
    """The left side of a product, [16 TILES, 64], from a place in the ring."""
    words_in: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    wide: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [4, 1, 1], [2, 1, 0])
    regs: gl.constexpr = [[0, 8]] if TILES == 4 else [[0, 8], [4, 0]]
    pairs_in: gl.constexpr = gl.DistributedLinearLayout(
        regs, [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[1, 0], [2, 0]], [], [TILES, 16]
    )
    kinds: gl.constexpr = EIGHT_FP16 if FP16 else EIGHT_BF16
    words = words_smem.index(slot * PLANES).slice(G * TILES, TILES, 0).load(words_in)
    pairs = pairs_smem.index(slot * PLANES).slice(G * TILES, TILES, 0).load(pairs_in)
    upper, lower = _pairs_of_words(pairs, words_in, wide, TILES, FP16, HALF_SCALES)
    if PLANES == 1:
        source: gl.constexpr = ASM_SCALED_FP16 if FP16 else ASM_SCALED_BF16
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            source, WORDS_AND_PAIRS, [words, upper, lower], dtype=kinds, is_pure=True, pack=2
        )
    else:
        both: gl.constexpr = ASM_PLANES_FP16 if FP16 else ASM_PLANES_BF16
        high = words_smem.index(slot * PLANES + 1).slice(G * TILES, TILES, 0).load(words_in)
        pairs = pairs_smem.index(slot * PLANES + 1).slice(G * TILES, TILES, 0).load(pairs_in)
        over, under = _pairs_of_words(pairs, words_in, wide, TILES, FP16, HALF_SCALES)
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            both, PLANES_AND_PAIRS, [words, high, upper, lower, over, under], dtype=kinds, is_pure=True, pack=2
        )
    v = gl.join(gl.join(gl.join(a, b), gl.join(c, d)), gl.join(gl.join(e, f), gl.join(g, h)))
    v = gl.permute(gl.reshape(v, [TILES, 8, 4, 2, 2, 2, 2, 2]), [0, 6, 1, 3, 7, 5, 2, 4])
    return gl.convert_layout(gl.reshape(v, [16 * TILES, 64]), left_in, assert_trivial=True)
