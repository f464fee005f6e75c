"""Memory of the host that a card copies from and to at the speed of its link.

Pages that are touched first and registered then cost 0.05 s a GiB; asking the driver for new ones 0.4 to 0.6, and
torch's own allocator rounds what it asks for up to a power of two. On a CPU it is plain memory.
"""

import mmap
from typing import Any, Final

import psutil
import torch
from torch import Tensor

from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.cluster.protocol.ledger import gib

_PAGE: Final = 2 * 2**20
KEPT_FREE: Final = 2 * 2**30  # for everything else on the host
_REGISTERED_ALREADY: Final = 712  # cudaErrorHostMemoryAlreadyRegistered


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


def pinned_bytes(num_bytes: int, device: torch.device) -> Tensor:
    """So many bytes, uint8, that `device` reaches by itself. They stay pinned until the process ends."""
    if device.type != "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8)
    size = -(-max(num_bytes, 1) // _PAGE) * _PAGE
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    whole.zero_()  # by all threads: a page lives where it is touched first
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call, unused-ignore]  # torch's own
    status = int(runtime.cudaHostRegister(whole.data_ptr(), size, 0))
    if status not in (0, _REGISTERED_ALREADY):
        raise PlacementImpossible(
            f"the driver refuses to pin {gib(size)} of the host's memory (error {status}): raise 'ulimit -l', or ask "
            "for less (--cpu-offload-gb, --swap-space)"
        )
    return whole[:num_bytes]
