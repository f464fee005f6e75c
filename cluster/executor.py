"""The one question a driver asks its workers.

An executor owns a group of ranks in one epoch. The driver's loop is single-threaded: `submit` sends a step and returns
at once, answers and losses come back as events from `poll`. Steps are answered in the order they were submitted.
"""

from typing import Protocol, TypeAlias

from argosy.cluster.protocol.errors import ServingError
from argosy.cluster.protocol.kv_groups import ONE_TABLE, KVGroups
from argosy.cluster.protocol.messages import ModelRunnerOutput, SchedulerOutput
from argosy.cluster.protocol.swap import NO_SWAP, SwapCosts


class RanksReady:
    """Event: all ranks of `epoch` have their weights, `num_blocks` KV blocks for layers in `groups`, host blocks."""

    __slots__ = ("epoch", "groups", "num_blocks", "swap")

    def __init__(self, epoch: int, num_blocks: int, groups: KVGroups | None = None, swap: SwapCosts = NO_SWAP):
        self.epoch, self.num_blocks, self.groups, self.swap = epoch, num_blocks, groups or ONE_TABLE, swap


class RanksLost:
    """Event: the group of `epoch` can't go on. `error` says which rank and why; the executor has stopped them all."""

    __slots__ = ("epoch", "error")

    def __init__(self, epoch: int, error: ServingError):
        self.epoch, self.error = epoch, error


ExecutorEvent: TypeAlias = RanksReady | RanksLost | ModelRunnerOutput


class Executor(Protocol):
    """Ranks that answer steps. Satisfied by `ChannelExecutor` (real ranks) and `SimulatedExecutor` (virtual time)."""

    def start(self, epoch: int) -> None:
        """Begin to bring up all ranks for `epoch`; `RanksReady` or `RanksLost` follows within the start deadline."""

    def submit(self, output: SchedulerOutput) -> None:
        """Send a step to every rank. Never blocks for the answer."""

    def poll(self, timeout_seconds: float) -> list[ExecutorEvent]:
        """What happened since the last call; waits at most `timeout_seconds` for the first event."""

    def stop(self) -> None:
        """End all ranks and give back what they held."""
