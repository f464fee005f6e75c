"""This rank's tensor-parallel group, its pipeline neighbours and the way to reach them, for one epoch.

One rank alone opens no process group and no socket. gloo carries CPU tensors, NCCL carries CUDA tensors. Every wait
has the deadline given at the start: a peer that went away is an error after that time, never a hang.
"""

import contextlib
import math
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from argosy.cluster.protocol.errors import ConfigError, StartupTimeout, WorkerFailed
from argosy.placement.network import choose_interface
from argosy.placement.plan import RankInfo
from argosy.placement.symmetric_memory import SymmetricAllReduce, SymmetricBuffer, open_symmetric

# newer versions of torch warn of the older names
_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ParallelContext:
    """The groups of one rank. All ranks of a tensor-parallel group must make the same calls in the same order.

    `world` is the group of all ranks of the replica (global rank = rank in the group); `stage_transport` sends and
    receives over it.
    """

    def __init__(
        self,
        rank: RankInfo,
        device: torch.device,
        timeout_seconds: float,
        world: "dist.ProcessGroup | None" = None,
        tp_group: "dist.ProcessGroup | None" = None,
    ):
        self.rank, self.device, self.timeout_seconds = rank, device, timeout_seconds
        self.world, self.tp_group = world, tp_group
        self.tp_size, self.pp_size = rank.tp_size, rank.pp_size
        self._symmetric: SymmetricAllReduce | None = None
        if tp_group is not None and device.type == "cuda":
            self._symmetric = open_symmetric(tp_group, device)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel group, in place. Returns `x`."""
        if self.tp_size > 1:
            assert x.is_contiguous(), x.stride()  # gloo would take the memory as it lies
            if self._symmetric is not None and self._symmetric.takes(x):
                return self._symmetric(x)
            dist.all_reduce(x, group=self.tp_group)
        return x

    @property
    def shares_memory(self) -> bool:
        """Whether the GPUs of the tensor-parallel group can address each other."""
        return self._symmetric is not None

    def shared_buffer(self, num_bytes: int) -> SymmetricBuffer:
        """Zeroed bytes on each GPU of the group, for all of them; only where `shares_memory`. Collective."""
        assert self.tp_group is not None
        return SymmetricBuffer(self.tp_group, self.device, num_bytes)

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        """The parts of all tensor-parallel ranks side by side along the last axis, on every rank."""
        if self.tp_size == 1:
            return x
        x = x.contiguous()
        parts = torch.empty((self.tp_size, *x.shape), dtype=x.dtype, device=x.device)
        if x.device.type == "cuda":
            dist.all_gather_into_tensor(parts, x, group=self.tp_group)
        else:
            dist.all_gather(list(parts.unbind(0)), x, group=self.tp_group)
        return parts.movedim(0, -2).reshape(*x.shape[:-1], self.tp_size * x.shape[-1])

    def gather_rows(self, x_SD: Tensor) -> Tensor:
        """The rows of all tensor-parallel ranks below each other, on every rank; all have equally many."""
        if self.tp_size == 1:
            return x_SD
        whole = torch.empty((self.tp_size * x_SD.shape[0], *x_SD.shape[1:]), dtype=x_SD.dtype, device=x_SD.device)
        _gather_single(whole, x_SD.contiguous(), group=self.tp_group)
        return whole

    def scatter_sum(self, x_TD: Tensor) -> Tensor:
        """This rank's share of the rows of the sum over the group; where they can't be divided, rows of 0 follow."""
        if self.tp_size == 1:
            return x_TD
        num_rows = -(-x_TD.shape[0] // self.tp_size)
        missing = num_rows * self.tp_size - x_TD.shape[0]
        whole = torch.nn.functional.pad(x_TD, (0, 0, 0, missing)) if missing else x_TD.contiguous()
        own = torch.empty((num_rows, *x_TD.shape[1:]), dtype=x_TD.dtype, device=x_TD.device)
        _scatter_single(own, whole, group=self.tp_group)
        return own

    def all_to_all(self, rows: Tensor, sent: list[int] | None, received: list[int] | None) -> Tensor:
        """`sent[r]` rows go to tensor-parallel rank r, in order; `received[r]` come from it. None: equally many."""
        if self.tp_size == 1:
            return rows
        count = rows.shape[0] if received is None else sum(received)
        made = torch.empty((count, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        dist.all_to_all_single(made, rows.contiguous(), received, sent, group=self.tp_group)
        return made

    def alone(self) -> "ParallelContext":
        """The same rank without its group: what is made with it is whole on every rank."""
        return ParallelContext(
            msgspec.structs.replace(self.rank, tp_size=1, tp_rank=0), self.device, self.timeout_seconds, self.world
        )

    def broadcast(self, x: Tensor, src_tp_rank: int = 0) -> Tensor:
        """Everyone in the tensor-parallel group gets the tensor of `src_tp_rank`, in place. Returns `x`."""
        if self.tp_size > 1:
            assert x.is_contiguous(), x.stride()
            dist.broadcast(x, src=self.global_rank_of(src_tp_rank, self.rank.pp_rank), group=self.tp_group)
        return x

    def global_rank_of(self, tp_rank: int, pp_rank: int) -> int:
        """Where in `world` the rank at these coordinates is."""
        return pp_rank * self.tp_size + tp_rank

    @property
    def previous_rank(self) -> int | None:
        """Global rank of the same TP place one stage earlier."""
        return None if self.rank.is_first_stage else self.global_rank_of(self.rank.tp_rank, self.rank.pp_rank - 1)

    @property
    def next_rank(self) -> int | None:
        """Global rank of the same TP place one stage later."""
        return None if self.rank.is_last_stage else self.global_rank_of(self.rank.tp_rank, self.rank.pp_rank + 1)


def init_parallel(rank: RankInfo, rendezvous: str, device: torch.device, timeout_seconds: float) -> ParallelContext:
    """Join the groups of this rank at `rendezvous` ("host:port"; global rank 0 listens there).

    Raises `StartupTimeout` when the others don't come within `timeout_seconds`.
    """
    world_size = rank.tp_size * rank.pp_size
    if world_size == 1:
        return ParallelContext(rank, device, timeout_seconds)
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"rendezvous={rendezvous!r}: must be 'host:port'")
    choose_interface(host)
    deadline = timedelta(seconds=timeout_seconds)
    what = f"process groups of {world_size} ranks at {rendezvous}"
    with _map_distributed_errors(rank, what, timeout_seconds):
        is_master = rank.global_rank == 0
        store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in torch's __all__
            host,
            int(port),
            world_size,
            is_master=is_master,
            timeout=deadline,
            wait_for_workers=True,
            master_listen_fd=_listen(host, int(port)) if is_master else None,
        )
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=store,
            rank=rank.global_rank,
            world_size=world_size,
            timeout=deadline,
            device_id=device if device.type == "cuda" else None,
        )
        # One stage: all ranks are the group, and a second communicator would take some hundred MB of each card.
        tp_group = dist.group.WORLD if rank.pp_size == 1 else None
        if rank.tp_size > 1 and rank.pp_size > 1:
            for pp_rank in range(rank.pp_size):  # every rank takes part in making every group, in the same order
                members = [pp_rank * rank.tp_size + tp_rank for tp_rank in range(rank.tp_size)]
                group = dist.new_group(members, timeout=deadline, backend=backend)
                if pp_rank == rank.pp_rank:
                    tp_group = group
    return ParallelContext(rank, device, timeout_seconds, dist.group.WORLD, tp_group)


def destroy_parallel(ctx: ParallelContext) -> None:
    """Leave all groups; nothing happens for a rank that never joined one."""
    if ctx.world is not None and dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a peer that is gone can't be asked to agree to our leaving
            dist.destroy_process_group()
    ctx.world = ctx.tp_group = ctx._symmetric = None


def _listen(host: str, port: int) -> int:
    """A listening socket on that address alone: by itself the store would listen on every network of the machine."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
        return listener.detach()


@contextlib.contextmanager
def _map_distributed_errors(rank: RankInfo, what: str, timeout_seconds: float) -> Iterator[None]:
    try:
        yield
    except dist.DistStoreError as error:
        raise StartupTimeout(what, math.ceil(timeout_seconds)) from error
    except OSError as error:
        raise WorkerFailed(rank.global_rank, "cluster_error", f"{what}: {error}") from error
    except RuntimeError as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "timed out" in first_line.lower() or "timeout" in first_line.lower():
            raise StartupTimeout(what, math.ceil(timeout_seconds)) from error
        raise WorkerFailed(rank.global_rank, "cluster_error", f"{what}: {first_line}") from error
