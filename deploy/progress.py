"""What people see while something starts or runs: one line that moves on a terminal, a few lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import NoReturn, Self, TextIO

from tqdm import tqdm

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

    def note(self, text: str) -> None:
        """A line of its own, which stays."""
        self.close()
        if not self._is_quiet:
            print(f"  {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """End the last line."""
        if not self._is_quiet:
            self._end_phase()
            self._phase = ""

    def _end_phase(self) -> None:
        if self._phase and self._stream.isatty():
            seconds = time.monotonic() - self._phase_started
            print(f"\r\x1b[K  [{'#' * _BAR_CELLS}] {self._phase} ({seconds:.1f} s)", file=self._stream, flush=True)


class JobProgress:
    """How far a job is, on stderr: a bar with the rate and the time that is left; off a terminal a line a tenth."""

    def __init__(self, *, is_shown: bool = True, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._is_shown = is_shown
        self._bar: tqdm[NoReturn] | None = None
        self._told = ("", -1)

    def show(self, counts: Mapping[str, int], status: str) -> None:
        """The counts as they are now."""
        if not self._is_shown:
            return
        total, ended = counts["total"], counts["completed"] + counts["failed"]
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        if not self._stream.isatty():
            tenth = 10 * ended // total if total else 0
            if (status, tenth) != self._told:
                self._told = (status, tenth)
                print(f"  {status}: {ended} of {total}{failed}", file=self._stream, flush=True)
            return
        if self._bar is None:
            # what was done before this bar began is no speed of now
            self._bar = tqdm(total=total, initial=ended, unit="item", file=self._stream, dynamic_ncols=True)
        self._bar.total = total
        self._bar.set_description(f"{status}{failed}", refresh=False)
        self._bar.update(ended - self._bar.n)
        self._bar.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
