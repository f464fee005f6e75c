"""Many replicas behind a router in virtual time, and what became of each request.

Events are taken in order of time, then of replica: the same input gives the same report on any machine.
"""

import heapq
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.messages import GenerateRequest
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.request import Request, make_requests
from argosy.cluster.routing import ReplicaLoad, choose_replica, has_queue
from argosy.cluster.simulated_replica import SimulatedReplica

_OWN_ID: Final = 1 << 20  # token ids from here on are one request's own
_SAMPLES: Final = 120


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One request of a workload: when, how long, and which prefix it shares."""

    seconds: float
    input_len: int
    output_len: int
    prefix: int = -1  # requests of one number share their first `prefix_len` tokens
    prefix_len: int = 0


class Sample(msgspec.Struct, frozen=True, gc=False):
    """The cluster at one moment."""

    seconds: float
    running: int
    waiting: int
    kv_usage: float
    waste: float  # part of the held slots that keeps no token
    output_tokens: int  # so far


class Records:
    """Columns over all requests that were answered, in order of their ends."""

    def __init__(self) -> None:
        self.arrival, self.ttft, self.tpot, self.end = array("d"), array("d"), array("d"), array("d")
        self.input_len, self.output_len, self.cached = array("l"), array("l"), array("l")
        self.replica = array("l")
        self.num_refused = self.output_tokens = 0

    def add(self, request: Request, replica_id: int, now: float) -> None:
        """A request has ended."""
        outputs = request.num_output_tokens
        if request.first_token_seconds < 0:
            self.num_refused += 1
            return
        self.arrival.append(request.arrival_seconds)
        self.ttft.append(request.first_token_seconds - request.arrival_seconds)
        self.tpot.append((now - request.first_token_seconds) / (outputs - 1) if outputs > 1 else 0.0)
        self.end.append(now)
        self.input_len.append(request.num_prompt_tokens)
        self.output_len.append(outputs)
        self.output_tokens += outputs
        self.cached.append(max(request.num_cached_tokens, 0))
        self.replica.append(replica_id)


class SimulatedCluster:
    """Replicas, a router, and the events between them."""

    def __init__(
        self,
        replicas: Sequence[SimulatedReplica],
        *,
        sample_seconds: float,
        max_model_len: int,
        block_size: int | None = None,
    ):
        """`block_size`: name blocks by what they hold instead of by its hash: the same finds, sooner."""
        self.replicas, self._max_len, self._block_size = list(replicas), max_model_len, block_size
        self.records, self.samples = Records(), list[Sample]()
        self._sample_seconds, self._next_sample = sample_seconds, sample_seconds
        self._heap: list[tuple[float, int]] = []
        self._queued_at = [math.inf] * len(replicas)  # the time under which each replica stands in the heap
        self._load = [0.0] * len(replicas)
        self._holders: dict[int, set[int]] = {}
        self._fresh: dict[tuple[int, int], int] = {}  # by replica and prefix: its tokens that were sent at this moment
        self._sinks: list[Any] = []
        self._num_added = 0
        self.now = 0.0

    def run(self, arrivals: Iterable[Arrival]) -> None:
        """Until every request has ended. `arrivals` in order of time."""
        coming = iter(arrivals)
        arrival = next(coming, None)
        heap, replicas = self._heap, self.replicas
        while arrival is not None or heap:
            first = heap[0][0] if heap else math.inf
            until = arrival.seconds if arrival is not None else math.inf
            if until <= first:
                assert arrival is not None
                self._sample_until(until)
                self.now = until
                asked = set[int]()
                while arrival is not None and arrival.seconds == until:  # made together: they begin together
                    asked.add(self._arrive(arrival))
                    arrival = next(coming, None)
                self._fresh.clear()
                for place in sorted(asked):
                    replicas[place].begin(until)
                    self._settle(place)
                continue
            seconds, place = heapq.heappop(heap)
            if seconds != self._queued_at[place]:
                continue  # it has been put there anew
            self._sample_until(seconds)
            self.now = seconds
            replica = replicas[place]
            for request in replica.advance():
                self._ended(request, place)
            replica.leap(min(until, self._next_sample))
            self._queue(place)

    # ------------------------------------------------------------------------------------------------- routing

    def _arrive(self, arrival: Arrival) -> int:
        """Give it to a replica, whose place is returned."""
        request = self._make(arrival)
        place = self._choose(request, arrival.prefix)
        if arrival.prefix >= 0:
            self._holders.setdefault(arrival.prefix, set()).add(place)
            self._fresh.setdefault((place, arrival.prefix), min(arrival.prefix_len, arrival.input_len - 1))
        self.replicas[place].take(request, arrival.seconds)
        self._settle(place)
        return place

    def _settle(self, place: int) -> None:
        """Who has ended there, and when it is to be asked again."""
        for ended in self._take_ended(place):
            self._ended(ended, place)
        self._queue(place)

    def _choose(self, request: Request, prefix: int) -> int:
        """What `choose_replica` says of all replicas, asked only of those that can be its answer.

        These are the one with the least load, and those that may hold a part of the prompt.
        """
        if len(self.replicas) == 1:
            return 0
        candidates = {self._load.index(min(self._load))}
        candidates |= self._holders.get(prefix, set())
        loads = []
        for place in sorted(candidates):
            replica = self.replicas[place]
            loads.append(
                ReplicaLoad(
                    replica_id=place,
                    num_waiting=replica.num_waiting,
                    num_running=replica.num_running,
                    kv_usage=replica.kv_usage,
                    num_cached_tokens=self._cached_tokens(request, place, prefix) if prefix >= 0 else 0,
                )
            )
        chosen = choose_replica(loads, num_prompt_tokens=request.num_prompt_tokens)
        assert chosen is not None
        return chosen

    def _cached_tokens(self, request: Request, place: int, prefix: int) -> int:
        """As far as a router knows: what the replica has, and what it was sent together with this request."""
        known, sent = self.replicas[place].cached_tokens(request), self._fresh.get((place, prefix), 0)
        block_size = self.replicas[place].block_size
        return max(known, min(sent, request.num_prompt_tokens - 1) // block_size * block_size)

    def _queue(self, place: int) -> None:
        replica = self.replicas[place]
        seconds = replica.next_seconds
        if seconds != self._queued_at[place]:
            self._queued_at[place] = seconds
            if seconds < math.inf:
                heapq.heappush(self._heap, (seconds, place))
        waiting = replica.num_waiting
        # the order of `choose_replica` without prefixes: is there a queue, how many are there, blocks (always below 1)
        running = replica.num_running
        self._load[place] = has_queue(waiting, running) * 1e9 + waiting + running + 0.999 * replica.kv_usage

    def _make(self, arrival: Arrival) -> Request:
        number, self._num_added = self._num_added, self._num_added + 1
        shared = min(arrival.prefix_len, arrival.input_len - 1) if arrival.prefix >= 0 else 0
        own = arrival.input_len - shared
        token_ids = [arrival.prefix] * shared + [_OWN_ID + number] + [TOKEN_OF_PROMPT] * (own - 1)
        message = GenerateRequest(
            stream_id=number,
            request_id="simulated",
            prompt_token_ids=token_ids,
            params=TokenParams(max_tokens=arrival.output_len, temperature=0.0),
        )
        self._sinks.clear()
        (request,) = make_requests(
            message, arrival=number, now=arrival.seconds, max_len=self._max_len, deltas=self._sinks
        )
        if self._block_size is not None:
            request.block_hashes = _names(
                arrival.prefix, shared // self._block_size, number, request.end // self._block_size
            )
        return request

    # ------------------------------------------------------------------------------------------------- figures

    def _take_ended(self, place: int) -> list[Request]:
        outcomes = self.replicas[place].scheduler.outcomes
        ended, outcomes.ended = outcomes.ended, []
        return ended

    def _ended(self, request: Request, place: int) -> None:
        self.records.add(request, place, self.now)

    def _sample_until(self, now: float) -> None:
        while self._next_sample <= now:
            self.samples.append(self._sample(self._next_sample))
            self._next_sample += self._sample_seconds
            if len(self.samples) >= 2 * _SAMPLES:  # longer than thought: half as fine
                self.samples = self.samples[1::2]
                self._sample_seconds *= 2
                self._next_sample = self.samples[-1].seconds + self._sample_seconds

    def _sample(self, seconds: float) -> Sample:
        running = waiting = held = total = 0
        kept = 0.0
        tokens = self.records.output_tokens
        for replica in self.replicas:
            scheduler = replica.scheduler
            waiting += scheduler.num_waiting
            pool = scheduler.blocks.pool
            held += pool.num_held
            total += pool.num_blocks
            rows = scheduler._running.by_handle.values()
            running += len(rows)
            tokens += sum(request.num_output_tokens for request in rows)
            kept += (1.0 - scheduler.blocks.gauges(rows)["argosy_kv_waste_ratio"]) * pool.num_held
        return Sample(seconds, running, waiting, held / max(total, 1), max(0.0, 1.0 - kept / max(held, 1)), tokens)

    def stage_figures(self) -> Iterator[tuple[int, int, float, float]]:
        """(replica, stage, seconds busy, seconds with a step under way on the replica)."""
        for replica in self.replicas:
            for stage, busy in enumerate(replica.busy_seconds):
                yield replica.replica_id, stage, busy, replica.active_seconds


TOKEN_OF_PROMPT: Final = 2


def _names(prefix: int, num_shared: int, number: int, num_blocks: int) -> list[tuple[bytes, bytes]]:
    """Names for all blocks that a request may come to fill: alike exactly where the tokens up to there are alike."""
    head, own = b"p%d." % prefix, b"r%d." % number
    shared = [(head + b"%d" % place, b"") for place in range(min(num_shared, num_blocks))]
    return shared + [(own + b"%d" % place, b"") for place in range(num_shared, num_blocks)]
