"""How long a step may take before its ranks are taken for hung: silence is all that a hung rank shows.

A fixed limit that is safe for a long prompt on a slow machine is an outage for a hung decode step of milliseconds. So
the limit follows what steps took: many times the slowest of the recent ones, and for a step of many tokens as many
times what the slowest recent token took.
"""

from collections import deque
from typing import Final

LEAST_SECONDS: Final = 10.0  # a machine may be busy with something else
MANY_TIMES: Final = 20.0
NUM_RECENT: Final = 256  # steps that are remembered
NUM_NEEDED: Final = 16  # before so many are known, only the limit holds


class StepDeadline:
    """Learns from steps that were answered; never above `limit_seconds`."""

    def __init__(self, limit_seconds: float):
        self.limit_seconds = limit_seconds
        self._recent: deque[tuple[float, float]] = deque(maxlen=NUM_RECENT)  # seconds of the step, and for each token
        self._slowest: tuple[float, float] | None = None

    def observe(self, seconds: float, num_tokens: int) -> None:
        """A step of so many tokens took so long."""
        each = seconds / max(num_tokens, 1)
        slowest, recent = self._slowest, self._recent
        if len(recent) == NUM_RECENT and slowest is not None:
            forgotten = recent[0]
            if forgotten[0] >= slowest[0] or forgotten[1] >= slowest[1]:
                slowest = None  # to be looked for again; a walk over all of them once in a while, not once a step
        recent.append((seconds, each))
        self._slowest = None if slowest is None else (max(slowest[0], seconds), max(slowest[1], each))

    def allowed_seconds(self, num_tokens: int) -> float:
        """How long a step of so many tokens may take."""
        if len(self._recent) < NUM_NEEDED:
            return self.limit_seconds
        if self._slowest is None:
            self._slowest = max(step for step, _ in self._recent), max(token for _, token in self._recent)
        a_step, a_token = self._slowest
        wanted = MANY_TIMES * max(a_step, a_token * num_tokens)
        return min(self.limit_seconds, max(LEAST_SECONDS, wanted))


class StepsInFlight:
    """Steps that were sent and not answered, and until when the next answer is waited for. Seconds of one clock."""

    def __init__(self, limit_seconds: float):
        self._deadline = StepDeadline(limit_seconds)
        self._steps: deque[tuple[int, float, int]] = deque()  # step id, when it was sent, its tokens
        self._answered_at = 0.0

    def __len__(self) -> int:
        return len(self._steps)

    def sent(self, step_id: int, num_tokens: int, now: float) -> None:
        """A step of so many tokens goes out."""
        if not self._steps:
            self._answered_at = now
        self._steps.append((step_id, now, num_tokens))

    def answered(self, step_id: int, now: float) -> bool:
        """An answer has come; False when it is not that of the step that is waited for."""
        if not self._steps or self._steps[0][0] != step_id:
            return False
        _, sent_at, num_tokens = self._steps.popleft()
        self._deadline.observe(now - max(sent_at, self._answered_at), num_tokens)
        self._answered_at = now
        return True

    def next_deadline(self) -> float:
        """When silence about the oldest of them means that its ranks hang. There must be one."""
        _, sent_at, num_tokens = self._steps[0]
        return max(sent_at, self._answered_at) + self._deadline.allowed_seconds(num_tokens)

    def clear(self) -> None:
        """Nobody will answer them."""
        self._steps.clear()
