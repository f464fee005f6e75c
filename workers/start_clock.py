"""Where the seconds of a rank's start go, from the birth of its process, whoever started it."""

import time

import psutil


class StartClock:
    """Seconds by phase, in order. A phase that comes twice is summed."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = 0.0
        try:
            self._born = psutil.Process().create_time()
        except psutil.Error:  # a system that hides it: count from here
            self._born = time.time()

    def mark(self, phase: str) -> None:
        """What happened since the last mark was `phase`."""
        now = max(time.time() - self._born, self._last)  # a clock that was set back takes nothing away
        self.phases[phase] = round(self.phases.get(phase, 0.0) + now - self._last, 3)
        self._last = now

    def skip(self) -> None:
        """What happened since the last mark was waiting for others."""
        self.mark("waiting")

    def describe(self) -> str:
        """One line for people, without what took no time."""
        parts = [f"{phase} {seconds:.2f}" for phase, seconds in self.phases.items() if seconds >= 0.005]
        return f"{self.seconds:.2f} s: {', '.join(parts)}"

    @property
    def seconds(self) -> float:
        """Since the birth of the process, at the last mark."""
        return self._last
