"""One token a row without sorting the vocabulary: five launches with filters, one without.

Meaning: `sampling_reference.sample_rows`.

    survey   all rows x chunks   the largest logit of each group of tokens, the mass of each chunk
    search   a program a row     the k-th largest of the groups' maxima is no more than the k-th largest logit, and a
                                 value above which the maxima alone hold top_p of the mass is no more than top_p's
                                 threshold: what lies above that bound is gathered, a few hundred tokens mostly, and
                                 there the exact threshold is found and the token drawn. Most rows are done then
    draw     all rows x chunks   argmax of logit + noise, for rows without filters and those with too much above
    judge    all rows x chunks   a token drawn from more than top_p keeps is the right one if it is one of those that
                                 top_p keeps: if the mass above it is less than top_p's
    repeat   a program a row     if not, draw from what lies above it, and judge again
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.sampling_judge import judge_kernel, keep_chosen, repeat_kernel
from argosy.kernels.sampling_parts import DONE, JUDGED, LARGEST, LOW, STATE, gumbel, is_last, ordered

CHUNK = 4096  # tokens that one program of the survey or the draw looks at
CANDIDATES = 2048  # tokens among which the search finds the threshold and draws
MAX_GROUPS = 2048
RANGE = 40.0  # a logit that much below the best is e^-40 as probable: less than the last digit of the total
PIVOTS, PASSES = 8, 9  # of the search for a large k: 40 / 8^9 is the last digit of a logit


@triton.jit
def _survey_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, group_ptr, chunk_ptr, stride_logits, vocabulary,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """group_ptr [R, GROUPS]: largest scaled logit of each group. chunk_ptr [R, 2, CHUNKS]: largest, mass relative."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    IN_CHUNK: tl.constexpr = CHUNK // GROUP
    group = tl.arange(0, IN_CHUNK)
    token = chunk * CHUNK + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    top_k = tl.load(top_k_ptr + row)
    filters = ((top_k > 0) & (top_k < vocabulary)) | (tl.load(top_p_ptr + row).to(tl.float32) < 1.0)
    if (temperature <= 0.0) | ((filters | (tl.load(min_p_ptr + row).to(tl.float32) > 0.0)) == 0):
        return
    z = tl.load(logits_ptr + row * stride_logits + token, token < vocabulary, other=float("-inf")).to(tl.float32)
    # nan counts as inf, so that it is drawn: whoever looks at the token's logit sees it
    z = tl.where(z == z, z * tl.div_rn(1.0, temperature), float("inf"))
    largest_in_group = tl.max(z, 1)
    largest = tl.max(largest_in_group, 0)
    pivot = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(group_ptr + row * GROUPS + chunk * IN_CHUNK + group, largest_in_group)
    tl.store(chunk_ptr + row * 2 * CHUNKS + chunk, largest)
    tl.store(chunk_ptr + row * 2 * CHUNKS + CHUNKS + chunk, tl.sum(tl.sum(tl.exp(z - pivot), 1), 0))


@triton.jit
def _kth_in_row(
    row_ptr, inverse, largest, low, k, vocabulary, PIVOTS: tl.constexpr, PASSES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The highest of PIVOTS^PASSES values from `low` up with at least k tokens from it up."""
    step = (largest - low) / PIVOTS
    index = tl.arange(0, PIVOTS)
    turn = 0
    while (turn < PASSES) & (step > 0.0):
        pivots = low + step * index.to(tl.float32)
        acc = tl.zeros((PIVOTS, BLOCK), tl.int32)
        for start in tl.range(0, vocabulary, BLOCK, num_stages=3):
            token = start + tl.arange(0, BLOCK)
            z = tl.load(row_ptr + token, token < vocabulary, other=float("-inf")).to(tl.float32) * inverse
            acc += (z[None, :] >= pivots[:, None]).to(tl.int32)
        sums = tl.sum(acc, 1)
        chosen = index == tl.maximum(tl.sum((sums >= k).to(tl.int32), 0), 1) - 1
        low = tl.max(tl.where(chosen, pivots, float("-inf")), 0)  # the very pivot that was counted from
        step = tl.where(tl.max(tl.where(chosen, sums, 0), 0) == k, 0.0, step / PIVOTS)  # these and no others
        turn += 1
    return low


@triton.jit
def _search_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr, group_ptr, chunk_ptr,
    list_ptr, value_ptr, id_ptr, state_ptr, out_ptr, stride_logits, vocabulary, num_groups, num_chunks,
    CHUNKS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, CANDIDATES: tl.constexpr, AT_ONCE: tl.constexpr,
    STATE: tl.constexpr, RANGE: tl.constexpr, PIVOTS: tl.constexpr, PASSES: tl.constexpr, BLOCK: tl.constexpr,
    FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
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
    state = state_ptr + row * STATE
    tl.store(state + LOW, float("-inf"))
    tl.store(state + DONE, 0.0)
    tl.store(state + JUDGED, 0.0)
    if (counts | weighs | (random & (min_p > 0.0))) == 0:
        return
    inverse = tl.div_rn(1.0, temperature)
    group = tl.arange(0, GROUPS)
    maxima = tl.load(group_ptr + row * GROUPS + group, group < num_groups, other=float("-inf"))
    chunk = tl.arange(0, CHUNKS)
    there = chunk < num_chunks
    chunk_largest = tl.load(chunk_ptr + row * 2 * CHUNKS + chunk, there, other=float("-inf"))
    chunk_mass = tl.load(chunk_ptr + row * 2 * CHUNKS + CHUNKS + chunk, there, other=0.0)
    largest = tl.max(maxima, 0)
    if largest == float("inf"):  # inf or nan among the logits: the draw finds it
        return
    mass = tl.sum(chunk_mass * tl.exp(chunk_largest - largest), 0)
    floor = tl.maximum(largest + tl.log(tl.maximum(min_p, 1e-37)), largest - RANGE)

    # A bound below the threshold, from the groups' maxima. top_p takes its share of what min_p and top_k left, which
    # must then be gathered whole.
    by_mass = weighs & (counts == 0) & (min_p <= 0.0)
    weight = tl.exp(maxima - largest)
    low = floor
    high = largest
    for _ in range(14):
        middle = 0.5 * (low + high)
        above = maxima >= middle
        enough = counts & (tl.sum(above.to(tl.int32), 0) >= top_k)
        enough = enough | (by_mass & (tl.sum(tl.where(above, weight, 0.0), 0) >= top_p * mass * 1.0001))
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)

    # Gather what lies above.
    chosen = (maxima >= low).to(tl.int32)
    num_chosen = tl.sum(chosen, 0)
    tl.store(list_ptr + row * GROUPS + tl.cumsum(chosen, 0) - 1, group, chosen > 0)
    tl.debug_barrier()
    values = value_ptr + row * CANDIDATES
    ids = id_ptr + row * CANDIDATES
    row_ptr = logits_ptr + row * stride_logits
    found = 0
    start = 0
    while (start < num_chosen) & (found <= CANDIDATES):
        place = start + tl.arange(0, AT_ONCE)
        its_group = tl.load(list_ptr + row * GROUPS + place, place < num_chosen, other=num_groups)
        token = tl.reshape(its_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (AT_ONCE * GROUP,))
        z = tl.load(row_ptr + token, token < vocabulary, other=float("-inf")).to(tl.float32) * inverse
        kept = (z >= low).to(tl.int32)
        to = found + tl.cumsum(kept, 0) - 1
        tl.store(values + to, z, (kept > 0) & (to < CANDIDATES))
        tl.store(ids + to, token, (kept > 0) & (to < CANDIDATES))
        found += tl.sum(kept, 0)
        start += AT_ONCE
    tl.debug_barrier()

    if found <= CANDIDATES:
        spot = tl.arange(0, CANDIDATES)
        its_z = tl.load(values + spot, spot < found, other=float("-inf"))
        key = ordered(its_z)
        its_weight = tl.exp(its_z - largest)
        bottom = tl.min(tl.where(spot < found, key, 0x7FFFFFFF), 0).to(tl.int64)
        top = tl.max(key, 0).to(tl.int64)
        if counts & (found > top_k):  # the highest key with top_k from it up
            high_key = top
            while bottom < high_key:
                middle_key = bottom + (high_key - bottom + 1) // 2
                enough = tl.sum((key >= middle_key).to(tl.int32), 0) >= top_k
                bottom = tl.where(enough, middle_key, bottom)
                high_key = tl.where(enough, high_key, middle_key - 1)
        if weighs:
            wanted = top_p * tl.where(by_mass, mass, tl.sum(tl.where(key >= bottom, its_weight, 0.0), 0))
            high_key = top
            while bottom < high_key:
                middle_key = bottom + (high_key - bottom + 1) // 2
                enough = tl.sum(tl.where(key >= middle_key, its_weight, 0.0), 0) >= wanted
                bottom = tl.where(enough, middle_key, bottom)
                high_key = tl.where(enough, high_key, middle_key - 1)
        stays = (key >= bottom) & (spot < found)
        its_token = tl.load(ids + spot, spot < found, other=0)
        one = tl.zeros((1,), tl.int32)
        seed = tl.load(seed_ptr + row + one).to(tl.int64)
        position = tl.load(position_ptr + row + one).to(tl.int64)
        score = tl.where(stays, its_z + gumbel(seed, position, its_token, FAST), float("-inf"))
        best = tl.max(score, 0)
        winner = tl.min(tl.where(stays & (score == best), its_token, vocabulary - 1), 0)
        tl.store(out_ptr + row, winner.to(tl.int64))
        tl.store(state + LOW, tl.min(tl.where(stays, its_z, largest), 0))
        tl.store(state + DONE, 1.0)
    else:
        low = floor
        if counts:
            low = _kth_in_row(row_ptr, inverse, largest, low, top_k, vocabulary, PIVOTS, PASSES, BLOCK)
        tl.store(state + LOW, low)
        tl.store(state + LARGEST, largest)
        tl.store(state + JUDGED, tl.where(weighs, 1.0, 0.0))


@triton.jit
def _draw_kernel(
    logits_ptr, temperature_ptr, state_ptr, seed_ptr, position_ptr, out_ptr, best_ptr, best_id_ptr, counter_ptr,
    stride_logits, vocabulary, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STATE: tl.constexpr, RANDOM: tl.constexpr, FILTER: tl.constexpr,
    FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocabulary
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if FILTER:  # noqa: SIM102 - known when compiling, the other only when running
        if tl.load(state_ptr + row * STATE + DONE) > 0.0:
            return
    score = tl.load(logits_ptr + row * stride_logits + token, inside, other=float("-inf")).to(tl.float32)
    # as in the survey
    score = tl.where(score == score, score, float("inf"))
    if RANDOM:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
        if temperature > 0.0:
            score *= tl.div_rn(1.0, temperature)
            if FILTER:
                score = tl.where(score >= tl.load(state_ptr + row * STATE + LOW), score, float("-inf"))
            seed = tl.load(seed_ptr + row + tl.zeros((1,), tl.int32)).to(tl.int64)
            position = tl.load(position_ptr + row + tl.zeros((1,), tl.int32)).to(tl.int64)
            score += gumbel(seed, position, token, FAST)
    best = tl.max(score, 0)
    best_id = tl.min(tl.where((score == best) & inside, token, vocabulary - 1), 0)
    if num_chunks == 1:
        tl.store(out_ptr + row, best_id.to(tl.int64))
        if FILTER:
            keep_chosen(logits_ptr + row * stride_logits, temperature_ptr + row, state_ptr + row * STATE, best_id)
        return
    tl.store(best_ptr + row * num_chunks + chunk, best)
    tl.store(best_id_ptr + row * num_chunks + chunk, best_id)
    if is_last(counter_ptr + row, num_chunks):
        other = tl.arange(0, CHUNKS)
        there = other < num_chunks
        bests = tl.load(best_ptr + row * num_chunks + other, there, other=float("-inf"), cache_modifier=".cg")
        ids = tl.load(best_id_ptr + row * num_chunks + other, there, other=vocabulary - 1, cache_modifier=".cg")
        winner = tl.min(tl.where(bests == tl.max(bests, 0), ids, vocabulary - 1), 0)
        tl.store(out_ptr + row, winner.to(tl.int64))
        if FILTER:
            keep_chosen(logits_ptr + row * stride_logits, temperature_ptr + row, state_ptr + row * STATE, winner)


def search(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    position_R: Tensor,
    out_R: Tensor,
) -> Tensor:
    """Two launches. [R, STATE]: what is known of each row, and for most rows the token in `out_R`."""
    num_rows, vocabulary = logits_RV.shape
    device = logits_RV.device
    chunk = min(CHUNK, tuning.next_power_of_two(vocabulary))
    group = min(chunk, 128)
    while -(-vocabulary // group) > MAX_GROUPS:
        group *= 2
    num_chunks = triton.cdiv(vocabulary, chunk)
    chunks, groups = tuning.next_power_of_two(num_chunks), tuning.next_power_of_two(num_chunks * (chunk // group))
    floats = torch.empty(num_rows * (groups + 2 * chunks + CANDIDATES + STATE), dtype=torch.float32, device=device)
    largest, masses, values, state = floats.split([num_rows * x for x in (groups, 2 * chunks, CANDIDATES, STATE)])
    ints = torch.empty(num_rows * (groups + CANDIDATES), dtype=torch.int32, device=device)
    chosen, ids = ints.split([num_rows * groups, num_rows * CANDIDATES])
    columns = (temperature_R, top_k_R, top_p_R, min_p_R)
    sizes = {"CHUNKS": chunks, "GROUP": group, "GROUPS": groups, **tuning.overlap(device)}
    _survey_kernel[(num_rows, num_chunks)](
        logits_RV, *columns, largest, masses, logits_RV.stride(0), vocabulary, CHUNK=chunk, num_warps=8, **sizes
    )
    _search_kernel[(num_rows,)](
        logits_RV, *columns, seed_R, position_R, largest, masses, chosen, values, ids, state, out_R,
        logits_RV.stride(0), vocabulary, num_chunks * (chunk // group), num_chunks,
        CANDIDATES=CANDIDATES, AT_ONCE=max(1, 1024 // group), STATE=STATE, RANGE=RANGE, PIVOTS=PIVOTS, PASSES=PASSES,
        BLOCK=512, FAST=_has_fast_log(device), num_warps=8, **sizes,
    )  # fmt: skip
    found: Tensor = state.view(num_rows, STATE)
    return found


def _has_fast_log(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


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
    """One launch, and with filters four more. Rows may be strided.

    Tokens less probable than e^-40 of the best are not drawn under a filter, whatever it says; for the rest see
    `step_ops.sample_rows`.
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
        state = search(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R, out_R)
    num_chunks = triton.cdiv(vocabulary, CHUNK)
    chunks, counters = tuning.next_power_of_two(num_chunks), tuning.counters(device)
    best = torch.empty((num_rows, 2 * chunks), dtype=torch.float32, device=device)
    best_id = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
    grid, stride, options = (num_rows, num_chunks), logits_RV.stride(0), {"num_warps": 8, **tuning.overlap(device)}
    _draw_kernel[grid](
        logits_RV, temperature_R, state, seed_R, position_R, out_R, best, best_id, counters, stride, vocabulary,
        num_chunks, CHUNK=CHUNK, CHUNKS=chunks, STATE=STATE, RANDOM=any_random, FILTER=any_filter,
        FAST=_has_fast_log(device), **options,
    )  # fmt: skip
    if any_filter:
        judge_kernel[grid](
            logits_RV, temperature_R, top_p_R, state, best, counters, stride, vocabulary, num_chunks, CHUNK=CHUNK,
            CHUNKS=chunks, STATE=STATE, **options,
        )  # fmt: skip
        repeat_kernel[(num_rows,)](
            logits_RV, temperature_R, state, seed_R, position_R, out_R, stride, vocabulary, STATE=STATE, BLOCK=2048,
            FAST=_has_fast_log(device), **options,
        )  # fmt: skip
    return out_R
