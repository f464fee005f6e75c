"""Attention on a CPU by compiled code that reads keys and values where they lie; torch's for what that does not do."""

import torch
from torch import Tensor

from argosy.kernels.cpu_steps import CpuSteps
from argosy.workers.attention.base import AttentionMetadata, AttentionShape, QKNorm
from argosy.workers.attention.torch_backend import NO_SCALES, TorchBackend


class NativeBackend(TorchBackend):
    """Plain heads in one call a layer; caps, slopes, sinks and caches in 8 bits as before."""

    def __init__(self, steps: CpuSteps):
        self._steps = steps

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
        """The one after the other."""
        if not self._takes(qkv_TD, positions_T, cos_sin_PH, kv_cache, metadata, shape):
            return super().forward(qkv_TD, positions_T, cos_sin_PH, kv_cache, metadata, shape, norm)
        return self._steps.attend(
            qkv_TD, positions_T, cos_sin_PH, *kv_cache, metadata.slot_mapping_T, metadata.query_start_R1,
            metadata.context_len_R, metadata.block_table_RB, num_rows=metadata.num_rows, num_heads=shape.num_heads,
            scale=shape.scale, most_context=metadata.max_context_len, window=shape.sliding_window,
            interleaved=shape.interleaved, norm_XH=None if norm is None else norm.weight_XH,
            eps=0.0 if norm is None else norm.eps,
        )  # fmt: skip

    def _takes(
        self,
        qkv_TD: Tensor,
        positions_T: Tensor,
        cos_sin_PH: Tensor | None,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        shape: AttentionShape,
    ) -> bool:
        """Whether all of it is as the compiled code reads it."""
        k_cache, v_cache = kv_cache
        dtype = self._steps.dtype
        rotated = 0 if cos_sin_PH is None else cos_sin_PH.shape[1]
        return (
            shape.is_plain
            and shape.kv_scales == NO_SCALES
            and k_cache.dtype is dtype
            and k_cache.shape == v_cache.shape
            and k_cache.is_contiguous()
            and v_cache.is_contiguous()
            and self._steps.takes(qkv_TD)
            and self._steps.takes_heads(shape.head_size, rotated)
            and positions_T.dtype is torch.int64
            and metadata.slot_mapping_T.dtype is torch.int64
            and metadata.query_start_R1.dtype is torch.int32
            and metadata.block_table_RB.dtype is torch.int32
            and metadata.context_len_R.dtype is torch.int32
            and metadata.block_table_RB.stride(1) == 1
        )
