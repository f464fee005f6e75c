"""One HTTP exchange over ASGI: what came in, what goes out, and watching for a client that leaves or stops reading."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.deploy.http_limits import Receive, Scope, Send
from argosy.deploy.openai.json_body import read_json_object

STALL_SECONDS: Final = 30.0  # a reader who takes nothing for so long has left
_WATCH_SECONDS: Final = 5.0
_JSON: Final = (b"content-type", b"application/json")
_MAX_LABEL_CHARS: Final = 128
_MAX_QUERY_FIELDS: Final = 32


class ClientGone(Exception):
    """The client closed its connection while it sent its request."""


class HttpRequest:
    """The request as handlers see it. `request_id` is a label for people: the client's own, or a random one."""

    def __init__(self, scope: Scope, receive: Receive):
        prefix: str = scope.get("root_path", "")  # where the application is mounted
        self.path: str = scope["path"].removeprefix(prefix) if prefix != "/" else scope["path"]
        self.method: str = scope["method"]
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # of several the first counts
        self.request_id = _label(self.headers.get(b"x-request-id")) or secrets.token_hex(16)
        self.receive = receive
        self._query: bytes = scope.get("query_string", b"")
        self.tenant = ""
        self.body_was_read = False

    @property
    def wants_event_numbers(self) -> bool:
        """Whether the client speaks of server-sent events by name, and so reads all of their fields."""
        return b"text/event-stream" in self.headers.get(b"accept", b"")

    @property
    def query(self) -> dict[str, str]:
        """What stands behind the question mark; of several of one name the first counts."""
        try:
            pairs = parse_qsl(self._query.decode("latin-1"), keep_blank_values=True, max_num_fields=_MAX_QUERY_FIELDS)
        except ValueError as error:
            raise InvalidRequest("query", "the URL's", f"has at most {_MAX_QUERY_FIELDS} fields") from error
        return dict(reversed(pairs))

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; its size is bounded by the limits in front of us."""
        while True:
            message = await self.receive()
            if message["type"] != "http.request":
                raise ClientGone
            self.body_was_read = not message.get("more_body", False)
            yield message.get("body", b"")
            if self.body_was_read:
                return

    async def body(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def json(self) -> dict[str, Any]:
        """The JSON object in the body."""
        kind = self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            # also a defence: a web page can't send this type to us without being allowed to
            raise InvalidRequest("Content-Type", kind.decode("latin-1") or "nothing", "must be application/json")
        return read_json_object(await self.body())


class Responder:
    """The answer to one request, with its id where nobody in front adds it. `sending_since` tells the watch whether the
    client still reads."""

    def __init__(self, send: Send, request_id: str = ""):
        self._send = send
        self._headers = [(b"x-request-id", request_id.encode("latin-1", "replace"))] if request_id else []
        self.status = 0
        self.ended = False
        self.sending_since: float | None = None

    @property
    def started(self) -> bool:
        """Whether the status line is out."""
        return self.status != 0

    def add_header(self, name: bytes, value: bytes) -> None:
        """A header for the answer; before it starts."""
        self._headers.append((name, value))

    async def json(self, value: Any, *, status: int = 200) -> None:
        """A JSON answer."""
        await self.whole(msgspec.json.encode(value), status=status)

    async def whole(
        self, body: bytes, *, status: int = 200, content_type: tuple[bytes, bytes] = _JSON, close: bool = False
    ) -> None:
        """An answer in one piece."""
        self.add_header(b"content-length", str(len(body)).encode())
        if close:
            self.add_header(b"connection", b"close")
        await self.start(status, content_type)
        await self._body(body, more=False)

    async def start_stream(self) -> None:
        """Status and header of a stream of events."""
        self.add_header(b"cache-control", b"no-cache")
        self.add_header(b"x-accel-buffering", b"no")
        await self.start(200, (b"content-type", b"text/event-stream; charset=utf-8"))

    async def events(self, data: bytes) -> None:
        """One or more events. Waits while the client is slower than we are."""
        await self._body(data, more=True)

    async def end(self) -> None:
        """The end of a stream."""
        await self._body(b"", more=False)

    async def start(self, status: int, content_type: tuple[bytes, bytes]) -> None:
        """Status and header of an answer that comes in pieces."""
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [content_type, *self._headers]})

    async def _body(self, body: bytes, *, more: bool) -> None:
        self.sending_since = time.monotonic()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self.sending_since = None
        self.ended = not more


async def run_while_client_stays(
    work: Callable[[], Awaitable[None]],
    request: HttpRequest,
    responder: Responder,
    *,
    stall_seconds: float = STALL_SECONDS,
) -> bool:
    """Run `work`; cancel it when the client goes away or stops reading. Whether it ran to its end."""
    working = asyncio.ensure_future(work())
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        while True:
            await asyncio.wait((working, leaving), timeout=_WATCH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                await working
                return True
            since = responder.sending_since
            if leaving.done() or (since is not None and time.monotonic() - since > stall_seconds):
                return False
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_for_disconnect(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _label(given: bytes | None) -> str:
    """The client's id of its request, if it is short and printable ASCII; else nothing."""
    if not given or len(given) > _MAX_LABEL_CHARS or not all(0x20 < byte < 0x7F for byte in given):
        return ""
    return given.decode("ascii")
