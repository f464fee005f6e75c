"""What a user of `LLM` gets back: vLLM's objects, with its fields and meanings. Imports nothing heavy."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import msgspec


class Logprob(NamedTuple):
    """One token's log probability at one position, its 1-based rank in the vocabulary, and what it reads as."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs: TypeAlias = dict[int, Logprob]  # token id -> figures; the token of the position is always among them
SampleLogprobs: TypeAlias = list[PositionLogprobs]
PromptLogprobs: TypeAlias = list[PositionLogprobs | None]  # the first prompt token has none


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request; `arrival_time` on the wall clock, the others in seconds from it."""

    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_recoveries: int = 0
    is_corrupted: bool = False


@dataclass(slots=True)
class CompletionOutput:
    """One of the n answers."""

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id; None for the end-of-sequence token
    lora_request: Any = None
    routed_experts: Any = None

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its n answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int] | None
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: Sequence[int] | None = None
    num_cached_tokens: int | None = None
    kv_transfer_params: Mapping[str, Any] | None = field(default=None, repr=False)


class TextDelta(msgspec.Struct, kw_only=True, gc=False):
    """What one of the n answers gained; the last one of an answer says why it ended."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int | None = None  # with the first delta
    prompt_logprobs: PromptLogprobs | None = None  # with the first delta, when asked for
    timing: tuple[float, ...] = ()  # with the last delta, seconds from arrival: scheduled, first token, last token
    num_preemptions: int = 0
    num_recoveries: int = 0


class OutputCollector:
    """Joins the deltas of a request to a `RequestOutput`."""

    def __init__(self, request_id: str, prompt: str | None, prompt_token_ids: Sequence[int], n: int = 1):
        self._output = RequestOutput(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=list(prompt_token_ids),
            prompt_logprobs=None,
            outputs=[CompletionOutput(index=index, text="", token_ids=[]) for index in range(n)],
            finished=False,
            metrics=RequestMetrics(arrival_time=time.time()),
        )
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._token_ids: list[list[int]] = [[] for _ in range(n)]
        self._num_open = n

    def add(self, delta: TextDelta) -> None:
        """Take up what arrived."""
        output, answer = self._output, self._output.outputs[delta.index]
        self._texts[delta.index].append(delta.text)
        self._token_ids[delta.index].extend(delta.token_ids)
        if delta.num_cached_tokens is not None and output.num_cached_tokens is None:
            output.num_cached_tokens = delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            output.prompt_logprobs = delta.prompt_logprobs
        if delta.logprobs is not None:
            if answer.logprobs is None:
                answer.logprobs = []
            answer.logprobs.extend(delta.logprobs)
            gained = sum(
                figures[token_id].logprob for token_id, figures in zip(delta.token_ids, delta.logprobs, strict=True)
            )
            answer.cumulative_logprob = (answer.cumulative_logprob or 0.0) + gained
        if delta.finish_reason is not None:
            answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
            self._num_open -= 1
            self._add_timing(delta)

    def snapshot(self) -> RequestOutput:
        """The request as it stands now."""
        for answer, texts, token_ids in zip(self._output.outputs, self._texts, self._token_ids, strict=True):
            texts[:] = ["".join(texts)]
            answer.text, answer.token_ids = texts[0], token_ids
        self._output.finished = self._num_open == 0
        return self._output

    def _add_timing(self, delta: TextDelta) -> None:
        metrics = self._output.metrics
        assert metrics is not None
        if len(delta.timing) >= 3:
            metrics.scheduled_ts, metrics.first_token_ts, metrics.last_token_ts = delta.timing[:3]
            metrics.first_token_latency = metrics.first_token_ts
        metrics.num_generation_tokens += len(self._token_ids[delta.index])
        metrics.num_preemptions += delta.num_preemptions
        metrics.num_recoveries += delta.num_recoveries
