"""`/v1/completions`: prompts as text or ids, one or many; whole or streamed."""

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.cluster.protocol.sampling import MAX_N
from argosy.deploy.gateway import Gateway, PreparedRequest
from argosy.deploy.http_io import HttpRequest, Responder
from argosy.deploy.openai.errors import missing
from argosy.deploy.openai.fields import MAX_ANSWERS, CompletionFields, note_unknown, read_fields
from argosy.deploy.openai.serving import (
    DONE,
    CompletionLogprobs,
    EventLog,
    Usage,
    collect_all,
    encode,
    merge_streams,
    prompt_logprobs_json,
    usage_of,
)
from argosy.deploy.outputs import CompletionOutput, RequestOutput, TextDelta

_MAX_TOKENS: Final = 16  # OpenAI's default


class CompletionRun:
    """One request to this endpoint."""

    def __init__(self, gateway: Gateway, fields: CompletionFields):
        self.gateway = gateway
        self.fields = fields
        self.id = f"cmpl-{fields.request_id or secrets.token_hex(16)}"
        self.created = int(time.time())
        self.model = gateway.check_model(fields.model)
        self.numbered = False
        self.requests: list[PreparedRequest] = []
        self.prompt_texts: list[str] = []
        # echo with max_tokens 0 asks for the figures of the prompt alone: one token is made and not shown
        self.prompt_only = fields.echo and fields.max_tokens == 0

    async def prepare(self, request: HttpRequest) -> None:
        """Check everything and tokenise all prompts."""
        fields, gateway, tenant = self.fields, self.gateway, request.tenant
        self.numbered = request.wants_event_numbers
        fields.check_common()
        if fields.suffix:
            raise InvalidRequest("suffix", fields.suffix, "filling in the middle is not supported; leave it out")
        prompts = _prompts(fields.prompt)
        num_answers = fields.best_of if fields.best_of is not None else fields.n
        if num_answers < fields.n:
            raise InvalidRequest("best_of", num_answers, f"must be at least n, which is {fields.n}")
        if fields.best_of is not None and num_answers != fields.n and fields.stream:
            raise InvalidRequest("best_of", num_answers, "can't be streamed: the best is known at the end only")
        if not 1 <= num_answers <= MAX_N:
            field = "best_of" if fields.best_of is not None else "n"
            raise InvalidRequest(field, num_answers, f"must be an integer from 1 to {MAX_N}")
        if num_answers * len(prompts) > MAX_ANSWERS:
            what = f"{len(prompts)} prompts with {num_answers} answers each"
            raise InvalidRequest("prompt", what, f"at most {MAX_ANSWERS} answers in one request")
        more: dict[str, Any] = {"n": num_answers, "logprobs": fields.logprobs}
        more["max_tokens"] = (
            1 if self.prompt_only else fields.max_tokens if fields.max_tokens is not None else _MAX_TOKENS
        )
        if num_answers != fields.n and fields.logprobs is None:
            more["logprobs"] = 0  # to tell which are the best
        if fields.echo and fields.logprobs is not None and fields.prompt_logprobs is None:
            more["prompt_logprobs"] = fields.logprobs
        params = fields.sampling_params(gateway.sampling_defaults, **more)
        for prompt in prompts:
            prepared = await gateway.prepare(
                prompt,
                params,
                priority=fields.priority,
                cache_salt=f"{tenant}{fields.cache_salt or ''}",
                add_special_tokens=fields.add_special_tokens,
                truncate_prompt_tokens=fields.truncate_prompt_tokens,
                truncation_side=fields.truncation_side,
            )
            gateway.check_room(prepared, "max_tokens", fields.max_tokens)
            self.requests.append(prepared)
            await asyncio.sleep(0)  # many prompts together may be long: other streams get their turn
            self.prompt_texts.append(self._echo_text(prepared) if fields.echo else "")

    async def run_whole(self, responder: Responder) -> None:
        """Answer with one JSON object."""
        outputs = await collect_all(self.gateway, self.requests)
        choices = []
        for place, output in enumerate(outputs):
            for number, answer in enumerate(_best(output.outputs, self.fields.n)):
                index = place * self.fields.n + number
                choices.append(self._choice(index, self.prompt_texts[place], output, answer))
        await responder.json(
            {
                "id": self.id,
                "object": "text_completion",
                "created": self.created,
                "model": self.model,
                "choices": choices,
                "usage": usage_of(outputs, without_answers=self.prompt_only),
            }
        )

    async def run_stream(self, responder: Responder) -> None:
        """Answer with events; the last one is `[DONE]`."""
        fields, n = self.fields, self.fields.n
        options = fields.stream_options
        with_usage = options is not None and options.include_usage
        always_usage = options is not None and options.continuous_usage_stats and with_usage
        # what is the same in every event is made once: an event costs one join, not one tree of objects
        head = encode({"id": self.id, "object": "text_completion", "created": self.created, "model": self.model})[:-1]
        tail = b'],"usage":null}' if with_usage else b"]}"
        log, usage = (
            EventLog(numbered=self.numbered),
            Usage(sum(len(request.prompt_token_ids) for request in self.requests)),
        )
        columns = [self._logprob_columns() for _ in range(n * len(self.requests))]
        first_of = set(range(len(columns))) if fields.echo else set()
        async for place, deltas in merge_streams(self.gateway, self.requests):
            if not responder.started:
                await responder.start_stream()
            events = []
            for delta in deltas:
                usage.add(place, delta)
                if self.prompt_only:
                    usage.num_completion_tokens = 0
                index = place * n + delta.index
                text, logprobs = (
                    ("", None) if self.prompt_only else (delta.text, self._delta_logprobs(delta, columns[index]))
                )
                if index in first_of:
                    first_of.discard(index)
                    text = self.prompt_texts[place] + text
                    logprobs = self._with_prompt(place, delta, columns[index], logprobs)
                if not (text or logprobs or delta.finish_reason or fields.return_token_ids):
                    continue
                if always_usage:
                    tail = b'],"usage":' + encode(usage.as_dict()) + b"}"
                parts = [
                    head,
                    b',"choices":[{"index":%d,"text":' % index,
                    encode(text),
                    b',"logprobs":',
                    encode(logprobs),
                ]
                parts += [
                    b',"finish_reason":',
                    encode(delta.finish_reason),
                    b',"stop_reason":',
                    encode(delta.stop_reason),
                ]
                if fields.return_token_ids:
                    parts += [b',"token_ids":', encode(list(delta.token_ids))]
                if fields.prompt_logprobs is not None and delta.prompt_logprobs is not None:
                    parts += [b',"prompt_logprobs":', encode(prompt_logprobs_json(delta.prompt_logprobs))]
                events.append(log.event(b"".join([*parts, b"}", tail])))
            if events:
                await responder.events(b"".join(events))
        if with_usage:
            await responder.events(log.event(head + b',"choices":[],"usage":' + encode(usage.as_dict()) + b"}"))
        await responder.events(DONE)
        await responder.end()

    def _choice(self, index: int, prompt_text: str, output: RequestOutput, answer: CompletionOutput) -> dict[str, Any]:
        fields = self.fields
        text, token_ids = (answer.text, list(answer.token_ids)) if not self.prompt_only else ("", [])
        logprobs = None
        if fields.logprobs is not None:
            figures: list[Any] = list(answer.logprobs or ()) if not self.prompt_only else []
            shown: Sequence[int] = token_ids
            if fields.echo and output.prompt_logprobs is not None:
                shown = [*(output.prompt_token_ids or ()), *token_ids]
                figures = [*output.prompt_logprobs, *figures]
            logprobs = CompletionLogprobs(self.gateway.tokenizer, fields.return_tokens_as_token_ids).build(
                shown, figures
            )
        choice: dict[str, Any] = {
            "index": index,
            "text": prompt_text + text,
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason if not self.prompt_only else "length",
            "stop_reason": answer.stop_reason,
        }
        if fields.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_json(output.prompt_logprobs)
        if fields.return_token_ids:
            choice["token_ids"] = token_ids
            choice["prompt_token_ids"] = list(output.prompt_token_ids or ())
        return choice

    def _logprob_columns(self) -> CompletionLogprobs | None:
        if self.fields.logprobs is None:
            return None
        return CompletionLogprobs(self.gateway.tokenizer, self.fields.return_tokens_as_token_ids)

    def _delta_logprobs(self, delta: TextDelta, columns: CompletionLogprobs | None) -> dict[str, Any] | None:
        if columns is None or delta.logprobs is None:
            return None
        return columns.build(delta.token_ids, delta.logprobs)

    def _with_prompt(
        self, place: int, delta: TextDelta, columns: CompletionLogprobs | None, answer: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        """The columns of the prompt, with those of the first delta behind them."""
        if columns is None or delta.prompt_logprobs is None:
            return dict(answer) if answer is not None else None
        fresh = self._logprob_columns()
        assert fresh is not None
        found = fresh.build(self.requests[place].prompt_token_ids, delta.prompt_logprobs)
        shift = sum(len(name) for name in found["tokens"])
        columns.shift(shift)
        for name, column in (answer or {}).items():
            found[name] += [offset + shift for offset in column] if name == "text_offset" else column
        return found

    def _echo_text(self, request: PreparedRequest) -> str:
        if request.prompt is not None:
            return request.prompt
        if self.gateway.tokenizer is None:
            raise InvalidRequest("echo", True, "this server has no tokenizer")
        return self.gateway.tokenizer.decode(request.prompt_token_ids)


async def serve_completions(
    gateway: Gateway, body: Mapping[str, Any], request: HttpRequest, responder: Responder
) -> None:
    """Run one request."""
    fields, unknown = read_fields(body, CompletionFields)
    note_unknown(responder, unknown)
    run = CompletionRun(gateway, fields)
    await run.prepare(request)
    await (run.run_stream if fields.stream else run.run_whole)(responder)


def _prompts(given: Any) -> list[str | list[int]]:
    """One prompt or many, text or ids."""
    if given is None:
        raise missing("prompt")
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise InvalidRequest("prompt", type(given).__name__, "must be text, ids, or a list of one of them, not empty")
    if isinstance(given[0], int):
        return [given]  # its ids are checked with all others
    if len(given) > MAX_ANSWERS:
        raise InvalidRequest("prompt", f"{len(given)} prompts", f"at most {MAX_ANSWERS} prompts in one request")
    if not (all(isinstance(p, str) for p in given) or all(isinstance(p, list) for p in given)):
        raise InvalidRequest("prompt", "a mixed list", "all prompts must be text, or all lists of token ids")
    return list(given)


def _best(answers: Sequence[CompletionOutput], n: int) -> list[CompletionOutput]:
    """The `n` answers with the highest mean logprob; all of them, in order, when there are no more."""
    if len(answers) == n:
        return list(answers)
    ranked = sorted(answers, key=lambda a: -(a.cumulative_logprob or 0.0) / max(1, len(a.token_ids)))
    return ranked[:n]
