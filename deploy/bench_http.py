"""Load on a server from outside, as clients see it: streamed completions, a given number of connections at once.

The client is as small as one can be, a protocol on a socket: at tens of thousands of tokens a second a comfortable one
would be what is measured.
"""

import asyncio
import json
import re
import ssl
import time
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from argosy.cluster.protocol.errors import ConfigError, ServingError
from argosy.deploy.bench_load import Ask, Timing, run_clients
from argosy.deploy.client import StreamBroken, error_of
from argosy.deploy.workload import Workload, WorkloadRequest

_SECONDS: Final = 900.0  # the longest answer
_USAGE: Final = re.compile(rb'"completion_tokens": ?(\d+)')
_PATH: Final = "/v1/completions"


async def run_load(
    url: str, workload: Workload, *, concurrency: int, api_key: str | None = None, extra: dict[str, Any] | None = None
) -> tuple[float, list[Timing]]:
    """Send all of it, at most `concurrency` at once; (seconds in all, one timing a request)."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=60.0, trust_env=False) as http:
        listing = await http.get("/v1/models")
        if listing.status_code != 200:
            raise error_of(listing)
        model = listing.json()["data"][0]["id"]
    clients = [_HttpClient(url, model, headers, extra or {}) for _ in range(min(concurrency, len(workload)))]
    asks: list[Ask] = [client.ask for client in clients]
    try:
        return await run_clients(asks, workload)
    except BaseExceptionGroup as group:  # not `except*`: up to Python 3.11.3 what it raises comes out in a group
        if (errors := group.subgroup(ServingError)) is None:
            raise
        raise errors.exceptions[0] from None
    finally:
        for client in clients:
            client.close()


class _HttpClient:
    """One connection, kept from request to request."""

    def __init__(self, url: str, model: str, headers: dict[str, str], extra: dict[str, Any]):
        parts = urlsplit(url)
        if parts.hostname is None:
            raise ConfigError(f"--url {url!r}: must be such as http://127.0.0.1:8000")
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/") + _PATH
        self._model, self._headers, self._extra = model, headers, extra
        self._stream: _Stream | None = None

    async def ask(self, request: WorkloadRequest) -> Timing:
        """Send it and read its answer to the end."""
        body = json.dumps(
            {
                "model": self._model,
                "prompt": request.prompt,
                "max_tokens": request.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self._extra,
            }
        ).encode()
        started = time.perf_counter()
        if self._stream is None or self._stream.is_closed:
            loop = asyncio.get_running_loop()
            _, self._stream = await loop.create_connection(_Stream, self._host, self._port, ssl=self._tls)
        stream = self._stream
        stream.send(self._path, {"Host": f"{self._host}:{self._port}", **self._headers}, body)
        try:
            await asyncio.wait_for(stream.ended, _SECONDS)
        except TimeoutError:
            self.close()
            raise StreamBroken(f"an answer did not end within {_SECONDS:g} s") from None
        if stream.status != 200:
            raise error_of(httpx.Response(stream.status, content=bytes(stream.text)))
        usage = _USAGE.findall(bytes(stream.text))
        if not usage:
            raise StreamBroken("a stream ended without its usage; the server must support stream_options.include_usage")
        return Timing(int(usage[-1]), stream.first_at - started, stream.last_at - started)

    def close(self) -> None:
        """Close the connection."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _Stream(asyncio.Protocol):
    """Reads one answer at a time: its status, the moments of its first and last data, and the end of its text."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_closed = False
        self._transport: asyncio.Transport | None = None
        self._begin()

    def _begin(self) -> None:
        self.status, self.first_at, self.last_at = 0, 0.0, 0.0
        self.text = bytearray()  # of the body as it lies on the wire; of a stream the last few kilobytes
        self._head = bytearray()
        self._length: int | None = None
        if self.ended.done():
            self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        if not self.ended.done():
            self.ended.set_exception(StreamBroken("the server closed the connection in the middle of an answer"))

    def send(self, path: str, headers: dict[str, str], body: bytes) -> None:
        """Ask; `ended` tells when the answer is there."""
        assert self._transport is not None
        self._begin()
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", "", ""]
        self._transport.write("\r\n".join(lines).encode() + body)

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.status:
            self._head += data
            head, found, data = bytes(self._head).partition(b"\r\n\r\n")
            if not found:
                return
            self.status = int(head.split(b" ", 2)[1])
            length = re.search(rb"(?im)^content-length: *(\d+)", head)
            self._length = int(length[1]) if length else None
            if not data and self._length != 0:
                return
        self.first_at = self.first_at or now
        self.text += data
        if b"data: {" in data:
            self.last_at = now
        whole = len(self.text) >= self._length if self._length is not None else self.text.endswith(b"0\r\n\r\n")
        if whole and not self.ended.done():
            self.ended.set_result(None)
        elif len(self.text) > 65536 and self._length is None:
            del self.text[:-4096]
