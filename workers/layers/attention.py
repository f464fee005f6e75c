"""Attention of one layer: this rank's q, k, v heads, handed to the backend. T = tokens, D = model width."""

import torch
from torch import Tensor, nn

from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.placement.process_groups import ParallelContext
from argosy.workers.attention.base import AttentionShape, QKNorm
from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.linear import QKVParallelLinear, RowParallelLinear
from argosy.workers.layers.norm import RMSNorm
from argosy.workers.layers.rotary import RotaryEmbedding
from argosy.workers.quantization.base import LinearMethod


class Attention(nn.Module):
    """q, k, v in one product; norm and rotation and cache by the backend; one all-reduce at the end."""

    def __init__(
        self,
        spec: ModelSpec,
        parallel: ParallelContext,
        method: LinearMethod,
        rotary: RotaryEmbedding,
        *,
        layer: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_size
        self.qkv_proj = QKVParallelLinear(
            parallel, method, spec.hidden_size, heads, kv_heads, size, bias=spec.qkv_bias, dtype=dtype
        )
        self.o_proj = RowParallelLinear(parallel, method, heads * size, spec.hidden_size, bias=spec.o_bias, dtype=dtype)
        self.q_norm = RMSNorm(size, spec.norm_eps, dtype=dtype) if spec.qk_norm else None
        self.k_norm = RMSNorm(size, spec.norm_eps, dtype=dtype) if spec.qk_norm else None
        self.rotary = rotary
        self.shape = AttentionShape(
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            head_size=size,
            scale=size**-0.5,
            sliding_window=spec.window_of(layer),
        )
        self.cache_index = layer - parallel.rank.first_layer
        self._norm: QKNorm | None = None

    def finish(self) -> None:
        """All weights are there."""
        if self.q_norm is not None and self.k_norm is not None:
            q_weight_H, k_weight_H = self.q_norm.weight, self.k_norm.weight
            both = [q_weight_H.expand(self.shape.num_heads, -1), k_weight_H.expand(self.shape.num_kv_heads, -1)]
            self._norm = QKNorm(q_weight_H, k_weight_H, self.q_norm.eps, torch.cat(both))

    def forward(self, x_TD: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """[T, D]."""
        return self.o_proj(self.attend(self.qkv_proj(x_TD), positions_T, ctx))  # type: ignore[no-any-return]

    def attend(self, qkv_TX: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """From the product of q, k and v to what the heads saw, [T, N * H]."""
        kv_cache = ctx.kv_cache.layers[self.cache_index]
        return ctx.backend.forward(
            qkv_TX, positions_T, self.rotary.cos_sin_PH, kv_cache, ctx.metadata, self.shape, self._norm
        )
