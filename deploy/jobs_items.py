"""One item of a job, run as the HTTP door would run it: the same code, the same answer, at a lower priority."""

import copy
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from argosy.cluster.protocol.errors import (
    ClusterError,
    DeadlineExceeded,
    Overloaded,
    RequestAborted,
    RequestLost,
)
from argosy.cluster.protocol.messages import EngineInfo, StatsReply
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.request import BATCH_PRIORITY
from argosy.deploy.gateway import EngineClient, EngineStream, Gateway
from argosy.deploy.http_io import HttpRequest, Responder
from argosy.deploy.http_limits import Message
from argosy.deploy.jobs_folder import JobFolder
from argosy.deploy.jobs_input import JobInput, read_input
from argosy.deploy.jobs_rows import ClaimedItem, Ended, JobRow, result_id
from argosy.deploy.openai.errors import error_bytes, log_unexpected, missing, status_of
from argosy.deploy.openai.fields import ChatFields, CompletionFields, read_fields
from argosy.deploy.openai.json_body import read_json_object

Work = Callable[[Gateway, Mapping[str, Any], HttpRequest, Responder], Awaitable[None]]

_TRANSIENT: Final = (ClusterError, RequestLost, RequestAborted, DeadlineExceeded)
_PAUSE_SECONDS: Final = 0.5  # after a loss, so that an outage does not eat up an item's attempts
_MAX_PRIORITY: Final = 2**31 - 1
# what an item must at least have; endpoints that are not named here are judged when the item runs
_FIELDS: Final[Mapping[str, tuple[type[ChatFields] | type[CompletionFields], str]]] = {
    "/v1/chat/completions": (ChatFields, "messages"),
    "/v1/completions": (CompletionFields, "prompt"),
}


class GatewayItems:
    """Items run through the gateway of this process. `num_interactive` says how many requests of people are open.

    `is_alone`: nobody else uses the engine.
    """

    def __init__(
        self,
        gateway: Gateway,
        works: Mapping[str, Work],
        folder: JobFolder,
        *,
        num_interactive: Callable[[], int] = lambda: 0,
        is_alone: bool = False,
    ):
        self.works = works
        self._gateway = copy.copy(gateway)
        # a cast: its `closed` is a property, since it reads the client's anew each time
        self._gateway.client = cast(EngineClient, _LowPriorityClient(gateway))
        self._client_of = gateway
        self._folder = folder
        self._num_interactive = num_interactive
        self._is_alone = is_alone
        self._not_before = float("-inf")

    @property
    def model_names(self) -> Sequence[str]:
        """The names that this server serves."""
        return self._gateway.model_names

    def num_seats(self) -> int:
        """Nearly all rows of a step, less those that people need: an eighth stays free for who comes next."""
        if self._client_of.client.closed or time.monotonic() < self._not_before:
            return 0
        most = self._gateway.info.max_num_seqs * getattr(self._client_of.client, "num_open", 1)
        if self._is_alone:
            return most + max(1, most // 4)  # some wait at the engine, so that it never runs dry
        return max(1, most - max(1, most // 8) - self._num_interactive())

    def read_input(self, job: JobRow) -> JobInput:
        """Check a job's input."""
        return read_input(
            self._folder.file(job.input_file_id),
            endpoint=job.endpoint,
            check_body=lambda body: self._check(job.endpoint, body),
            max_line_bytes=self._gateway.config.server.max_body_bytes,
        )

    async def run(self, job: JobRow, item: ClaimedItem) -> Ended:
        """The item's answer as a result line; none when it has to be run again."""
        label = result_id(job.id, item.line)
        answer = _Answer()
        responder = Responder(answer.send, label)
        request = HttpRequest(_scope(job.endpoint, label), answer.receive)
        request.tenant = job.tenant
        try:
            body = read_json_object(self._read(job, item))["body"]
            await self.works[job.endpoint](self._gateway, body, request, responder)
            status, content = responder.status, bytes(answer.content)
        except Overloaded as error:
            self._not_before = time.monotonic() + max(_PAUSE_SECONDS, error.retry_after_seconds)
            return Ended(item.line, is_innocent=True)
        except _TRANSIENT:
            self._not_before = time.monotonic() + _PAUSE_SECONDS
            return Ended(item.line)
        except Exception as error:  # whatever happens to an item, it gets its line
            log_unexpected(error, label)
            status, content = status_of(error), error_bytes(error, label)
        response = {"status_code": status, "request_id": label, "body": msgspec.Raw(content)}
        line = {"id": label, "custom_id": item.custom_id, "response": response, "error": None}
        return Ended(item.line, status < 400, msgspec.json.encode(line))

    def _read(self, job: JobRow, item: ClaimedItem) -> bytes:
        with self._folder.file(job.input_file_id).open("rb") as file:
            return os.pread(file.fileno(), item.length, item.start)

    def _check(self, endpoint: str, body: Mapping[str, Any]) -> str:
        model = self._gateway.check_model(body.get("model"))
        if endpoint in _FIELDS:
            kind, needed = _FIELDS[endpoint]
            fields, _ = read_fields(body, kind)
            if getattr(fields, needed) is None:
                raise missing(needed)
        return model


class _LowPriorityClient:
    """The gateway's client, whose requests go behind those of people."""

    def __init__(self, gateway: Gateway):
        self._gateway = gateway  # asked each time: it may connect anew

    @property
    def info(self) -> EngineInfo:
        return self._gateway.client.info

    @property
    def closed(self) -> bool:
        return self._gateway.client.closed

    def submit(
        self, prompt_token_ids: Sequence[int], params: TokenParams, *, priority: int = 0, **more: Any
    ) -> EngineStream:
        """As the client's."""
        priority = min(max(1, BATCH_PRIORITY + priority), _MAX_PRIORITY)
        return self._gateway.client.submit(prompt_token_ids, params, priority=priority, **more)

    async def stats(self) -> StatsReply:
        """As the client's."""
        return await self._gateway.client.stats()

    async def reset_prefix_cache(self) -> bool:
        """As the client's."""
        return await self._gateway.client.reset_prefix_cache()


class _Answer:
    """The other end of the doors' code: takes what it sends."""

    def __init__(self) -> None:
        self.content = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.content += message.get("body", b"")

    async def receive(self) -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}


def _scope(path: str, label: str) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", label.encode())]
    return {"type": "http", "path": path, "root_path": "", "method": "POST", "headers": headers, "query_string": b""}
