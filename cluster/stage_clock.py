"""When each step would leave each pipeline stage: stages work side by side, and a step waits for what it depends on.

    a step starts on stage 0 when that is free, the step has been sent, and the tokens it continues from were sampled
    it starts on stage s when that is free and stage s - 1 has handed it over

For trying out how work is divided into steps, with the real scheduler and without a device.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from argosy.cluster.protocol.messages import SchedulerOutput


class StepSize(NamedTuple):
    """What a step's time depends on."""

    num_tokens: int  # computed, over all rows
    num_rows: int
    num_sampled: int
    context_tokens: int  # read from the cache, over all rows


StageSeconds: TypeAlias = Callable[[int, StepSize], float]
"""Stage, step: how long the one computes the other."""


class StageClock:
    """The stages of one replica. `hop_seconds` is a message from stage to stage."""

    def __init__(self, num_stages: int, stage_seconds: StageSeconds, *, hop_seconds: float = 0.0):
        self._stage_seconds, self._hop_seconds = stage_seconds, hop_seconds
        self._free_at = [0.0] * num_stages
        self._sampled_at: dict[int, float] = {}  # by handle; who is new brings all tokens along
        self._num_computed: dict[int, int] = {}
        self.busy_seconds = [0.0] * num_stages
        self.spans: list[list[tuple[float, float]]] = [[] for _ in range(num_stages)]

    def run(self, output: SchedulerOutput, now: float) -> float:
        """The step was sent now; when its tokens are there."""
        size, ready = self._take_up(output, now)
        for stage, free_at in enumerate(self._free_at):
            start = max(ready, free_at)
            seconds = self._stage_seconds(stage, size)
            ready = self._free_at[stage] = start + seconds
            self.busy_seconds[stage] += seconds
            self.spans[stage].append((start, ready))
            if stage + 1 < len(self._free_at):
                ready += self._hop_seconds
        partial = set(output.partial)
        for place, handle in enumerate(output.rows):
            if place not in partial:
                self._sampled_at[handle] = ready
        return ready

    def idle_shares(self, begin: float, end: float) -> list[float]:
        """The part of the time from `begin` to `end` in which each stage had nothing to compute."""
        shares = []
        for spans in self.spans:
            busy = sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in spans)
            shares.append(1.0 - busy / (end - begin))
        return shares

    def _take_up(self, output: SchedulerOutput, now: float) -> tuple[StepSize, float]:
        for request in output.new_requests:
            self._num_computed[request.handle] = request.num_computed_tokens
            self._sampled_at.pop(request.handle, None)
        counts = output.num_tokens or [1] * len(output.rows)
        ready, context = now, 0
        for handle, count in zip(output.rows, counts, strict=True):
            self._num_computed[handle] += count
            context += self._num_computed[handle]
            sampled_at = self._sampled_at.get(handle)
            if sampled_at is not None:
                ready = max(ready, sampled_at + self._hop_seconds)
        num_tokens, num_sampled = sum(counts), len(output.rows) - len(output.partial)
        return StepSize(num_tokens, len(output.rows), num_sampled, context), ready
