"""Tokens to the ranks that hold their experts and back: what an expert-parallel group does instead of sums.

While tokens are exchanged, each rank has a slice of the step's tokens, not all of them:

    norm | gather rows | attention of own heads | scatter the sum | norm | route | to experts and back | add

A slice has equally many rows on all ranks; the last ones may have rows beyond the step's tokens, which go nowhere.
Bytes that a rank sends a layer, with W ranks, T tokens of D numbers, and P the chance that a token has an expert on a
given other rank (`share_elsewhere`):

    two sums            4 (W - 1) / W  T D
    with the exchange   (2 + 2 P) (W - 1) / W  T D, its last column for ids and weights aside

Sizes are exchanged on the device and read once a layer, which a recorded graph can't do: those keep the sums.
S = tokens of this rank's slice, W = ranks of the group, K = chosen experts, R = rows that came here, D = model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from argosy.cluster.protocol.model_spec import MoESpec
from argosy.placement.expert_traffic import least_tokens
from argosy.placement.process_groups import ParallelContext

ALIGNMENT = 64  # numbers: rows begin where a kernel can load many at once


class Dispatched(NamedTuple):
    """What came to this rank, and the way back."""

    rows_RD: Tensor
    ids_RK: Tensor  # of experts of the whole model, int32; others than this rank's are served elsewhere
    weights_RK: Tensor  # float32
    places_SW: Tensor  # of each own token's part from each rank, in what comes back; the last place: none
    sent: list[int]  # rows to each rank
    received: list[int]


class ExpertExchange:
    """One group's exchange. All ranks make the same calls in the same order."""

    def __init__(self, parallel: ParallelContext, moe: MoESpec):
        self.parallel, self.moe = parallel, moe
        self._least_tokens = least_tokens(moe, parallel.tp_size, parallel.device.type)

    def takes(self, num_tokens: int, *, only_decodes: bool = False) -> bool:
        """Whether a step of so many tokens is exchanged; the same on all ranks.

        Not one of answers alone on a GPU: it is recorded, or runs as it will be recorded.
        """
        if self._least_tokens is None or num_tokens < self._least_tokens:
            return False
        return self.parallel.device.type != "cuda" or not only_decodes

    def own_slice(self, x_TD: Tensor) -> Tensor:
        """This rank's rows of what all ranks have, [S, D]; rows beyond the last token are 0. A copy."""
        num_tokens, world, rank = x_TD.shape[0], self.parallel.tp_size, self.parallel.rank.tp_rank
        size = -(-num_tokens // world)
        own = x_TD.new_zeros((size, *x_TD.shape[1:]))
        first, last = min(rank * size, num_tokens), min((rank + 1) * size, num_tokens)
        own[: last - first].copy_(x_TD[first:last])
        return own

    def num_own(self, num_tokens: int) -> int:
        """Rows of this rank's slice that are tokens."""
        size = -(-num_tokens // self.parallel.tp_size)
        return max(0, min(size, num_tokens - self.parallel.rank.tp_rank * size))

    def dispatch(self, x_SD: Tensor, ids_SK: Tensor, weights_SK: Tensor, num_own: int) -> Dispatched:
        """Send each token, once, to each rank that has some of its experts."""
        parallel, world = self.parallel, self.parallel.tp_size
        num_slots, top_k, device = len(x_SD), ids_SK.shape[1], x_SD.device
        owners_SK = ((ids_SK.long() + 1) * world - 1) // self.moe.num_experts  # the inverse of `own_experts`
        hit_SW = torch.zeros((num_slots, world), dtype=torch.bool, device=device).scatter_(1, owners_SK, True)
        hit_SW[num_own:] = False
        hit_X = hit_SW.t().reshape(-1)  # by rank, then by token: the order of what is sent
        order_X = hit_X.cumsum(0) - 1
        counts_W = hit_SW.sum(0)
        sent, received = torch.stack((counts_W, parallel.all_to_all(counts_W, None, None))).tolist()
        total = sum(sent)
        tokens_X = torch.arange(num_slots, device=device).repeat(world)
        source = torch.empty(num_slots * world + 1, dtype=torch.int64, device=device)
        source.scatter_(0, torch.where(hit_X, order_X, num_slots * world), tokens_X)
        packed = parallel.all_to_all(_pack(x_SD, ids_SK, weights_SK)[source[:total]], sent, received)
        width = x_SD.shape[1]
        extra = packed[:, width : width + 2 * _columns(top_k, x_SD.dtype)]
        ids_RK, weights_RK = extra.contiguous().view(torch.int32).chunk(2, dim=1)
        places_SW = torch.where(hit_X, order_X, total).view(world, num_slots).t()
        return Dispatched(
            packed[:, :width],
            ids_RK.contiguous(),
            weights_RK.contiguous().view(torch.float32),
            places_SW,
            sent,
            received,
        )

    def combine(self, made_RD: Tensor, way: Dispatched) -> Tensor:
        """Each token's parts from all ranks, summed in float32 in the order of the ranks: [S, D]."""
        back = self.parallel.all_to_all(made_RD, way.received, way.sent)
        back = torch.cat((back, back.new_zeros((1, back.shape[1]))))
        out_SD = torch.zeros((len(way.places_SW), back.shape[1]), dtype=torch.float32, device=back.device)
        for places_S in way.places_SW.unbind(1):
            out_SD += back[places_S]
        return out_SD.to(made_RD.dtype)


def _columns(top_k: int, dtype: torch.dtype) -> int:
    """Numbers of the model's that the 4 bytes of each choice take."""
    return top_k * 4 // dtype.itemsize


def _pack(x_SD: Tensor, ids_SK: Tensor, weights_SK: Tensor) -> Tensor:
    """Tokens, ids and weights in one row each, so that they travel together."""
    dtype = x_SD.dtype
    parts = [x_SD, ids_SK.int().view(dtype), weights_SK.float().view(dtype)]
    missing = -2 * _columns(ids_SK.shape[1], dtype) % ALIGNMENT
    return torch.cat((*parts, x_SD.new_zeros((len(x_SD), missing))), dim=1)
