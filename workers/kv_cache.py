"""The tensors behind block ids on this rank: its heads of its layers.

B = blocks, S = tokens in a block, K = key/value heads of this rank, H = head size. Slot = block id * S + offset.
A cache with a scale for each token and head has them behind the numbers of each block: see `kernels.kv_scales`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.model_spec import ModelSpec, kv_bytes_per_token, kv_heads_per_rank, kv_sizes
from argosy.kernels import kv_scales, ops
from argosy.placement.plan import RankInfo


class KVCache:
    """One (k, v) pair of tensors a layer of this stage; index = global layer - first layer.

    `tensors` are what to copy when a block is copied: contiguous, a row a block, two a layer. Without scales they are
    those of `layers`; with scales those are views, which leave out the scales.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], block_size: int, tensors: list[Tensor] | None = None):
        self.layers = layers
        self.block_size = block_size
        self.tensors = [tensor for layer in layers for tensor in layer] if tensors is None else tensors

    @classmethod
    def allocate(
        cls,
        spec: ModelSpec,
        rank: RankInfo,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        scaled: bool = False,
    ) -> "KVCache":
        """Zeroed caches for `num_blocks` blocks. Zeros: a slot that is masked out must not hold NaN.

        `scaled`: with a scale for each token and head; int8 always is.
        """
        if num_blocks < 1:
            raise ConfigError(f"num_gpu_blocks_override={num_blocks}: a rank needs at least one KV block")
        heads = kv_heads_per_rank(spec, rank.tp_size)
        if scaled or dtype == torch.int8:
            sizes = kv_sizes(spec) * (rank.last_layer - rank.first_layer)
            tensors = [
                torch.zeros(
                    (num_blocks, kv_scales.block_bytes(block_size, heads, size)), dtype=torch.uint8, device=device
                )
                for size in sizes
            ]
            views = [
                kv_scales.as_scaled_cache(tensor, block_size, heads, size, dtype)
                for tensor, size in zip(tensors, sizes, strict=True)
            ]
            return cls(list(zip(views[::2], views[1::2], strict=True)), block_size, tensors)
        k_shape, v_shape = ((num_blocks, block_size, heads, size) for size in kv_sizes(spec))
        layers = [
            (torch.zeros(k_shape, dtype=dtype, device=device), torch.zeros(v_shape, dtype=dtype, device=device))
            for _ in range(rank.first_layer, rank.last_layer)
        ]
        return cls(layers, block_size)

    @staticmethod
    def block_bytes(
        spec: ModelSpec, rank: RankInfo, block_size: int, dtype: torch.dtype, *, scaled: bool = False
    ) -> int:
        """Bytes of one block on this rank, over all layers of its stage."""
        return block_size * kv_bytes_per_token(
            spec, dtype.itemsize, rank.tp_size, rank.last_layer - rank.first_layer,
            scale_bytes=int(scaled or dtype == torch.int8),
        )  # fmt: skip

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer, as if all pairs were done at once."""
        if pairs:
            ops.copy_blocks(self.tensors, pairs)

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self.layers[0][0].shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all caches together."""
        return sum(tensor.nbytes for tensor in self.tensors)
