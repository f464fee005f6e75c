"""`Client` and `AsyncClient`: talk to an Argosy server (or another one that speaks OpenAI's API) from Python.

    ServingError                what the server refused comes back as the class the server raised
      RemoteError               mixed into each of them: `status`, `code`, `param`, and the server's sentence
      ServerUnreachable         no answer at that address
      StreamBroken              a stream ended without saying that it was complete

    with Client("http://127.0.0.1:8000") as client:
        print(client.complete("Once upon a time", max_tokens=16).text)
        for piece in client.stream_chat([{"role": "user", "content": "Hello"}]):
            print(piece, end="", flush=True)

A 503 (queue full, still starting) is tried again, after the server's Retry-After or with growing pauses, until
`retry_seconds` are over. Nothing else is: a request that may have begun is never sent twice.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import httpx

from argosy.deploy.client_wire import (
    Answer,
    Choice,
    Events,
    Patience,
    RemoteError,
    ServerUnreachable,
    StreamBroken,
    answer_of,
    checked,
    error_of,
    http_options,
    unreachable,
    with_json,
)
from argosy.deploy.jobs_client import Job, JobRequest, JobServer, submit

__all__ = [
    "Answer",
    "AsyncClient",
    "Choice",
    "Client",
    "Job",
    "RemoteError",
    "ServerUnreachable",
    "StreamBroken",
    "error_of",
]

Prompt: TypeAlias = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
Messages: TypeAlias = Sequence[Mapping[str, Any]]

DEFAULT_URL = "http://127.0.0.1:8000"
JOB_OUTAGE_SECONDS = 600.0  # that a server may be away before a call about a job gives up


class Client:
    """A server at `url`, for code that waits. Safe to share between threads; close it, or use `with`."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 600.0,
        retry_seconds: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ):
        self._retry_seconds = retry_seconds
        self._model: str | None = None
        self._http = httpx.Client(**http_options(url, api_key, timeout_seconds), transport=transport)

    def complete(self, prompt: Prompt, *, model: str | None = None, **params: Any) -> Answer:
        """Continue `prompt`. `params` are the fields of `/v1/completions` (max_tokens, temperature, ...)."""
        body = {"model": model or self._default_model(), "prompt": prompt, **params}
        return answer_of(self._call("POST", "/v1/completions", body))

    def chat(self, messages: Messages, *, model: str | None = None, **params: Any) -> Answer:
        """Answer a conversation. `params` are the fields of `/v1/chat/completions`."""
        body = {"model": model or self._default_model(), "messages": messages, **params}
        return answer_of(self._call("POST", "/v1/chat/completions", body))

    def stream_complete(self, prompt: Prompt, *, model: str | None = None, **params: Any) -> Iterator[str]:
        """As `complete`, a piece of text at a time."""
        yield from self._stream("/v1/completions", {"prompt": prompt, **params}, model)

    def stream_chat(self, messages: Messages, *, model: str | None = None, **params: Any) -> Iterator[str]:
        """As `chat`, a piece of text at a time."""
        yield from self._stream("/v1/chat/completions", {"messages": messages, **params}, model)

    def models(self) -> list[str]:
        """The names that requests may give as `model`."""
        return [row["id"] for row in self._call("GET", "/v1/models")["data"]]

    def health(self) -> bool:
        """Whether the server serves now. Never raises and is not tried again."""
        try:
            return self._http.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def tokenize(self, text: str, *, model: str | None = None, **params: Any) -> list[int]:
        """The token ids of `text`."""
        body = {"model": model or self._default_model(), "prompt": text, **params}
        return list(self._call("POST", "/tokenize", body)["tokens"])

    def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        """The text of `token_ids`."""
        body = {"model": model or self._default_model(), "tokens": list(token_ids)}
        return str(self._call("POST", "/detokenize", body)["prompt"])

    def submit(
        self,
        requests: str | Path | Iterable[JobRequest],
        *,
        endpoint: str | None = None,
        key: str | None = None,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        outage_seconds: float = JOB_OUTAGE_SECONDS,
        **params: Any,
    ) -> Job:
        """Leave many requests (or a file of JSON lines) with the server, which works them off; see `jobs_client`.

        `params` are for requests that don't say otherwise. With a `key` of your own the same call made again, after
        a kill of this program say, gives the job that the first one made.
        """
        return submit(
            JobServer(self._http, outage_seconds),
            requests,
            endpoint=endpoint,
            key=key,
            completion_window=completion_window,
            metadata=metadata,
            defaults={"model": params.pop("model", None) or self._default_model(), **params},
        )

    def job(self, job_id: str, *, outage_seconds: float = JOB_OUTAGE_SECONDS) -> Job:
        """A job that was submitted before, here or elsewhere."""
        server = JobServer(self._http, outage_seconds)
        return Job(server, server.call("GET", f"/v1/batches/{job_id}"))

    def jobs(self, *, limit: int = 20) -> list[Job]:
        """The newest jobs."""
        server = JobServer(self._http, self._retry_seconds)
        return [Job(server, row) for row in server.call("GET", "/v1/batches", params={"limit": limit})["data"]]

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _default_model(self) -> str:
        if self._model is None:
            self._model = self.models()[0]
        return self._model

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        patience = Patience(self._retry_seconds)
        while True:
            try:
                response = self._http.request(method, path, **with_json(body))
            except httpx.HTTPError as error:
                raise unreachable(self._http.base_url, error) from error
            if (pause := patience.pause_before_next_try(response)) is None:
                return checked(response)
            time.sleep(pause)

    def _stream(self, path: str, body: dict[str, Any], model: str | None) -> Iterator[str]:
        body = {"model": model or self._default_model(), **body, "stream": True}
        patience = Patience(self._retry_seconds)
        while True:
            events = Events()
            try:
                with self._http.stream("POST", path, **with_json(body)) as response:
                    if response.status_code == 200:
                        for line in response.iter_lines():
                            yield from events.texts(line)
                        return events.check_complete()
                    response.read()
                    pause = patience.pause_before_next_try(response)
            except httpx.HTTPError as error:
                raise events.broken(self._http.base_url, error) from error
            if pause is None:
                checked(response)
            time.sleep(pause or 0.0)


class AsyncClient:
    """A server at `url`, for asyncio. The methods are `Client`'s, awaited; streams are asynchronous iterators."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 600.0,
        retry_seconds: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self._retry_seconds = retry_seconds
        self._model: str | None = None
        self._http = httpx.AsyncClient(**http_options(url, api_key, timeout_seconds), transport=transport)

    async def complete(self, prompt: Prompt, *, model: str | None = None, **params: Any) -> Answer:
        """Continue `prompt`. `params` are the fields of `/v1/completions` (max_tokens, temperature, ...)."""
        body = {"model": model or await self._default_model(), "prompt": prompt, **params}
        return answer_of(await self._call("POST", "/v1/completions", body))

    async def chat(self, messages: Messages, *, model: str | None = None, **params: Any) -> Answer:
        """Answer a conversation. `params` are the fields of `/v1/chat/completions`."""
        body = {"model": model or await self._default_model(), "messages": messages, **params}
        return answer_of(await self._call("POST", "/v1/chat/completions", body))

    async def stream_complete(self, prompt: Prompt, *, model: str | None = None, **params: Any) -> AsyncIterator[str]:
        """As `complete`, a piece of text at a time."""
        async for text in self._stream("/v1/completions", {"prompt": prompt, **params}, model):
            yield text

    async def stream_chat(self, messages: Messages, *, model: str | None = None, **params: Any) -> AsyncIterator[str]:
        """As `chat`, a piece of text at a time."""
        async for text in self._stream("/v1/chat/completions", {"messages": messages, **params}, model):
            yield text

    async def models(self) -> list[str]:
        """The names that requests may give as `model`."""
        return [row["id"] for row in (await self._call("GET", "/v1/models"))["data"]]

    async def health(self) -> bool:
        """Whether the server serves now. Never raises and is not tried again."""
        try:
            return (await self._http.get("/health")).status_code == 200
        except httpx.HTTPError:
            return False

    async def tokenize(self, text: str, *, model: str | None = None, **params: Any) -> list[int]:
        """The token ids of `text`."""
        body = {"model": model or await self._default_model(), "prompt": text, **params}
        return list((await self._call("POST", "/tokenize", body))["tokens"])

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        """The text of `token_ids`."""
        body = {"model": model or await self._default_model(), "tokens": list(token_ids)}
        return str((await self._call("POST", "/detokenize", body))["prompt"])

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _default_model(self) -> str:
        if self._model is None:
            self._model = (await self.models())[0]
        return self._model

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        patience = Patience(self._retry_seconds)
        while True:
            try:
                response = await self._http.request(method, path, **with_json(body))
            except httpx.HTTPError as error:
                raise unreachable(self._http.base_url, error) from error
            if (pause := patience.pause_before_next_try(response)) is None:
                return checked(response)
            await asyncio.sleep(pause)

    async def _stream(self, path: str, body: dict[str, Any], model: str | None) -> AsyncIterator[str]:
        body = {"model": model or await self._default_model(), **body, "stream": True}
        patience = Patience(self._retry_seconds)
        while True:
            events = Events()
            try:
                async with self._http.stream("POST", path, **with_json(body)) as response:
                    if response.status_code == 200:
                        async for line in response.aiter_lines():
                            for text in events.texts(line):
                                yield text
                        events.check_complete()
                        return
                    await response.aread()
                    pause = patience.pause_before_next_try(response)
            except httpx.HTTPError as error:
                raise events.broken(self._http.base_url, error) from error
            if pause is None:
                checked(response)
            await asyncio.sleep(pause or 0.0)
