"""Text in, text out: check, tokenise, ask the driver, detokenise, find stop strings, abort what nobody wants any more.

    prepare()   everything that can be refused is refused here, before the driver or anyone else has done any work
    stream()    lists of text deltas, as many as arrived together; an error of the request is raised
    generate()  both, one delta at a time;  complete() the whole answer

Whoever drops the iterator (a client that went away, a cancelled task) aborts the request at the driver.
"""

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import (
    ContextTooLong,
    InvalidRequest,
    UnknownModel,
)
from argosy.cluster.protocol.messages import EngineInfo, StatsReply, TokenDelta
from argosy.cluster.protocol.sampling import SamplingParams, TokenParams
from argosy.deploy.answer_text import AnswerText
from argosy.deploy.outputs import OutputCollector, RequestOutput, TextDelta
from argosy.deploy.remote_errors import rebuild_error
from argosy.deploy.template_process import TemplateProcess
from argosy.deploy.token_params import TokenParamsBuilder, read_generation_config
from argosy.deploy.tokenizer import Tokenizer, check_text


class EngineStream(Protocol):
    """The answers to one request, as `cluster.driver_client.TokenStream` gives them."""

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]: ...

    def abort(self, index: int | None = None) -> None:
        """Call off all answers, or one."""


class EngineClient(Protocol):
    """What the gateway needs of `cluster.driver_client.DriverClient` or `cluster.replica_client.ReplicaClient`."""

    @property
    def info(self) -> EngineInfo:
        """What stands behind the driver."""

    @property
    def closed(self) -> bool:
        """Whether it went away."""

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
    ) -> EngineStream:
        """Ask for tokens."""

    async def stats(self) -> StatsReply:
        """The live figures."""

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request that was checked and tokenised and may be sent."""

    request_id: str  # ours, random; what a client calls its request is only a label
    prompt: str | None
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    token_params: TokenParams
    priority: int = 0
    cache_salt: str = ""
    deadline_seconds: float | None = None


class Gateway:
    """The one way from text to the engine and back; HTTP, gRPC and `LLM` use it."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer | None, config: ServingConfig):
        self.client = client
        self.tokenizer = tokenizer
        self.config = config
        generation = read_generation_config(config.model.model, config.model.generation_config)
        self._builder = TokenParamsBuilder(client.info, tokenizer, generation)
        template = tokenizer.chat_template if tokenizer is not None else None
        self._templates = TemplateProcess(template) if template is not None else None
        self.model_names: tuple[str, ...] = config.model.served_model_name or (config.model.model,)

    @property
    def info(self) -> EngineInfo:
        """What stands behind the driver."""
        return self.client.info

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """What the model's `generation_config.json` says where a request says nothing."""
        return dict(self._builder.sampling_defaults)

    def default_sampling_params(self) -> SamplingParams:
        """The defaults for this model, as `LLM.get_default_sampling_params` gives them."""
        return SamplingParams(**self.sampling_defaults)

    def check_model(self, model: str | None) -> str:
        """The served name that was asked for; none means the first."""
        if model is None:
            return self.model_names[0]
        if model not in self.model_names:
            raise UnknownModel(model, self.model_names)
        return model

    def check_token_ids(self, field: str, token_ids: Sequence[int]) -> None:
        """Refuse ids that this model does not have."""
        self._builder.check_token_ids(field, token_ids)

    async def tokenize(
        self, text: str, *, field: str = "prompt", add_special_tokens: bool = True, of_any_length: bool = False
    ) -> list[int]:
        """The ids of `text`, which may not be far longer than the model's length unless it is `of_any_length`."""
        check_text(field, text)
        if self.tokenizer is None:
            raise InvalidRequest(field, "text", "this server has no tokenizer; send token ids")
        least = self.tokenizer.least_num_tokens(text) if not of_any_length else 0
        if least >= self.info.max_model_len:
            raise ContextTooLong(least, self.info.max_model_len, is_least=True)
        return await self.tokenizer.encode_async(text, add_special_tokens=add_special_tokens)

    async def prepare(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        field: str = "prompt",
        prompt_text: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        deadline_seconds: float | None = None,
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
        truncation_side: str = "left",
    ) -> PreparedRequest:
        """Check everything, tokenise, and turn the parameters to numbers. Raises our `RequestError`s."""
        if priority and self.config.scheduler.policy != "priority":
            raise InvalidRequest("priority", priority, "must be 0: this server serves first come, first served")
        if isinstance(prompt, str):
            prompt_text = prompt
            token_ids: Sequence[int] = await self.tokenize(
                prompt,
                field=field,
                add_special_tokens=add_special_tokens,
                of_any_length=truncate_prompt_tokens is not None,
            )
        else:
            token_ids = prompt
        if truncate_prompt_tokens is not None:
            keep = truncate_prompt_tokens if truncate_prompt_tokens != -1 else self.info.max_model_len - 1
            if not 1 <= keep < self.info.max_model_len:
                raise InvalidRequest(
                    "truncate_prompt_tokens", keep, f"must be -1, or from 1 to {self.info.max_model_len - 1}"
                )
            token_ids = token_ids[-keep:] if truncation_side == "left" else token_ids[:keep]
        self._builder.check_prompt(field, token_ids)
        params = params.clone()  # its owner may change it for the next request while this one runs
        if self.tokenizer is None and params.detokenize:
            if params.stop:
                raise InvalidRequest("stop", "strings", "this server has no tokenizer; use stop_token_ids")
            params = params.replace(detokenize=False)
        return PreparedRequest(
            request_id=secrets.token_hex(16),
            prompt=prompt_text,
            prompt_token_ids=token_ids,
            params=params,
            token_params=self._builder.build(params, len(token_ids)),
            priority=priority,
            cache_salt=cache_salt,
            deadline_seconds=deadline_seconds,
        )

    def check_room(self, request: PreparedRequest, field: str, max_tokens: int | None) -> None:
        """Refuse a number of tokens that the caller named and that can't follow this prompt, as vLLM and OpenAI do."""
        num_prompt_tokens, most = len(request.prompt_token_ids), self.info.max_model_len
        room = most - num_prompt_tokens
        if max_tokens is not None and max_tokens > room:
            fix = f"this model takes {most} tokens and the prompt has {num_prompt_tokens}"
            raise InvalidRequest(field, max_tokens, f"{fix}; ask for at most {room}, or leave it out")

    async def stream(self, request: PreparedRequest) -> AsyncGenerator[list[TextDelta], None]:
        """The answers as they come. Close it (or let it be cancelled) to abort what has not ended."""
        answers = [
            AnswerText(self.tokenizer, request.params, request.token_params, index) for index in range(request.params.n)
        ]
        num_open = len(answers)
        source = self.client.submit(
            request.prompt_token_ids,
            request.token_params,
            n=request.params.n,
            priority=request.priority,
            cache_salt=request.cache_salt,
            deadline_seconds=request.deadline_seconds,
            request_id=request.request_id,
        )
        try:
            async for deltas in source:
                out = []
                for delta in deltas:
                    answer = answers[delta.index]
                    if answer.ended:
                        continue  # tokens that were under way when its stop string was found
                    if delta.error_code:
                        num_open -= 1
                        raise rebuild_error(delta)
                    text = answer.push(delta)
                    if text.finish_reason is not None:
                        num_open -= 1
                        if delta.finish_reason is None:
                            source.abort(delta.index)
                    out.append(text)
                if out:
                    yield out
                if not num_open:
                    return
        finally:
            if num_open:
                source.abort()

    async def generate(
        self, prompt: str | Sequence[int], params: SamplingParams, **options: Any
    ) -> AsyncIterator[TextDelta]:
        """`prepare` and `stream`, one delta at a time. `options` are those of `prepare`."""
        async with aclosing(self.stream(await self.prepare(prompt, params, **options))) as batches:
            async for batch in batches:
                for delta in batch:
                    yield delta

    async def complete(self, prompt: str | Sequence[int], params: SamplingParams, **options: Any) -> RequestOutput:
        """The whole answer. `options` are those of `prepare`."""
        request = await self.prepare(prompt, params, **options)
        return await self.collect(request)

    async def collect(self, request: PreparedRequest) -> RequestOutput:
        """The whole answer to a prepared request."""
        collector = OutputCollector(request.request_id, request.prompt, request.prompt_token_ids, request.params.n)
        async with aclosing(self.stream(request)) as batches:
            async for batch in batches:
                for delta in batch:
                    collector.add(delta)
        return collector.snapshot()

    async def start_templates(self) -> None:
        """From now on `render_conversation` has chat templates run in a process of their own."""
        if self._templates is not None:
            await self._templates.start()

    async def stop_templates(self) -> None:
        """End that process."""
        if self._templates is not None:
            await self._templates.close()

    async def render_conversation(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """As `render_chat`, for conversations of strangers: within a time, and without stopping anything else."""
        if self._templates is None or not self._templates.is_started:
            return self.render_chat(messages, **options)
        return await self._templates.render(messages, **options)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt for a conversation. `options` are those of `Tokenizer.chat_text`."""
        if self.tokenizer is None:
            raise InvalidRequest("messages", "text", "this server has no tokenizer; use completions with token ids")
        return self.tokenizer.chat_text(messages, **options)
