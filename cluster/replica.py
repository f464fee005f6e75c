"""The life of a replica as events in, commands out; and its epoch.

    starting --RanksReady--> ready --RanksLost--> rebuilding --RanksReady--> ready
    starting --RanksLost (weights, settings)--> failed        rebuilding --RanksLost, too often--> failed

Every group of ranks has its epoch. A word from an older one is dropped here (`is_current`), nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

from argosy.cluster.executor import RanksLost, RanksReady
from argosy.cluster.protocol.errors import (
    ConfigError,
    InvariantBroken,
    PlacementImpossible,
    ServingError,
    StartupTimeout,
    WeightError,
    WorkerFailed,
)
from argosy.cluster.protocol.kv_groups import ONE_TABLE, KVGroups
from argosy.cluster.protocol.swap import NO_SWAP, SwapCosts

MAX_FAILED_STARTS: Final = 3
"""So many groups in a row that never got ready, and the replica gives up."""


class ReplicaStatus(StrEnum):
    """Where a replica stands."""

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    REBUILDING = "rebuilding"
    FAILED = "failed"


TRANSITIONS: Final[Mapping[ReplicaStatus, frozenset[ReplicaStatus]]] = {
    ReplicaStatus.NEW: frozenset({ReplicaStatus.STARTING}),
    ReplicaStatus.STARTING: frozenset({ReplicaStatus.STARTING, ReplicaStatus.READY, ReplicaStatus.FAILED}),
    ReplicaStatus.READY: frozenset({ReplicaStatus.REBUILDING}),
    ReplicaStatus.REBUILDING: frozenset({ReplicaStatus.REBUILDING, ReplicaStatus.READY, ReplicaStatus.FAILED}),
    ReplicaStatus.FAILED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class StartRanks:
    """Command: bring up all ranks for `epoch`."""

    epoch: int


@dataclass(frozen=True, slots=True)
class BeginSteps:
    """Command: steps may go to the ranks of `epoch`, which have `num_blocks` empty blocks for layers in `groups`."""

    epoch: int
    num_blocks: int
    groups: KVGroups = ONE_TABLE
    swap: SwapCosts = NO_SWAP


@dataclass(frozen=True, slots=True)
class RequeueAll:
    """Command: all that ran goes back to the queue; `error` says what was lost."""

    error: ServingError


@dataclass(frozen=True, slots=True)
class FailAll:
    """Command: nothing will run any more; end all requests with `error`."""

    error: ServingError


Command: TypeAlias = StartRanks | BeginSteps | RequeueAll | FailAll


class ReplicaState:
    """One group of ranks after another, each with its epoch."""

    def __init__(self) -> None:
        self.status = ReplicaStatus.NEW
        self.epoch = 0
        self.fatal: ServingError | None = None
        self.is_draining = False
        self.story: list[str] = []
        self._num_failed_starts = 0

    @property
    def is_ready(self) -> bool:
        """Whether steps may be sent."""
        return self.status is ReplicaStatus.READY

    @property
    def takes_requests(self) -> bool:
        """Whether new requests are taken up; while ranks start they wait in the queue."""
        return not self.is_draining and self.status is not ReplicaStatus.FAILED

    def is_current(self, epoch: int) -> bool:
        """Whether a word from `epoch` still counts."""
        return epoch == self.epoch

    def start(self) -> list[Command]:
        """The first group."""
        self._move(ReplicaStatus.STARTING, "started")
        return [StartRanks(self.epoch)]

    def handle(self, event: RanksReady | RanksLost) -> list[Command]:
        """What to do about it."""
        if not self.is_current(event.epoch) or self.status is ReplicaStatus.FAILED:
            return []
        if isinstance(event, RanksReady):
            self._num_failed_starts = 0
            self._move(ReplicaStatus.READY, f"epoch {event.epoch} is ready with {event.num_blocks} blocks")
            return [BeginSteps(event.epoch, event.num_blocks, event.groups, event.swap)]
        return self._on_lost(event.error)

    def _on_lost(self, error: ServingError) -> list[Command]:
        was_ready = self.is_ready
        if not was_ready:
            self._num_failed_starts += 1
        first_start = self.status is ReplicaStatus.STARTING
        hopeless = isinstance(error, ConfigError | WeightError | PlacementImpossible)  # the same again next time
        if first_start and (hopeless or isinstance(error, WorkerFailed | StartupTimeout)):
            return self._fail(error)
        if not was_ready and (hopeless or self._num_failed_starts >= MAX_FAILED_STARTS):
            return self._fail(error)
        self._move(ReplicaStatus.STARTING if first_start else ReplicaStatus.REBUILDING, f"lost: {error}")
        self.epoch += 1
        commands: list[Command] = [StartRanks(self.epoch)]
        return [RequeueAll(error), *commands] if was_ready else commands

    def _fail(self, error: ServingError) -> list[Command]:
        self._move(ReplicaStatus.FAILED, f"gave up: {error}")
        self.fatal = error
        return [FailAll(error)]

    def _move(self, to: ReplicaStatus, why: str) -> None:
        if to not in TRANSITIONS[self.status]:
            raise InvariantBroken(f"replica {self.status} -> {to} ({why})", self.story)
        self.story.append(why)
        self.status = to
