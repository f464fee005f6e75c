"""How hidden states travel from stage to stage: one [T, D] tensor a step, from each rank to the same TP place.

Both sides derive the size from the same `SchedulerOutput`, so nothing is announced. Sends don't wait for the other
side: a stage goes on with the next micro-batch while its neighbour works. Every wait has a deadline.
"""

from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from argosy.cluster.protocol.errors import WorkerFailed
from argosy.placement.process_groups import ParallelContext


class StageTransport:
    """This rank's wires to the stage before and the stage after it. With one stage there are none."""

    def __init__(self, parallel: ParallelContext, hidden_size: int, dtype: torch.dtype, *, timeout_seconds: float):
        self._parallel, self._hidden_size, self._dtype = parallel, hidden_size, dtype
        self.timeout_seconds = timeout_seconds
        self._max_under_way = parallel.pp_size + 1
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()  # the tensor must live until it was sent

    def send(self, hidden_TD: Tensor) -> None:
        """Start to send to the next stage; waits only when too many earlier ones have not been taken."""
        target = self._parallel.next_rank
        assert target is not None
        while self._under_way and (len(self._under_way) >= self._max_under_way or self._under_way[0][0].is_completed()):
            self._wait(self._under_way.popleft()[0], f"rank {target} did not take its hidden states")
        hidden_TD = hidden_TD.contiguous()
        work = dist.isend(hidden_TD, dst=target, group=self._parallel.world)
        assert work is not None
        self._under_way.append((work, hidden_TD))

    def receive(self, num_tokens: int) -> Tensor:
        """The hidden states of the previous stage for this step: [num_tokens, D]."""
        source = self._parallel.previous_rank
        assert source is not None
        hidden_TD = torch.empty((num_tokens, self._hidden_size), dtype=self._dtype, device=self._parallel.device)
        work = dist.irecv(hidden_TD, src=source, group=self._parallel.world)
        assert work is not None
        self._wait(work, f"no hidden states came from rank {source}")
        return hidden_TD

    def flush(self) -> None:
        """Wait until all that was sent has left."""
        while self._under_way:
            self._wait(self._under_way.popleft()[0], "the next stage did not take its hidden states")

    def _wait(self, work: dist.Work, problem: str) -> None:
        try:
            if self._parallel.device.type == "cuda":
                work.wait()  # orders the streams only; the host goes on
            else:
                work.wait(timedelta(seconds=self.timeout_seconds))
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WorkerFailed(self._parallel.rank.global_rank, "cluster_error", f"{problem}: {reason}") from error
