"""What time it is, for those who may not ask the system."""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that only go forward; where they start means nothing."""

    def now(self) -> float:
        """Seconds since some fixed moment."""

    def sleep(self, seconds: float) -> None:
        """Come back after `seconds`."""


class MonotonicClock:
    """The machine's own clock."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Come back after `seconds`."""
        time.sleep(max(0.0, seconds))


class ManualClock:
    """Time that passes when told to: a cluster hour runs in a moment of test."""

    def __init__(self, now: float = 0.0):
        self._now = now

    def now(self) -> float:
        """Seconds since this clock was made."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        assert seconds >= 0.0, seconds
        self._now += seconds

    def move_to(self, now: float) -> None:
        """Let it be `now`, exactly: many small advances would not add up to it."""
        assert now >= self._now, (now, self._now)
        self._now = now

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass at once."""
        self.advance(max(0.0, seconds))
