"""What `swap_space` takes on a rank: buffers on its device, and blocks in the host's memory."""

from typing import Final

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.swap import MOST_HOST_BLOCKS

OUT_BUFFERS: Final = 4
OUT_BUFFER_BYTES: Final = 128 * 2**20  # four of them take a request of 4096 tokens of an 8B model at once
IN_BUFFER_BYTES: Final = 64 * 2**20


def rows_of(buffer_bytes: int, block_bytes: int) -> int:
    """Blocks that a buffer has room for; there is always one."""
    return max(1, buffer_bytes // max(1, block_bytes))


def staging_bytes(block_bytes: int) -> int:
    """What a card's memory gives up for the buffers of the copies."""
    rows = OUT_BUFFERS * rows_of(OUT_BUFFER_BYTES, block_bytes) + rows_of(IN_BUFFER_BYTES, block_bytes)
    return rows * block_bytes


def swap_setting(config: ServingConfig) -> int | None:
    """The bytes of each rank that `swap_space` asks for; None for "auto"."""
    asked = config.offload.swap_space
    return None if isinstance(asked, str) else int(asked * 2**30)


def num_host_blocks(swap_bytes: int | None, block_bytes: int, num_blocks: int, host_share: int) -> int:
    """Blocks that a rank keeps in the host's memory. `host_share`: its part of what the host has; 0: not known.

    "auto" takes half of the share at most, and no more than `MOST_HOST_BLOCKS` times the device's blocks.
    """
    if swap_bytes is not None:
        return swap_bytes // block_bytes
    most = MOST_HOST_BLOCKS * num_blocks
    return min(most, host_share // 2 // block_bytes) if host_share else most
