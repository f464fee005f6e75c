"""The tensors behind block ids on this rank: its heads of its layers.

B = blocks, S = tokens in a block, K = key/value heads of this rank, H = head size. Slot = block id * S + offset.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.model_spec import ModelSpec, kv_bytes_per_token, kv_heads_per_rank, kv_sizes
from argosy.kernels import ops
from argosy.placement.plan import RankInfo


class KVCache:
    """One (k, v) pair of tensors a layer of this stage; index = global layer - first layer."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], block_size: int):
        self.layers = layers
        self.block_size = block_size

    @classmethod
    def allocate(
        cls,
        spec: ModelSpec,
        rank: RankInfo,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "KVCache":
        """Zeroed caches for `num_blocks` blocks. Zeros: a slot that is masked out must not hold NaN."""
        if num_blocks < 1:
            raise ConfigError(f"num_gpu_blocks_override={num_blocks}: a rank needs at least one KV block")
        heads = kv_heads_per_rank(spec, rank.tp_size)
        k_shape, v_shape = ((num_blocks, block_size, heads, size) for size in kv_sizes(spec))
        layers = [
            (torch.zeros(k_shape, dtype=dtype, device=device), torch.zeros(v_shape, dtype=dtype, device=device))
            for _ in range(rank.first_layer, rank.last_layer)
        ]
        return cls(layers, block_size)

    @staticmethod
    def block_bytes(spec: ModelSpec, rank: RankInfo, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block on this rank, over all layers of its stage."""
        return block_size * kv_bytes_per_token(spec, dtype.itemsize, rank.tp_size, rank.last_layer - rank.first_layer)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer, as if all pairs were done at once."""
        if pairs:
            ops.copy_blocks([tensor for layer in self.layers for tensor in layer], pairs)

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self.layers[0][0].shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all caches together."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)
