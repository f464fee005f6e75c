"""The life of a replica: events in, commands out."""

import pytest

from argosy.cluster.executor import RanksLost, RanksReady
from argosy.cluster.protocol.errors import InvariantBroken, StartupTimeout, WeightError, WorkerFailed, WorkerLost
from argosy.cluster.replica import BeginSteps, FailAll, ReplicaState, ReplicaStatus, RequeueAll, StartRanks


def ready_replica() -> ReplicaState:
    replica = ReplicaState()
    assert replica.start() == [StartRanks(0)]
    assert replica.handle(RanksReady(0, 64)) == [BeginSteps(0, 64)]
    return replica


def lost(epoch: int) -> RanksLost:
    return RanksLost(epoch, WorkerLost(3, "node b", epoch))


def test_a_loss_begins_a_new_epoch() -> None:
    """A process dies: what ran goes back to the queue, and new ranks are started."""
    replica = ready_replica()
    loss = lost(0)
    assert replica.handle(loss) == [RequeueAll(loss.error), StartRanks(1)]
    assert replica.status is ReplicaStatus.REBUILDING
    assert replica.handle(RanksReady(1, 60)) == [BeginSteps(1, 60)]
    assert replica.is_ready


def test_late_words_from_a_lost_epoch_are_ignored() -> None:
    """A node drops off the network, its replica is rebuilt, and then its words arrive after all."""
    replica = ready_replica()
    replica.handle(lost(0))
    assert replica.handle(lost(0)) == []
    assert replica.handle(RanksReady(0, 64)) == []
    assert (replica.status, replica.epoch) == (ReplicaStatus.REBUILDING, 1)
    assert not replica.is_current(0)


@pytest.mark.parametrize(
    "error",
    [WorkerFailed(0, "out_of_memory", "no room"), WeightError("config.json", "x", "bad"), StartupTimeout("rank 0", 60)],
)
def test_what_is_wrong_at_the_first_start_will_be_wrong_again(error: WorkerFailed) -> None:
    """Bad weights are told at once, not after three tries."""
    replica = ReplicaState()
    replica.start()
    assert replica.handle(RanksLost(0, error)) == [FailAll(error)]
    assert replica.fatal is error


def test_a_process_that_dies_while_starting_is_tried_again_three_times_in_all() -> None:
    """The machine may have been short of memory for a moment, or may not."""
    replica = ReplicaState()
    replica.start()
    assert replica.handle(lost(0)) == [StartRanks(1)]
    assert replica.handle(lost(1)) == [StartRanks(2)]
    assert isinstance(replica.handle(lost(2))[0], FailAll)
    assert replica.handle(lost(2)) == []


def test_a_rebuild_that_fails_again_and_again_gives_up_and_one_that_succeeds_starts_the_count_anew() -> None:
    """Two bad starts after each of many losses are no reason to end."""
    replica = ready_replica()
    for _ in range(3):
        replica.handle(lost(replica.epoch))
        replica.handle(RanksLost(replica.epoch, WorkerFailed(0, "out_of_memory", "no room")))
        replica.handle(lost(replica.epoch))
        replica.handle(RanksReady(replica.epoch, 64))
        assert replica.is_ready
    for _ in range(4):
        replica.handle(lost(replica.epoch))
    assert replica.status is ReplicaStatus.FAILED


def test_a_replica_that_drains_takes_nothing_new() -> None:
    """Nor does one that has failed; one that starts does: requests wait in the queue."""
    replica = ReplicaState()
    replica.start()
    assert replica.takes_requests
    replica.is_draining = True
    assert not replica.takes_requests


def test_an_illegal_change_tells_the_story() -> None:
    """Nobody starts twice."""
    replica = ready_replica()
    with pytest.raises(InvariantBroken, match="epoch 0 is ready"):
        replica.start()
