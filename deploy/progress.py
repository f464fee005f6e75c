"""What people see while something starts: one line that moves on a terminal, one line a phase elsewhere."""

import sys
import time
from typing import TextIO

_BAR_CELLS = 24


class StartProgress:
    """Call it with a phase's name and how much of it is done (0 to 1). Writes to stderr, so that stdout stays data."""

    def __init__(self, stream: TextIO | None = None, *, is_quiet: bool = False):
        self._stream = stream or sys.stderr
        self._is_quiet = is_quiet
        self._phase, self._phase_started = "", time.monotonic()
        self._started = self._phase_started

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def __call__(self, phase: str, fraction: float) -> None:
        if self._is_quiet:
            return
        fraction = min(max(fraction, 0.0), 1.0)
        if phase != self._phase:
            self._end_phase()
            self._phase, self._phase_started = phase, time.monotonic()
            if not self._stream.isatty():
                print(f"  {phase} ...", file=self._stream, flush=True)
        if self._stream.isatty():
            cells = int(fraction * _BAR_CELLS)
            bar = "#" * cells + "." * (_BAR_CELLS - cells)
            print(f"\r\x1b[K  [{bar}] {phase}", end="", file=self._stream, flush=True)

    def close(self) -> None:
        """End the last line."""
        if not self._is_quiet:
            self._end_phase()
            self._phase = ""

    def _end_phase(self) -> None:
        if self._phase and self._stream.isatty():
            seconds = time.monotonic() - self._phase_started
            print(f"\r\x1b[K  [{'#' * _BAR_CELLS}] {self._phase} ({seconds:.1f} s)", file=self._stream, flush=True)
