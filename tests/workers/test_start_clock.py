"""The seconds of a start by phase: they begin with the process, and all of them are somebody's."""

import time

import psutil
import pytest

from argosy.workers import start_clock
from argosy.workers.start_clock import StartClock


def test_phases_add_up_to_the_age_of_the_process() -> None:
    """Nothing is lost between two marks, and a phase that comes twice is one."""
    clock = StartClock()
    clock.mark("imports")
    clock.skip()
    time.sleep(0.02)
    clock.mark("weights")
    clock.skip()
    age = time.time() - psutil.Process().create_time()
    assert list(clock.phases) == ["imports", "waiting", "weights"]
    assert clock.phases["weights"] >= 0.02
    assert sum(clock.phases.values()) == pytest.approx(clock.seconds, abs=0.01)
    assert clock.seconds <= age + 0.05
    assert "weights 0.0" in clock.describe()


def test_a_clock_that_was_set_back_takes_nothing_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock is the only one that knows when the process began."""
    clock = StartClock()
    clock.mark("imports")
    before = clock.seconds
    monkeypatch.setattr(start_clock.time, "time", lambda: psutil.Process().create_time() - 3600)
    clock.mark("weights")
    assert clock.phases["weights"] == 0.0
    assert clock.seconds == before
