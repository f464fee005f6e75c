"""Attention of one layer: this rank's q, k, v heads, handed to the backend. T = tokens, D = model width."""

import dataclasses

import torch
from torch import Tensor, nn

from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.kernels.fp8_reference import Fp8Rows
from argosy.placement.process_groups import ParallelContext
from argosy.workers.attention.base import AttentionShape, QKNorm
from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.group_sum import Left
from argosy.workers.layers.linear import QKVParallelLinear, RowParallelLinear
from argosy.workers.layers.norm import RMSNorm
from argosy.workers.layers.position import alibi_slopes
from argosy.workers.layers.qk_norm import FullNorm, HeadLayerNorm
from argosy.workers.layers.rotary import RotaryEmbedding
from argosy.workers.quantization.base import Cut, LinearMethod, empty_parameter
from argosy.workers.quantization.int_weights import IntWeightMethod


class Sinks(nn.Module):
    """A logit for each of this rank's heads that takes part in the softmax without a value."""

    def __init__(self, parallel: ParallelContext, num_heads: int, *, dtype: torch.dtype):
        super().__init__()
        self.num_heads, self.own = num_heads, num_heads // parallel.tp_size
        self.first = parallel.rank.tp_rank * self.own
        self.sinks = empty_parameter(self.own, dtype=dtype)

    def cuts(self, part: str) -> dict[str, Cut]:
        """Those of this rank's heads."""
        return {"sinks": Cut((self.num_heads,), (slice(self.first, self.first + self.own),))}


class Attention(nn.Module):
    """q, k, v in one product; norm and rotation and cache by the backend; one all-reduce at the end."""

    def __init__(
        self,
        spec: ModelSpec,
        parallel: ParallelContext,
        method: LinearMethod,
        rotary: RotaryEmbedding | None,
        *,
        layer: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_size
        self.spec, self.device = spec, parallel.device
        self.qkv_proj = QKVParallelLinear(
            parallel, method, spec.hidden_size, heads, kv_heads, size, bias=spec.qkv_bias, dtype=dtype
        )
        self.o_proj = RowParallelLinear(parallel, method, heads * size, spec.hidden_size, bias=spec.o_bias, dtype=dtype)
        self.q_norm = _qk_norm(spec, parallel, heads, dtype=dtype)
        self.k_norm = _qk_norm(spec, parallel, kv_heads, dtype=dtype)
        self.sinks = Sinks(parallel, heads, dtype=dtype) if spec.sinks else None
        self.rotary = rotary
        self.first_head = parallel.rank.tp_rank * self.qkv_proj.num_heads
        self.shape = AttentionShape(
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            head_size=size,
            scale=spec.attention_scale or size**-0.5,
            sliding_window=spec.window_of(layer),
            interleaved=spec.rope.interleaved,
            soft_cap=spec.attention_soft_cap,
        )
        self.cache_index = layer - parallel.rank.first_layer
        self._norm: QKNorm | None = None
        self._changes_qkv = spec.clip_qkv is not None or (spec.qk_norm and spec.qk_norm_kind != "head")

    def finish(self) -> None:
        """All weights are there."""
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.finish()
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            q_weight_H, k_weight_H = self.q_norm.weight, self.k_norm.weight
            both = [q_weight_H.expand(self.shape.num_heads, -1), k_weight_H.expand(self.shape.num_kv_heads, -1)]
            self._norm = QKNorm(q_weight_H, k_weight_H, self.q_norm.eps, torch.cat(both))
        is_packed = isinstance(self.o_proj.method, IntWeightMethod)
        self.shape = dataclasses.replace(self.shape, kv_scales=self.qkv_proj.kv_scales, is_packed=is_packed)
        if self.sinks is not None:
            self.shape = dataclasses.replace(self.shape, sinks_N=self.sinks.sinks.float())
        if self.spec.position == "alibi":
            self.shape = dataclasses.replace(self.shape, alibi_slopes_N=self._slopes())

    def _slopes(self) -> Tensor:
        slopes = alibi_slopes(self.spec.num_heads, self.spec.alibi_max) * self.spec.alibi_scale
        own = slopes[self.first_head : self.first_head + self.shape.num_heads]
        return own.to(self.device)

    def forward(self, x_TD: Tensor | Fp8Rows, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """[T, D]."""
        return self.o_proj(self.attend(self.qkv_proj(x_TD), positions_T, ctx))  # type: ignore[no-any-return]  # a module's call is Any

    def partial(self, x_TD: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """`forward` without the sum over the group."""
        return self.o_proj.product(self.attend(self.qkv_proj.product(x_TD), positions_T, ctx))

    def part(
        self, x_TD: Tensor, positions_T: Tensor, ctx: ForwardContext, out_TD: Tensor, *, in_pieces: bool = False
    ) -> Left:
        """`partial`, written to `out_TD`, or with `in_pieces` maybe left as `ParallelLinear.part` does."""
        seen_TX = self.attend(self.qkv_proj.product(x_TD), positions_T, ctx)
        return Left(self.o_proj.part(seen_TX, out_TD, in_pieces=in_pieces))

    def attend(
        self, qkv_TX: Tensor, positions_T: Tensor, ctx: ForwardContext, shape: AttentionShape | None = None
    ) -> Tensor:
        """From the product of q, k and v to what the heads saw, [T, N * H]. `shape`: instead of the layer's own."""
        if self._changes_qkv:
            qkv_TX = self._clip_and_norm(qkv_TX)
        kv_cache = ctx.kv_cache.layers[self.cache_index]
        table_PH = None if self.rotary is None else self.rotary.cos_sin_PH
        metadata = ctx.metadata_of(self.cache_index)
        return ctx.backend.forward(qkv_TX, positions_T, table_PH, kv_cache, metadata, shape or self.shape, self._norm)

    def _clip_and_norm(self, qkv_TX: Tensor) -> Tensor:
        """What no backend does."""
        if self.spec.clip_qkv is not None:
            qkv_TX = qkv_TX.clamp(-self.spec.clip_qkv, self.spec.clip_qkv)
        if self.q_norm is None or self.k_norm is None or self._norm is not None:
            return qkv_TX
        end_q = self.shape.num_heads * self.shape.head_size
        end_k = end_q + self.shape.num_kv_heads * self.shape.head_size
        normed = (self.q_norm(qkv_TX[:, :end_q]), self.k_norm(qkv_TX[:, end_q:end_k]))
        return torch.cat((*normed, qkv_TX[:, end_k:]), dim=1)


def _qk_norm(
    spec: ModelSpec, parallel: ParallelContext, num_heads: int, *, dtype: torch.dtype
) -> RMSNorm | FullNorm | HeadLayerNorm | None:
    if not spec.qk_norm:
        return None
    if spec.qk_norm_kind == "full":
        return FullNorm(parallel, num_heads, spec.head_size, spec.norm_eps, dtype=dtype)
    if spec.qk_norm_kind == "layer_head":
        return HeadLayerNorm(parallel, num_heads, spec.head_size, spec.norm_eps, dtype=dtype)
    return RMSNorm(spec.head_size, spec.norm_eps, dtype=dtype, plus_one=spec.norm == "rms_plus_one")
