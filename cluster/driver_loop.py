"""The driver's process loop: edges on one side, ranks on the other, the `Driver` state machine between them.

One thread, one `Poller`. A round is: read what came, let the driver decide (which sends the next step first, since the
ranks wait for it), then tell the edges. Nobody who is slow can hold up the round: an edge that doesn't read is dropped.
"""

import contextlib
import gc
import itertools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Final

import msgspec

from argosy.cluster.channel_executor import ChannelExecutor
from argosy.cluster.clock import Clock, MonotonicClock
from argosy.cluster.connection import Connection
from argosy.cluster.driver import Driver
from argosy.cluster.metrics import Metrics
from argosy.cluster.poller import READ, WRITE, Poller
from argosy.cluster.protocol.channel import MAX_HELLO_BYTES, Listener, encode_frame, format_tcp, secret_matches
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ChannelClosed, ServingError
from argosy.cluster.protocol.messages import EngineInfo, FromEdge, Hello, Welcome, WorkerReady
from argosy.cluster.rank_processes import StartRanks

_log = logging.getLogger(__name__)
_MAX_SLEEP_SECONDS: Final = 1.0  # the beat that /health looks at is never older than this while the loop lives
_HELLO_SECONDS: Final = 10.0
_MAX_STRANGERS: Final = 256
_MAX_EDGE_FRAME_BYTES: Final = 64 * 1024 * 1024
_LOOKS_APART: Final = 1000  # of the next younger objects: ten thousand requests, not five hundred
MAX_EDGE_PENDING_BYTES: Final = 64 * 1024 * 1024


def settle_garbage() -> None:
    """Let a process that is a driver and nothing else look at all its objects seldom, and at those of its start never.

    Python does it whenever a quarter has been added, such as by the requests of a burst: 25 to 45 ms, in which no rank
    gets a step. A driver leaves next to nothing that only this would find.
    """
    gc.collect()
    gc.freeze()
    often, seldom, _ = gc.get_threshold()
    gc.set_threshold(often, seldom, _LOOKS_APART)


class DriverStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How the driver is, for those who started it and for /health."""

    state: str  # "starting", "ready", "rebuilding", "draining", "failed", "stopped"
    phase: str = ""
    fraction: float = 0.0
    info: EngineInfo | None = None
    address: str = ""
    error_code: str = ""
    error_message: str = ""
    seconds_since_beat: float = 0.0
    epoch: int = 0
    ranks: tuple[WorkerReady, ...] = ()  # of the group that is ready: where each one's bytes and seconds went


class DriverLoop:
    """Construct, then `run` in a thread of its own. `stop` and `status` may be called from any thread.

    `folder` is private to this engine and holds the sockets. With a `tcp_host` the door and the ranks' door are open on
    that address as well as they are in the folder: then edges and ranks of other nodes can come.
    """

    def __init__(
        self,
        config: ServingConfig,
        start_ranks: StartRanks,
        *,
        info: EngineInfo,
        folder: str,
        secret: str,
        tcp_host: str = "",
        tcp_port: int = 0,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
    ):
        self.clock = clock or MonotonicClock()
        self._info, self._is_known = info, False  # known: what the ranks measured is in it
        self._secret = secret
        self._poller = Poller()
        self._executor = ChannelExecutor(
            config=config,
            start_ranks=start_ranks,
            poller=self._poller,
            clock=self.clock,
            folder=folder,
            tcp_host=tcp_host,
        )
        self.driver = Driver(config, self._executor, self.clock, metrics or Metrics(), info=info)
        self._listener = Listener.bind(format_tcp(tcp_host, tcp_port) if tcp_host else f"unix:{folder}/door")
        self.address = self._listener.address
        self._strangers: dict[Connection, float] = {}  # not yet shown the secret: when they came
        self._edges: dict[int, Connection] = {}
        self._unwelcomed: set[int] = set()
        self._edge_ids = itertools.count()
        self._error: ServingError | None = None
        self._state = "starting"
        self._beat = self.clock.now()
        self._stop_at: float | None = None
        self.stopped = threading.Event()

    # ---------------------------------------------------------------------------------------- from other threads

    def stop(self, drain_seconds: float = 0.0) -> None:
        """End the loop: take no new requests, let what runs end for at most so long, then stop the ranks."""

        def begin() -> None:
            self._stop_at = self.clock.now() + drain_seconds
            self._state = "draining"
            if drain_seconds > 0.0:
                self.driver.drain()

        self._poller.call_soon(begin)

    def status(self) -> DriverStatus:
        """A snapshot."""
        phase, fraction = self._executor.start_progress() if self._state in ("starting", "rebuilding") else ("", 1.0)
        return DriverStatus(
            state=self._state,
            phase=phase,
            fraction=fraction,
            info=self._info if self._is_known else None,
            address=self.address,
            error_code=self._error.code if self._error else "",
            error_message=str(self._error) if self._error else "",
            seconds_since_beat=max(self.clock.now() - self._beat, 0.0),
            epoch=self._executor.epoch,
            ranks=tuple(ready for _, ready in sorted(self._executor.ready.items())) if self._state == "ready" else (),
        )

    # -------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Until `stop`, or until the driver can't go on (see `status`). Leaves no process, socket or file."""
        self._poller.register(self._listener.fileno(), lambda _: self._on_connect())
        try:
            self.driver.start()
            while not self._is_over():
                self._round()
        except Exception as error:  # the loop's top: record why, then end everything that hangs on us
            _log.exception("the driver's loop failed")
            self._error = error if isinstance(error, ServingError) else ServingError(f"the driver failed: {error!r}")
        finally:
            self._close()

    def _round(self) -> None:
        executor, driver = self._executor, self.driver
        self._poller.poll(min(driver.next_deadline_seconds(), executor.next_deadline_seconds(), _MAX_SLEEP_SECONDS))
        self._beat = self.clock.now()
        executor.check_deadlines()
        for event in executor.take_events():
            driver.on_executor_event(event)
        driver.advance()
        for edge_id, message in driver.take_outbox():
            self._send(edge_id, encode_frame(message))
        if self._unwelcomed or self._state != "ready" or executor.status != "ready":
            self._look_at_ranks()
        if self._strangers:
            self._drop_silent_strangers()

    def _is_over(self) -> bool:
        if self.driver.fatal is not None:
            self._error = self.driver.fatal
            return True
        if self._stop_at is None:
            return False
        return self.clock.now() >= self._stop_at or self.driver.is_drained

    def _look_at_ranks(self) -> None:
        """Keep `status` true while a group comes up; when it stands, edges that wait are told of the engine."""
        executor = self._executor
        ready = executor.status == "ready"
        if self._stop_at is None:
            self._state = "ready" if ready else "rebuilding" if self._is_known else "starting"
        if ready and not (self._is_known and self._info.epoch == executor.epoch):
            reports = executor.reports
            self._is_known = True
            self.driver.metrics.ledgers = {rank: ready.ledger for rank, ready in executor.ready.items()}
            self._info = msgspec.structs.replace(
                self._info,
                num_blocks=executor.num_blocks,
                kv_windows=executor.groups.windows,
                epoch=executor.epoch,
                device=reports[0].device,
                weight_bytes=sum(report.weight_bytes for report in reports.values()),
            )
        if self._is_known and self._unwelcomed:
            frame = encode_frame(Welcome(info=self._info))
            for edge_id in sorted(self._unwelcomed):
                self._send(edge_id, frame)
            self._unwelcomed.clear()

    # ------------------------------------------------------------------------------------------------- the edges

    def _on_connect(self) -> None:
        with contextlib.suppress(OSError):  # gone before it was greeted
            connection = Connection(
                self._listener.accept(0.0),
                Hello,
                max_frame_bytes=MAX_HELLO_BYTES,
                max_pending_bytes=MAX_EDGE_PENDING_BYTES,
            )
            if len(self._strangers) >= _MAX_STRANGERS:
                connection.close()
                return
            self._strangers[connection] = self.clock.now()
            self._poller.register(connection.fileno(), lambda _: self._on_stranger(connection))

    def _on_stranger(self, connection: Connection) -> None:
        try:
            messages = connection.receive()
        except ChannelClosed:
            self._drop_stranger(connection)
            return
        if not messages:
            return
        hello = messages[0]
        if hello.role != "edge" or not secret_matches(hello, self._secret):
            _log.warning("a connection was refused: it did not show the secret")
            self._drop_stranger(connection)
            return
        del self._strangers[connection]
        connection.accept_as(FromEdge, _MAX_EDGE_FRAME_BYTES)
        edge_id = next(self._edge_ids)
        self._edges[edge_id] = connection
        self._unwelcomed.add(edge_id)
        self._poller.unregister(connection.fileno())
        self._poller.register(connection.fileno(), lambda mask: self._on_edge(edge_id, connection, mask))
        self._guard(edge_id, connection.decode_rest)

    def _on_edge(self, edge_id: int, connection: Connection, mask: int) -> None:
        try:
            if mask & WRITE:
                connection.flush()
                if not connection.wants_to_write:
                    self._poller.modify(connection.fileno(), READ)
        except ChannelClosed as error:
            self._drop_edge(edge_id, error)
            return
        if mask & ~WRITE:
            self._guard(edge_id, connection.receive)

    def _guard(self, edge_id: int, read: Callable[[], list[Any]]) -> None:
        """Hand on what an edge said; what it says wrong costs only its own connection."""
        try:
            for message in read():
                if not isinstance(message, Hello):
                    self.driver.on_edge_message(edge_id, message)
        except ChannelClosed as error:
            self._drop_edge(edge_id, error)

    def _send(self, edge_id: int, frame: bytearray) -> None:
        connection = self._edges.get(edge_id)
        if connection is None:
            return  # gone since the driver wrote this
        try:
            connection.send_frame(frame)
            if connection.wants_to_write:
                self._poller.modify(connection.fileno(), READ | WRITE)
        except ChannelClosed as error:
            self._drop_edge(edge_id, error)

    def _drop_edge(self, edge_id: int, error: ChannelClosed) -> None:
        connection = self._edges.pop(edge_id, None)
        if connection is None:
            return
        _log.info("edge %d left: %s", edge_id, error)
        self._unwelcomed.discard(edge_id)
        self._poller.unregister(connection.fileno())
        connection.close()
        self.driver.on_edge_closed(edge_id)

    def _drop_stranger(self, connection: Connection) -> None:
        if self._strangers.pop(connection, None) is not None:
            self._poller.unregister(connection.fileno())
            connection.close()

    def _drop_silent_strangers(self) -> None:
        oldest = self.clock.now() - _HELLO_SECONDS
        for connection in [c for c, since in self._strangers.items() if since < oldest]:
            self._drop_stranger(connection)

    def _close(self) -> None:
        try:
            self._executor.stop()
        finally:
            for connection in (*self._edges.values(), *self._strangers):
                connection.close()
            self._edges.clear()
            self._strangers.clear()
            self._listener.close()
            self._state = "failed" if self._error else "stopped"
            self._poller.close()
            self.stopped.set()
            _log.info("driver of process %d ended", os.getpid())
