"""The drivers of all replicas as one: ready when all are, failed when one is, stopped together."""

import threading
from collections.abc import Sequence
from typing import Protocol

import msgspec

from argosy.cluster.driver_loop import DriverStatus

_ORDER = ("failed", "stopped", "starting", "rebuilding", "draining", "ready")


class RunningDriver(Protocol):
    """A driver that was started, wherever it runs."""

    def status(self) -> DriverStatus:
        """How it is. Raises `ChannelClosed` when it has gone."""

    def stop(self, drain_seconds: float = 0.0) -> None:
        """End it and all its ranks."""


class ReplicaDrivers:
    """Satisfies `RunningDriver`. Its address lists those of the replicas; `cluster.replica_client` understands it."""

    def __init__(self, drivers: Sequence[RunningDriver]):
        self.drivers = tuple(drivers)

    def status(self) -> DriverStatus:
        """That of the one that is furthest from serving, with the addresses of all."""
        every = [driver.status() for driver in self.drivers]
        worst = min(every, key=lambda status: (not status.error_code, _ORDER.index(status.state), status.fraction))
        info = every[0].info
        if info is not None and len(every) > 1:
            info = msgspec.structs.replace(info, layout=f"{len(every)} replicas of {info.layout}")
        return msgspec.structs.replace(worst, info=info, address=",".join(status.address for status in every))

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Stop all at the same time; returns when all are gone."""
        threads = [threading.Thread(target=driver.stop, args=(drain_seconds,)) for driver in self.drivers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
