"""Which replica gets a request."""

from argosy.cluster.routing import ReplicaLoad, choose_replica


def load(replica_id: int, *, waiting: int = 0, running: int = 0, cached: int = 0, is_open: bool = True) -> ReplicaLoad:
    return ReplicaLoad(
        replica_id=replica_id,
        num_waiting=waiting,
        num_running=running,
        num_cached_tokens=cached,
        takes_requests=is_open,
    )


def test_the_longest_cached_prefix_wins_then_the_least_load() -> None:
    """A chat goes back to where its history is; a new one to whoever has least to do."""
    assert choose_replica([load(0, running=1), load(1, running=9, cached=512)]) == 1
    assert choose_replica([load(0, running=3), load(1, running=2)]) == 1
    assert choose_replica([load(1), load(0)]) == 0


def test_a_prefix_behind_a_queue_is_worth_nothing() -> None:
    """Computing a prompt again is sooner done than waiting for others."""
    assert choose_replica([load(0, waiting=4, cached=512), load(1, running=9)]) == 1
    assert choose_replica([load(0, waiting=4, cached=512), load(1, waiting=1)]) == 0


def test_nobody_takes_requests() -> None:
    """All drain, or there are none."""
    assert choose_replica([load(0, is_open=False)]) is None
    assert choose_replica([]) is None
