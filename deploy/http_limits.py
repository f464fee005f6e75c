"""What we are willing to read: limits as plain ASGI middleware, in front of everything else.

The declared length is judged before a byte of the body is read, then the bytes as they come. uvicorn and Ray Serve set
none of these, and Serve obeys some headers that a stranger may send: those never get further than here.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

from argosy.cluster.protocol.errors import DeadlineExceeded, PayloadTooLarge
from argosy.deploy.openai.errors import HttpRefusal, error_bytes, error_headers, status_of

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_HEADER_BYTES: Final = 32 * 1024
MAX_HEADERS: Final = 100
MAX_URL_BYTES: Final = 8 * 1024
MAX_BODY_CHUNKS: Final = 65_536
_LEAST_CHUNK_BYTES: Final = 1024  # of a large upload on average: a packet holds more
BODY_SECONDS: Final = 30.0  # for the whole body, and
BODY_BYTES_PER_SECOND: Final = 1024  # one second more for each so many bytes that did arrive
_MOST_DISCARDED_BYTES: Final = 64 * 1024 * 1024  # of a body that is too large, and
_DISCARD_SECONDS: Final = 5.0
_FORBIDDEN_HEADERS: Final = frozenset(
    {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id"}  # the last one chooses a replica
)
_TEXT_HEADERS: Final = frozenset({b"x-request-id", b"traceparent"})  # Ray Serve answers 500 when they are none
_FORBIDDEN_PREFIXES: Final = (b"serve_", b"serve-", b"x-argosy-")


class LimitsMiddleware:
    """Refuses what is too large or too slow, and takes away headers that only our own machines may set."""

    def __init__(
        self,
        app: App,
        *,
        max_body_bytes: int,
        body_seconds: float = BODY_SECONDS,
        max_upload_bytes: int = 0,
        upload_path: str = "",
    ):
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes, self._upload_path = max_upload_bytes, upload_path
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = bool(self._upload_path) and scope["method"] == "POST" and scope["path"].endswith(self._upload_path)
        max_bytes = self._max_upload_bytes if is_upload else self._max_body_bytes
        try:
            headers = check_head(scope, max_bytes)
        except PayloadTooLarge as error:
            await _discard_body(scope, receive)
            await refuse(error, send)
            return
        except HttpRefusal as error:
            await refuse(error, send)
            return
        body = _LimitedBody(receive, max_bytes, self._body_seconds)
        if is_upload:
            body.allow_chunks(max_bytes // _LEAST_CHUNK_BYTES)
        await self._app({**scope, "headers": headers}, body.receive, send)


def check_head(scope: Scope, max_body_bytes: int) -> list[tuple[bytes, bytes]]:
    """The header without what is only ours to set. Raises when it, the URL or the declared body is too large."""
    headers: list[tuple[bytes, bytes]] = list(scope["headers"])
    if len(headers) > MAX_HEADERS:
        raise HttpRefusal(431, "headers_too_large", f"there are more than {MAX_HEADERS} header fields; send fewer")
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        raise HttpRefusal(431, "headers_too_large", f"the header is larger than {MAX_HEADER_BYTES} bytes; send less")
    if len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b"")) > MAX_URL_BYTES:
        raise HttpRefusal(414, "url_too_long", f"the URL is longer than {MAX_URL_BYTES} bytes")
    for name, value in headers:
        if name == b"content-length" and (not value.isdigit() or int(value[:20]) > max_body_bytes):
            raise PayloadTooLarge("body", max_body_bytes)
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise HttpRefusal(400, "encoded_body", "send the body as it is, without Content-Encoding")
    return [
        (name, value)
        for name, value in headers
        if name not in _FORBIDDEN_HEADERS
        and not name.startswith(_FORBIDDEN_PREFIXES)
        and (value.isascii() or name not in _TEXT_HEADERS)
    ]


async def _discard_body(scope: Scope, receive: Receive) -> None:
    """Read what is on its way and drop it, within bounds.

    Whoever still sends when the connection is closed hears that it broke, not what we answered, and tries again.
    """
    headers = dict(scope["headers"])
    declared = headers.get(b"content-length", b"")[:20]
    if not declared.isdigit() or int(declared) > _MOST_DISCARDED_BYTES or b"expect" in headers:  # who asks first, waits
        return
    with contextlib.suppress(TimeoutError):  # so much is enough
        async with asyncio.timeout(_DISCARD_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass


class _LimitedBody:
    """`receive` that counts, and that gives up on a body that trickles."""

    def __init__(self, receive: Receive, max_bytes: int, seconds: float):
        self._receive = receive
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._started = time.monotonic()
        self._num_bytes = 0
        self._num_chunks = 0
        self._max_chunks = MAX_BODY_CHUNKS
        self._complete = False

    def allow_chunks(self, num_chunks: int) -> None:
        """More than those of a request, for a large upload."""
        self._max_chunks = max(num_chunks, MAX_BODY_CHUNKS)

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        allowed = self._seconds + self._num_bytes / BODY_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(self._started + min(allowed, 10 * self._seconds) - time.monotonic()):
                message = await self._receive()
        except TimeoutError as error:
            raise DeadlineExceeded(allowed) from error
        if message["type"] == "http.request":
            self._num_chunks += 1
            self._num_bytes += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._num_bytes > self._max_bytes:
                raise PayloadTooLarge("body", self._max_bytes)
            if self._num_chunks > self._max_chunks:
                raise PayloadTooLarge("number of body chunks", self._max_chunks)
        else:
            self._complete = True
        return message


async def refuse(error: BaseException, send: Send, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """Answer with an error and close the connection, since what the client is still sending was not read."""
    body = error_bytes(error)
    await send(
        {
            "type": "http.response.start",
            "status": status_of(error),
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                *error_headers(error),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})
