"""Mixtures of experts in plain torch: the path of the CPU engine, and the judge of the kernels.

T tokens, E experts, K chosen experts a token, D model width, I inner width of an expert. An id of -1 is a choice that
another rank serves; it adds nothing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from argosy.kernels import mxfp4, packed_reference
from argosy.kernels.packed_reference import PackedWeight


class IntExpertWeight(NamedTuple):
    """One product of all experts, of 4 or 8 bits with a scale and a zero a group of inputs."""

    packed: PackedWeight  # with an axis of experts before its own
    order_EJ: Tensor | None = None  # int32: which input stands at each place, where that is not its own
    num_inputs: int | None = None  # fewer than places, where places were filled up with numbers that count nothing

    @property
    def num_experts(self) -> int:
        """That are here."""
        return self.packed.words_MUW.shape[0]

    def of(self, expert: int) -> Tensor:
        """What one expert's weight means, [O, I] in the scales' numbers."""
        words, pairs = self.packed.words_MUW[expert], self.packed.pairs_MKR2[expert]
        plain_OI = packed_reference.dequantize(self.packed._replace(words_MUW=words, pairs_MKR2=pairs))
        if self.order_EJ is None:
            return plain_OI
        zeros = plain_OI.new_zeros((len(plain_OI), self.num_inputs or plain_OI.shape[1]))
        return zeros.index_add_(1, self.order_EJ[expert].long(), plain_OI)


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
    """(ids [T, K] int32, weights [T, K] float32) from a router's logits.

    `scoring`: "softmax" or "sigmoid" of all logits, or "softmax_after", over the chosen ones alone. The choice is by
    score + `correction_E`, within the `top_groups` groups of neighbours that score highest by `group_score` ("max": of
    the best, "top2": of the two best together); the weight is the score alone.
    """
    logits_TE = logits_TE.float()
    if scoring == "softmax_after":
        values_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
        return ids_TK.int(), values_TK.softmax(-1)
    scores_TE = logits_TE.sigmoid() if scoring == "sigmoid" else logits_TE.softmax(-1)
    choice_TE = scores_TE if correction_E is None else scores_TE + correction_E
    if top_groups < num_groups:
        grouped_TGE = choice_TE.unflatten(-1, (num_groups, -1))  # type: ignore[no-untyped-call, unused-ignore]  # torch's own
        best = grouped_TGE.topk(2, -1)[0].sum(-1) if group_score == "top2" else grouped_TGE.amax(-1)
        kept_TG = torch.zeros_like(best).scatter_(1, best.topk(top_groups, -1)[1], 1.0)
        dropped_TE = kept_TG.repeat_interleave(choice_TE.shape[-1] // num_groups, -1) == 0
        choice_TE = choice_TE.masked_fill(dropped_TE, float("-inf"))
    ids_TK = choice_TE.topk(top_k, dim=-1)[1]
    weights_TK = scores_TE.gather(1, ids_TK)
    if renormalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK.int(), weights_TK * scaling_factor


def swiglu(both: Tensor, limit: float = 0.0, alpha: float = 1.0) -> Tensor:
    """silu(gate) * up of [.., gate | up]; with a limit, as gpt-oss has it: both clamped, and up + 1."""
    gate, up = both.chunk(2, dim=-1)
    if not limit:
        return F.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def experts(
    x_TD: Tensor,
    gate_up_EID: Tensor | IntExpertWeight,
    down_EDI: Tensor | IntExpertWeight,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    gate_up_bias_EI: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    limit: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """The sum over each token's experts of weight * down(swiglu(gate_up(x))), [T, D]. `gate_up_EID`: [E, 2 I, D].

    With scales, weights are e4m3 with one for each 128 x 128 of them ([E, O / 128, I / 128], float32), or MXFP4 (uint8
    [E, O, I / 2], scales uint8 [E, O, I / 32]).
    """
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in sorted(set(ids_TK.flatten().tolist())):
        if expert < 0:
            continue
        tokens, places = torch.where(ids_TK == expert)
        gate_up = _unscaled(gate_up_EID, gate_up_scale, expert, x_TD.dtype)
        down = _unscaled(down_EDI, down_scale, expert, x_TD.dtype)
        both = F.linear(x_TD[tokens], gate_up, None if gate_up_bias_EI is None else gate_up_bias_EI[expert])
        made = F.linear(swiglu(both, limit, alpha), down, None if down_bias_ED is None else down_bias_ED[expert])
        out_TD.index_add_(0, tokens, made.float() * weights_TK[tokens, places, None])
    return out_TD.to(x_TD.dtype)


def _unscaled(
    weights: Tensor | IntExpertWeight, scale: Tensor | None, expert: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """One expert's weight of 8 or 4 bits with its scales multiplied in; another as it is."""
    if isinstance(weights, IntExpertWeight):
        return weights.of(expert).to(dtype)
    weight = weights[expert]
    if scale is None:
        return weight
    if weight.dtype == torch.uint8:
        return mxfp4.unpack(weight.unflatten(-1, (-1, mxfp4.BLOCK // 2)), scale[expert], dtype)
    whole = scale[expert].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (weight.float() * whole[: weight.shape[0], : weight.shape[1]]).to(dtype)


def group_tokens(ids_TK: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Choices in the order of their experts, each expert's padded to whole blocks of `rows`.

    Returns (place of each row in the flat ids, or their number for padding; the expert of each block, -1 for none),
    both int32 and as long as the worst case needs.
    """
    flat = ids_TK.reshape(-1)
    num_blocks = most_blocks(flat.numel(), num_experts, rows)
    places = torch.full((num_blocks * rows,), flat.numel(), dtype=torch.int32, device=flat.device)
    expert_of_block = torch.full((num_blocks,), -1, dtype=torch.int32, device=flat.device)
    block = 0
    for expert in range(num_experts):
        (mine,) = torch.where(flat == expert)
        count = -(-len(mine) // rows)
        places[block * rows : block * rows + len(mine)] = mine.int()
        expert_of_block[block : block + count] = expert
        block += count
    return places, expert_of_block


def most_blocks(num_choices: int, num_experts: int, rows: int) -> int:
    """Blocks that choices can need at most, whatever they are: known on the host, so that launches have one shape."""
    full_and_begun = -(-num_choices // rows) + num_experts
    return max(1, min(num_choices, full_and_begun))
