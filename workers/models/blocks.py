"""The parts of a layer that families put together differently. T = tokens, D = model width.

With x the sum so far, a the attention, m the MLP:

    sequential          x += a(n1(x));            x += m(n2(x))
    sandwich            x += p1(a(n1(x)));        x += p2(m(n2(x)))                        Gemma 2, 3
    norm_after          x += n1(a(x));            x += n2(m(x))                            OLMo2
    post_norm           x = n1(x + a(x));         x = n2(x + m(x))                         OPT-350m
    parallel            x += a(n1(x)) + m(n1(x))                                           GPT-J, Falcon-7B, Command-R
    parallel_two_norms  x += a(n1(x)) + m(n2(x))                                           GPT-NeoX, Falcon-40B
"""

from typing import Any

import torch
from torch import Tensor, nn

from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.placement.process_groups import ParallelContext
from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.activation import ACTIVATIONS
from argosy.workers.layers.attention import Attention
from argosy.workers.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from argosy.workers.layers.linear import ColumnParallelLinear, RowParallelLinear
from argosy.workers.layers.moe import MoE
from argosy.workers.layers.norm import LayerNorm, RMSNorm, make_norm
from argosy.workers.models.decoder import GatedMLP
from argosy.workers.quantization.base import Cut, LinearMethod, empty_parameter

PARALLEL_BLOCKS = ("parallel", "parallel_two_norms")
FEW_TOKENS = 16  # up to which products have a kernel of their own on a GPU


class PlainMLP(nn.Module):
    """down(act(up(x))); one all-reduce at the end."""

    def __init__(self, spec: ModelSpec, parallel: ParallelContext, method: LinearMethod, *, dtype: torch.dtype):
        super().__init__()
        width, inner, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        self.up_proj = ColumnParallelLinear(parallel, method, width, inner, bias=bias, dtype=dtype)
        self.down_proj = RowParallelLinear(parallel, method, inner, width, bias=bias, dtype=dtype)
        self.activate = ACTIVATIONS[spec.activation]

    def partial(self, x_TD: Tensor) -> Tensor:
        """`forward` without the sum over the group."""
        return self.down_proj.product(self.activate(self.up_proj(x_TD)))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D]."""
        return self.down_proj(self.activate(self.up_proj(x_TD)))  # type: ignore[no-any-return]  # a module's call is Any


class BiasedLMHead(ParallelLMHead):
    """A head with a bias, also where its weight is the embedding's."""

    def __init__(
        self,
        parallel: ParallelContext,
        vocab_size: int,
        width: int,
        *,
        dtype: torch.dtype,
        tied_to: VocabParallelEmbedding | None,
    ):
        super().__init__(parallel, vocab_size, width, dtype=dtype, tied_to=tied_to)
        self.bias = empty_parameter(self.share.rows, dtype=dtype)

    def cuts(self, part: str) -> dict[str, Cut]:
        """This rank's rows, and its part of the bias."""
        share = self.share
        own = slice(0, share.last - share.first)
        return super().cuts(part) | {"bias": Cut((share.vocab_size,), (slice(share.first, share.last),), own)}


class GeneralLayer(nn.Module):
    """Attention and MLP, joined as `spec.block` says. What came before is kept apart, as `residual`."""

    def __init__(
        self,
        spec: ModelSpec,
        parallel: ParallelContext,
        attention: Any,  # nn.Module: called, and asked for its `partial`
        mlp: Any,
        *,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.block, self.residual_scale, self.parallel = spec.block, spec.residual_scale, parallel

        def norm() -> RMSNorm | LayerNorm:
            return make_norm(spec.norm, spec.hidden_size, spec.norm_eps, dtype=dtype)

        self.input_norm = norm()
        self.attention = attention
        self.mlp_norm = None if spec.block == "parallel" else norm()
        self.mlp = mlp
        self.attention_out_norm = norm() if spec.block == "sandwich" else None
        self.mlp_out_norm = norm() if spec.block == "sandwich" else None

    def forward(
        self, delta_TD: Tensor | None, residual_TD: Tensor, positions_T: Tensor, ctx: ForwardContext
    ) -> Tensor | None:
        """What is still to be added to `residual_TD`, which this layer updates in place; None: nothing."""
        if self.block == "norm_after":
            return self._norm_after(delta_TD, residual_TD, positions_T, ctx)
        if self.block == "post_norm":
            self._post_norm(residual_TD, positions_T, ctx)
            return None
        norm = self.input_norm
        x_TD = norm(residual_TD) if delta_TD is None else norm.add(delta_TD, residual_TD)
        if self.block in PARALLEL_BLOCKS:  # one sum over the group for both
            mlp_in_TD = x_TD if self.mlp_norm is None else self.mlp_norm(residual_TD)
            attended_TD = self.attention.partial(x_TD, positions_T, ctx)
            return self.parallel.all_reduce(attended_TD.add_(self.mlp.partial(mlp_in_TD)))
        attended_TD = self._attend(x_TD, positions_T, ctx)
        if self.attention_out_norm is not None:
            attended_TD = self.attention_out_norm(attended_TD)
        assert self.mlp_norm is not None
        x_TD = self._run_mlp(self.mlp_norm.add(self._scaled(attended_TD), residual_TD))
        return self._scaled(x_TD if self.mlp_out_norm is None else self.mlp_out_norm(x_TD))

    def forward_slice(
        self, delta_SD: Tensor | None, residual_SD: Tensor, positions_T: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """`forward` with the tokens divided over the group: this rank's slice of everything but the attention."""
        assert self.block == "sequential", self.block  # as all families with experts are
        assert self.mlp_norm is not None
        norm, parallel, num_tokens = self.input_norm, self.parallel, len(positions_T)
        x_SD = norm(residual_SD) if delta_SD is None else norm.add(delta_SD, residual_SD)
        x_TD = parallel.gather_rows(x_SD)[:num_tokens]
        attended_SD = parallel.scatter_sum(self.attention.partial(x_TD, positions_T, ctx))
        x_SD = self.mlp_norm.add(self._scaled(attended_SD), residual_SD)
        if isinstance(self.mlp, MoE):
            return self._scaled(self.mlp.forward_slice(x_SD, num_tokens))
        return self._scaled(parallel.scatter_sum(self.mlp.partial(parallel.gather_rows(x_SD))))

    def _attend(self, x_TD: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """The attention; a few tokens by the products that are made for them."""
        if len(x_TD) <= FEW_TOKENS and isinstance(self.attention, Attention):
            return self.parallel.all_reduce(self.attention.partial(x_TD, positions_T, ctx))
        return self.attention(x_TD, positions_T, ctx)  # type: ignore[no-any-return]  # a module's call is Any

    def _run_mlp(self, x_TD: Tensor) -> Tensor:
        """The MLP, in the same way."""
        if len(x_TD) <= FEW_TOKENS and isinstance(self.mlp, GatedMLP | PlainMLP):
            return self.parallel.all_reduce(self.mlp.partial(x_TD))
        return self.mlp(x_TD)  # type: ignore[no-any-return]  # a module's call is Any

    def _scaled(self, x_TD: Tensor) -> Tensor:
        return x_TD if self.residual_scale == 1.0 else x_TD * self.residual_scale

    def _norm_after(
        self, delta_TD: Tensor | None, residual_TD: Tensor, positions_T: Tensor, ctx: ForwardContext
    ) -> Tensor:
        assert self.mlp_norm is not None
        if delta_TD is not None:
            residual_TD.add_(delta_TD)
        residual_TD.add_(self.input_norm(self.attention(residual_TD, positions_T, ctx)))
        normed: Tensor = self.mlp_norm(self.mlp(residual_TD))
        return normed

    def _post_norm(self, residual_TD: Tensor, positions_T: Tensor, ctx: ForwardContext) -> None:
        assert self.mlp_norm is not None
        residual_TD.copy_(self.input_norm.add(self.attention(residual_TD, positions_T, ctx), residual_TD))
        residual_TD.copy_(self.mlp_norm.add(self.mlp(residual_TD), residual_TD))
