"""What a user of `LLM` gets back: vLLM's objects, with its fields and meanings. Imports nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias


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
