"""What a rank says when the cache that somebody asked for is larger than the card has room for."""

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.cluster.protocol.ledger import gib
from argosy.workers.memory import MemoryLedger
from argosy.workers.model_runner import ModelRunner


def check_cache_fits(runner: ModelRunner, ledger: MemoryLedger, num_blocks: int) -> None:
    """After the largest steps were measured, before so many blocks are allocated. Blocks that follow from the share of
    the card always fit; those that follow from a setting of their own may not.

    Raises `PlacementImpossible` that names the setting and a value that fits.
    """
    cache = runner.config.cache
    if ledger.meter is None or (cache.kv_cache_memory_bytes is None and cache.num_gpu_blocks_override is None):
        return
    now = ledger.meter.read()
    room = now.total - now.outside - now.allocated - ledger.activation_bytes - ledger.graph_bytes
    needed = num_blocks * runner.block_bytes
    if needed <= room:
        return
    if cache.num_gpu_blocks_override is not None:
        asked = f"num_gpu_blocks_override={cache.num_gpu_blocks_override}"
        fix = f"--num-gpu-blocks-override {max(room, 0) // runner.block_bytes} or less"
    else:
        asked = f"kv_cache_memory_bytes={cache.kv_cache_memory_bytes}"
        fix = f"--kv-cache-memory-bytes {_flag(max(room, 0))} or less"
    raise PlacementImpossible(
        f"{asked} asks for {gib(needed)} of cache, and rank {runner.rank.global_rank} has room for {gib(max(room, 0))} "
        f"on its card of {gib(now.total)}; use {fix}, or leave it out to get what --gpu-memory-utilization gives"
    )


def less_cache(config: ServingConfig) -> str:
    """The setting that decides how large the cache is, and a smaller value."""
    cache = config.cache
    if cache.num_gpu_blocks_override is not None:
        return f"lower --num-gpu-blocks-override from {cache.num_gpu_blocks_override}"
    if cache.kv_cache_memory_bytes is not None:
        return f"lower --kv-cache-memory-bytes from {cache.kv_cache_memory_bytes}"
    share = cache.gpu_memory_utilization
    return f"lower --gpu-memory-utilization from {share:g} to {max(share - 0.05, 0.05):.2f}"


def _flag(num_bytes: int) -> str:
    """As the command line takes it, rounded down."""
    for name, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= 4 * size:
            return f"{num_bytes // size}{name}"
    return str(num_bytes)
