"""Whether top_p keeps a token that was drawn from more than it keeps; and if not, another draw.

The best of all by logit + noise is the best of those that top_p keeps, if it is one of them, and it mostly is: top_p
keeps most of the mass. So a row of nearly even logits needs no threshold: the mass above one token is a single sum.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels.sampling_parts import CHOSEN, JUDGED, LARGEST, LOW, WANTED, gumbel, is_last


@triton.jit
def keep_chosen(row_ptr, temperature_ptr, state, token):
    """For the judge: the scaled logit of the drawn token."""
    inverse = tl.div_rn(1.0, tl.load(temperature_ptr).to(tl.float32))
    tl.store(state + CHOSEN, tl.load(row_ptr + token).to(tl.float32) * inverse)


@triton.jit
def judge_kernel(
    logits_ptr, temperature_ptr, top_p_ptr, state_ptr, part_ptr, counter_ptr, stride_logits, vocabulary, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Whether top_p keeps the drawn token: DONE; else what it would have to be among is WANTED."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    state = state_ptr + row * STATE
    if tl.load(state + JUDGED) == 0.0:
        return
    largest = tl.load(state + LARGEST)
    chosen = tl.load(state + CHOSEN)
    low = tl.load(state + LOW)
    z = tl.load(logits_ptr + row * stride_logits + token, token < vocabulary, other=float("-inf")).to(tl.float32)
    z *= tl.div_rn(1.0, tl.load(temperature_ptr + row).to(tl.float32))
    weight = tl.exp(z - largest)
    part = part_ptr + row * 2 * CHUNKS
    tl.store(part + chunk, tl.sum(tl.where(z > chosen, weight, 0.0), 0))
    tl.store(part + CHUNKS + chunk, tl.sum(tl.where(z >= low, weight, 0.0), 0))
    if is_last(counter_ptr + row, num_chunks):
        other = tl.arange(0, CHUNKS)
        there = other < num_chunks
        above = tl.sum(tl.load(part + other, there, other=0.0, cache_modifier=".cg"), 0)
        mass = tl.sum(tl.load(part + CHUNKS + other, there, other=0.0, cache_modifier=".cg"), 0)
        wanted = tl.load(top_p_ptr + row).to(tl.float32) * mass
        tl.store(state + WANTED, wanted)
        if (above < wanted) | (above == 0.0):
            tl.store(state + JUDGED, 0.0)


@triton.jit
def repeat_kernel(
    logits_ptr, temperature_ptr, state_ptr, seed_ptr, position_ptr, out_ptr, stride_logits, vocabulary,
    STATE: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For rows whose token top_p does not keep: the best of those above it, until top_p keeps it."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    state = state_ptr + row * STATE
    if tl.load(state + JUDGED) == 0.0:
        return
    row_ptr = logits_ptr + row * stride_logits
    inverse = tl.div_rn(1.0, tl.load(temperature_ptr + row).to(tl.float32))
    one = tl.zeros((1,), tl.int32)
    seed = tl.load(seed_ptr + row + one).to(tl.int64)
    position = tl.load(position_ptr + row + one).to(tl.int64)
    largest = tl.load(state + LARGEST)
    wanted = tl.load(state + WANTED)
    bound = tl.load(state + CHOSEN)
    chosen = vocabulary - 1
    above = wanted
    turn = 0
    while (turn == 0) | ((above >= wanted) & (above > 0.0)):  # each turn weighs what the one before chose
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        best_id = tl.zeros((BLOCK,), tl.int32) + vocabulary - 1
        mass = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, vocabulary, BLOCK, num_stages=2):
            token = start + tl.arange(0, BLOCK)
            z = tl.load(row_ptr + token, token < vocabulary, other=float("-inf")).to(tl.float32) * inverse
            mass += tl.where(z > bound, tl.exp(z - largest), 0.0)
            score = tl.where(z > bound, z + gumbel(seed, position, token, FAST), float("-inf"))
            best_id = tl.where(score > best, token, best_id)
            best = tl.maximum(score, best)
        above = tl.where(turn == 0, wanted + 1.0, tl.sum(mass, 0))
        if (above >= wanted) & (above > 0.0):
            chosen = tl.min(tl.where(best == tl.max(best, 0), best_id, vocabulary - 1), 0)
            bound = tl.load(row_ptr + chosen).to(tl.float32) * inverse
        turn += 1
    tl.store(out_ptr + row, chosen.to(tl.int64))
