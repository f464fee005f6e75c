"""A stand-in for the driver, for tests of doors: answers by a script, and remembers what it was asked."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from argosy.cluster.protocol.messages import EngineInfo, StatsReply, TokenDelta, TokenLogprobs
from argosy.cluster.protocol.sampling import FinishReason, TokenParams


def engine_info(**changes: Any) -> EngineInfo:
    """What a small engine says of itself."""
    facts: dict[str, Any] = {
        "model": "fake",
        "max_model_len": 256,
        "vocab_size": 4096,
        "num_blocks": 64,
        "block_size": 16,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "dtype": "float32",
        "max_logprobs": 20,
        "max_num_seqs": 16,
        "eos_token_ids": (1, 6),
    }
    return EngineInfo(**{**facts, **changes})


@dataclass
class Submitted:
    """One request as the driver would have seen it."""

    prompt_token_ids: Sequence[int]
    params: TokenParams
    n: int
    priority: int
    cache_salt: str
    request_id: str | None
    aborted: list[int | None] = field(default_factory=list)
    num_taken: int = 0


class ScriptedStream:
    """The deltas of one request, one step at a time."""

    def __init__(self, submitted: Submitted, steps: Iterable[list[TokenDelta]], gate: asyncio.Event | None):
        self.submitted = submitted
        self._steps = iter(steps)
        self._gate = gate

    def __aiter__(self) -> "ScriptedStream":
        return self

    async def __anext__(self) -> list[TokenDelta]:
        if self._gate is not None and self.submitted.num_taken:
            await self._gate.wait()
        await asyncio.sleep(0)
        step = next(self._steps, None)
        if step is None:
            raise StopAsyncIteration
        self.submitted.num_taken += 1
        return step

    def abort(self, index: int | None = None) -> None:
        """Remember it."""
        self.submitted.aborted.append(index)


Script = Callable[[Submitted], Iterable[list[TokenDelta]]]


class ScriptedClient:
    """Satisfies `gateway.EngineClient`."""

    def __init__(self, script: Script | None = None, **info: Any):
        self.info = engine_info(**info)
        self.closed = False
        self.script: Script = script or tokens_script(range(100, 104))
        self.submitted: list[Submitted] = []
        self.gate: asyncio.Event | None = None
        self.reply = StatsReply(values={"argosy_requests_running": 0.0}, healthy=True)
        self.num_stats = 0

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: TokenParams,
        *,
        n: int = 1,
        priority: int = 0,
        cache_salt: str = "",
        deadline_seconds: float | None = None,
        request_id: str | None = None,
    ) -> ScriptedStream:
        """Take the request and answer by the script."""
        asked = Submitted(prompt_token_ids, params, n, priority, cache_salt, request_id)
        self.submitted.append(asked)
        return ScriptedStream(asked, self.script(asked), self.gate)

    async def stats(self) -> StatsReply:
        """What was set as the reply."""
        self.num_stats += 1
        return self.reply

    async def reset_prefix_cache(self) -> bool:
        """Always done."""
        return True


def delta(index: int = 0, token_ids: Sequence[int] = (), **more: Any) -> TokenDelta:
    """A delta of stream 0."""
    return TokenDelta(stream_id=0, index=index, token_ids=token_ids, **more)


def tokens_script(token_ids: Iterable[int], *, finish: FinishReason = FinishReason.LENGTH) -> Script:
    """Each of the n answers gets these tokens, one a step, with logprobs where they are asked for."""
    ids = list(token_ids)

    def script(asked: Submitted) -> Iterable[list[TokenDelta]]:
        for place, token_id in enumerate(ids[: asked.params.max_tokens]):
            is_last = place + 1 == min(len(ids), asked.params.max_tokens)
            more: dict[str, Any] = {"finish_reason": finish if is_last else None}
            if asked.params.logprobs is not None:
                more["logprobs"] = [figures(token_id, asked.params.logprobs)]
            if place == 0:
                more["num_cached_tokens"] = 3
                if asked.params.prompt_logprobs is not None:
                    rest = asked.prompt_token_ids[1:]
                    more["prompt_logprobs"] = [None, *(figures(i, asked.params.prompt_logprobs) for i in rest)]
            yield [delta(index, [token_id], **more) for index in range(asked.n)]

    return script


def figures(token_id: int, num_best: int) -> TokenLogprobs:
    """The token is the second best; the best are made up around it."""
    best = [token_id + 1, token_id, token_id + 2, token_id + 3][:num_best]
    return TokenLogprobs(
        rank=2, top_ids=[token_id, *best], top_logprobs=[-1.0, *(-0.5 * (i + 1) for i in range(len(best)))]
    )
