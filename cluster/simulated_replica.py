"""One replica in virtual time: the real scheduler, block manager and prefix cache against a price list of steps.

Steps pass through the stages as they would: a stage takes one step after the other, a step waits for the tokens that it
goes on from. Only what ranks compute is left out, so that a million requests take minutes.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

from argosy.cluster.clock import ManualClock
from argosy.cluster.metrics import Metrics
from argosy.cluster.outcome import Outcomes
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.kv_groups import KVGroups
from argosy.cluster.protocol.messages import BlockSwaps, ModelRunnerOutput, SchedulerOutput
from argosy.cluster.protocol.swap import NO_SWAP, SwapCosts
from argosy.cluster.request import WATCH_ALL, Request
from argosy.cluster.scheduler import Scheduler
from argosy.cluster.step import Step

TOKEN: Final = 1  # what every row draws; no request ends at it
MOST_LEAPT: Final = 4096


class StepSize(NamedTuple):
    """What the seconds of a step depend on."""

    num_decodes: int
    context_tokens: int  # that the decodes look back on, all together
    prefill_tokens: int
    prefill_pairs: int  # (token, token it looks back on) of the prompts
    num_sampled: int
    longest_context: int = 0  # of a decode


StageSeconds: TypeAlias = Callable[[StepSize], Sequence[float]]
"""The seconds of a step on each stage, the hand-over to the next one included."""


class QuietOutcomes(Outcomes):
    """The same ends and times, without a message for every token."""

    def apply(self, step: Step, output: ModelRunnerOutput) -> None:
        """Give each row its token; only those that may be special are looked at."""
        now = self._clock.now()
        for request in step.sampling:
            if request.watched is WATCH_ALL:
                self._take_token(request, TOKEN, None, now)
            else:
                request.token_ids.append(TOKEN)


def _most_shared(rows: Sequence[Request]) -> int:
    """Blocks that need not be read again, where of all prefixes that rows have in common the one that saves most is."""
    groups: dict[int, list[Sequence[int]]] = {}
    for request in rows:
        if request.block_ids:
            groups.setdefault(request.block_ids[0], []).append(request.block_ids)
    most = 0
    for tables in groups.values():
        if len(tables) > 1:
            common = min(map(len, tables))
            first = tables[0]
            for table in tables:
                if table[:common] != first[:common]:
                    common = next(place for place in range(common) if table[place] != first[place])
            most = max(most, (len(tables) - 1) * common)
    return most


class HostLink:
    """Copies between device and host, in virtual time: one after the other in each direction, beside the steps."""

    def __init__(self, costs: SwapCosts):
        self._costs = costs
        self._out_free_at = self._in_free_at = 0.0
        self._arriving: deque[tuple[int, float]] = deque()  # step that ordered blocks in, when they are all there
        self._swapped_in_step_id = -1
        self._seconds = [0.0, 0.0]

    def begin(self, step_id: int, swaps: BlockSwaps, now: float) -> float:
        """What a step orders at `now`; when its rows can run."""
        out_seconds, in_seconds = len(swaps.out) * self._costs.out_seconds, len(swaps.into) * self._costs.in_seconds
        self._seconds = [self._seconds[0] + out_seconds, self._seconds[1] + in_seconds]
        self._out_free_at = max(self._out_free_at, now) + out_seconds
        if swaps.into:
            self._in_free_at = max(self._in_free_at, now) + in_seconds
            self._arriving.append((step_id, self._in_free_at))
        return max([now, *(when for ordered, when in self._arriving if ordered <= swaps.await_step_id)])

    def report(self, now: float) -> tuple[int, tuple[float, float]]:
        """The latest step whose blocks are all in at `now`, and seconds out and in since the last call."""
        while self._arriving and self._arriving[0][1] <= now:
            self._swapped_in_step_id = self._arriving.popleft()[0]
        seconds, self._seconds = (self._seconds[0], self._seconds[1]), [0.0, 0.0]
        return self._swapped_in_step_id, seconds


class SimulatedReplica:
    """A replica that takes requests and answers after virtual seconds. `leaps`: many plain steps at once.

    `shared_reads`: which part of the reads of a prefix that decodes have in common is saved, where ranks read it once.
    """

    def __init__(
        self,
        replica_id: int,
        config: ServingConfig,
        num_blocks: int,
        stage_seconds: StageSeconds,
        *,
        num_stages: int = 1,
        leaps: bool = True,
        groups: KVGroups | None = None,
        swap: SwapCosts = NO_SWAP,
        shared_reads: float = 0.0,
    ):
        self._shared_reads = shared_reads if groups is None or groups.num_groups == 1 else 0.0
        self.block_size = config.cache.block_size
        self.replica_id, self.num_blocks = replica_id, num_blocks
        self.clock, self.metrics = ManualClock(), Metrics()
        self.scheduler = Scheduler(config, self.clock, self.metrics)
        self.scheduler.outcomes = QuietOutcomes(self.clock, self.metrics, self.scheduler.end, num_stages)
        self.scheduler.begin_epoch(0, num_blocks, groups, swap)
        self._link = HostLink(swap)
        self._stage_seconds, self._num_stages, self._leaps = stage_seconds, num_stages, leaps
        self._finishes: deque[float] = deque()  # of the steps in flight, in order
        self._free_at = [0.0] * num_stages
        self._sampled_at: dict[int, float] = {}  # by handle, with several stages
        self._last_decodes: Sequence[Request] = ()
        self._last_context = self._last_longest = 0
        self.busy_seconds = [0.0] * num_stages
        self.active_seconds = 0.0  # with a step under way
        self._active_until = 0.0
        self.num_steps = self.num_leapt = 0
        self.next_seconds = math.inf  # when the oldest step will be answered

    # ------------------------------------------------------------------------------------------------ events

    def add(self, request: Request, now: float) -> None:
        """A request arrives alone; a step is sent if there is room for one more in flight."""
        self.take(request, now)
        self.begin(now)

    def take(self, request: Request, now: float) -> None:
        """A request arrives, and others with it: `begin` after the last, as a driver waits for it (`gathering`)."""
        self.clock.move_to(now)
        self.scheduler.add([request])

    def begin(self, now: float) -> None:
        """All that came at this moment are here."""
        self._launch(now)

    def advance(self) -> list[Request]:
        """The oldest step is answered at `next_seconds`; who ended with it."""
        now = self._finishes.popleft()
        self.clock.move_to(now)
        scheduler = self.scheduler
        step = scheduler._in_flight[0]  # the answer to the oldest: its id is all that is checked
        done, seconds = self._link.report(now)
        scheduler.update(
            ModelRunnerOutput(
                step_id=step.step_id, epoch=0, token_ids=(), swapped_in_step_id=done, swap_seconds=seconds
            )
        )
        ended = scheduler.outcomes.ended
        if ended:
            scheduler.outcomes.ended = []
        self._launch(now)
        return ended

    def leap(self, until: float) -> None:
        """Pass over steps in which nothing happens but one token more for each row, as long as they end before `until`.

        That is so while nobody waits or computes a prompt, no block fills up, and no row may end. The state afterwards
        is that of stepping, to the bit.
        """
        scheduler = self.scheduler
        running = scheduler._running
        rows = running.decoding
        if not self._leaps or self._num_stages > 1 or running.prefilling or running.is_stale or scheduler.queue:
            return
        if scheduler.host.loading:
            return
        in_flight = scheduler._in_flight
        if len(in_flight) != scheduler.max_steps_in_flight or any(step.rows is not rows for step in in_flight):
            return
        most = min((request.countdown for request in rows), default=0)
        if most < 2 or any(request.watched is WATCH_ALL for request in rows):
            return
        finishes, count, context, size = self._finishes, 0, self._last_context, len(rows)
        longest = self._last_longest
        while count < most and count < MOST_LEAPT and finishes[0] < until:
            finishes.popleft()
            context, longest = context + size, longest + 1
            load = StepSize(size, context, 0, 0, size, longest)
            self._run_on_stages(load, finishes[-1] if finishes else self._free_at[0])
            count += 1
        if not count:
            return
        self._last_context, self._last_longest = context, longest
        tokens = [TOKEN] * count
        for request in rows:
            request.countdown -= count
            request.token_ids += tokens
        self.num_leapt += count
        self.next_seconds = finishes[0]

    # ------------------------------------------------------------------------------------------------ steps

    def _launch(self, now: float) -> None:
        scheduler = self.scheduler
        while len(self._finishes) < scheduler.max_steps_in_flight:
            output = scheduler.schedule()
            if output is None:
                break
            step = scheduler._in_flight[-1]
            ready = now
            if self._num_stages > 1:
                ready = max([now, *(self._sampled_at.get(handle, now) for handle in output.rows[: step.num_decodes])])
            if output.swaps is not None:
                at = max(ready, self._free_at[0])  # copies begin where the step does: its blocks are others' until then
                ready = max(ready, self._link.begin(output.step_id, output.swaps, at))
            finish = self._run_on_stages(self._size_of(output, step), ready)
            if self._num_stages > 1:
                self._note_sampled(output, finish)
        self.next_seconds = self._finishes[0] if self._finishes else math.inf

    def _size_of(self, output: SchedulerOutput, step: Step) -> StepSize:
        num_decodes, rows = step.num_decodes, step.rows
        if rows is self._last_decodes and num_decodes == len(rows):
            context, longest = self._last_context + num_decodes, self._last_longest + 1
        else:
            contexts = [request.boundary - request.countdown for request in rows[:num_decodes]]
            context, longest = sum(contexts), max(contexts, default=0)
            if self._shared_reads and num_decodes == len(rows):  # steps with prompts read each row's own
                context -= int(self._shared_reads * _most_shared(rows) * self.block_size)
        self._last_decodes, self._last_context = (rows, context) if num_decodes == len(rows) else ((), 0)
        self._last_longest = longest
        tokens = pairs = 0
        if num_decodes < len(rows):
            counts = output.num_tokens
            for place in range(num_decodes, len(rows)):
                count = counts[place] if counts else 1
                tokens += count
                pairs += count * (rows[place].num_computed_tokens - count) + count * (count + 1) // 2
        return StepSize(num_decodes, context, tokens, pairs, len(step.sampling), longest)

    def _run_on_stages(self, size: StepSize, ready: float) -> float:
        """Let a step pass through the stages; it can't start before `ready`. When its tokens are there."""
        start = max(ready, self._free_at[0])
        at = start
        for stage, seconds in enumerate(self._stage_seconds(size)):
            at = max(at, self._free_at[stage]) + seconds
            self._free_at[stage] = at
            self.busy_seconds[stage] += seconds
        self.active_seconds += at - max(start, self._active_until)
        self._active_until = at
        self._finishes.append(at)
        self.num_steps += 1
        return at

    def _note_sampled(self, output: SchedulerOutput, finish: float) -> None:
        partial = set(output.partial)
        for handle in output.finished:
            self._sampled_at.pop(handle, None)
        for place, handle in enumerate(output.rows):
            if place not in partial:
                self._sampled_at[handle] = finish

    # ------------------------------------------------------------------------------------------------ figures

    @property
    def num_running(self) -> int:
        """Requests with blocks."""
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self.scheduler.num_waiting

    @property
    def kv_usage(self) -> float:
        """Held part of the blocks."""
        return self.scheduler.blocks.pool.num_held / self.num_blocks

    def cached_tokens(self, request: Request) -> int:
        """How many of the request's tokens its prefix cache knows."""
        return self.scheduler.blocks.num_cached_tokens(self.scheduler.blocks.find_prefix(request))
