"""`/v1/chat/completions`: a conversation through the model's chat template; whole or streamed."""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.deploy.conversations import read_messages
from argosy.deploy.gateway import Gateway, PreparedRequest
from argosy.deploy.http_io import HttpRequest, Responder
from argosy.deploy.openai.errors import missing
from argosy.deploy.openai.fields import ChatFields, note_unknown, read_fields
from argosy.deploy.openai.serving import (
    DONE,
    EventLog,
    Usage,
    chat_logprobs,
    encode,
    merge_streams,
    prompt_logprobs_json,
    usage_of,
)
from argosy.deploy.outputs import CompletionOutput, TextDelta

_REASONING_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class ChatRun:
    """One request to this endpoint."""

    def __init__(self, gateway: Gateway, fields: ChatFields):
        self.gateway = gateway
        self.fields = fields
        self.id = f"chatcmpl-{fields.request_id or secrets.token_hex(16)}"
        self.created = int(time.time())
        self.model = gateway.check_model(fields.model)
        self.numbered = False
        self.role = gateway.config.server.response_role
        self.echo = ""
        self.request: PreparedRequest | None = None

    async def prepare(self, request: HttpRequest) -> None:
        """Check everything, render the conversation, tokenise it."""
        fields, gateway, tenant = self.fields, self.gateway, request.tenant
        self.numbered = request.wants_event_numbers
        fields.check_common()
        _check_not_supported(fields)
        params = fields.sampling_params(
            gateway.sampling_defaults, logprobs=self._num_logprobs(), max_tokens=self._max_tokens()
        )
        if fields.messages is None:
            raise missing("messages")
        messages = read_messages(fields.messages)
        if fields.echo or not fields.add_generation_prompt:
            last = messages[-1]
            self.role = str(last["role"]) if not fields.add_generation_prompt else self.role
            self.echo = str(last["content"] or "") if fields.echo and last["role"] == self.role else ""
        kwargs = dict(fields.chat_template_kwargs or {})
        if fields.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", fields.reasoning_effort)
        prompt = await gateway.render_conversation(
            messages,
            documents=fields.documents,
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            template_kwargs=kwargs,
        )
        self.request = await gateway.prepare(
            prompt,
            params,
            field="messages",
            priority=fields.priority,
            cache_salt=f"{tenant}{fields.cache_salt or ''}",
            add_special_tokens=fields.add_special_tokens,
            truncate_prompt_tokens=fields.truncate_prompt_tokens,
            truncation_side=fields.truncation_side,
        )
        asked = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
        gateway.check_room(self.request, asked, getattr(fields, asked))

    async def run_whole(self, responder: Responder) -> None:
        """Answer with one JSON object."""
        assert self.request is not None
        output = await self.gateway.collect(self.request)
        value: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(answer) for answer in output.outputs],
            "usage": usage_of([output]),
        }
        if self.fields.prompt_logprobs is not None:
            value["prompt_logprobs"] = prompt_logprobs_json(output.prompt_logprobs)
        if self.fields.return_token_ids:
            value["prompt_token_ids"] = list(self.request.prompt_token_ids)
        if self.fields.return_prompt_text:
            value["prompt_text"] = self.request.prompt
        await responder.json(value)

    async def run_stream(self, responder: Responder) -> None:
        """Answer with events: a role event and a final event for each answer, then `[DONE]`."""
        assert self.request is not None
        fields, options = self.fields, self.fields.stream_options
        with_usage = options is not None and options.include_usage
        always_usage = options is not None and options.continuous_usage_stats and with_usage
        head = encode({"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model})
        head = head[:-1] + b',"choices":['
        tail = b'],"usage":null}' if with_usage else b"]}"
        log, usage = EventLog(numbered=self.numbered), Usage(len(self.request.prompt_token_ids))
        async for place, deltas in merge_streams(self.gateway, [self.request]):
            events = []
            if not responder.started:
                await responder.start_stream()
                opening = encode({"role": self.role, "content": self.echo})
                events = [
                    log.event(b"%b%b%b" % (head, _chunk(index, opening, b"null"), tail)) for index in range(fields.n)
                ]
            for delta in deltas:
                usage.add(place, delta)
                if always_usage:
                    tail = b'],"usage":' + encode(usage.as_dict()) + b"}"
                logprobs = self._logprobs_of(delta.token_ids, delta.logprobs)
                if delta.text or logprobs or fields.return_token_ids:
                    content = b'{"content":%b}' % encode(delta.text)
                    more = b',"token_ids":' + encode(list(delta.token_ids)) if fields.return_token_ids else b""
                    chunk = _chunk(delta.index, content, encode(logprobs) if logprobs else b"null", more=more)
                    events.append(log.event(b"%b%b%b" % (head, chunk, tail)))
                if delta.finish_reason is not None:
                    events.append(log.event(b"%b%b%b" % (head, _final_chunk(delta), tail)))
            if events:
                await responder.events(b"".join(events))
        if with_usage:
            await responder.events(log.event(head + b'],"usage":' + encode(usage.as_dict()) + b"}"))
        await responder.events(DONE)
        await responder.end()

    def _choice(self, answer: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": answer.index,
            "message": {"role": self.role, "content": self.echo + answer.text, "refusal": None},
            "logprobs": self._logprobs_of(answer.token_ids, answer.logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self.fields.return_token_ids:
            choice["token_ids"] = list(answer.token_ids)
        return choice

    def _logprobs_of(self, token_ids: Sequence[int], figures: Any) -> Mapping[str, Any] | None:
        if not self.fields.logprobs or not figures:
            return None
        fields = self.fields
        return chat_logprobs(
            self.gateway.tokenizer, token_ids, figures, fields.top_logprobs or 0, fields.return_tokens_as_token_ids
        )

    def _num_logprobs(self) -> int | None:
        asked = self.fields.top_logprobs
        if not self.fields.logprobs:
            if asked:
                raise InvalidRequest("top_logprobs", asked, "needs logprobs: true")
            return None
        most = self.gateway.info.max_logprobs
        if asked is not None and (asked < 0 or (most != -1 and asked > most)):
            raise InvalidRequest("top_logprobs", asked, f"must be from 0 to {most} (the server's --max-logprobs)")
        return asked or 0

    def _max_tokens(self) -> int | None:
        fields = self.fields
        if fields.max_completion_tokens is not None:
            if not 1 <= fields.max_completion_tokens < 2**31:
                raise InvalidRequest("max_completion_tokens", fields.max_completion_tokens, "must be at least 1")
            return fields.max_completion_tokens
        if fields.max_tokens is not None:
            return fields.max_tokens
        default = self.gateway.sampling_defaults.get("max_tokens")
        return int(default) if default is not None else None


async def serve_chat(gateway: Gateway, body: Mapping[str, Any], request: HttpRequest, responder: Responder) -> None:
    """Run one request."""
    fields, unknown = read_fields(body, ChatFields)
    note_unknown(responder, unknown)
    run = ChatRun(gateway, fields)
    await run.prepare(request)
    await (run.run_stream if fields.stream else run.run_whole)(responder)


def _check_not_supported(fields: ChatFields) -> None:
    choice = fields.tool_choice
    if fields.tools and choice != "none":
        raise InvalidRequest(
            "tools", f"{len(fields.tools)} tools", "tools are not supported yet; set tool_choice 'none'"
        )
    if choice not in (None, "none", "auto"):
        raise InvalidRequest("tool_choice", "a choice", "tools are not supported yet; leave it out or say 'none'")
    if fields.chat_template is not None:
        raise InvalidRequest("chat_template", "given", "templates come from the operator only: --chat-template")
    if fields.modalities not in (None, ["text"]):
        raise InvalidRequest("modalities", "given", "only ['text'] is supported")
    effort = fields.reasoning_effort
    if effort is not None and effort not in _REASONING_EFFORTS:
        raise InvalidRequest("reasoning_effort", effort, f"must be one of {', '.join(_REASONING_EFFORTS)}")


def _chunk(index: int, delta: bytes, logprobs: bytes, *, more: bytes = b"") -> bytes:
    return b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null%b}' % (index, delta, logprobs, more)


def _final_chunk(delta: TextDelta) -> bytes:
    return b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b,"stop_reason":%b}' % (
        delta.index,
        encode(delta.finish_reason),
        encode(delta.stop_reason),
    )
