"""A mixture of experts in place of an MLP: router, this rank's experts, the expert that sees every token.

Over a tensor-parallel group either each expert is cut (its inner width), or each rank has whole experts. With few
tokens a rank then leaves the choices of others out, and both end in the one sum over the group that an MLP needs, too;
with many, tokens may go to the ranks that hold their experts (`expert_exchange`).

T = tokens, S = those of this rank's slice, D = model width, E = experts of this rank, I = inner width of an expert on
this rank.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argosy.cluster.protocol.model_spec import ModelSpec, MoESpec
from argosy.kernels import moe_ops
from argosy.placement.process_groups import ParallelContext
from argosy.workers.layers.expert_exchange import ExpertExchange
from argosy.workers.layers.group_sum import Left
from argosy.workers.loading.names import Slot
from argosy.workers.quantization.base import Cut, empty_parameter

ALL = slice(None)


class Router(nn.Module):
    """Which experts a token goes to, and with what weights; the same on every rank."""

    def __init__(self, moe: MoESpec, width: int, *, dtype: torch.dtype):
        super().__init__()
        self.moe, self.width = moe, width
        self.weight = empty_parameter(moe.num_experts, width, dtype=dtype)
        self.bias = empty_parameter(moe.num_experts, dtype=dtype) if moe.router_bias else None
        self.e_score_correction_bias = (
            empty_parameter(moe.num_experts, dtype=torch.float32) if moe.correction_bias else None
        )
        # DeepSeek trained its router in float32; the others in the model's numbers
        self.exact = moe.scoring == "sigmoid" or moe.num_groups > 1 or moe.scaling_factor != 1.0

    def cuts(self, part: str) -> dict[str, Cut]:
        """All of it."""
        found = {"weight": Cut((self.moe.num_experts, self.width), (ALL, ALL))}
        if self.bias is not None:
            found["bias"] = Cut((self.moe.num_experts,), (ALL,))
        if self.e_score_correction_bias is not None:
            found["e_score_correction_bias"] = Cut((self.moe.num_experts,), (ALL,))
        return found

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(ids [T, K] int32, weights [T, K] float32)."""
        moe = self.moe
        x, weight = (x_TD.float(), self.weight.float()) if self.exact else (x_TD, self.weight)
        return moe_ops.choose_experts(
            F.linear(x, weight, self.bias),
            moe.top_k,
            scoring=moe.scoring,
            renormalise=moe.renormalise,
            scaling_factor=moe.scaling_factor,
            correction_E=self.e_score_correction_bias,
            num_groups=moe.num_groups,
            top_groups=moe.top_groups,
            group_score=moe.group_score,
        )


class Experts(nn.Module):
    """This rank's part of all experts, in two tensors: [E, gate | up, D] and [E, D, I]."""

    def __init__(self, moe: MoESpec, parallel: ParallelContext, width: int, *, dtype: torch.dtype):
        super().__init__()
        self.moe, self.width = moe, width
        tp_size, tp_rank = parallel.tp_size, parallel.rank.tp_rank
        inner, self.own_experts = moe.intermediate_size, range(moe.num_experts)
        if moe.expert_parallel:
            self.own_experts = moe.own_experts(tp_size, tp_rank)
            self.own_inner = slice(0, inner)
        else:
            inner //= tp_size
            self.own_inner = slice(tp_rank * inner, tp_rank * inner + inner)
        count = len(self.own_experts)
        self.inner = inner
        self.gate_up = empty_parameter(count, 2 * inner, width, dtype=dtype)
        self.down = empty_parameter(count, width, inner, dtype=dtype)
        adds_bias = moe.expert_bias and (moe.expert_parallel or tp_rank == 0)  # of cut experts, once
        self.gate_up_bias = empty_parameter(count, 2 * inner, dtype=dtype) if moe.expert_bias else None
        self.down_bias = empty_parameter(count, width, dtype=dtype) if adds_bias else None
        self.gate_up_scale: nn.Parameter | None = None  # of weights of 8 bits
        self.down_scale: nn.Parameter | None = None

    def expert_cuts(self, slot: Slot, expert: int) -> Iterator[tuple[str, str, Cut]]:
        """What one expert's tensor holds for us: (last word of its name, our parameter, cut)."""
        full, place = self.moe.intermediate_size, expert - self.own_experts.start
        if slot is Slot.DOWN:
            yield "weight", "down", Cut((self.width, full), (ALL, self.own_inner), (place,))
            return
        first = self.inner * (slot is Slot.UP)
        target = (place, slice(first, first + self.inner))
        yield "weight", "gate_up", Cut((full, self.width), (self.own_inner, ALL), target)

    def forward(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        *,
        num_tokens: int | None = None,
        out_TD: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum over those of the chosen experts that this rank has, [T, D], written to `out_TD` if given.

        `num_tokens` of the whole group, where `x_TD` are only those that have experts here.
        """
        if self.moe.expert_parallel:
            ids_TK = ids_TK - self.own_experts.start
            ids_TK = torch.where((ids_TK >= 0) & (ids_TK < len(self.own_experts)), ids_TK, -1)
        return moe_ops.experts(
            x_TD,
            self.gate_up,
            self.down,
            ids_TK,
            weights_TK,
            gate_up_bias_EI=self.gate_up_bias,
            down_bias_ED=self.down_bias,
            gate_up_scale=self.gate_up_scale,
            down_scale=self.down_scale,
            limit=self.moe.swiglu_limit,
            alpha=self.moe.swiglu_alpha,
            out_TD=out_TD,
            average=(num_tokens or len(x_TD)) * self.moe.top_k // self.moe.num_experts,
        )


class SharedGate(nn.Module):
    """How much of the shared expert a token gets."""

    def __init__(self, width: int, *, dtype: torch.dtype):
        super().__init__()
        self.width = width
        self.weight = empty_parameter(1, width, dtype=dtype)

    def cuts(self, part: str) -> dict[str, Cut]:
        """All of it."""
        return {"weight": Cut((1, self.width), (ALL, ALL))}

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, 1]."""
        return F.linear(x_TD, self.weight).sigmoid()


class SharedMLP(Protocol):
    """What the expert that sees every token is: an MLP that can leave out its sum over the group."""

    def partial(self, x_TD: Tensor) -> Tensor:
        """This rank's part of the sum, [T, D]."""


class MoE(nn.Module):
    """Router, experts and shared expert; one all-reduce at the end, or tokens exchanged between the ranks."""

    def __init__(
        self,
        spec: ModelSpec,
        parallel: ParallelContext,
        *,
        dtype: torch.dtype,
        shared: SharedMLP | None = None,
        experts: Callable[..., Experts] = Experts,
        exchange: ExpertExchange | None = None,
    ):
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.parallel, self.exchange = parallel, exchange
        self.shared_is_whole = moe.shared_is_whole
        self.router = Router(moe, spec.hidden_size, dtype=dtype)
        self.experts = experts(moe, parallel, spec.hidden_size, dtype=dtype)
        self.shared = shared
        self.shared_gate = SharedGate(spec.hidden_size, dtype=dtype) if moe.shared_gate else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D]."""
        ids_TK, weights_TK = self.router(x_TD)
        out_TD: Tensor = self.experts(x_TD, ids_TK, weights_TK)
        if self.shared_is_whole:
            return self._with_shared(self.parallel.all_reduce(out_TD), x_TD)
        return self.parallel.all_reduce(self._with_shared(out_TD, x_TD))

    def part(self, x_TD: Tensor, out_TD: Tensor, *, in_pieces: bool = False) -> Left:
        """This rank's part of the sum, written to `out_TD`, never in pieces; where ranks that have no expert of a token
        add nothing to it, the experts that were asked.
        """
        ids_TK, weights_TK = self.router(x_TD)
        self.experts(x_TD, ids_TK, weights_TK, out_TD=out_TD)
        if self.shared is not None:
            own = slice(0, len(x_TD))
            if self.shared_is_whole:  # each rank adds it for its share of the tokens: the parts are summed
                size = -(-len(x_TD) // self.parallel.tp_size)
                own = slice(self.parallel.rank.tp_rank * size, (self.parallel.rank.tp_rank + 1) * size)
            if len(x_TD[own]):
                self._with_shared(out_TD[own], x_TD[own], in_place=True)
            return Left()
        moe = self.experts.moe
        return Left(asked=(ids_TK, moe.num_experts) if moe.expert_parallel else None)

    def forward_slice(self, x_SD: Tensor, num_tokens: int) -> Tensor:
        """The same of this rank's slice of `num_tokens`, [S, D]: tokens go to their experts and come back."""
        assert self.exchange is not None
        ids_SK, weights_SK = self.router(x_SD)
        way = self.exchange.dispatch(x_SD, ids_SK, weights_SK, self.exchange.num_own(num_tokens))
        made_RD: Tensor = self.experts(way.rows_RD, way.ids_RK, way.weights_RK, num_tokens=num_tokens)
        return self._with_shared(self.exchange.combine(made_RD, way), x_SD)

    def _with_shared(self, out_TD: Tensor, x_TD: Tensor, *, in_place: bool = False) -> Tensor:
        """With what the expert that sees every token adds, whole or this rank's part of it."""
        if self.shared is None:
            return out_TD
        shared_TD = self.shared.partial(x_TD)
        if self.shared_gate is not None:
            shared_TD = shared_TD * self.shared_gate(x_TD)
        return out_TD.add_(shared_TD) if in_place else out_TD + shared_TD
