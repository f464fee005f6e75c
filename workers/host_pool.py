"""KV blocks of this rank in host memory, and the copies between there and the device.

    host pool [N, bytes of a block]     a row holds a block's tensors one after the other: this rank's heads and layers

    out   compute stream: blocks -> rows of a buffer on the device (at its own speed)    then they may be written again
          out stream:     buffer -> host rows, long copies that the card's copy engine carries out
    in    in stream:      host rows -> buffer -> blocks that nobody uses until a step waits for them

The compute stream waits only where it must: for a buffer that is still on its way out when more has to go, and where a
step names blocks that have not come in. On a CPU a copy is a copy, done when the step that orders it begins.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import BlockSwaps
from argosy.kernels import ops
from argosy.placement.swap_space import IN_BUFFER_BYTES, OUT_BUFFER_BYTES, OUT_BUFFERS, rows_of
from argosy.workers.host_memory import check_host_room, free_host_bytes, pinned_bytes

MEASURED_BYTES: Final = 256 * 2**20


def choose_num_host_blocks(config: ServingConfig, block_bytes: int, num_ranks: int) -> int:
    """How many blocks this rank keeps in host memory that `num_ranks` share. "auto": half of what is free, for all.

    Raises `PlacementImpossible` where there is not so much.
    """
    asked = config.offload.swap_space
    if isinstance(asked, str):
        return free_host_bytes() // (2 * num_ranks * block_bytes)
    num_bytes = int(asked * 2**30)
    check_host_room(num_bytes, f"swap_space={asked:g}", "ask for less, or for auto", num_ranks=num_ranks)
    return num_bytes // block_bytes


class HostPool:
    """`num_blocks` host blocks behind the device blocks of `tensors` (each contiguous, a row a block)."""

    def __init__(self, tensors: Sequence[Tensor], num_blocks: int):
        self.tensors = _distinct(tensors)
        self.device = self.tensors[0].device
        self.block_bytes = sum(tensor.stride(0) * tensor.element_size() for tensor in self.tensors)
        self.rows_NB = pinned_bytes(num_blocks * self.block_bytes, self.device).view(num_blocks, self.block_bytes)
        self.swapped_in_step_id = -1
        self._lock = threading.Lock()
        self._seconds = [0.0, 0.0]  # out, in: of copies that ended and were not reported

    def begin(self, step_id: int, swaps: BlockSwaps) -> None:
        """What a step orders: see `BlockSwaps`."""
        started = time.perf_counter()
        rows, start = self.rows_NB.numpy(), 0  # plain copies: torch's calls take longer than a block's bytes
        parts = []
        for tensor in self.tensors:
            blocks = tensor.view(tensor.shape[0], -1).view(torch.uint8).numpy()
            parts.append((blocks, rows[:, start : start + blocks.shape[1]]))
            start += blocks.shape[1]
        for blocks, kept in parts:
            for block_id, host_id in swaps.out:
                kept[host_id] = blocks[block_id]
        between = time.perf_counter()
        for blocks, kept in parts:
            for host_id, block_id in swaps.into:
                blocks[block_id] = kept[host_id]
        if swaps.into:
            self.swapped_in_step_id = step_id
        self._count(between - started, time.perf_counter() - between)

    def report(self) -> tuple[int, tuple[float, float]]:
        """The latest step whose blocks are all in, and seconds out and in since the last call. On any thread."""
        with self._lock:
            seconds, self._seconds = (self._seconds[0], self._seconds[1]), [0.0, 0.0]
        return self.swapped_in_step_id, seconds

    def measure(self) -> tuple[float, float]:
        """Seconds of a block out and in, in a copy of many. Leaves device blocks as they are."""
        count = min(len(self.rows_NB), self.tensors[0].shape[0], rows_of(MEASURED_BYTES, self.block_bytes))
        best = [float("inf"), float("inf")]
        for _ in range(3):  # the first pays for what is used for the first time
            for way, swaps in enumerate((
                BlockSwaps(out=[(block_id, block_id) for block_id in range(count)]),
                BlockSwaps(into=[(block_id, block_id) for block_id in range(count)]),
            )):  # fmt: skip
                started = time.perf_counter()
                self.begin(-1, swaps)
                self.finish()
                best[way] = min(best[way], (time.perf_counter() - started) / count)
        self.report()
        self.swapped_in_step_id = -1
        return best[0], best[1]

    def finish(self) -> None:
        """Wait for all copies."""

    def _count(self, out_seconds: float, in_seconds: float) -> None:
        with self._lock:
            self._seconds[0] += out_seconds
            self._seconds[1] += in_seconds


class CardHostPool(HostPool):
    """The same beside a GPU, with streams of its own."""

    def __init__(self, tensors: Sequence[Tensor], num_blocks: int):
        super().__init__(tensors, num_blocks)
        device, event = self.device, _event
        make: Any = torch.cuda.Stream  # torch gives it no types
        self._out_stream, self._in_stream = make(device), make(device)
        rows = rows_of(OUT_BUFFER_BYTES, self.block_bytes)
        self._out_buffers = [torch.empty(rows, self.block_bytes, dtype=torch.uint8, device=device)
                             for _ in range(OUT_BUFFERS)]  # fmt: skip
        self._out_free = [event() for _ in range(OUT_BUFFERS)]
        self._turn = 0
        self._in_buffer = torch.empty(
            rows_of(IN_BUFFER_BYTES, self.block_bytes), self.block_bytes, dtype=torch.uint8, device=device
        )
        self._out: list[tuple[set[int], Any, Any]] = []  # host blocks, first and last event of copies under way
        self._in: list[tuple[int, Any, Any]] = []  # step id, first and last event; in order

    def begin(self, step_id: int, swaps: BlockSwaps) -> None:
        """What a step orders, on the current stream and beside it."""
        self._settle()
        compute = torch.cuda.current_stream(self.device)
        self._wait(compute, min(swaps.await_step_id, step_id - 1))
        if swaps.out:
            self._begin_out(compute, swaps.out)
        if swaps.into:
            self._begin_in(compute, step_id, swaps.into)
            if swaps.await_step_id >= step_id:
                self._wait(compute, step_id)

    def _wait(self, compute: Any, step_id: int) -> None:
        """The compute stream goes on when what steps up to this one ordered in has come in; streams keep the order."""
        latest = next((entry for entry in reversed(self._in) if entry[0] <= step_id), None)
        if latest is not None:
            compute.wait_event(latest[2])

    def _begin_out(self, compute: Any, pairs: Sequence[tuple[int, int]]) -> None:
        first, start = _event(), 0
        pairs = sorted(pairs, key=_second)
        ids = _upload([block_id for block_id, _ in pairs], self.device)
        for part, chunk in enumerate(_chunks(pairs, len(self._out_buffers[0]))):
            turn = self._turn = (self._turn + 1) % OUT_BUFFERS
            buffer, stream = self._out_buffers[turn], self._out_stream
            compute.wait_event(self._out_free[turn])
            ops.gather_blocks(self.tensors, ids[start : start + len(chunk)], buffer)
            start += len(chunk)
            gathered = _event()
            gathered.record(compute)
            with torch.cuda.stream(stream):
                stream.wait_event(gathered)
                if not part:
                    first.record(stream)
                for row, host_id, count in _runs([host_id for _, host_id in chunk]):
                    self.rows_NB[host_id : host_id + count].copy_(buffer[row : row + count], non_blocking=True)
                self._out_free[turn].record(stream)
        last = _event()
        last.record(self._out_stream)
        self._out.append(({host_id for _, host_id in pairs}, first, last))

    def _begin_in(self, compute: Any, step_id: int, pairs: Sequence[tuple[int, int]]) -> None:
        stream, buffer = self._in_stream, self._in_buffer
        before, first, last = _event(), _event(), _event()
        before.record(compute)  # those blocks were others' until now
        host_ids = {host_id for host_id, _ in pairs}
        with torch.cuda.stream(stream):
            stream.wait_event(before)
            for filled, _, written in self._out:
                if not filled.isdisjoint(host_ids):
                    stream.wait_event(written)
            first.record(stream)
            pairs, start = sorted(pairs), 0
            ids = _upload([block_id for _, block_id in pairs], self.device)
            for chunk in _chunks(pairs, len(buffer)):
                for row, host_id, count in _runs([host_id for host_id, _ in chunk]):
                    buffer[row : row + count].copy_(self.rows_NB[host_id : host_id + count], non_blocking=True)
                ops.scatter_blocks(buffer, self.tensors, ids[start : start + len(chunk)])
                start += len(chunk)
            last.record(stream)
        self._in.append((step_id, first, last))

    def _settle(self) -> None:
        """Forget the copies that are done, after their seconds were counted."""
        while self._out and self._out[0][2].query():
            _, first, last = self._out.pop(0)
            self._count(first.elapsed_time(last) / 1e3, 0.0)
        while self._in and self._in[0][2].query():
            step_id, first, last = self._in[0]
            self.swapped_in_step_id = max(self.swapped_in_step_id, step_id)  # before it leaves: `report` reads both
            self._in = self._in[1:]
            self._count(0.0, first.elapsed_time(last) / 1e3)

    def report(self) -> tuple[int, tuple[float, float]]:
        """As above, without waiting; copies that have ended since the last step are seen."""
        entries = self._in
        done, seconds = super().report()
        for step_id, _, last in entries:
            if not last.query():
                break
            done = max(done, step_id)
        return done, seconds

    def finish(self) -> None:
        """Wait for all copies."""
        self._out_stream.synchronize()
        self._in_stream.synchronize()
        self._settle()


def make_host_pool(tensors: Sequence[Tensor], num_blocks: int) -> HostPool:
    """The pool that goes with where `tensors` are."""
    return (CardHostPool if tensors[0].is_cuda else HostPool)(tensors, num_blocks)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]  # torch's own


def _upload(block_ids: Sequence[int], device: torch.device) -> Tensor:
    """The ids on the device, without waiting. Slices of them serve the parts of an order."""
    return torch.tensor(block_ids, dtype=torch.int64).pin_memory().to(device, non_blocking=True)


def _second(pair: tuple[int, int]) -> int:
    return pair[1]


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each piece of memory once: layers may share theirs, and some have none."""
    return list({tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}.values())


def _chunks(pairs: Sequence[tuple[int, int]], most: int) -> Iterator[Sequence[tuple[int, int]]]:
    for start in range(0, len(pairs), most):
        yield pairs[start : start + most]


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Ascending ids as (place of the first, first id, how many follow each other)."""
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[place - 1] + 1:
            yield start, ids[start], place - start
            start = place
