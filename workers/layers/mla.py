"""Attention over a latent vector (DeepSeek): the cache holds it and one rotated key a token, whatever the heads.

A decode row multiplies its query by the matrix that would expand the latent ("absorbed"), and attends to latents as if
they were the one key and value of all heads. The tokens of a prompt expand their row's latents to keys and values of
each head first, which is less work as soon as they are many. Both give the same numbers.

T = tokens, D = model width, N = heads of this rank, C = latent width, P = rotated width, Q = unrotated, V = value.
"""

import torch
from torch import Tensor, nn

from argosy.cluster.protocol.model_spec import ModelSpec
from argosy.kernels import mla_ops, ops
from argosy.placement.process_groups import ParallelContext
from argosy.workers.attention.base import AttentionMetadata
from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.group_sum import Left
from argosy.workers.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from argosy.workers.layers.norm import RMSNorm
from argosy.workers.layers.rotary import RotaryEmbedding
from argosy.workers.quantization.base import LinearMethod

NORM_EPS = 1e-6  # of its two norms, whatever the config says of the others


class LatentAttention(nn.Module):
    """One layer; one all-reduce at the end."""

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
        mla = spec.mla
        assert mla is not None
        self.mla, self.rotary, self.interleaved = mla, rotary, spec.rope.interleaved
        self.num_heads = spec.num_heads // parallel.tp_size
        self.scale = spec.attention_scale or spec.head_size**-0.5
        width, heads, bias = spec.hidden_size, spec.num_heads, spec.qkv_bias
        query_width = heads * (mla.nope_size + mla.rope_size)
        self.q_a_proj: ReplicatedLinear | None = None
        self.q_a_norm: RMSNorm | None = None
        if mla.q_rank:
            self.q_a_proj = ReplicatedLinear(method, width, mla.q_rank, bias=bias, dtype=dtype)
            self.q_a_norm = RMSNorm(mla.q_rank, NORM_EPS, dtype=dtype)
        self.q_b_proj = ColumnParallelLinear(
            parallel, method, mla.q_rank or width, query_width, bias=False, dtype=dtype
        )
        self.kv_a_proj = ReplicatedLinear(method, width, mla.kv_rank + mla.rope_size, bias=bias, dtype=dtype)
        self.kv_a_norm = RMSNorm(mla.kv_rank, NORM_EPS, dtype=dtype)
        self.kv_b_proj: ColumnParallelLinear | None = ColumnParallelLinear(
            parallel, method, mla.kv_rank, heads * (mla.nope_size + mla.value_size), bias=False, dtype=dtype
        )
        self.o_proj = RowParallelLinear(parallel, method, heads * mla.value_size, width, bias=spec.o_bias, dtype=dtype)
        self.cache_index = layer - parallel.rank.first_layer
        self.dtype, self.device = dtype, parallel.device
        self.key_weight_NQC: nn.Parameter | None = None  # from `after_finish` on
        self.value_weight_NCV: nn.Parameter | None = None

    def after_finish(self) -> None:
        """Part what expands the latent into its half for keys and its half for values, by head.

        The product of the unit matrix is the weight, however it is packed.
        """
        assert self.kv_b_proj is not None
        unit = torch.eye(self.mla.kv_rank, dtype=self.dtype, device=self.device)
        both_CX = self.kv_b_proj(unit).view(self.mla.kv_rank, self.num_heads, -1)
        key, value = both_CX[..., : self.mla.nope_size], both_CX[..., self.mla.nope_size :]
        self.key_weight_NQC = nn.Parameter(key.permute(1, 2, 0).contiguous(), requires_grad=False)
        self.value_weight_NCV = nn.Parameter(value.permute(1, 0, 2).contiguous(), requires_grad=False)
        self.kv_b_proj = None

    def forward(self, x_TD: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """[T, D]."""
        return self.o_proj(self._attend(x_TD, positions_T, ctx))  # type: ignore[no-any-return]  # a module's call is Any

    def partial(self, x_TD: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """`forward` without the sum over the group."""
        return self.o_proj.product(self._attend(x_TD, positions_T, ctx))

    def part(
        self, x_TD: Tensor, positions_T: Tensor, ctx: ForwardContext, out_TD: Tensor, *, in_pieces: bool = False
    ) -> Left:
        """`partial`, written to `out_TD`, or with `in_pieces` maybe left as `ParallelLinear.part` does."""
        return Left(self.o_proj.part(self._attend(x_TD, positions_T, ctx), out_TD, in_pieces=in_pieces))

    def _attend(self, x_TD: Tensor, positions_T: Tensor, ctx: ForwardContext) -> Tensor:
        """What this rank's heads saw, [T, N * V]."""
        mla, metadata = self.mla, ctx.metadata
        latent_cache, key_cache = ctx.kv_cache.layers[self.cache_index]
        low = x_TD if self.q_a_proj is None or self.q_a_norm is None else self.q_a_norm(self.q_a_proj(x_TD))
        q_TNH = self.q_b_proj(low).view(-1, self.num_heads, mla.nope_size + mla.rope_size)
        kv_TX = self.kv_a_proj(x_TD)
        latent_TC = self.kv_a_norm(kv_TX[:, : mla.kv_rank].contiguous())
        q_nope_TNQ, q_rotated_TNP = q_TNH[..., : mla.nope_size], q_TNH[..., mla.nope_size :].contiguous()
        key_T1P = kv_TX[:, mla.kv_rank :].contiguous().view(-1, 1, mla.rope_size)
        ops.apply_rotary(q_rotated_TNP, key_T1P, positions_T, self.rotary.cos_sin_PH, interleaved=self.interleaved)
        mla_ops.store_latent(latent_TC, key_T1P[:, 0], latent_cache, key_cache, metadata.slot_mapping_T)
        num_decodes = metadata.num_decode_rows
        if num_decodes == metadata.num_rows:
            return self._decode(q_nope_TNQ, q_rotated_TNP, latent_cache, key_cache, metadata)
        out_TX: Tensor = q_TNH.new_zeros(len(q_TNH), self.num_heads * mla.value_size)
        if num_decodes:
            rows = slice(0, num_decodes)
            out_TX[rows] = self._decode(q_nope_TNQ[rows], q_rotated_TNP[rows], latent_cache, key_cache, metadata)
        starts, lengths = _row_bounds(metadata)
        for row in range(num_decodes, metadata.num_rows):
            tokens = slice(starts[row], starts[row + 1])
            if starts[row + 1] > starts[row]:
                q_QNH = torch.cat((q_nope_TNQ[tokens], q_rotated_TNP[tokens]), dim=-1)
                own = mla_ops.gather(latent_cache, key_cache, metadata.block_table_RB[row], lengths[row])
                out_TX[tokens] = self._attend_expanded(q_QNH, *own)
        return out_TX

    def _decode(
        self,
        q_nope_RNQ: Tensor,
        q_rotated_RNP: Tensor,
        latent_cache: Tensor,
        key_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """[R, N * V]."""
        assert self.key_weight_NQC is not None
        assert self.value_weight_NCV is not None
        num_rows = len(q_nope_RNQ)
        q_latent_RNC = torch.bmm(q_nope_RNQ.transpose(0, 1), self.key_weight_NQC).transpose(0, 1)
        seen_RNC = mla_ops.decode(
            q_latent_RNC,
            q_rotated_RNP,
            latent_cache,
            key_cache,
            metadata.block_table_RB[:num_rows],
            metadata.context_len_R[:num_rows],
            scale=self.scale,
            max_context=metadata.max_context_len,
        )
        return torch.bmm(seen_RNC.transpose(0, 1), self.value_weight_NCV).transpose(0, 1).reshape(num_rows, -1)

    def _attend_expanded(self, q_QNH: Tensor, latent_LC: Tensor, key_LP: Tensor) -> Tensor:
        """A row of a prompt: [Q, N * V]."""
        assert self.key_weight_NQC is not None
        assert self.value_weight_NCV is not None
        latent_LC, key_LP = latent_LC.to(q_QNH.dtype), key_LP.to(q_QNH.dtype)
        k_nope_LNQ = torch.matmul(latent_LC, self.key_weight_NQC.transpose(1, 2)).transpose(0, 1)
        v_LNV = torch.matmul(latent_LC, self.value_weight_NCV).transpose(0, 1)
        k_LNH = torch.cat((k_nope_LNQ, key_LP[:, None].expand(-1, self.num_heads, -1)), dim=-1)
        return mla_ops.attend_expanded(q_QNH, k_LNH, v_LNV, scale=self.scale).reshape(len(q_QNH), -1)


def _row_bounds(metadata: AttentionMetadata) -> tuple[list[int], list[int]]:
    """(starts, lengths) of the rows on the host, asked for once a step."""
    found: tuple[list[int], list[int]] | None = metadata.scratch.get("row_bounds")
    if found is None:
        found = (metadata.query_start_R1.tolist(), metadata.context_len_R.tolist())
        metadata.scratch["row_bounds"] = found
    return found
