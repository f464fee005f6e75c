"""What travels between pipeline stages: hidden states from each stage to the next, tokens from the last to the first.

Each rank sends to the same tensor-parallel place of the other stage, which has all of it: a whole hidden state [T, D]
a step, and after a step that sampled the table of last tokens [N]. Both sides derive sizes and order from the same
stream of `SchedulerOutput`s, so nothing is announced.

    stage 0 ---hidden---> stage 1 ---hidden---> stage 2          a wire of its own for each arrow, so that a message
       ^------------------tokens-------------------'             that waits for its taker holds up no other

Sends don't wait for the other side: a stage goes on with the next micro-batch while its neighbour works. On a GPU
nothing here blocks the host: a receive is queued behind what was computed before it, and in front of what needs it. On
a CPU every wait has a deadline. Cards of one host write into each other's memory (`card_wires`), others use NCCL.
"""

from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from argosy.cluster.protocol.errors import WorkerFailed
from argosy.placement.card_wires import CardWires, open_card_wires
from argosy.placement.process_groups import ParallelContext

NCCL_BLOCKS = 8  # multiprocessors that a send may hold while it waits for its taker


class StageTransport:
    """This rank's wires. With one stage there are none. Made by all ranks together: it opens process groups."""

    def __init__(
        self,
        parallel: ParallelContext,
        hidden_size: int,
        dtype: torch.dtype,
        *,
        timeout_seconds: float,
        max_steps_in_flight: int = 2,
        max_tokens: int = 0,
        max_rows: int = 0,
    ):
        """`max_tokens`, `max_rows`: of the largest messages; without them cards don't share memory."""
        self.parallel, self._hidden_size, self._dtype = parallel, hidden_size, dtype
        self.timeout_seconds = timeout_seconds
        self.max_steps_in_flight = max_steps_in_flight
        rank = parallel.rank
        self._wires: list[dist.ProcessGroup] = []
        self._cards: CardWires | None = None
        if rank.pp_size > 1 and parallel.device.type == "cuda" and max_tokens:
            self._cards = open_card_wires(
                parallel,
                token_bytes=max_rows * torch.int64.itemsize,
                token_slots=max(2, max_steps_in_flight),
                hidden_bytes=max_tokens * hidden_size * dtype.itemsize,
            )
        if rank.pp_size > 1 and self._cards is None:
            # by all ranks, in one order; neighbouring boundaries alternate, so that a stage between two others
            # receives on one wire and sends on another
            self._wires = [_open_wire(parallel) for _ in range(2 + (rank.pp_size > 2))]
        self._sent: dict[int, deque[tuple[dist.Work, Tensor]]] = {}  # by wire; the tensor must live until it was sent

    # ---------------------------------------------------------------------------------------------- hidden states

    def send(self, hidden_TD: Tensor, *, changes: bool = False) -> None:
        """Start to send to the next stage. `changes`: later steps write to the same tensor."""
        target = self.parallel.next_rank
        assert target is not None
        self._send(hidden_TD, target, self._forward_wire(self.parallel.rank.pp_rank), "hidden states", changes)

    def receive(self, num_tokens: int, into_TD: Tensor | None = None) -> Tensor:
        """The hidden states of the previous stage for this step: [num_tokens, D], in `into_TD` if given."""
        source = self.parallel.previous_rank
        assert source is not None
        if into_TD is None:
            shape = (num_tokens, self._hidden_size)
            into_TD = torch.empty(shape, dtype=self._dtype, device=self.parallel.device)
        return self._receive(into_TD, source, self._forward_wire(self.parallel.rank.pp_rank - 1), "hidden states")

    # ----------------------------------------------------------------------------------------------------- tokens

    def send_tokens(self, last_token_N: Tensor) -> None:
        """From the last stage to the first: who has which last token. Later steps may write there."""
        parallel = self.parallel
        self._send(last_token_N, parallel.global_rank_of(parallel.rank.tp_rank, 0), 0, "tokens", True)

    def receive_tokens(self, into_N: Tensor) -> Tensor:
        """On the first stage: the tokens of the oldest step whose tokens weren't received."""
        parallel = self.parallel
        source = parallel.global_rank_of(parallel.rank.tp_rank, parallel.pp_size - 1)
        return self._receive(into_N, source, 0, "tokens")

    # ------------------------------------------------------------------------------------------------------- both

    def flush(self) -> None:
        """Wait until all that was sent has left."""
        if self._cards is not None:
            self._cards.finish()
        for wire, sent in self._sent.items():
            while sent:
                self._wait(sent.popleft()[0], f"nobody took what was sent on wire {wire}")

    def _forward_wire(self, boundary: int) -> int:
        return 1 + boundary % 2

    def _send(self, tensor: Tensor, target: int, wire: int, what: str, changes: bool) -> None:
        tensor = tensor.contiguous()
        if self._cards is not None:
            self._cards.send(what, tensor, changes=changes)
            return
        if changes:
            tensor = tensor.clone()
        sent = self._sent.setdefault(wire, deque())
        # the scheduler keeps fewer steps unanswered, so this waits only when something is wrong
        while sent and (len(sent) > self.max_steps_in_flight or sent[0][0].is_completed()):
            self._wait(sent.popleft()[0], f"rank {target} did not take its {what}")
        work = dist.isend(tensor, dst=target, group=self._wires[wire])
        assert work is not None
        sent.append((work, tensor))

    def _receive(self, tensor: Tensor, source: int, wire: int, what: str) -> Tensor:
        if self._cards is not None:
            self._cards.receive(what, tensor)
            return tensor
        work = dist.irecv(tensor, src=source, group=self._wires[wire])
        assert work is not None
        self._wait(work, f"no {what} came from rank {source}")
        return tensor

    def _wait(self, work: dist.Work, problem: str) -> None:
        try:
            if self.parallel.device.type == "cuda":
                work.wait()  # orders the streams only; the host goes on
            else:
                work.wait(timedelta(seconds=self.timeout_seconds))
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WorkerFailed(self.parallel.rank.global_rank, "cluster_error", f"{problem}: {reason}") from error


def _open_wire(parallel: ParallelContext) -> dist.ProcessGroup:
    timeout = timedelta(seconds=parallel.timeout_seconds)
    group: dist.ProcessGroup
    if parallel.device.type != "cuda":
        group = dist.new_group(timeout=timeout, backend="gloo")
        return group
    # its kernels come before others that wait for multiprocessors, and don't take many of them while they wait
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = NCCL_BLOCKS
    group = dist.new_group(timeout=timeout, backend="nccl", pg_options=options)
    return group
