"""An executor whose ranks are processes behind sockets.

Who starts and ends the processes is not known here: a callable does (`rank_processes.StartRanks`). This file greets,
agrees on the number of blocks, sends each step, and notices when a rank has gone or gone silent. It lives in the
driver's thread; the callable, which may take seconds, runs in a thread of its own.

    starting    processes come up and connect     Hello from every rank          -> StartWorker to all
    loading     groups, weights, measuring        WorkerReport from every rank   -> AllocateCache(the least of them)
    allocating  cache, warm-up                    WorkerReady from every rank    -> event RanksReady
    ready       steps
    stopped     nothing runs; every failure leads here, with one event RanksLost
"""

import contextlib
import functools
import logging
import os
import secrets
from typing import Any, Final

from argosy.cluster.clock import Clock
from argosy.cluster.connection import Connection
from argosy.cluster.executor import ExecutorEvent, RanksLost, RanksReady
from argosy.cluster.poller import READ, WRITE, Poller
from argosy.cluster.protocol.channel import (
    MAX_FRAME_BYTES,
    MAX_HELLO_BYTES,
    Listener,
    encode_frame,
    format_tcp,
    secret_matches,
)
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import (
    ChannelClosed,
    PlacementImpossible,
    ServingError,
    StartupTimeout,
    WorkerFailed,
    WorkerLost,
)
from argosy.cluster.protocol.kv_groups import ONE_TABLE, KVGroups
from argosy.cluster.protocol.messages import (
    AllocateCache,
    FromRank,
    Hello,
    ModelRunnerOutput,
    Pong,
    SchedulerOutput,
    StartWorker,
    StopWorker,
    WorkerError,
    WorkerProgress,
    WorkerReady,
    WorkerReport,
)
from argosy.cluster.rank_processes import RankDoor, RankKeeper, StartRanks
from argosy.cluster.start_rules import (
    agree_on_num_blocks,
    agree_on_num_host_blocks,
    error_of_rank,
    slowest_phase,
    swap_costs,
)
from argosy.cluster.step_deadline import StepsInFlight

_log = logging.getLogger(__name__)
_STOP_SECONDS: Final = 3.0  # for ranks to leave by themselves before they are killed
_MAX_PENDING_BYTES: Final = 2 * MAX_FRAME_BYTES


class ChannelExecutor:
    """Satisfies `Executor`."""

    def __init__(
        self,
        *,
        config: ServingConfig,
        start_ranks: StartRanks,
        poller: Poller,
        clock: Clock,
        folder: str,
        tcp_host: str = "",
    ):
        self.config, self.clock, self.poller = config, clock, poller
        self._steps = StepsInFlight(config.parallel.step_deadline_seconds)
        self.num_ranks = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
        self.status = "stopped"
        self.epoch = -1
        self.num_blocks = 0
        self.groups = ONE_TABLE
        self._num_host_blocks = 0
        self.reports: dict[int, WorkerReport] = {}
        self.ready: dict[int, WorkerReady] = {}
        self.progress: dict[int, tuple[str, float]] = {}
        self._start_ranks, self._tcp_host = start_ranks, tcp_host
        self._keeper = RankKeeper()
        self._folder = folder  # private to this engine: the ranks' socket is in it
        self._listeners: list[Listener] = []
        self._secret = ""
        self._strangers: set[Connection] = set()
        self._ranks: dict[int, Connection] = {}  # a relayed rank has the connection of the one that relays
        self._fan_out: list[Connection] = []  # each connection once
        self._rendezvous = ""
        self._events: list[ExecutorEvent] = []
        self._start_deadline = 0.0

    # ------------------------------------------------------------------------------------------------- Executor

    def start(self, epoch: int) -> None:
        """Begin to bring up all ranks for `epoch`; `RanksReady` or `RanksLost` follows within the start deadline."""
        assert self.status == "stopped", self.status
        self.status, self.epoch = "starting", epoch
        self.reports, self.ready, self.progress, self._rendezvous = {}, {}, {}, ""
        self._steps = StepsInFlight(self.config.parallel.step_deadline_seconds)  # fresh ranks are slow at first
        self._start_deadline = self.clock.now() + self.config.parallel.start_deadline_seconds
        self._secret = secrets.token_hex(32)  # of this epoch only: a late rank of an older one stays outside
        self._listen()
        tcp = next((listener.address for listener in self._listeners if listener.address.startswith("tcp:")), "")
        door = RankDoor(epoch=epoch, unix=self._listeners[0].address, tcp=tcp, secret=self._secret)

        def on_dead(global_rank: int, why: str) -> None:
            self.poller.call_soon(lambda: self._on_dead(epoch, global_rank, why))

        def start() -> None:
            try:
                handles = self._start_ranks(door, on_dead)
            except ServingError as error:
                lost = error
                self.poller.call_soon(lambda: self._lose(epoch, lost))
            except Exception as error:  # the thread's top: whatever went wrong ends the start, and is told
                failure = PlacementImpossible(f"could not start the ranks: {error!r}")
                self.poller.call_soon(lambda: self._lose(epoch, failure))
            else:
                self._keeper.hold(handles)
                self.poller.call_soon(lambda: self._on_started(epoch, handles.rendezvous))

        self._keeper.do(start)

    def submit(self, output: SchedulerOutput) -> None:
        """Send a step to every rank. Never blocks for the answer."""
        if self.status != "ready" or output.epoch != self.epoch:
            return  # the group was lost a moment ago: its RanksLost is on the way, and the step with it
        frame = encode_frame(output)
        self._steps.sent(output.step_id, output.num_scheduled_tokens, self.clock.now())
        for connection in self._fan_out:
            self._send(connection, frame)

    def poll(self, timeout_seconds: float) -> list[ExecutorEvent]:
        """What happened since the last call; waits at most `timeout_seconds` for the first event."""
        if not self._events:
            self.poller.poll(min(timeout_seconds, self.next_deadline_seconds()))
        self.check_deadlines()
        return self.take_events()

    def stop(self) -> None:
        """End all ranks and give back what they held: first by word, then by force."""
        if self.status != "stopped":
            self.status = "stopping"
            for connection in self._fan_out:
                with contextlib.suppress(ChannelClosed):  # gone already
                    connection.send(StopWorker())
            deadline = self.clock.now() + _STOP_SECONDS
            while self._ranks and (left := deadline - self.clock.now()) > 0.0:
                self.poller.poll(min(left, 0.1))
        self._close()
        self._keeper.kill()

    # ------------------------------------------------------------------------------------- for the driver's loop

    def take_events(self) -> list[ExecutorEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def next_deadline_seconds(self) -> float:
        """How long until `check_deadlines` may have something to say."""
        if self.status in ("starting", "loading", "allocating"):
            return max(self._start_deadline - self.clock.now(), 0.0)
        if self.status == "ready" and self._steps:
            return max(self._steps.next_deadline() - self.clock.now(), 0.0)
        return 3600.0

    def check_deadlines(self) -> None:
        """A rank that hangs looks alive to everybody else: only silence tells."""
        now = self.clock.now()
        if self.status in ("starting", "loading", "allocating") and now >= self._start_deadline:
            missing = [rank for rank in range(self.num_ranks) if rank not in self._here()]
            waited_for = f"rank {', '.join(map(str, missing))} ({self.status})"
            self._lose(self.epoch, StartupTimeout(waited_for, self.config.parallel.start_deadline_seconds))
        elif self.status == "ready" and self._steps and now >= self._steps.next_deadline():
            self._lose(self.epoch, WorkerLost(self._answering_rank, self._node_of(self._answering_rank), self.epoch))

    def start_progress(self) -> tuple[str, float]:
        """What the slowest rank is doing, and how much of that is done."""
        if self.status in ("starting", "stopped"):
            return "starting workers", len(self._ranks) / self.num_ranks
        return slowest_phase(self.progress.values()) or (self.status, 0.0)

    @property
    def num_steps_in_flight(self) -> int:
        """Steps that were sent and not answered."""
        return len(self._steps)

    # ------------------------------------------------------------------------------------------------- the start

    def _listen(self) -> None:
        if self._listeners:
            return
        self._listeners = [Listener.bind(f"unix:{self._folder}/ranks")]
        if self._tcp_host:
            self._listeners.append(Listener.bind(format_tcp(self._tcp_host, 0)))
        for listener in self._listeners:
            self.poller.register(listener.fileno(), functools.partial(self._on_connect, listener))

    def _on_connect(self, listener: Listener, _mask: int) -> None:
        with contextlib.suppress(OSError):  # gone before it was greeted
            connection = Connection(
                listener.accept(0.0), Hello, max_frame_bytes=MAX_HELLO_BYTES, max_pending_bytes=_MAX_PENDING_BYTES
            )
            self._strangers.add(connection)
            self.poller.register(connection.fileno(), lambda mask: self._on_ready(connection, mask))

    def _on_started(self, epoch: int, rendezvous: str) -> None:
        if epoch == self.epoch and self.status == "starting":
            self._rendezvous = rendezvous
            self._maybe_start_workers()

    def _on_hello(self, connection: Connection, hello: Hello) -> bool:
        """Whether the peer may stay."""
        fits = hello.role == "rank" and 0 <= hello.global_rank < self.num_ranks and hello.global_rank not in self._ranks
        if self.status != "starting" or not fits or not secret_matches(hello, self._secret):
            self._on_closed(connection, ChannelClosed("a hello that does not fit"))
            return False
        self._strangers.discard(connection)
        self._ranks[hello.global_rank] = connection
        if connection not in self._fan_out:
            connection.accept_as(FromRank)
            self._fan_out.append(connection)
        self._maybe_start_workers()
        return True

    def _maybe_start_workers(self) -> None:
        if self._rendezvous and len(self._ranks) == self.num_ranks:
            self.status = "loading"
            left = max(self._start_deadline - self.clock.now(), 1.0)
            self._send_all(StartWorker(epoch=self.epoch, rendezvous=self._rendezvous, deadline_seconds=left))

    def _on_report(self, report: WorkerReport) -> None:
        self.reports[report.global_rank] = report
        if self.status == "loading" and len(self.reports) == self.num_ranks:
            try:
                num_blocks = agree_on_num_blocks(list(self.reports.values()), self.config)
                self.groups = KVGroups(report.kv_windows)
                self._num_host_blocks = agree_on_num_host_blocks(list(self.reports.values()), self.config, num_blocks)
            except ServingError as error:
                self._lose(self.epoch, error)
                return
            self.status = "allocating"
            self.num_blocks = num_blocks
            self._send_all(AllocateCache(num_blocks=num_blocks, num_host_blocks=self._num_host_blocks))

    def _on_worker_ready(self, ready: WorkerReady) -> None:
        self.ready[ready.global_rank] = ready
        if self.status == "allocating" and len(self.ready) == self.num_ranks:
            self.status = "ready"
            swap = swap_costs(list(self.reports.values()), list(self.ready.values()), self._num_host_blocks)
            self._events.append(RanksReady(self.epoch, self.num_blocks, self.groups, swap))

    # --------------------------------------------------------------------------------------------------- the wire

    def _on_ready(self, connection: Connection, mask: int) -> None:
        try:
            if mask & WRITE:
                connection.flush()
                if not connection.wants_to_write:
                    self.poller.modify(connection.fileno(), READ)
            if mask & ~WRITE:
                for message in connection.receive():
                    self._on_message(connection, message)
        except ChannelClosed as error:
            self._on_closed(connection, error)

    def _on_message(self, connection: Connection, message: Any) -> None:
        if isinstance(message, ModelRunnerOutput):
            if message.epoch == self.epoch and self._steps.answered(message.step_id, self.clock.now()):
                self._events.append(message)
        elif isinstance(message, Hello):
            if self._on_hello(connection, message):
                for later in connection.decode_rest():
                    self._on_message(connection, later)
        elif isinstance(message, Pong):
            pass
        elif connection in self._fan_out and 0 <= message.global_rank < self.num_ranks:
            self._on_start_message(message)

    def _on_start_message(self, message: Any) -> None:
        if isinstance(message, WorkerProgress):
            self.progress[message.global_rank] = (message.phase, message.fraction)
        elif isinstance(message, WorkerError):  # of this epoch, as its connection is: a relay does not know the number
            node = self._node_of(message.global_rank)
            self._lose(self.epoch, error_of_rank(message, node, self.epoch))
        elif message.epoch != self.epoch:
            return
        elif isinstance(message, WorkerReport):
            self._on_report(message)
        elif isinstance(message, WorkerReady):
            self._on_worker_ready(message)

    def _send_all(self, message: object) -> None:
        frame = encode_frame(message)
        for connection in list(self._fan_out):
            self._send(connection, frame)

    def _send(self, connection: Connection, frame: bytearray) -> None:
        try:
            connection.send_frame(frame)
            if connection.wants_to_write:
                self.poller.modify(connection.fileno(), READ | WRITE)
        except ChannelClosed as error:
            # Not handled here: the caller is in the middle of a step. The next poll tells it, in order.
            cause = error
            self.poller.call_soon(lambda: self._on_closed(connection, cause))

    # --------------------------------------------------------------------------------------------------- the end

    def _on_closed(self, connection: Connection, error: ChannelClosed) -> None:
        if connection not in self._fan_out:
            self._drop(connection)
            return
        gone = [rank for rank, other in self._ranks.items() if other is connection]
        self._fan_out.remove(connection)
        for rank in gone:
            del self._ranks[rank]
        self._drop(connection)
        if self.status != "stopping" and gone:
            lost = WorkerLost(gone[0], self._node_of(gone[0]), self.epoch)
            lost.__cause__ = error
            self._lose(self.epoch, lost)

    def _on_dead(self, epoch: int, global_rank: int, why: str) -> None:
        if epoch != self.epoch or self.status in ("stopped", "stopping"):
            return
        _log.warning("rank %d ended: %s", global_rank, why)
        if self.status == "ready":
            self._lose(epoch, WorkerLost(global_rank, self._node_of(global_rank), epoch))
        else:
            self._lose(epoch, WorkerFailed(global_rank, "worker_lost", f"ended while starting: {why}"))

    def _lose(self, epoch: int, error: ServingError) -> None:
        """The group can't go on: end all of it (a peer of a dead rank hangs in its collectives), and say so once."""
        if epoch != self.epoch or self.status in ("stopped", "stopping"):
            return
        _log.warning("epoch %d is over: %s", epoch, error)
        self._close()
        self._keeper.do(self._keeper.kill_held)
        self._events.append(RanksLost(epoch, error))

    def _close(self) -> None:
        """Forget all connections; ranks exit when they see it."""
        self.status = "stopped"
        self._steps.clear()
        for connection in (*self._fan_out, *self._strangers):
            self.poller.unregister(connection.fileno())
            connection.close()
        self._fan_out.clear()
        self._strangers.clear()
        self._ranks.clear()
        for listener in self._listeners:
            self.poller.unregister(listener.fileno())
            listener.close()
        self._listeners = []

    def _drop(self, connection: Connection) -> None:
        self._strangers.discard(connection)
        if connection.fileno() >= 0:
            self.poller.unregister(connection.fileno())
            connection.close()

    # ------------------------------------------------------------------------------------------------ small words

    @property
    def _answering_rank(self) -> int:
        return (self.config.parallel.pipeline_parallel_size - 1) * self.config.parallel.tensor_parallel_size

    def _node_of(self, global_rank: int) -> str:
        report = self.reports.get(global_rank)
        return report.node if report and report.node else os.uname().nodename

    def _here(self) -> set[int]:
        if self.status == "starting":
            return set(self._ranks)
        return set(self.reports) if self.status == "loading" else set(self.ready)
