"""The sum over a tensor-parallel group through memory that all its GPUs can address, for what NCCL is slow at.

For a few kilobytes NCCL needs 12 us inside a graph and this 7 (measured on 2 H200); a decode step of 32 layers does it
64 times. Without multicast: a kernel in which each rank reads its peers' buffers (one shot), or reads and writes back a
share of them (two shots) for what is larger.
"""

import logging
import os
import socket
import zlib
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from argosy.placement.switches import read_switch

logger = logging.getLogger(__name__)

ONE_SHOT_BYTES: Final = 256 * 1024
TWO_SHOT_BYTES: Final = 4 * 1024 * 1024  # above it NCCL is as fast, and needs no copy to a shared buffer
_ALIGNMENT: Final = 16  # bytes that the kernels load at once

# Where each rank sees its own card alone, as under Ray, all cards are number 0, which torch takes for one and the same.
os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")


class SymmetricBuffer:
    """Zeroed bytes on each GPU of a group that all of them can address. Making one is collective."""

    def __init__(self, group: "dist.ProcessGroup", device: torch.device, num_bytes: int):
        # Here, since it registers kernels that no CPU rank needs, which costs every process its start.
        import torch.distributed._symmetric_memory as symmetric

        self.local: Tensor = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        self.local.zero_()
        torch.cuda.synchronize(device)
        self._handle: Any = symmetric.rendezvous(self.local, group=group.group_name)
        self.pointers: list[int] = list(self._handle.buffer_ptrs)  # of all ranks' bytes, as this GPU addresses them
        self.addresses_W = torch.tensor(self.pointers, dtype=torch.int64, device=device)
        dist.barrier(group)  # all have zeroed theirs before anyone writes


class SymmetricAllReduce:
    """One shared buffer a group. All ranks call it with the same shapes, in the same order, on one stream."""

    def __init__(self, group: "dist.ProcessGroup", device: torch.device):
        # Here, since it registers kernels that no CPU rank needs, which costs every process its start.
        import torch.distributed._symmetric_memory as symmetric

        self._name = group.group_name
        self._buffer: Tensor = symmetric.empty(TWO_SHOT_BYTES, dtype=torch.uint8, device=device)
        self._handle: Any = symmetric.rendezvous(self._buffer, group=self._name)
        self._ops: Any = torch.ops.symm_mem

    def takes(self, x: Tensor) -> bool:
        """Whether this tensor is ours to sum."""
        size = x.numel() * x.element_size()
        return 0 < size <= TWO_SHOT_BYTES and size % (_ALIGNMENT * self._handle.world_size) == 0

    def __call__(self, x: Tensor) -> Tensor:
        """Sum in place. Returns `x`."""
        flat = x.view(-1)
        size = flat.numel() * flat.element_size()
        buffer = self._buffer[:size].view(flat.dtype)
        if size <= ONE_SHOT_BYTES:
            self._ops.one_shot_all_reduce_copy_out(buffer, flat, "sum", self._name, flat)
            return x
        buffer.copy_(flat)
        self._ops.two_shot_all_reduce_(buffer, "sum", self._name)
        flat.copy_(buffer)
        return x


def open_symmetric(group: "dist.ProcessGroup", device: torch.device) -> SymmetricAllReduce | None:
    """The group's shared buffer, or None where its GPUs can't address each other; all ranks come to the same answer."""
    if read_switch("ARGOSY_DISABLE_SYMMETRIC_MEMORY"):
        return None
    if not _is_on_one_host(group, device):
        return None  # opening it would wait for a peer that can't come
    opened: SymmetricAllReduce | None = None
    try:
        opened = SymmetricAllReduce(group, device)
        trial = torch.ones(1024, dtype=torch.float32, device=device)
        works = bool((opened(trial) == dist.get_world_size(group)).all())
    except (RuntimeError, ImportError, AttributeError) as error:
        logger.info("tensor-parallel sums go by NCCL alone: %s", str(error).splitlines()[0] if str(error) else error)
        works = False
    agreed = torch.tensor([int(works)], device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
    return opened if int(agreed) else None


def _is_on_one_host(group: "dist.ProcessGroup", device: torch.device) -> bool:
    own = zlib.crc32(socket.gethostname().encode())
    ends = torch.tensor([own, -own], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = ends.tolist()
    return bool(highest == -lowest)
