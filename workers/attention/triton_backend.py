"""Attention by our kernels. Safe in a CUDA graph: nothing is read back from the device, shapes alone decide.

Letters as in `attention.base`.
"""

from torch import Tensor

from argosy.kernels import ops
from argosy.workers.attention.base import AttentionMetadata, AttentionShape, QKNorm


class TritonBackend:
    """Decode rows by the split kernel, longer rows by the ragged one."""

    def forward(
        self,
        qkv_TD: Tensor,
        positions_T: Tensor,
        cos_sin_PH: Tensor | None,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        shape: AttentionShape,
        norm: QKNorm | None,
    ) -> Tensor:
        """A step of decode rows alone is one kernel from the product of q, k, v to the heads' outputs."""
        if metadata.num_decode_rows < metadata.num_rows:
            q_TNH = self.rotate_and_store(qkv_TD, positions_T, cos_sin_PH, kv_cache, metadata, shape, norm)
            return self.attend(q_TNH, kv_cache, metadata, shape)
        num_rows = qkv_TD.shape[0]
        return ops.decode_attention(
            qkv_TD,
            positions_T,
            cos_sin_PH,
            kv_cache[0],
            kv_cache[1],
            metadata.slot_mapping_T,
            metadata.block_table_RB[:num_rows],
            metadata.context_len_R[:num_rows],
            num_heads=shape.num_heads,
            scale=shape.scale,
            interleaved=shape.interleaved,
            q_norm_weight_H=None if norm is None else norm.q_weight_H,
            k_norm_weight_H=None if norm is None else norm.k_weight_H,
            eps=1e-6 if norm is None else norm.eps,
            max_context=metadata.max_context_len,
            sliding_window=shape.sliding_window,
            soft_cap=shape.soft_cap,
            alibi_slopes_N=shape.alibi_slopes_N,
            sinks_N=shape.sinks_N,
            kv_scales=shape.kv_scales,
            shared_len_R=metadata.shared_len_R,
            inputs_early=True,
            order_R=metadata.order_R,
            even=metadata.even,
            lean=shape.is_packed,
            rings=shape.beside_rings,
        ).flatten(1)

    def rotate_and_store(
        self,
        qkv_TD: Tensor,
        positions_T: Tensor,
        cos_sin_PH: Tensor | None,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        shape: AttentionShape,
        norm: QKNorm | None,
    ) -> Tensor:
        """One kernel for norm, rotation and both stores."""
        return ops.rope_and_store(
            qkv_TD,
            positions_T,
            cos_sin_PH,
            kv_cache[0],
            kv_cache[1],
            metadata.slot_mapping_T,
            num_heads=shape.num_heads,
            interleaved=shape.interleaved,
            q_norm_weight_H=None if norm is None else norm.q_weight_H,
            k_norm_weight_H=None if norm is None else norm.k_weight_H,
            eps=1e-6 if norm is None else norm.eps,
            kv_scales=shape.kv_scales,
        )

    def attend(
        self, q_TNH: Tensor, kv_cache: tuple[Tensor, Tensor], metadata: AttentionMetadata, shape: AttentionShape
    ) -> Tensor:
        """A step of decode rows alone is one launch; a mixed step is two, written into one output."""
        num_decodes, num_rows = metadata.num_decode_rows, metadata.num_rows
        if metadata.is_padded:
            return self._attend_padded(q_TNH, kv_cache, metadata, shape)
        if num_decodes == num_rows:
            return self._decode(q_TNH, kv_cache, metadata, shape).flatten(1)
        if num_decodes == 0:
            return self._prefill(q_TNH, kv_cache, metadata, shape, 0).flatten(1)
        out_TNH = q_TNH.new_empty(q_TNH.shape)
        self._decode(q_TNH[:num_decodes], kv_cache, metadata, shape, out_TNH[:num_decodes])
        self._prefill(q_TNH[num_decodes:], kv_cache, metadata, shape, num_decodes, out_TNH[num_decodes:])
        return out_TNH.flatten(1)

    def _attend_padded(
        self, q_TNH: Tensor, kv_cache: tuple[Tensor, Tensor], metadata: AttentionMetadata, shape: AttentionShape
    ) -> Tensor:
        """Both kernels see where rows may be; those that are not there leave at once.

        The first makes zeros of the tokens behind the last decode row, which the second then writes: it must be second.
        What neither writes, behind the last token, stays zero, since all layers write to the same tokens of one output.
        """
        num_decodes, key = metadata.num_decode_rows, ("out", *q_TNH.shape)
        out_TNH = metadata.scratch.get(key)
        if out_TNH is None:
            out_TNH = metadata.scratch[key] = q_TNH.new_zeros(q_TNH.shape)
        self._decode(q_TNH[:num_decodes], kv_cache, metadata, shape, out_TNH[:num_decodes])
        self._prefill(q_TNH, kv_cache, metadata, shape, num_decodes, out_TNH)
        return out_TNH.flatten(1)

    def _decode(
        self,
        q_RNH: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        shape: AttentionShape,
        out_RNH: Tensor | None = None,
    ) -> Tensor:
        num_rows = q_RNH.shape[0]
        return ops.paged_attention(
            q_RNH,
            kv_cache[0],
            kv_cache[1],
            metadata.block_table_RB[:num_rows],
            metadata.context_len_R[:num_rows],
            scale=shape.scale,
            max_context=metadata.max_context_len,
            sliding_window=shape.sliding_window,
            soft_cap=shape.soft_cap,
            alibi_slopes_N=shape.alibi_slopes_N,
            sinks_N=shape.sinks_N,
            kv_scales=shape.kv_scales,
            out_RNH=out_RNH,
            order_R=metadata.order_R,
            likely_rows=-(-num_rows // 4) if metadata.is_padded else None,
        )

    def _prefill(
        self,
        q_TNH: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        shape: AttentionShape,
        first_row: int,
        out_TNH: Tensor | None = None,
    ) -> Tensor:
        rows = slice(first_row, metadata.num_rows)
        starts_R1 = metadata.query_start_R1[first_row : metadata.num_rows + 1]
        if first_row and not metadata.is_padded:
            if "prefill_starts" not in metadata.scratch:
                metadata.scratch["prefill_starts"] = starts_R1 - first_row
            starts_R1 = metadata.scratch["prefill_starts"]
        return ops.prefill_attention(
            q_TNH,
            kv_cache[0],
            kv_cache[1],
            starts_R1,
            metadata.context_len_R[rows],
            metadata.block_table_RB[rows],
            scale=shape.scale,
            sliding_window=shape.sliding_window,
            soft_cap=shape.soft_cap,
            alibi_slopes_N=shape.alibi_slopes_N,
            sinks_N=shape.sinks_N,
            kv_scales=shape.kv_scales,
            out_TNH=out_TNH,
            scratch=metadata.scratch,
            num_context_tokens=metadata.num_context_tokens,
            num_queries=metadata.max_query_len if metadata.is_padded else None,
        )
