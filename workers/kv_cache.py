"""The tensors behind block ids on this rank: its heads of its layers.

B = blocks, S = tokens in a block, K = key/value heads of this rank, H = head size. Slot = block id * S + offset.
A cache with a scale for each token and head has them behind the numbers of each block: see `kernels.kv_scales`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.kv_groups import ONE_TABLE, KVGroups, LayerPlaces, layer_places
from argosy.cluster.protocol.model_spec import ModelSpec, kv_bytes_per_token, kv_heads_per_rank, kv_sizes
from argosy.kernels import kv_scales, ops
from argosy.placement.plan import RankInfo


class KVCache:
    """One (k, v) pair of tensors a layer of this stage; index = global layer - first layer.

    Layers of different groups (`protocol.kv_groups`) share tensors, since they never share blocks. `tensors` has each
    once, and is what to copy when a block is copied: contiguous, a row a block. Without scales they are those of
    `layers`; with scales those are views, which leave out the scales.
    """

    def __init__(
        self,
        pages: list[tuple[Tensor, Tensor]],
        block_size: int,
        tensors: list[Tensor] | None = None,
        places: LayerPlaces | None = None,
    ):
        """`places`: where each layer stands; without them each has a pair of its own and all are of one group."""
        self.layers = pages if places is None else [pages[place] for place in places.places]
        self.groups = (0,) * len(pages) if places is None else places.groups
        self.block_size = block_size
        self.tensors = [tensor for page in pages for tensor in page] if tensors is None else tensors

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
        groups: KVGroups = ONE_TABLE,
    ) -> "KVCache":
        """Zeroed caches for `num_blocks` blocks. Zeros: a slot that is masked out must not hold NaN.

        `scaled`: with a scale for each token and head; int8 always is.
        """
        if num_blocks < 1:
            raise ConfigError(f"num_gpu_blocks_override={num_blocks}: a rank needs at least one KV block")
        heads = kv_heads_per_rank(spec, rank.tp_size)
        places = layer_places(spec, groups, rank.first_layer, rank.last_layer)
        if scaled or dtype == torch.int8:
            sizes = kv_sizes(spec) * places.num_places
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
            return cls(list(zip(views[::2], views[1::2], strict=True)), block_size, tensors, places)
        k_shape, v_shape = ((num_blocks, block_size, heads, size) for size in kv_sizes(spec))
        pages = [
            (torch.zeros(k_shape, dtype=dtype, device=device), torch.zeros(v_shape, dtype=dtype, device=device))
            for _ in range(places.num_places)
        ]
        return cls(pages, block_size, places=places)

    @staticmethod
    def block_bytes(
        spec: ModelSpec,
        rank: RankInfo,
        block_size: int,
        dtype: torch.dtype,
        *,
        scaled: bool = False,
        groups: KVGroups = ONE_TABLE,
    ) -> int:
        """Bytes of one block on this rank, over as many layers of its stage as a block has room for."""
        num_places = layer_places(spec, groups, rank.first_layer, rank.last_layer).num_places
        return block_size * kv_bytes_per_token(
            spec, dtype.itemsize, rank.tp_size, num_places, scale_bytes=int(scaled or dtype == torch.int8)
        )

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination), for all layers that they hold, as if all pairs were done at once."""
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
