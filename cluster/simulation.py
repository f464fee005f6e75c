"""The real scheduler and driver on ranks that only pretend: in virtual time, or live behind real doors.

`SimulatedExecutor` keeps a paged memory of token ids, written and read through the block ids it is told, as ranks do
with keys and values. A token is a function of all token ids read back, so a block that is lost, stale or somebody
else's changes what follows. It has no scheduling of its own.
"""

import zlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from argosy.cluster.clock import Clock
from argosy.cluster.driver import Driver
from argosy.cluster.executor import ExecutorEvent, RanksLost, RanksReady
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import InvariantBroken, ServingError, WorkerLost
from argosy.cluster.protocol.kv_groups import KVGroups
from argosy.cluster.protocol.messages import (
    AbortRequest,
    GenerateRequest,
    ModelRunnerOutput,
    NewRequest,
    SchedulerOutput,
    TokenDelta,
    TokenDeltas,
    TokenLogprobs,
)
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.protocol.swap import NO_SWAP, SwapCosts
from argosy.cluster.stage_clock import StageClock

NextToken: TypeAlias = Callable[[Sequence[int], TokenParams], int]
"""All token ids of a request so far, and how it wants its tokens chosen: the next token id, or -1: the row fails."""

_EMPTY: Final = -1


def hash_token(vocab_size: int) -> NextToken:
    """The next token as a hash of all before it and the seed (which greedy requests don't have)."""

    def next_token(token_ids: Sequence[int], params: TokenParams) -> int:
        seed = params.seed if params.temperature > 0.0 else 0
        digest = zlib.crc32(array("i", token_ids).tobytes(), seed & 0xFFFFFFFF)
        token_id = digest % vocab_size
        if params.allowed_token_ids:
            return params.allowed_token_ids[digest % len(params.allowed_token_ids)]
        return token_id

    return next_token


class _Row:
    """What a rank remembers of a request."""

    __slots__ = ("block_ids", "num_computed", "num_prompt", "params", "token_ids")

    def __init__(self, request: NewRequest):
        self.token_ids, self.num_prompt = list(request.token_ids), request.num_prompt_tokens
        self.num_computed, self.block_ids = request.num_computed_tokens, list(request.block_ids)  # place by place
        self.params = request.params


class PagedTokens:
    """The ranks of one epoch as one: a paged memory of token ids, and the rows that live in it."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        next_token: NextToken,
        windows: tuple[int, ...] = (0,),
        *,
        num_host_blocks: int = 0,
        swap_lag: int = 0,
    ):
        """`swap_lag`: blocks come in from the host so many steps late, unless a step waits for them."""
        self._windows = windows
        self._slots = [[_EMPTY] * block_size for _ in range(num_blocks)]
        self._host_slots = [[_EMPTY] * block_size for _ in range(num_host_blocks)]
        self._arriving: deque[tuple[int, Sequence[tuple[int, int]]]] = deque()
        self._swap_lag, self._swapped_in_step_id = swap_lag, -1
        self._block_size, self._max_num_seqs, self._next_token = block_size, max_num_seqs, next_token
        self._rows: dict[int, _Row] = {}
        self.last_step_id = -1

    def run(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Carry out a step in the order that `SchedulerOutput` names, and check what it takes for granted."""
        _require(output.step_id > self.last_step_id, "a step came out of order", output)
        self.last_step_id = output.step_id
        self._take_up(output)
        self._swap(output)
        for source, destination in output.block_copies:
            self._slots[destination] = list(self._slots[source])
        counts = list(output.num_tokens) or [1] * len(output.rows)
        _require(len(counts) == len(output.rows) == len(set(output.rows)), "rows and counts don't match", output)
        written: set[tuple[int, int]] = set()
        for handle, count in zip(output.rows, counts, strict=True):
            self._write(self._rows[handle], count, written, output)
        partial = set(output.partial)
        token_ids: list[int] = []
        logprobs: list[tuple[int, TokenLogprobs]] = []
        prompt_logprobs: list[tuple[int, int, Sequence[TokenLogprobs]]] = []
        failed: list[tuple[int, str]] = []
        for place, (handle, count) in enumerate(zip(output.rows, counts, strict=True)):
            row = self._rows[handle]
            if row.params.prompt_logprobs is not None and row.num_computed < row.num_prompt:
                prompt_logprobs.append(self._prompt_figures(handle, row, count))
            first, row.num_computed = row.num_computed, row.num_computed + count
            seen = self._read(row, first, row.num_computed, output)
            if place in partial:
                _require(row.num_computed < len(row.token_ids), "a partial row has no more tokens", output)
                continue
            token_id = self._next_token(seen, row.params)
            if token_id < 0:
                failed.append((place, "it was told to fail"))
            row.token_ids.append(max(token_id, 0))  # fed by the ranks themselves
            if row.params.logprobs is not None:
                logprobs.append((len(token_ids), _figures(token_id, row.params.logprobs)))
            token_ids.append(token_id)
        return ModelRunnerOutput(
            step_id=output.step_id,
            epoch=output.epoch,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            failed=failed,
            swapped_in_step_id=self._swapped_in_step_id,
        )

    def _swap(self, output: SchedulerOutput) -> None:
        """As a rank may do it at the latest: copies in read and write when they are done, not when they are ordered."""
        swaps = output.swaps
        self._land(max(swaps.await_step_id if swaps is not None else -1, output.step_id - self._swap_lag - 1))
        if swaps is None:
            return
        for pairs in (swaps.out, swaps.into):
            _require(len({to for _, to in pairs}) == len(pairs), "two blocks are copied to one place", output)
        for block_id, host_id in swaps.out:
            self._host_slots[host_id] = list(self._slots[block_id])
        self._arriving.append((output.step_id, swaps.into))
        for _, block_id in swaps.into:
            self._slots[block_id] = [_EMPTY] * self._block_size
        self._land(swaps.await_step_id)

    def _land(self, step_id: int) -> None:
        """What steps up to this one ordered in is in."""
        while self._arriving and self._arriving[0][0] <= step_id:
            self._swapped_in_step_id, pairs = self._arriving.popleft()
            for host_id, block_id in pairs:
                self._slots[block_id] = list(self._host_slots[host_id])

    def _take_up(self, output: SchedulerOutput) -> None:
        for handle in output.finished:
            _require(self._rows.pop(handle, None) is not None, f"handle {handle} is unknown", output)
        for request in output.new_requests:
            _require(0 <= request.handle < self._max_num_seqs, "a handle is out of range", output)
            _require(request.handle not in self._rows, f"handle {request.handle} is in use", output)
            self._rows[request.handle] = _Row(request)
        for handle, block_ids in output.new_blocks:
            self._rows[handle].block_ids.extend(block_ids)

    def _write(self, row: _Row, count: int, written: set[tuple[int, int]], output: SchedulerOutput) -> None:
        end = row.num_computed + count
        _require(count > 0 and end <= len(row.token_ids), "a row computes tokens that nobody knows", output)
        num_groups = len(self._windows)
        _require(end * num_groups <= len(row.block_ids) * self._block_size, "a row has no block for its tokens", output)
        for group in range(num_groups):
            table = row.block_ids[group::num_groups]
            for position in range(row.num_computed, end):
                place, slot = divmod(position, self._block_size)
                at = (table[place], slot)
                _require(at not in written, f"two rows write slot {at}", output)
                written.add(at)
                self._slots[at[0]][slot] = row.token_ids[position]

    def _read(self, row: _Row, first: int, end: int, output: SchedulerOutput) -> list[int]:
        """What the layers of all groups together know of the tokens [0, end) while [first, end) are computed.

        Each group sees the window of the first of them; what all see must be the same, and the rest is a matter of
        layers that saw it before.
        """
        known = list(row.token_ids[:end])
        for group, window in enumerate(self._windows):
            begin = max(0, first - window + 1) if window else 0
            table = row.block_ids[group :: len(self._windows)]
            seen: list[int] = []
            for block_id in table[begin // self._block_size : -(-end // self._block_size)]:
                seen += self._slots[block_id]
            skipped = begin % self._block_size
            seen = seen[skipped : skipped + end - begin]
            _require(group == 0 or seen == known[begin:], f"group {group} of handle sees other tokens", output)
            known[begin:] = seen
        return known

    def _prompt_figures(self, handle: int, row: _Row, count: int) -> tuple[int, int, list[TokenLogprobs]]:
        first = row.num_computed + 1
        following = row.token_ids[first : min(first + count, row.num_prompt)]
        return handle, first, [_figures(token_id, row.params.prompt_logprobs or 0) for token_id in following]


class SimulatedExecutor:
    """Ranks that answer each step after `step_seconds`, by the clock they are given. Satisfies `Executor`.

    With a `stage_clock` its stages say when, and `step_seconds` is what passes until the driver knows.

    With a `ManualClock`, `poll` lets the time pass that it would have waited. `lose` ends the group of ranks;
    `late_answers` lets its answers come all the same, as a network may.
    """

    def __init__(
        self,
        config: ServingConfig,
        clock: Clock,
        *,
        num_blocks: int = 1024,
        step_seconds: float | Callable[[SchedulerOutput], float] = 0.0,
        start_seconds: float = 0.0,
        vocab_size: int = 32_000,
        next_token: NextToken | None = None,
        late_answers: bool = False,
        stage_clock: StageClock | None = None,
        windows: tuple[int, ...] = (0,),
        swap: SwapCosts = NO_SWAP,
        swap_lag: int = 0,
    ):
        """`windows`: of the groups of layers, see `KVGroups`. `swap_lag`: see `PagedTokens`."""
        self._windows = windows
        self._swap, self._swap_lag = swap, swap_lag
        self._stage_clock = stage_clock
        self._config, self._clock, self.num_blocks = config, clock, num_blocks
        self._step_seconds = step_seconds if callable(step_seconds) else lambda _: step_seconds
        self._start_seconds, self._late_answers = start_seconds, late_answers
        self._next_token = next_token or hash_token(vocab_size)
        self._ranks: PagedTokens | None = None
        self._events: deque[tuple[float, ExecutorEvent]] = deque()  # when, what; in order
        self.epoch = -1
        self.outputs: list[SchedulerOutput] = []  # the latest steps, for tests
        self.keeps_outputs = False
        self.start_failures: deque[ServingError] = deque()  # the next starts end like this

    def start(self, epoch: int) -> None:
        """Begin to bring up all ranks for `epoch`."""
        self.epoch = epoch
        when = self._clock.now() + self._start_seconds
        if self.start_failures:
            self._events.append((when, RanksLost(epoch, self.start_failures.popleft())))
            return
        self._ranks = PagedTokens(
            self.num_blocks,
            self._config.cache.block_size,
            self._config.scheduler.max_num_seqs,
            self._next_token,
            self._windows,
            num_host_blocks=self._swap.num_host_blocks,
            swap_lag=self._swap_lag,
        )
        self._events.append((when, RanksReady(epoch, self.num_blocks, KVGroups(self._windows), self._swap)))

    def submit(self, output: SchedulerOutput) -> None:
        """Carry out a step at once; its answer can be had after `step_seconds`."""
        if self._ranks is None:
            return  # lost a moment ago: `RanksLost` is on the way, and the step with it
        if output.epoch != self.epoch:
            raise InvariantBroken(f"a step of epoch {output.epoch} came to the ranks of epoch {self.epoch}")
        if self.keeps_outputs:
            self.outputs.append(output)
        if self._stage_clock is not None:
            when = self._stage_clock.run(output, self._clock.now()) + self._step_seconds(output)
        else:
            before = self._events[-1][0] if self._events else self._clock.now()
            when = max(before, self._clock.now()) + self._step_seconds(output)
        self._events.append((when, self._ranks.run(output)))

    def poll(self, timeout_seconds: float) -> list[ExecutorEvent]:
        """What happened since the last call; waits at most `timeout_seconds` for the first event."""
        until_first = self._events[0][0] - self._clock.now() if self._events else timeout_seconds
        if until_first > 0.0 and timeout_seconds > 0.0:
            self._clock.sleep(min(until_first, timeout_seconds))
        now, found = self._clock.now() + 1e-9, []
        while self._events and self._events[0][0] <= now:
            found.append(self._events.popleft()[1])
        return found

    def lose(self, error: ServingError | None = None) -> None:
        """The group of ranks is gone, with all it held."""
        lost = RanksLost(self.epoch, error or WorkerLost(0, "simulated", self.epoch))
        if not self._late_answers:
            self._events.clear()
        self._ranks = None
        self._events.appendleft((self._clock.now(), lost))

    def stop(self) -> None:
        """End all ranks."""
        self._ranks = None
        self._events.clear()


class Simulation:
    """A driver on simulated ranks with one edge, in a loop that ends: for tests and for trying out settings."""

    EDGE: Final = 0

    def __init__(self, driver: Driver, executor: SimulatedExecutor):
        self.driver, self.executor = driver, executor
        self.deltas: dict[tuple[int, int], list[TokenDelta]] = {}  # by stream and index

    def send(self, message: GenerateRequest | AbortRequest) -> None:
        """An edge's word to the driver."""
        self.driver.on_edge_message(self.EDGE, message)

    def round(self, timeout_seconds: float = 1.0) -> None:
        """One round of the loop: decisions, events, decisions, messages."""
        self.driver.advance()
        wait = min(timeout_seconds, self.driver.next_deadline_seconds())
        for event in self.executor.poll(wait):
            self.driver.on_executor_event(event)
        self.driver.advance()
        self.collect()

    def collect(self) -> None:
        """Take what the driver has for its edge."""
        for _, message in self.driver.take_outbox():
            if isinstance(message, TokenDeltas):
                for delta in message.deltas:
                    self.deltas.setdefault((delta.stream_id, delta.index), []).append(delta)

    def run(self, max_rounds: int = 100_000) -> None:
        """Until every request has ended. Raises when that takes more rounds than it may."""
        for _ in range(max_rounds):
            if next(self.driver.open_requests(), None) is None:
                return
            self.round()
        raise InvariantBroken(f"requests did not end in {max_rounds} rounds", list(self.driver.open_requests()))

    def tokens(self, stream_id: int, index: int = 0) -> list[int]:
        """All tokens that an answer got so far."""
        return [token_id for delta in self.deltas.get((stream_id, index), ()) for token_id in delta.token_ids]

    def last(self, stream_id: int, index: int = 0) -> TokenDelta:
        """The latest word on an answer."""
        return self.deltas[stream_id, index][-1]


def _figures(token_id: int, count: int) -> TokenLogprobs:
    others = [token_id ^ (place + 1) for place in range(max(count, 0))]
    return TokenLogprobs(1, [token_id, *others], [-0.1 * (place + 1) for place in range(len(others) + 1)])


def _require(condition: bool, problem: str, output: SchedulerOutput) -> None:
    if not condition:
        raise InvariantBroken(f"step {output.step_id}: {problem}", output)
