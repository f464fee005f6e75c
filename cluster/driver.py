"""Joins scheduler, executor and replica. A state machine without IO: events in, messages and steps out.

The loop around it (`driver_loop`, or `simulation`) feeds it what edges and ranks say, calls `advance`, and carries out
what `take_outbox` gives. It never waits and never asks the system for the time.
"""

import heapq
from collections.abc import Iterator
from typing import Final

import msgspec

from argosy.cluster.admission import check_request
from argosy.cluster.clock import Clock
from argosy.cluster.executor import Executor, ExecutorEvent
from argosy.cluster.gathering import Gathering
from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import (
    ClusterError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestAborted,
    RequestError,
    RequestLost,
    ServingError,
)
from argosy.cluster.protocol.messages import (
    AbortRequest,
    Burst,
    Drain,
    EngineInfo,
    FromEdge,
    GenerateRequest,
    ModelRunnerOutput,
    PrefixCacheReset,
    ResetPrefixCache,
    StatsReply,
    StatsRequest,
    ToEdge,
    TokenDelta,
    TokenDeltas,
    Welcome,
)
from argosy.cluster.protocol.sampling import MAX_N, FinishReason
from argosy.cluster.recovery import plan_recovery
from argosy.cluster.replica import BeginSteps, Command, FailAll, ReplicaState, RequeueAll, StartRanks
from argosy.cluster.request import Request, make_requests
from argosy.cluster.scheduler import Scheduler

_DEFAULT_MAX_MODEL_LEN: Final = 2048
_NEVER: Final = 3600.0


class EngineDraining(ClusterError):
    """The engine takes no new requests: it is being stopped."""

    code = "draining"

    def __str__(self) -> str:
        return "this engine is being stopped and takes no new requests; try another, or later"


class _Stream:
    """The n answers of one message."""

    __slots__ = ("edge", "num_open", "requests", "seconds", "stream_id")

    def __init__(self, edge: "_Edge", stream_id: int, seconds: float):
        self.edge, self.stream_id, self.seconds = edge, stream_id, seconds
        self.requests: list[Request] = []
        self.num_open = 0


class _Edge:
    """One connection's requests, and what they gained since the last message to it."""

    __slots__ = ("deltas", "edge_id", "streams")

    def __init__(self, edge_id: int):
        self.edge_id = edge_id
        self.deltas: list[TokenDelta] = []  # requests append here
        self.streams: dict[int, _Stream] = {}


class Driver:
    """One replica's requests, from arrival to their end.

    `info` says what is known of the model; without it (tests) the vocabulary isn't bounded. What the ranks measure is
    filled in when they are ready.
    """

    def __init__(
        self,
        config: ServingConfig,
        executor: Executor,
        clock: Clock,
        metrics: Metrics,
        *,
        info: EngineInfo | None = None,
    ):
        self.config, self.metrics, self.replica = config, metrics, ReplicaState()
        self.scheduler = Scheduler(config, clock, metrics)
        self.info = info or _plain_info(config)
        self._executor, self._clock = executor, clock
        self._edges: dict[int, _Edge] = {}
        self._outbox: list[tuple[int, ToEdge]] = []
        self._arrivals = 0
        self._deadlines: list[tuple[float, int, _Stream]] = []
        self._progress_seconds = clock.now()
        self._step_id, self._gathering = 0, Gathering(config, self.scheduler.most_waiting_tokens)

    # ------------------------------------------------------------------------------------------------- state

    @property
    def status(self) -> str:
        """starting, ready, rebuilding, failed or draining."""
        return "draining" if self.replica.is_draining and self.replica.is_ready else str(self.replica.status)

    @property
    def fatal(self) -> ServingError | None:
        """Why nothing will run here any more."""
        return self.replica.fatal

    @property
    def is_drained(self) -> bool:
        """Whether draining was asked for and every request has ended."""
        return self.replica.is_draining and not any(edge.streams for edge in self._edges.values())

    def next_deadline_seconds(self) -> float:
        """How long the loop may sleep at most."""
        seconds = max(self._deadlines[0][0] - self._clock.now(), 0.0) if self._deadlines else _NEVER
        if self.replica.is_ready and (left := self._gathering.seconds_left(self._clock.now())) > 0.0:
            seconds = min(seconds, left)
        return min(seconds, _NEVER)

    def take_outbox(self) -> list[tuple[int, ToEdge]]:
        """The messages to edges since the last call, in order."""
        self._flush()
        outbox, self._outbox = self._outbox, []
        return outbox

    # ------------------------------------------------------------------------------------------------- events

    def start(self) -> None:
        """Bring up the ranks."""
        self._carry_out(self.replica.start())

    def drain(self) -> None:
        """Take no new requests; what is here may end."""
        self.replica.is_draining = True

    def on_edge_message(self, edge_id: int, message: FromEdge) -> None:
        """An edge wants something. Who it is was checked by the loop."""
        edge = self._edges.get(edge_id) or self._edges.setdefault(edge_id, _Edge(edge_id))
        if isinstance(message, GenerateRequest):
            self._generate(edge, message)
        elif isinstance(message, AbortRequest):
            self._abort(edge, message)
        elif isinstance(message, Burst):
            self._gathering.note(edge_id, message, self._clock.now())
        elif isinstance(message, StatsRequest):
            self._outbox.append((edge_id, self.stats(message.known_names)))
        elif isinstance(message, ResetPrefixCache):
            self.scheduler.reset_prefix_cache()
            self._outbox.append((edge_id, PrefixCacheReset(done=True)))
        elif isinstance(message, Drain):
            self.drain()
        elif self.replica.is_ready:  # Hello, where a loop hands it on
            self._outbox.append((edge_id, Welcome(info=self.info)))

    def on_edge_closed(self, edge_id: int) -> None:
        """Nobody reads what this edge's requests would give: end them all."""
        edge = self._edges.pop(edge_id, None)
        if edge is None:
            return
        for stream in list(edge.streams.values()):
            self._end_stream(stream, FinishReason.ABORT, RequestAborted())
        self._gathering.end(edge_id)
        self._outbox = [(to, message) for to, message in self._outbox if to != edge_id]

    def on_executor_event(self, event: ExecutorEvent) -> None:
        """The ranks answered a step, are ready, or were lost."""
        if not isinstance(event, ModelRunnerOutput):
            self._carry_out(self.replica.handle(event))
        elif not self.replica.is_current(event.epoch) or not self.replica.is_ready:
            self.metrics.stale_outputs += 1
        else:
            self.scheduler.update(event)
            self._step_id, self._progress_seconds = event.step_id, self._clock.now()
            self._settle()
            self._flush()

    def advance(self) -> None:
        """Let deadlines pass, then send as many steps as may be in flight and need not wait for the rest of a burst."""
        if self._deadlines and self._deadlines[0][0] <= self._clock.now():
            self._pass_deadlines()
        if not self.replica.is_ready:
            return
        scheduler, gathering = self.scheduler, self._gathering
        while scheduler.num_steps_in_flight < scheduler.max_steps_in_flight:
            if gathering.is_open and gathering.holds(
                self._clock.now(), scheduler.is_idle, scheduler.num_steps_in_flight
            ):
                break
            if (output := scheduler.schedule()) is None:
                break
            gathering.begin_step()
            if scheduler.num_steps_in_flight == 1:  # it was idle until now
                self._progress_seconds = self._clock.now()
            self._executor.submit(output)
        self._settle()

    # ----------------------------------------------------------------------------------------------- requests

    def _generate(self, edge: _Edge, message: GenerateRequest) -> None:
        try:
            self._check(edge, message)
        except ServingError as error:
            self.metrics.refuse(error.code)
            for index in range(min(max(message.n, 1), MAX_N)):
                edge.deltas.append(_refusal(message.stream_id, index, error))
            return
        now, cap = self._clock.now(), self.config.scheduler.request_deadline_seconds
        stream = _Stream(edge, message.stream_id, min(message.deadline_seconds or cap, cap))
        self._arrivals += 1
        stream.requests = make_requests(
            message,
            arrival=self._arrivals,
            now=now,
            max_len=self.info.max_model_len,
            deltas=edge.deltas,
            owner=stream,
        )
        stream.num_open = message.n
        self._gathering.add(message)
        edge.streams[message.stream_id] = stream
        self._remember_deadline(now + stream.seconds, stream)
        self.scheduler.add(list(stream.requests))
        self._settle()

    def _check(self, edge: _Edge, message: GenerateRequest) -> None:
        """Raises why the request can't be taken up."""
        if self.replica.fatal is not None:
            raise self.replica.fatal
        if not self.replica.takes_requests:
            raise EngineDraining()
        if message.stream_id in edge.streams:
            raise InvalidRequest("stream_id", message.stream_id, "is in use on this connection")
        check_request(
            message,
            vocab_size=self.info.vocab_size,
            max_model_len=self.info.max_model_len,
            max_logprobs=self.info.max_logprobs,
        )
        num_waiting = self.scheduler.num_waiting
        if num_waiting >= self.config.scheduler.max_num_waiting + self.scheduler.num_free_rows:
            raise Overloaded(num_waiting, self.scheduler.outcomes.retry_after_seconds(num_waiting))

    def _abort(self, edge: _Edge, message: AbortRequest) -> None:
        stream = edge.streams.get(message.stream_id)
        if stream is not None:  # otherwise it ended while this was on the way
            self._end_stream(stream, FinishReason.ABORT, RequestAborted(), message.indexes)

    def _end_stream(
        self, stream: _Stream, reason: FinishReason, error: ServingError, indexes: tuple[int, ...] = ()
    ) -> None:
        for request in reversed(stream.requests):  # forks before the one they wait for
            if not request.is_finished and (not indexes or request.index in indexes):
                self.scheduler.end(request, reason, error=error)
        self._settle()

    def _settle(self) -> None:
        """Close the streams whose answers have all ended."""
        ended = self.scheduler.ended
        for request in ended:
            stream: _Stream = request.owner
            stream.num_open -= 1
            if stream.num_open == 0:
                del stream.edge.streams[stream.stream_id]
        ended.clear()

    def _remember_deadline(self, moment: float, stream: _Stream) -> None:
        heapq.heappush(self._deadlines, (moment, self._arrivals, stream))
        if len(self._deadlines) > 2 * sum(len(edge.streams) for edge in self._edges.values()) + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[2].num_open]
            heapq.heapify(self._deadlines)

    def _pass_deadlines(self) -> None:
        now = self._clock.now()
        while self._deadlines and self._deadlines[0][0] <= now:
            stream = heapq.heappop(self._deadlines)[2]
            if stream.num_open:
                self._end_stream(stream, FinishReason.ERROR, DeadlineExceeded(stream.seconds))

    # ---------------------------------------------------------------------------------------------- the ranks

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, StartRanks):
                self._executor.start(command.epoch)
            elif isinstance(command, BeginSteps):
                self._begin_steps(command)
            elif isinstance(command, RequeueAll):
                self._requeue_all(command.error)
            else:
                self._fail_all(command)

    def _begin_steps(self, command: BeginSteps) -> None:
        self.scheduler.begin_epoch(command.epoch, command.num_blocks, command.groups, command.swap)
        self.info = msgspec.structs.replace(
            self.info, num_blocks=command.num_blocks, epoch=command.epoch, kv_windows=command.groups.windows
        )
        self._progress_seconds = self._clock.now()
        self._settle()

    def _requeue_all(self, error: ServingError) -> None:
        plan = plan_recovery(self.scheduler.take_back_all(), self.config.scheduler.max_recoveries)
        self.metrics.recoveries += len(plan.recomputed)
        for request in plan.lost:
            lost = RequestLost(request.num_recoveries - 1, str(error))
            self.scheduler.end(request, FinishReason.LOST, error=lost)
        self._settle()

    def _fail_all(self, command: FailAll) -> None:
        for edge in self._edges.values():
            for stream in list(edge.streams.values()):
                self._end_stream(stream, FinishReason.ERROR, command.error)

    # ------------------------------------------------------------------------------------------------ figures

    def stats(self, known_names: int = -1) -> StatsReply:
        """The live figures, and the names of cached blocks from that number on (-1: none)."""
        names = self.scheduler.blocks.news(known_names) if known_names >= 0 else (b"", -1)
        gauges = self.scheduler.gauges()
        is_idle = not self.scheduler.num_steps_in_flight
        waited = 0.0 if is_idle and self.replica.is_ready else self._clock.now() - self._progress_seconds
        return StatsReply(
            values=self.metrics.values(gauges),
            histograms=self.metrics.histograms(),
            # draining: still at work for those who are here, but nobody new should be sent
            healthy=self.status == "ready" and waited <= self.config.parallel.step_deadline_seconds,
            status=self.status,
            step_id=self._step_id,
            seconds_since_progress=waited,
            new_names=names[0],
            known_names=names[1],
        )

    def open_requests(self) -> Iterator[Request]:
        """All requests that have not ended."""
        for edge in self._edges.values():
            for stream in edge.streams.values():
                yield from (request for request in stream.requests if not request.is_finished)

    def check(self) -> None:
        """The scheduler is sound, and every open request is its or waits for another one's prompt."""
        self.scheduler.check()
        known = set(map(id, self.scheduler.known_requests()))
        for request in self.open_requests():
            assert id(request) in known, request
        for edge in self._edges.values():
            for stream in edge.streams.values():
                assert stream.num_open == sum(not request.is_finished for request in stream.requests), stream.stream_id

    def _flush(self) -> None:
        """One message to each edge whose requests gained something."""
        for edge in self._edges.values():
            if edge.deltas:
                self._outbox.append((edge.edge_id, TokenDeltas(deltas=edge.deltas[:], step_id=self._step_id)))
                edge.deltas.clear()


def _refusal(stream_id: int, index: int, error: ServingError) -> TokenDelta:
    return TokenDelta(
        stream_id=stream_id,
        index=index,
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        error_code=error.code,
        error_message=str(error),
        error_status=error.http_status if isinstance(error, RequestError | ClusterError) else 503,
        retry_after_seconds=error.retry_after_seconds if isinstance(error, Overloaded) else 0.0,
    )


def _plain_info(config: ServingConfig) -> EngineInfo:
    return EngineInfo(
        model=config.model.model,
        max_model_len=config.model.max_model_len or _DEFAULT_MAX_MODEL_LEN,
        vocab_size=2**31 - 1,
        num_blocks=0,
        block_size=config.cache.block_size,
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        pipeline_parallel_size=config.parallel.pipeline_parallel_size,
        dtype=config.model.dtype,
        max_logprobs=config.model.max_logprobs,
        max_num_seqs=config.scheduler.max_num_seqs,
    )
