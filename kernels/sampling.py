"""One token a row without sorting the vocabulary: a threshold by counting, then a draw by argmax.

Meaning: `sampling_reference.sample_rows`. The threshold that min_p, top_k and top_p leave is searched as a value. Each
pass weighs what lies above sixteen pivots at once and leaves a sixteenth of the bracket; seven passes bring it from 40
(e^-40 of the best: beyond that, a vocabulary weighs less than the last digit of the total) below the last digit of a
float. A pass is a launch over all rows and chunks; the last program of a row joins its chunks and moves the bracket.
(One program a row, with all passes in one launch, took 250 to 700 us where this takes some tens.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning

CHUNK = 4096  # tokens that one program of the draw looks at
PASSES = 7
STATE = 8  # floats a row: largest logit, threshold, bracket by count (low, step), bracket by mass (low, step), mass
LARGEST, THRESHOLD, COUNT_LOW, COUNT_STEP, MASS_LOW, MASS_STEP, MASS = (tl.constexpr(i) for i in range(7))


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
def _is_last(counter_ptr, num_chunks):
    """Whether all chunks of the row have come here; the stores of all threads before are visible to the last."""
    tl.debug_barrier()
    done = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    if done == num_chunks - 1:
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed")  # ready for the next launch
    return done == num_chunks - 1


@triton.jit
def _begin_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, state_ptr, best_ptr, counter_ptr,
    stride_logits, vocabulary, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The largest logit of each row, and the brackets to begin with. A row without filters gets empty ones."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row).to(tl.float32)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    random = temperature > 0.0
    counts = random & (top_k > 0) & (top_k < vocabulary)
    weighs = random & (top_p < 1.0)
    best = best_ptr + row * CHUNKS
    if counts | weighs | (random & (min_p > 0.0)):
        z = tl.load(logits_ptr + row * stride_logits + token, token < vocabulary, other=float("-inf")).to(tl.float32)
        tl.store(best + chunk, tl.max(z, 0) * tl.div_rn(1.0, temperature))
    if _is_last(counter_ptr + row, num_chunks):
        state = state_ptr + row * STATE
        nothing = float("-inf")
        tl.store(state + THRESHOLD, nothing)
        tl.store(state + COUNT_LOW, nothing)
        tl.store(state + COUNT_STEP, 0.0)
        tl.store(state + MASS_LOW, nothing)
        tl.store(state + MASS_STEP, 0.0)
        if counts | weighs | (random & (min_p > 0.0)):
            other = tl.arange(0, CHUNKS)
            largest = tl.max(tl.load(best + other, other < num_chunks, other=nothing, cache_modifier=".cg"), 0)
            threshold = largest + tl.log(tl.maximum(min_p, 1e-38))
            low = tl.maximum(threshold, largest - 40.0)
            tl.store(state + LARGEST, largest)
            if min_p > 0.0:
                tl.store(state + THRESHOLD, threshold)
            if counts:
                tl.store(state + COUNT_LOW, low)
                tl.store(state + COUNT_STEP, (largest - low) / 16)
            if weighs:
                tl.store(state + MASS_LOW, low)
                tl.store(state + MASS_STEP, (largest - low) / 16)


@triton.jit
def _narrow_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, state_ptr, best_ptr, part_ptr, counter_ptr,
    stride_logits, vocabulary, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, STATE: tl.constexpr,
    BY_MASS: tl.constexpr, FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One pass: a bracket [low, low + 16 step) becomes one of its sixteen parts, the highest with enough above it."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    state = state_ptr + row * STATE
    low = tl.load(state + (MASS_LOW if BY_MASS else COUNT_LOW))
    step = tl.load(state + (MASS_STEP if BY_MASS else COUNT_STEP))
    if step <= 0.0:
        return
    largest = tl.load(state + LARGEST)
    inverse = tl.div_rn(1.0, tl.load(temperature_ptr + row).to(tl.float32))
    index = tl.arange(0, 16)
    pivots = low + step * index.to(tl.float32)
    acc = tl.zeros((16, BLOCK), tl.float32)
    # as the bracket closes, whole chunks lie below it; the pipeline hides the loads of the others
    end = tl.where(tl.load(best_ptr + row * CHUNKS + chunk) >= low, CHUNK, 0)
    for start in tl.range(0, end, BLOCK, num_stages=4):
        token = chunk * CHUNK + start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + row * stride_logits + token, token < vocabulary, other=float("-inf"))
        z = z.to(tl.float32) * inverse
        weight = tl.exp(z - largest) if BY_MASS else tl.where(token < vocabulary, 1.0, 0.0)
        acc += tl.where(z[None, :] >= pivots[:, None], weight[None, :], 0.0)
    part = part_ptr + row * CHUNKS * 16
    tl.store(part + chunk * 16 + index, tl.sum(acc, 1))
    if _is_last(counter_ptr + row, num_chunks):
        other = tl.arange(0, CHUNKS)[:, None]
        parts = tl.load(part + other * 16 + index[None, :], other < num_chunks, other=0.0, cache_modifier=".cg")
        sums = tl.sum(parts, 0)
        if BY_MASS:
            if FIRST:
                # min_p and top_k have raised `low` already, so what is above it is what top_p takes its share of
                wanted = tl.load(top_p_ptr + row).to(tl.float32) * tl.max(sums, 0)
                tl.store(state + MASS, wanted)
            else:
                wanted = tl.load(state + MASS)
        else:
            wanted = tl.load(top_k_ptr + row).to(tl.float32)
        enough = tl.maximum(tl.sum((sums >= wanted).to(tl.int32), 0), 1)
        chosen = index == enough - 1
        low = tl.max(tl.where(chosen, pivots, float("-inf")), 0)  # the very pivot that was weighed
        step = step / 16
        if BY_MASS:
            tl.store(state + MASS_LOW, low)
            tl.store(state + MASS_STEP, step)
        else:
            just = tl.max(tl.where(chosen, sums, 0.0), 0) == wanted
            tl.store(state + COUNT_LOW, low)
            tl.store(state + COUNT_STEP, tl.where(just, 0.0, step))  # these and no others: the passes left have nothing
            if tl.load(top_p_ptr + row).to(tl.float32) < 1.0:
                tl.store(state + MASS_LOW, low)
                tl.store(state + MASS_STEP, (largest - low) / 16)


@triton.jit
def _draw_kernel(
    logits_ptr, temperature_ptr, state_ptr, seed_ptr, position_ptr, out_ptr, best_ptr, best_id_ptr, counter_ptr,
    stride_logits, vocabulary, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STATE: tl.constexpr, RANDOM: tl.constexpr, FILTER: tl.constexpr,
    PDL: tl.constexpr,
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
                state = state_ptr + row * STATE
                threshold = tl.maximum(tl.load(state + THRESHOLD), tl.load(state + COUNT_LOW))
                threshold = tl.maximum(threshold, tl.load(state + MASS_LOW))
                score = tl.where(score >= threshold, score, float("-inf"))
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
    if _is_last(counter_ptr + row, num_chunks):
        other = tl.arange(0, CHUNKS)
        there = other < num_chunks
        bests = tl.load(best_ptr + row * num_chunks + other, there, other=float("-inf"), cache_modifier=".cg")
        ids = tl.load(best_id_ptr + row * num_chunks + other, there, other=vocabulary - 1, cache_modifier=".cg")
        winner = tl.min(tl.where(bests == tl.max(bests, 0), ids, vocabulary - 1), 0)
        tl.store(out_ptr + row, winner.to(tl.int64))


def find_thresholds(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    """Fifteen launches. Returns the state of the search, [R, STATE]; a row keeps what is at least the largest of its
    THRESHOLD, COUNT_LOW and MASS_LOW."""
    num_rows, vocabulary = logits_RV.shape
    device = logits_RV.device
    chunk = 2048 if num_rows <= 16 else 4096
    num_chunks = triton.cdiv(vocabulary, chunk)
    chunks = tuning.next_power_of_two(num_chunks)
    state = torch.empty((num_rows, STATE), dtype=torch.float32, device=device)
    best = torch.empty(num_rows * chunks, dtype=torch.float32, device=device)
    part = torch.empty(num_rows * chunks * 16, dtype=torch.float32, device=device)
    grid = (num_rows, num_chunks)
    options = {"CHUNK": chunk, "CHUNKS": chunks, "STATE": STATE, "num_warps": 8, **tuning.overlap(device)}
    tail = (logits_RV.stride(0), vocabulary, num_chunks)
    counters = tuning.counters(device)
    _begin_kernel[grid](logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, state, best, counters, *tail, **options)
    for by_mass in (False, True):
        for turn in range(PASSES):
            _narrow_kernel[grid](
                logits_RV, temperature_R, top_k_R, top_p_R, state, best, part, counters, *tail, BLOCK=1024,
                BY_MASS=by_mass, FIRST=turn == 0, **options,
            )  # fmt: skip
    return state


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
    """One launch, and with filters those of `find_thresholds`. Rows may be strided.

    Tokens less probable than e^-40 of the best are not drawn under top_k or top_p, whatever these say; see
    `ops.sample_rows` for the rest.
    """
    num_rows, vocabulary = logits_RV.shape
    device = logits_RV.device
    assert logits_RV.stride(1) == 1
    assert num_rows <= tuning.MAX_COUNTERS
    out_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return out_R
    any_filter = any_filter and any_random
    state = temperature_R
    if any_filter:
        state = find_thresholds(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R)
    num_chunks = triton.cdiv(vocabulary, CHUNK)
    best = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=device)
    best_id = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
    _draw_kernel[(num_rows, num_chunks)](
        logits_RV, temperature_R, state, seed_R, position_R, out_R, best, best_id, tuning.counters(device),
        logits_RV.stride(0), vocabulary, num_chunks, CHUNK=CHUNK, CHUNKS=tuning.next_power_of_two(num_chunks),
        STATE=STATE, RANDOM=any_random, FILTER=any_filter, num_warps=8, **tuning.overlap(device),
    )  # fmt: skip
    return out_R
