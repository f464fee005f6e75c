"""Parts of kernels about caches with a scale for each token and head. Meaning and layout: `kv_scales`.

Scales are never multiplied into tiles of keys and values. Those of keys are multiplied to the logits. Those of values
join the exponent, by their logarithm: so the largest weight of a row is 1 whatever the scales are, which keeps the
weights within float16, in which they are multiplied with the numbers of the cache; the sum of weights is that of
weights over their scale. Both are relative to one pivot, so pieces are joined and sinks added as without scales.
"""

import triton
import triton.language as tl


@triton.jit
def codes_at(cache_ptr):
    """Where codes are counted from: the cache, by bytes."""
    return cache_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit
def number_place(block, offset, K: tl.constexpr, H: tl.constexpr, S: tl.constexpr):
    """Where the numbers of a token's first head begin."""
    return block * (S * K * (H + 1)) + offset * (K * H)


@triton.jit
def code_place(block, offset, head, K: tl.constexpr, H: tl.constexpr, S: tl.constexpr):
    """Where the code of a token's head lies."""
    return block * (S * K * (H + 1)) + S * K * H + head * S + offset


@triton.jit
def scale_of(code):
    """As `kv_scales.decode`."""
    return ((code.to(tl.int32) + 766) << 21).to(tl.float32, bitcast=True) * 3.0814879110195774e-33


@triton.jit
def load_codes(cache_ptr, block, offset, head, inside, K: tl.constexpr, H: tl.constexpr, S: tl.constexpr):
    """Codes of a tile's tokens. Loops ask for those of the next tile before they work on one: Triton fetches ahead what
    goes to a product, and nothing of a byte a thread."""
    return tl.load(codes_at(cache_ptr) + code_place(block, offset, head, K, H, S), inside, other=0)


@triton.jit
def load_words(cache_ptr, place, inside):
    """Words of four codes, which Triton does fetch ahead: for prompts, whose tiles have more threads than tokens."""
    return tl.load((codes_at(cache_ptr) + place).to(tl.pointer_type(tl.int32), bitcast=True), inside, other=0)


@triton.jit
def codes_of(words, inside, BLOCK_L: tl.constexpr):
    """The codes of a tile, from words of four; the smallest for tokens outside, which may hold that of nan."""
    code = tl.reshape((words[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255, [BLOCK_L])
    return tl.where(inside, code, 0)


@triton.jit
def raw_scales(code):
    """Scales times 2^108."""
    return ((code.to(tl.int32) + 766) << 21).to(tl.float32, bitcast=True)


# The three below are told to have effects: so each is computed once for a token and then handed to the threads that
# want it, where Triton would hand out the codes and let every thread work on all of its tokens' (a fifth of a decode
# tile's instructions, and a third of a prompt's).


@triton.jit
def key_factor(raw, factor, NATIVE: tl.constexpr):
    """What logits are multiplied with: the scale of keys times `factor`."""
    scale = raw * (factor * 3.0814879110195774e-33)
    if NATIVE:
        scale = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [scale], dtype=tl.float32, is_pure=False, pack=1
        )  # fmt: skip
    return scale


@triton.jit
def value_log(raw, NATIVE: tl.constexpr, ANYWHERE: tl.constexpr):
    """Base 2, of the scale of values. Triton's own is exact where we need no more than 22 bits. ANYWHERE: may be
    computed by every thread, after all."""
    if NATIVE:
        log = tl.inline_asm_elementwise(
            "{ lg2.approx.ftz.f32 $0, $1; add.f32 $0, $0, 0fC2D80000; }", "=r,r", [raw], dtype=tl.float32,
            is_pure=ANYWHERE, pack=1,
        )  # fmt: skip
    else:
        log = tl.log2(raw) - 108.0
    return log


@triton.jit
def value_inverse(log, NATIVE: tl.constexpr):
    """One over the scale of values, from its logarithm."""
    if NATIVE:
        inverse = tl.inline_asm_elementwise(
            "{ .reg .f32 n; neg.f32 n, $1; ex2.approx.ftz.f32 $0, n; }", "=r,r", [log], dtype=tl.float32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        inverse = tl.exp2(-log)
    return inverse


@triton.jit
def numbers(x, dtype: tl.constexpr, NATIVE: tl.constexpr, STAGED: tl.constexpr):
    """Numbers of a cache in the dtype that they are multiplied in. STAGED: at once, as they come from memory, where
    Triton would do it last, after it has moved the bytes one by one to where the tensor cores want values."""
    EIGHT_BITS: tl.constexpr = x.dtype == tl.int8 or x.dtype == tl.float8e4nv
    if NATIVE and dtype == tl.float16 and x.dtype == tl.int8:
        # x + 128 in the low byte of a float16 of 1024 is 1152 + x: two instructions for two numbers, of which a
        # conversion each, at a quarter of the rate, would be felt
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes, unit;
            xor.b32 bytes, $2, 0x80808080;
            mov.b32 unit, 0x64806480;
            prmt.b32 $0, bytes, 0x64646464, 0x4140;
            prmt.b32 $1, bytes, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, unit;
            sub.f16x2 $1, $1, unit;
            }""",
            "=&r,=&r,r", [x], dtype=tl.float16, is_pure=not STAGED, pack=4,
        )  # fmt: skip
    elif NATIVE and dtype == tl.float16 and EIGHT_BITS and STAGED:
        y = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=&r,=&r,r", [x], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        y = x.to(dtype)
    return y


@triton.jit
def magnitude(x):
    """What the largest number of a head is sought among: nan counts as inf."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def code_of(largest, cache_ptr):
    """As `kv_scales.encode`, int32."""
    TOP: tl.constexpr = 127.0 if cache_ptr.dtype.element_ty == tl.int8 else 448.0
    bits = (largest * (3.24518553658426726783156020576256e32 / TOP)).to(tl.int32, bitcast=True)
    code = tl.minimum(tl.maximum(((bits + 0x1FFFFF) >> 21) - 766, 0), 253)
    return tl.where(largest < float("inf"), code, 255)


@triton.jit
def inverse_of(code):
    """What numbers are multiplied with on their way to the cache, rounded as in `kv_scales.quantise`."""
    return tl.div_rn(1.0, scale_of(code))


@triton.jit
def rounded(x, inverse, cache_ptr):
    """Numbers as the cache keeps them, in its dtype."""
    x = x * inverse
    if cache_ptr.dtype.element_ty == tl.int8:
        # adding 1.5 · 2^23 leaves no bits below 1: to the nearest, to the even one between two
        x = (tl.minimum(tl.maximum(x, -127.0), 127.0) + 12582912.0) - 12582912.0
    else:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    return x.to(cache_ptr.dtype.element_ty)
