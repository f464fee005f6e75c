"""One token a row without sorting the vocabulary: a threshold by counting, then a draw by argmax.

Meaning: `sampling_reference.sample_rows`. The threshold that min_p, top_k and top_p leave is searched as a value: each
pass over the row weighs what lies above sixteen pivots at once. Two passes narrow it down, one gathers what is left
into a scratch row if it fits, and the rest of the search, exact to the last bit of a float, reads only that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning

CANDIDATES = 8192  # of a row that are gathered; a flatter distribution is searched where it stands
CHUNK = 4096  # tokens that one program of the draw looks at


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= tl.full((1,), 0x7FEB352D, tl.uint32)
    x ^= x >> 15
    x *= tl.full((1,), 0x846CA68B, tl.uint32)
    x ^= x >> 16
    return x


@triton.jit
def _gumbel(seed, position, token):
    """The noise of `sampling_reference.gumbel_noise` for one row; seed and position are [1], token is [X] int32."""
    golden = tl.full((1,), 0x9E3779B9, tl.uint32)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a = _mix(low ^ golden)
    b = _mix(high + a)
    c = _mix((position & 0xFFFFFFFF).to(tl.uint32) + b)
    d = _mix(c ^ tl.full((1,), 0x85EBCA6B, tl.uint32))
    bits = _mix(_mix((token.to(tl.uint32) * golden) ^ c) + d)
    uniform = (bits >> 8).to(tl.float32) * (2.0**-24) + ((bits & 0xFF).to(tl.float32) + 0.5) * (2.0**-32)
    uniform = tl.minimum(uniform, 1.0 - 2.0**-24)
    # log(1 - u) has no digits left where u is small, which is where the winners are
    series = uniform * (1.0 + uniform * (0.5 + uniform * 0.33333334))
    waiting = tl.where(uniform < 0.01, series, -tl.log(1.0 - uniform))
    return -tl.log(waiting)


@triton.jit
def _ordered(x):
    """float32 as int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_scaled(logits_row, scratch_row, index, size, gathered, inverse):
    """Logits over temperature: from the scratch row once it holds the candidates, else from the logits."""
    old = tl.load(logits_row + index, index < tl.where(gathered, 0, size), other=float("-inf")).to(tl.float32) * inverse
    new = tl.load(scratch_row + index, index < tl.where(gathered, size, 0), other=float("-inf"))
    return tl.where(gathered, new, old)


@triton.jit
def _weigh(logits_row, scratch_row, size, gathered, inverse, largest, by_mass, pivots, BLOCK: tl.constexpr):
    """For each of 16 pivots (ordered int32), the number or the mass of the logits at or above it."""
    acc = tl.zeros((16, BLOCK), tl.float32)
    for start in tl.range(0, size, BLOCK, num_stages=3):
        index = start + tl.arange(0, BLOCK)
        z = _load_scaled(logits_row, scratch_row, index, size, gathered, inverse)
        weight = tl.where(index < size, tl.where(by_mass, tl.exp(z - largest), 1.0), 0.0)
        acc += tl.where(_ordered(z)[None, :] >= pivots[:, None], weight[None, :], 0.0)
    return tl.sum(acc, 1)


@triton.jit
def _search(
    logits_row, scratch_row, size, gathered, inverse, largest, by_mass, wanted, low, high, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest key in [low, high) at or above which there is enough; `low` is enough, `high` is not."""
    while high - low > 1:
        step = (high - low + 15) // 16
        pivots = low + step * tl.arange(0, 16).to(tl.int64)
        pivots = tl.minimum(pivots, high)
        sums = _weigh(
            logits_row, scratch_row, size, gathered, inverse, largest, by_mass, pivots.to(tl.int32), BLOCK
        )  # fmt: skip
        enough = tl.maximum(tl.sum(((sums >= wanted) & (pivots < high)).to(tl.int32), 0), 1)
        low = low + step * (enough - 1)
        high = tl.minimum(low + step, high)
    return low


@triton.jit
def _narrow(logits_row, scratch_row, size, inverse, largest, by_mass, wanted, low, BLOCK: tl.constexpr):
    """A value at or above which there is enough, by two passes of evenly spaced pivots over [low, largest]."""
    step = (largest - low) / 16
    for _ in range(2):
        pivots = low + step * tl.arange(0, 16).to(tl.float32)
        sums = _weigh(logits_row, scratch_row, size, False, inverse, largest, by_mass, _ordered(pivots), BLOCK)
        enough = tl.maximum(tl.sum((sums >= wanted).to(tl.int32), 0), 1)
        low = low + step * (enough - 1).to(tl.float32)
        step = step / 16
    return low


@triton.jit
def _threshold_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, threshold_ptr, scratch_ptr,
    stride_logits, vocabulary, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    top_p = tl.load(top_p_ptr + row).to(tl.float32)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    counts = (top_k > 0) & (top_k < vocabulary)
    weighs = top_p < 1.0
    threshold = float("-inf")
    if (temperature <= 0.0) | ((min_p <= 0.0) & (weighs == 0) & (counts == 0)):
        tl.store(threshold_ptr + row, threshold)
        return
    inverse = tl.div_rn(1.0, temperature)
    logits_row = logits_ptr + row * stride_logits
    scratch_row = scratch_ptr + row * CAPACITY

    maxima = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=3):
        index = start + tl.arange(0, BLOCK)
        z = _load_scaled(logits_row, scratch_row, index, vocabulary, False, inverse)
        higher = tl.maximum(maxima, z)
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(maxima - pivot) + tl.exp(z - pivot)
        maxima = higher
    largest = tl.max(maxima, 0)
    mass = tl.sum(sums * tl.exp(maxima - largest), 0)
    if min_p > 0.0:
        threshold = largest + tl.log(min_p)

    # Below e^-40 of the largest, a whole vocabulary weighs less than the last digit of the total: dropped unseen.
    floor = tl.maximum(threshold, largest - 40.0)
    start_value = threshold
    if counts:
        start_value = _narrow(
            logits_row, scratch_row, vocabulary, inverse, largest, False, top_k.to(tl.float32), floor, BLOCK
        )  # fmt: skip
    else:
        if min_p > 0.0:
            kept = tl.zeros((16,), tl.int32) + _ordered(threshold)
            mass = tl.max(_weigh(logits_row, scratch_row, vocabulary, False, inverse, largest, True, kept, BLOCK), 0)
        if weighs:
            start_value = _narrow(
                logits_row, scratch_row, vocabulary, inverse, largest, True, top_p * mass, floor, BLOCK
            )  # fmt: skip
    size = 0
    if counts | weighs:
        for start in tl.range(0, vocabulary, BLOCK):
            index = start + tl.arange(0, BLOCK)
            z = _load_scaled(logits_row, scratch_row, index, vocabulary, False, inverse)
            chosen = ((z >= start_value) & (index < vocabulary)).to(tl.int32)
            place = size + tl.cumsum(chosen, 0) - 1
            tl.store(scratch_row + place, z, (chosen > 0) & (place < CAPACITY))
            size += tl.sum(chosen, 0)
        tl.debug_barrier()  # what other threads wrote is read below
    gathered = size <= CAPACITY
    size = tl.where(gathered, size, vocabulary)

    above = _ordered(largest).to(tl.int64) + 1
    if counts:
        key = _search(
            logits_row, scratch_row, size, gathered, inverse, largest, False, top_k.to(tl.float32),
            _ordered(start_value).to(tl.int64), above, BLOCK,
        )  # fmt: skip
        threshold = tl.maximum(threshold, _unordered(key.to(tl.int32)))
        start_value = threshold
        if weighs:
            kept = tl.zeros((16,), tl.int32) + _ordered(threshold)
            mass = tl.max(_weigh(logits_row, scratch_row, size, gathered, inverse, largest, True, kept, BLOCK), 0)
    if weighs:
        key = _search(
            logits_row, scratch_row, size, gathered, inverse, largest, True, top_p * mass,
            _ordered(start_value).to(tl.int64), above, BLOCK,
        )  # fmt: skip
        threshold = tl.maximum(threshold, _unordered(key.to(tl.int32)))
    tl.store(threshold_ptr + row, threshold)


@triton.jit
def _draw_kernel(
    logits_ptr, temperature_ptr, threshold_ptr, seed_ptr, position_ptr, out_ptr, best_ptr, best_id_ptr, counter_ptr,
    stride_logits, vocabulary, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, RANDOM: tl.constexpr, FILTER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocabulary
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    score = tl.load(logits_ptr + row * stride_logits + token, inside, other=float("-inf")).to(tl.float32)
    if RANDOM:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
        if temperature > 0.0:
            score *= tl.div_rn(1.0, temperature)
            if FILTER:
                score = tl.where(score >= tl.load(threshold_ptr + row), score, float("-inf"))
            seed = tl.load(seed_ptr + row + tl.zeros((1,), tl.int32)).to(tl.int64)
            position = tl.load(position_ptr + row + tl.zeros((1,), tl.int32)).to(tl.int64)
            score += _gumbel(seed, position, token)
    best = tl.max(score, 0)
    best_id = tl.min(tl.where((score == best) & inside, token, vocabulary - 1), 0)
    if num_chunks == 1:
        tl.store(out_ptr + row, best_id.to(tl.int64))
        return
    tl.store(best_ptr + row * num_chunks + chunk, best)
    tl.store(best_id_ptr + row * num_chunks + chunk, best_id)
    tl.debug_barrier()  # both stores come before the release below
    done = tl.atomic_add(counter_ptr + row, 1, sem="acq_rel")
    if done < num_chunks - 1:
        return
    tl.atomic_xchg(counter_ptr + row, 0, sem="relaxed")
    other = tl.arange(0, CHUNKS)
    there = other < num_chunks
    bests = tl.load(best_ptr + row * num_chunks + other, there, other=float("-inf"), cache_modifier=".cg")
    ids = tl.load(best_id_ptr + row * num_chunks + other, there, other=vocabulary - 1, cache_modifier=".cg")
    winner = tl.min(tl.where(bests == tl.max(bests, 0), ids, vocabulary - 1), 0)
    tl.store(out_ptr + row, winner.to(tl.int64))


def sample_rows(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    position_R: Tensor,
    *,
    any_random: bool = True,
    any_filter: bool = True,
) -> Tensor:
    """One launch, or two with filters. Rows may be strided. Tokens less probable than e^-40 of the best are not drawn
    under top_k or top_p, whatever these say; see `ops.sample_rows` for the rest."""
    num_rows, vocabulary = logits_RV.shape
    device = logits_RV.device
    assert logits_RV.stride(1) == 1
    assert num_rows <= tuning.MAX_COUNTERS
    out_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return out_R
    overlap = tuning.overlap(device)
    any_filter = any_filter and any_random
    threshold_R = temperature_R
    if any_filter:
        threshold_R = torch.empty(num_rows, dtype=torch.float32, device=device)
        scratch = torch.empty(num_rows * CANDIDATES, dtype=torch.float32, device=device)
        _threshold_kernel[(num_rows,)](
            logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, threshold_R, scratch, logits_RV.stride(0), vocabulary,
            CAPACITY=CANDIDATES, BLOCK=2048, num_warps=16, **overlap,
        )  # fmt: skip
    num_chunks = triton.cdiv(vocabulary, CHUNK)
    best = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=device)
    best_id = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
    _draw_kernel[(num_rows, num_chunks)](
        logits_RV, temperature_R, threshold_R, seed_R, position_R, out_R, best, best_id, tuning.counters(device),
        logits_RV.stride(0), vocabulary, num_chunks, CHUNK=CHUNK, CHUNKS=tuning.next_power_of_two(num_chunks),
        RANDOM=any_random, FILTER=any_filter, num_warps=8, **overlap,
    )  # fmt: skip
    return out_R
