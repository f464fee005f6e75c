"""What both families of endpoints share: running several prompts as one request, usage, logprobs, and events."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import msgspec

from argosy.deploy.gateway import Gateway, PreparedRequest
from argosy.deploy.outputs import PositionLogprobs, PromptLogprobs, RequestOutput, TextDelta
from argosy.deploy.tokenizer import Tokenizer

encode: Final = msgspec.json.encode
DONE: Final = b"data: [DONE]\n\n"
_LOWEST_LOGPROB: Final = -9999.0  # JSON has no minus infinity
_MAX_WAITING_BATCHES: Final = 64  # of all prompts of a request, when its reader is slow


async def merge_streams(
    gateway: Gateway, requests: Sequence[PreparedRequest]
) -> AsyncGenerator[tuple[int, list[TextDelta]], None]:
    """(place of the prompt, its deltas) as they come, from all prompts at once. Ends with the first error of any."""
    if len(requests) == 1:
        async with aclosing(gateway.stream(requests[0])) as batches:
            async for batch in batches:
                yield 0, batch
        return
    queue: asyncio.Queue[tuple[int, list[TextDelta] | BaseException | None]] = asyncio.Queue(_MAX_WAITING_BATCHES)

    async def pump(place: int) -> None:
        try:
            async with aclosing(gateway.stream(requests[place])) as batches:
                async for batch in batches:
                    await queue.put((place, batch))
            await queue.put((place, None))
        except Exception as error:  # handed to the reader, who raises it
            await queue.put((place, error))

    tasks = [asyncio.create_task(pump(place)) for place in range(len(requests))]
    try:
        num_open = len(tasks)
        while num_open:
            place, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield place, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect_all(gateway: Gateway, requests: Sequence[PreparedRequest]) -> list[RequestOutput]:
    """The whole answers of all prompts. The first error of any ends the others."""
    if len(requests) == 1:
        return [await gateway.collect(requests[0])]
    tasks = [asyncio.create_task(gateway.collect(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Usage:
    """Counts tokens while they pass."""

    def __init__(self, num_prompt_tokens: int):
        self.num_prompt_tokens = num_prompt_tokens
        self.num_completion_tokens = 0
        self.num_cached_tokens = 0
        self._seen: set[int] = set()

    def add(self, place: int, delta: TextDelta) -> None:
        """Count what arrived for the prompt at `place`; one at a time, since an event may say what came up to it."""
        self.num_completion_tokens += len(delta.token_ids)
        if delta.num_cached_tokens is not None and place not in self._seen:
            self._seen.add(place)
            self.num_cached_tokens += delta.num_cached_tokens

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


def usage_of(outputs: Sequence[RequestOutput], *, without_answers: bool = False) -> dict[str, Any]:
    """OpenAI's `usage` of whole answers."""
    usage = Usage(sum(len(output.prompt_token_ids or ()) for output in outputs))
    if not without_answers:
        usage.num_completion_tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    usage.num_cached_tokens = sum(output.num_cached_tokens or 0 for output in outputs)
    return usage.as_dict()


class EventLog:
    """Frames the events of one stream; numbered (`id: N`), a client can see a gap or a repeat.

    Only a client that asks for `text/event-stream` gets numbers: the load generators of vLLM and SGLang read every line
    as data and would fail on them.
    """

    def __init__(self, *, numbered: bool):
        self._numbered = numbered
        self._next = 0

    def event(self, data: bytes) -> bytes:
        """One event."""
        if not self._numbered:
            return b"data: " + data + b"\n\n"
        number = self._next
        self._next += 1
        return b"id: %d\ndata: %b\n\n" % (number, data)


def token_name(tokenizer: Tokenizer | None, token_id: int, text: str | None, as_ids: bool) -> str:
    """How a token is called in logprobs."""
    if as_ids or text is None or tokenizer is None:
        return f"token_id:{token_id}"
    return text


def finite(logprob: float) -> float:
    """A logprob that JSON can hold."""
    return logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB


def prompt_logprobs_json(figures: PromptLogprobs | None) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: per position a mapping from token id."""
    if figures is None:
        return None
    return [None if position is None else _position_json(position) for position in figures]


def _position_json(position: PositionLogprobs) -> dict[str, Any]:
    return {
        str(token_id): {"logprob": finite(f.logprob), "rank": f.rank, "decoded_token": f.decoded_token}
        for token_id, f in position.items()
    }


def chat_logprobs(
    tokenizer: Tokenizer | None,
    token_ids: Sequence[int],
    figures: Sequence[PositionLogprobs],
    num_top: int,
    as_ids: bool,
) -> Mapping[str, Any]:
    """OpenAI's chat `logprobs`: each token with its bytes, and the `num_top` most likely ones, best first."""

    def entry(token_id: int, position: PositionLogprobs) -> dict[str, Any]:
        found = position[token_id]
        raw = tokenizer.token_bytes(token_id) if tokenizer is not None else b""
        name = token_name(tokenizer, token_id, found.decoded_token, as_ids)
        return {"token": name, "logprob": finite(found.logprob), "bytes": list(raw)}

    content = []
    for token_id, position in zip(token_ids, figures, strict=True):
        ranked = [(f.rank, other) for other, f in position.items() if f.rank is not None and f.rank <= num_top]
        best = [entry(other, position) for _, other in sorted(ranked)[:num_top]]
        content.append({**entry(token_id, position), "top_logprobs": best})
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """OpenAI's `logprobs` of completions; remembers where in the text the next token begins."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool):
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._offset = 0

    def shift(self, num_chars: int) -> None:
        """So many characters stand in front of what follows."""
        self._offset += num_chars

    def build(self, token_ids: Sequence[int], figures: Sequence[PositionLogprobs | None]) -> dict[str, Any]:
        """The columns for these tokens."""
        offsets: list[int] = []
        names: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token_id, position in zip(token_ids, figures, strict=True):
            text = self._tokenizer.token_text(token_id) if self._tokenizer is not None else None
            offsets.append(self._offset)
            self._offset += len(text or "")
            names.append(token_name(self._tokenizer, token_id, text, self._as_ids))
            logprobs.append(finite(position[token_id].logprob) if position is not None else None)
            tops.append(self._top(position) if position is not None else None)
        return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": names, "top_logprobs": tops}

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        for token_id, f in position.items():
            name = token_name(self._tokenizer, token_id, f.decoded_token, self._as_ids)
            found.setdefault(name, finite(f.logprob))
        return found
