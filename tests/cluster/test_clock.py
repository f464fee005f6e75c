"""Time as an argument."""

from argosy.cluster.clock import ManualClock, MonotonicClock


def test_manual_time_passes_when_told() -> None:
    """An hour of a cluster in a moment."""
    clock = ManualClock(5.0)
    clock.advance(3600.0)
    clock.sleep(1.0)
    clock.sleep(-1.0)
    assert clock.now() == 3606.0


def test_the_machines_clock_only_goes_forward() -> None:
    """It starts anywhere."""
    clock = MonotonicClock()
    before = clock.now()
    clock.sleep(0.0)
    assert clock.now() >= before
