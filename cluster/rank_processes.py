"""The processes of an epoch's ranks, as the driver's side sees them: started and ended by somebody else.

`deploy.launch` hands in the callable, so that this room knows neither Ray actors nor GPUs nor plain processes.
"""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec

_log = logging.getLogger(__name__)


class RankDoor(msgspec.Struct, frozen=True, kw_only=True):
    """Driver -> whoever starts ranks: where a rank of this epoch finds us, and what it must say."""

    epoch: int
    unix: str  # for ranks on the driver's node
    tcp: str  # for others; empty when the driver listens on no network
    secret: str


class RankHandles(Protocol):
    """The processes of one epoch."""

    rendezvous: str  # "host:port", free a moment ago on rank 0's node, for torch process groups

    def kill(self) -> None:
        """End all of them now, wait until they are gone, give back what they held. May be called twice."""


class StartRanks(Protocol):
    """Starts the processes of all ranks and returns without waiting for them to connect. Runs in its own thread.

    `on_dead(global_rank, why)` is to be called, from any thread, when a process has ended without being asked to.
    """

    def __call__(self, door: RankDoor, on_dead: Callable[[int, str], None]) -> RankHandles: ...


class RankKeeper:
    """The thread that starts and ends processes, one thing after the other, and knows which are held."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._handles: list[RankHandles] = []
        self._thread: threading.Thread | None = None

    def do(self, job: Callable[[], None]) -> None:
        """Have it done after what was asked for before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rank-keeper", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def hold(self, handles: RankHandles) -> None:
        """These run now (called in the thread)."""
        self._handles.append(handles)

    def kill_held(self) -> None:
        """End what runs (called in the thread)."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.kill()

    def kill(self) -> None:
        """End what runs and the thread, and wait for both."""
        if self._thread is not None:
            self._jobs.put(self.kill_held)
            self._jobs.put(None)
            self._thread.join(timeout=60.0)
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # the thread's top: a kill that failed must not keep the next one from being tried
                _log.exception("could not end the ranks")
