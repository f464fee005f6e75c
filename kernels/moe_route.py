"""Which experts a token goes to, in one launch. Meaning: `moe_reference.choose_experts`.

A program has a token's scores in registers, as groups by experts of a group, and takes the best one after the other.
Of equal scores the lower number wins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning

SCORINGS = {"softmax": 0, "sigmoid": 1, "softmax_after": 2}


@triton.jit
def _route_kernel(
    logits_ptr, correction_ptr, ids_ptr, weights_ptr, stride_logits, scaling_factor,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr, GROUPS_2: tl.constexpr, MEMBERS_2: tl.constexpr,
    TOP_K: tl.constexpr, TOP_K_2: tl.constexpr, TOP_GROUPS: tl.constexpr, SCORING: tl.constexpr,
    RENORMALISE: tl.constexpr, CORRECTED: tl.constexpr, BY_TWO: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_2)[:, None]
    member = tl.arange(0, MEMBERS_2)[None, :]
    is_expert = (group < GROUPS) & (member < MEMBERS)
    expert = group * MEMBERS + member
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    logits = tl.load(logits_ptr + token * stride_logits + expert, is_expert, other=float("-inf")).to(tl.float32)
    peak = tl.max(tl.max(logits, axis=1), axis=0)
    if SCORING == 0:
        powers = tl.exp(logits - peak)
        scores = powers / tl.sum(tl.sum(powers, axis=1), axis=0)
    elif SCORING == 1:
        scores = tl.sigmoid(logits)
    else:
        scores = logits
    choice = scores
    if CORRECTED:
        choice += tl.load(correction_ptr + expert, is_expert, other=0.0).to(tl.float32)
    choice = tl.where(is_expert, choice, float("-inf"))
    if TOP_GROUPS < GROUPS:
        best = tl.max(choice, axis=1)
        if BY_TWO:
            first = tl.argmax(choice, axis=1)
            second = tl.max(tl.where(member == first[:, None], float("-inf"), choice), axis=1)
            best = tl.where(tl.arange(0, GROUPS_2) < GROUPS, best + second, float("-inf"))
        kept = tl.zeros((GROUPS_2,), tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            chosen = tl.arange(0, GROUPS_2) == tl.argmax(best, axis=0)
            kept = tl.where(chosen, 1, kept)
            best = tl.where(chosen, float("-inf"), best)
        choice = tl.where(kept[:, None] == 1, choice, float("-inf"))
    place = tl.arange(0, TOP_K_2)
    ids = tl.zeros((TOP_K_2,), tl.int32)
    weights = tl.zeros((TOP_K_2,), tl.float32)
    for turn in tl.static_range(TOP_K):
        best_choice = tl.max(tl.max(choice, axis=1), axis=0)
        found = tl.min(tl.min(tl.where(choice == best_choice, expert, GROUPS * MEMBERS), axis=1), axis=0)
        is_found = expert == found
        weight = tl.sum(tl.sum(tl.where(is_found & is_expert, scores, 0.0), axis=1), axis=0)
        ids = tl.where(place == turn, found, ids)
        weights = tl.where(place == turn, weight, weights)
        choice = tl.where(is_found, float("-inf"), choice)
    is_place = place < TOP_K
    if SCORING == 2:
        powers = tl.where(is_place, tl.exp(weights - peak), 0.0)
        weights = powers / tl.sum(powers, axis=0)
    else:
        if RENORMALISE:
            weights = weights / (tl.sum(weights, axis=0) + 1e-20)
        weights *= scaling_factor
    tl.store(ids_ptr + token * TOP_K + place, ids, is_place)
    tl.store(weights_ptr + token * TOP_K + place, weights, is_place)


def choose_experts(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalise: bool = False,
    scaling_factor: float = 1.0,
    correction_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    """See `moe_reference.choose_experts`; the best comes first."""
    num_tokens, num_experts = logits_TE.shape
    if top_groups >= num_groups:
        num_groups = top_groups = 1
    members = num_experts // num_groups
    ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits_TE.device)
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits_TE.device)
    assert logits_TE.stride(1) == 1
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits_TE, logits_TE if correction_E is None else correction_E, ids, weights, logits_TE.stride(0),
            scaling_factor, GROUPS=num_groups, MEMBERS=members, GROUPS_2=tuning.next_power_of_two(num_groups),
            MEMBERS_2=tuning.next_power_of_two(members), TOP_K=top_k, TOP_K_2=tuning.next_power_of_two(top_k),
            TOP_GROUPS=top_groups, SCORING=SCORINGS[scoring], RENORMALISE=renormalise,
            CORRECTED=correction_E is not None, BY_TWO=group_score == "top2", num_warps=1 if num_experts <= 64 else 4,
            **tuning.overlap(logits_TE.device),
        )  # fmt: skip
    return ids, weights
