"""What one forward pass may read besides its inputs. It is passed, never global."""

from dataclasses import dataclass

from torch import Tensor

from argosy.workers.attention.base import AttentionBackend, AttentionMetadata
from argosy.workers.kv_cache import KVCache


@dataclass(slots=True)
class ForwardContext:
    """The cache of this rank, how to attend to it, and where this step's tokens stand in it."""

    backend: AttentionBackend
    kv_cache: KVCache
    metadata: AttentionMetadata
    asked_rows_S: Tensor | None = None  # places among T of the tokens whose last state is asked for; None: all

    def metadata_of(self, cache_index: int) -> AttentionMetadata:
        """Where the tokens stand in the cache of one layer of this stage."""
        return self.metadata.of_group(self.kv_cache.groups[cache_index])
