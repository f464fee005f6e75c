"""Memory of the host that a card copies from and to at the speed of its link.

Pages that are touched first and registered then cost 0.05 s a GiB; asking the driver for new ones 0.4 to 0.6, and
torch's own allocator rounds what it asks for up to a power of two. On a CPU it is plain memory.
"""

import contextlib
import mmap
from collections.abc import Callable
from typing import Any, Final

import psutil
import torch
from torch import Tensor

from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.cluster.protocol.ledger import gib

_PAGE: Final = 2 * 2**20
KEPT_FREE: Final = 2 * 2**30  # for everything else on the host


def check_host_room(num_bytes: int, what: str, fix: str, *, num_ranks: int = 1) -> None:
    """Raise `PlacementImpossible` where the host has not so much left for each of the ranks that share it."""
    free = free_host_bytes()
    if num_bytes * num_ranks > free:
        many = f" for each of {num_ranks} ranks" if num_ranks > 1 else ""
        raise PlacementImpossible(
            f"{what} needs {gib(num_bytes)} of the host's memory{many}; {gib(free)} are free: {fix}"
        )


def free_host_bytes() -> int:
    """What may be taken of the host's memory now."""
    return max(0, int(psutil.virtual_memory().available) - KEPT_FREE)


class PinnedPages(mmap.mmap):
    """Pages that tell the driver before they go: it would take the next ones at that address for them."""

    unpin: Callable[[int], object] | None = None
    address = 0

    def __del__(self) -> None:
        if self.unpin is not None:
            self.unpin(self.address)


def pinned_bytes(num_bytes: int, device: torch.device) -> Tensor:
    """So many bytes, uint8, that `device` reaches by itself. Given back with the last tensor that looks at them.

    Raises `PlacementImpossible` where the driver won't have it.
    """
    if device.type != "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8)
    size = -(-max(num_bytes, 1) // _PAGE) * _PAGE
    pages = PinnedPages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    whole.zero_()  # by all threads: a page lives where it is touched first
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call, unused-ignore]  # torch's own
    status = int(runtime.cudaHostRegister(whole.data_ptr(), size, 0))
    if status:
        raise PlacementImpossible(
            f"the driver refuses to pin {gib(size)} of the host's memory (error {status}): raise 'ulimit -l', or ask "
            "for less (--cpu-offload-gb, --swap-space)"
        )
    pages.unpin, pages.address = runtime.cudaHostUnregister, whole.data_ptr()
    return whole[:num_bytes]
