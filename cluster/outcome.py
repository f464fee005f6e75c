"""What a step's answer means for each request: a token more, or the end; told to its owner as `TokenDelta`s."""

from collections import deque
from typing import Final, Protocol

from argosy.cluster.clock import Clock
from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.errors import InvariantBroken, RequestError, ServingError
from argosy.cluster.protocol.messages import ModelRunnerOutput, TokenDelta, TokenLogprobs
from argosy.cluster.protocol.sampling import NOTHING_ALLOWED, FinishReason
from argosy.cluster.request import WATCH_ALL, Request, RequestStatus
from argosy.cluster.step import Step

_REMEMBERED_ENDS: Final = 64


class RowFailed(RequestError):
    """A rank could not compute this request's row; the others of the step went well."""

    code = "row_failed"

    def __init__(self, why: str):
        super().__init__(why)
        self.http_status = 400 if why == NOTHING_ALLOWED else 500  # the request's own wishes, or what the model gave


class EndRequest(Protocol):
    """`Scheduler.end`."""

    def __call__(
        self,
        request: Request,
        reason: FinishReason,
        *,
        error: ServingError | None = None,
        stop_token_id: int | None = None,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None: ...


class Outcomes:
    """Applies answers to requests. `max_groups`: into how many steps those that decode are split at most."""

    def __init__(self, clock: Clock, metrics: Metrics, end: EndRequest, max_groups: int):
        self.ended: list[Request] = []
        self._clock, self._metrics, self._end = clock, metrics, end
        self._update_seconds: deque[float] = deque(maxlen=max_groups)
        self._end_seconds: deque[float] = deque(maxlen=_REMEMBERED_ENDS)

    def apply(self, step: Step, output: ModelRunnerOutput) -> None:
        """Give each row its token. A request that ended while the step was in flight is passed over."""
        now, metrics, sampling = self._clock.now(), self._metrics, step.sampling
        if len(output.token_ids) != len(sampling):
            raise InvariantBroken(f"step {step.step_id}: {len(output.token_ids)} tokens for {len(sampling)} rows")
        if output.prompt_logprobs:
            self._keep_prompt_logprobs(step, output)
        for place, why in output.failed:
            if not (request := step.rows[place]).is_finished:
                self._end(request, FinishReason.ERROR, error=RowFailed(why))
        metrics.steps += 1
        metrics.generation_tokens += len(sampling)
        if step.num_decodes and self._update_seconds:
            before = self._update_seconds[-min(step.num_groups, len(self._update_seconds))]
            metrics.inter_token.observe(now - before, step.num_decodes)
        self._update_seconds.append(now)
        if output.logprobs:
            logprobs = dict(output.logprobs)
            for place, (request, token_id) in enumerate(zip(sampling, output.token_ids, strict=True)):
                self._take_token(request, token_id, logprobs.get(place), now)
            return
        for request, token_id in zip(sampling, output.token_ids, strict=True):  # about 0.5 us a request
            if token_id in request.watched:
                self._take_token(request, token_id, None, now)
            else:
                request.token_ids.append(token_id)
                request.deltas.append(TokenDelta(request.stream_id, request.index, (token_id,)))

    def _take_token(self, request: Request, token_id: int, logprobs: TokenLogprobs | None, now: float) -> None:
        """A token that may be the first, the last, or one too many."""
        if request.status is RequestStatus.FINISHED:
            self._metrics.generation_tokens -= 1
            self._metrics.tokens_dropped += 1
            return
        if token_id < 0:
            self._end(request, FinishReason.ERROR, error=RowFailed("the rank gave no token and no reason"))
            return
        request.token_ids.append(token_id)
        if request.first_token_seconds < 0:
            request.first_token_seconds = now
            self._metrics.time_to_first_token.observe(now - request.arrival_seconds)
        wants = request.params.logprobs is not None or request.params.logprob_token_ids
        figures = (logprobs,) if logprobs is not None and wants else ()
        reason, stop_token_id = _reason_to_stop(request, token_id)
        if reason is not None:
            self._end(request, reason, stop_token_id=stop_token_id, token_ids=(token_id,), logprobs=figures)
            return
        request.deltas.append(self._delta(request, (token_id,), figures))
        request.rest()

    def note_start(self, request: Request, num_cached_tokens: int, *, is_fork: bool) -> None:
        """The request goes to the ranks, with so many tokens in blocks already."""
        now, metrics = self._clock.now(), self._metrics
        if not is_fork:
            metrics.prefix_queries += len(request.token_ids)
            metrics.prefix_hits += num_cached_tokens
        if request.first_scheduled_seconds >= 0:
            return
        request.first_scheduled_seconds = now
        metrics.queue_seconds.observe(now - request.arrival_seconds)
        if is_fork:
            return
        request.num_cached_tokens = min(num_cached_tokens, request.num_prompt_tokens)
        metrics.prompt_tokens += request.num_prompt_tokens
        metrics.cached_tokens += request.num_cached_tokens
        metrics.request_prompt_tokens.observe(request.num_prompt_tokens)

    def close(
        self,
        request: Request,
        reason: FinishReason,
        error: ServingError | None,
        stop_token_id: int | None,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
    ) -> None:
        """Tell the owner that this is the end. The one place where a request becomes FINISHED."""
        request.move(RequestStatus.FINISHED, f"ended: {reason}")
        request.watched = WATCH_ALL
        now, metrics = self._clock.now(), self._metrics
        metrics.finished[reason] += 1
        metrics.request_seconds.observe(now - request.arrival_seconds)
        metrics.request_generation_tokens.observe(request.num_output_tokens)
        self._end_seconds.append(now)
        request.deltas.append(self._delta(request, token_ids, logprobs, reason, stop_token_id, error, now))
        self.ended.append(request)

    def retry_after_seconds(self, num_waiting: int) -> float:
        """When a quarter of the queue will be gone at the pace of the latest ends; 5 s when nothing ended lately."""
        ends = self._end_seconds
        if len(ends) < 2 or ends[-1] <= ends[0]:
            return 5.0
        pace = len(ends) / (self._clock.now() - ends[0])
        return min(60.0, max(1.0, 0.25 * num_waiting / pace))

    def _delta(
        self,
        request: Request,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        reason: FinishReason | None = None,
        stop_token_id: int | None = None,
        error: ServingError | None = None,
        now: float = 0.0,
    ) -> TokenDelta:
        is_first, request.is_first_delta = request.is_first_delta, False
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None  # told once; prefixes may be read now
        timing: tuple[float, ...] = ()
        if reason is not None and request.first_token_seconds >= 0:
            moments = (request.first_scheduled_seconds, request.first_token_seconds, now)
            timing = tuple(moment - request.arrival_seconds for moment in moments)
        return TokenDelta(
            stream_id=request.stream_id,
            index=request.index,
            token_ids=token_ids,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            logprobs=logprobs,
            num_cached_tokens=max(request.num_cached_tokens, 0) if is_first else None,
            prompt_logprobs=prompt_logprobs,
            error_code=error.code if error is not None else "",
            error_message=str(error) if error is not None else "",
            error_status=error.http_status if error is not None else 0,
            timing=timing,
            num_preemptions=request.num_preemptions if reason is not None else 0,
            num_recoveries=request.num_recoveries if reason is not None else 0,
        )

    def _keep_prompt_logprobs(self, step: Step, output: ModelRunnerOutput) -> None:
        """Figures of prompt positions come chunk by chunk, and go out with the first token."""
        by_handle = dict(zip(step.handles, step.rows, strict=True))
        for handle, first, figures in output.prompt_logprobs:
            request = by_handle.get(handle)
            if request is None or request.prompt_logprobs is None or not request.is_first_delta:
                continue
            for position, figure in enumerate(figures, start=first):
                if position < request.num_prompt_tokens:
                    request.prompt_logprobs[position] = figure


def _reason_to_stop(request: Request, token_id: int) -> tuple[FinishReason | None, int | None]:
    params = request.params
    if request.num_output_tokens >= params.min_tokens:
        if token_id in params.eos_token_ids:
            return FinishReason.STOP, None
        if token_id in params.stop_token_ids:
            return FinishReason.STOP, token_id
    if len(request.token_ids) >= request.end:
        return FinishReason.LENGTH, None
    return None, None
