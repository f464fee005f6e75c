"""Parts that the sampling kernels share: the noise, floats as integers, who comes last, what is kept of a row."""

import triton
import triton.language as tl

STATE = 8  # floats a row
LOW, DONE, LARGEST, JUDGED, CHOSEN, WANTED = (tl.constexpr(i) for i in range(6))
# the lowest scaled logit that may be drawn; 1 if the token is drawn; the largest; 1 if top_p is still to be asked; the
# drawn token's; the mass that top_p keeps


@triton.jit
def mix(x):
    x ^= x >> 16
    x *= tl.full((1,), 0x7FEB352D, tl.uint32)
    x ^= x >> 15
    x *= tl.full((1,), 0x846CA68B, tl.uint32)
    x ^= x >> 16
    return x


@triton.jit
def log(x, FAST: tl.constexpr):
    """Natural logarithm; FAST: the card's own, 2^-22 off, one instruction where the library's are twenty."""
    if FAST:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        return y * 0.6931471805599453
    return tl.log(x)


@triton.jit
def gumbel(seed, position, token, FAST: tl.constexpr):
    """The noise of `sampling_reference.gumbel_noise` for one row; seed and position are [1], token is [X] int32."""
    golden = tl.full((1,), 0x9E3779B9, tl.uint32)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a = mix(low ^ golden)
    b = mix(high + a)
    c = mix((position & 0xFFFFFFFF).to(tl.uint32) + b)
    d = mix(c ^ tl.full((1,), 0x85EBCA6B, tl.uint32))
    bits = mix(mix((token.to(tl.uint32) * golden) ^ c) + d)
    uniform = bits.to(tl.float32) * (2.0**-32) + 2.0**-33
    uniform = tl.minimum(uniform, 1.0 - 2.0**-24)
    # log(1 - u) has no digits left where u is small, which is where the winners are
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.33333334 + uniform * 0.25)))
    waiting = tl.where(uniform < 0.02, series, -log(1.0 - uniform, FAST))
    return -log(waiting, FAST)


@triton.jit
def ordered(x):
    """Integers in the order of the floats that they stand for."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def is_last(counter_ptr, num_chunks):
    """Whether all chunks of the row have come here; the stores of all threads before are visible to the last."""
    tl.debug_barrier()
    done = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    if done == num_chunks - 1:
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed")  # ready for the next launch
    return done == num_chunks - 1
