"""How long a sum over all nodes takes, by gloo on CPUs and by NCCL where each node has a GPU. Runs on the nodes."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

_SECONDS: Final = 15.0
_REPEATS: Final = 5


def time_all_reduce(rank: int, world_size: int, rendezvous: str, sizes: Sequence[int]) -> list[float]:
    """The median seconds for each size in bytes. Raises `RuntimeError` when the group does not come together."""
    # Inside: this module is imported by a process that may have no torch.
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"tcp://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_SECONDS),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        found = []
        for size in sizes:
            values = torch.ones(max(size // 4, 1), dtype=torch.float32, device=device)
            times = []
            for _ in range(_REPEATS + 1):
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(values)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            found.append(sorted(times[1:])[_REPEATS // 2])
        return found
    finally:
        dist.destroy_process_group()
