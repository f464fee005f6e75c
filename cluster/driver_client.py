"""An edge's connection to the driver: requests out, tokens in, for asyncio.

One connection carries all of an edge's requests. Those made in one pass of the event loop go out together, and say so,
since a driver with nothing to do had better begin with all of them. The driver sends one message a step with the tokens
of all its requests; it is decoded once, its parts go to the streams they belong to, and each stream that waits is woken
once.
"""

import asyncio
import os
import secrets
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, cast

from argosy.cluster.protocol.channel import FrameReader, encode_frame, open_socket, tune_socket
from argosy.cluster.protocol.errors import ChannelClosed, StartupTimeout
from argosy.cluster.protocol.messages import (
    AbortRequest,
    Burst,
    Drain,
    EngineInfo,
    GenerateRequest,
    Hello,
    PrefixCacheReset,
    ResetPrefixCache,
    StatsReply,
    StatsRequest,
    ToEdge,
    TokenDelta,
    TokenDeltas,
    Welcome,
)
from argosy.cluster.protocol.sampling import FinishReason, TokenParams

_ANSWER_SECONDS: Final = 10.0  # to a question that the driver's loop answers between two steps
_HELD_BYTES: Final = 32 * 1024  # of requests that wait for others of their burst: the driver can begin with so many


class TokenStream:
    """The answers to one request: iterate for what arrived since the last time, until all `n` have ended."""

    def __init__(self, client: "DriverClient", stream_id: int, n: int):
        self.stream_id = stream_id
        self.was_cut = False  # the driver went away, or was left, before all answers had ended
        self.can_move = False  # whoever reads it would go on at another driver
        self._client = client
        self._unfinished = set(range(n))
        self._arrived: list[TokenDelta] = []
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> list[TokenDelta]:
        while not self._arrived:
            if not self._unfinished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        arrived, self._arrived = self._arrived, []
        return arrived

    @property
    def client(self) -> "DriverClient":
        """The connection that it came over."""
        return self._client

    @property
    def finished(self) -> bool:
        """Whether all answers have ended (what arrived may still wait to be read)."""
        return not self._unfinished

    def abort(self, index: int | None = None) -> None:
        """Nobody wants this any more: all answers, or the one of `index`. Their last deltas still arrive."""
        if self._unfinished and not self._client.closed:
            indexes = () if index is None else (index,)
            self._client.send(AbortRequest(stream_id=self.stream_id, indexes=indexes))

    def push(self, delta: TokenDelta) -> bool:
        """Take what arrived; whether it was the last. For `DriverClient`."""
        self._arrived.append(delta)
        if delta.finish_reason is not None:
            self._unfinished.discard(delta.index)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return not self._unfinished

    def lose(self, reason: str) -> None:
        """The driver has gone, or is left: end every answer that has not ended."""
        self.was_cut = bool(self._unfinished)
        for index in sorted(self._unfinished):
            self.push(
                TokenDelta(
                    stream_id=self.stream_id,
                    index=index,
                    token_ids=(),
                    finish_reason=FinishReason.LOST,
                    error_code="request_lost",
                    error_message=reason,
                    error_status=500,
                )
            )


class DriverClient:
    """Open with `connect`. All methods belong to the event loop that opened it."""

    info: EngineInfo

    def __init__(self) -> None:
        self._wire = _Wire(self)
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, TokenStream] = {}
        self._next_stream_id = 0
        self._welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stats_waiters: deque[asyncio.Future[StatsReply]] = deque()
        self._reset_waiters: deque[asyncio.Future[bool]] = deque()
        self._held = bytearray()  # requests of this pass of the event loop, as frames
        self._is_flush_due = self._in_burst = False
        self.closed = False
        self.closed_reason = ""
        self.on_closed: asyncio.Event = asyncio.Event()

    @classmethod
    async def connect(cls, address: str, secret: str, *, timeout_seconds: float = 10.0) -> "DriverClient":
        """Connect, show the secret and wait until the engine is ready.

        Raises `ChannelClosed` when nobody is there or the secret is wrong, `StartupTimeout` at the deadline.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        sock = await asyncio.to_thread(open_socket, address, timeout_seconds)
        tune_socket(sock)
        sock.setblocking(False)
        client = cls()
        client._transport, _ = await loop.create_connection(lambda: client._wire, sock=sock)
        client.send(Hello(role="edge", secret=secret, pid=os.getpid()))
        try:
            async with asyncio.timeout_at(deadline):
                await client._welcome
        except TimeoutError:
            await client.close()
            raise StartupTimeout("the engine", timeout_seconds) from None
        except BaseException:
            await client.close()
            raise
        return client

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
        generated_token_ids: Sequence[Sequence[int]] = (),
    ) -> TokenStream:
        """Ask for tokens. The stream also carries refusals; with the driver gone it ends at once as LOST."""
        self._next_stream_id += 1
        stream = TokenStream(self, self._next_stream_id, n)
        if self.closed:
            stream.lose(self.closed_reason)
            return stream
        request = GenerateRequest(
            stream_id=stream.stream_id,
            request_id=request_id or secrets.token_hex(16),
            prompt_token_ids=prompt_token_ids,
            params=params,
            n=n,
            priority=priority,
            cache_salt=cache_salt,
            deadline_seconds=deadline_seconds,
            generated_token_ids=generated_token_ids,
        )
        self._hold(encode_frame(request))
        self._streams[stream.stream_id] = stream
        return stream

    def leave(self, most: int, reason: str) -> int:
        """Call off up to `most` requests that can go on elsewhere, the oldest first; how many that were."""
        leaving = [stream for stream in self._streams.values() if stream.can_move and not stream.finished][:most]
        for stream in leaving:
            stream.abort()
            del self._streams[stream.stream_id]  # what the driver still says of it comes too late
            stream.lose(reason)
        return len(leaving)

    async def stats(self, timeout_seconds: float = _ANSWER_SECONDS, *, known_names: int = -1) -> StatsReply:
        """The live figures, and names of cached blocks from that number on (-1: none).

        Raises `StartupTimeout` when the driver's loop does not answer in time.
        """
        reply: StatsReply = await self._ask(StatsRequest(known_names=known_names), self._stats_waiters, timeout_seconds)
        return reply

    async def reset_prefix_cache(self, timeout_seconds: float = _ANSWER_SECONDS) -> bool:
        """Forget all cached prefixes; False when blocks were in use."""
        done: bool = await self._ask(ResetPrefixCache(), self._reset_waiters, timeout_seconds)
        return done

    def drain(self) -> None:
        """Tell the driver to take no new requests."""
        self.send(Drain())

    async def close(self) -> None:
        """End the connection; streams that are open end as LOST (and the driver aborts their requests)."""
        if self._transport is not None:
            self._transport.close()
        self.connection_lost("this connection was closed")

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def send(self, message: object) -> None:
        """Queue a message to the driver, behind the requests so far; never waits."""
        if self.closed or self._transport is None:
            raise ChannelClosed(self.closed_reason or "the connection is not open")
        self._end_burst()
        self._transport.write(encode_frame(message))

    def _hold(self, frame: bytearray) -> None:
        """Keep a request until this pass of the event loop is over, or enough of them are there."""
        assert self._transport is not None
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)
        if self._held and not self._in_burst:
            self._in_burst = True
            self._transport.write(encode_frame(Burst(begins=True)) + self._held)
            self._held.clear()
        self._held += frame
        if self._in_burst and len(self._held) >= _HELD_BYTES:
            self._transport.write(bytes(self._held))
            self._held.clear()

    def _flush(self) -> None:
        self._is_flush_due = False
        if not self.closed:
            self._end_burst()

    def _end_burst(self) -> None:
        """Send what is held; nothing more belongs to it."""
        if self._in_burst:
            self._held += encode_frame(Burst(begins=False))
            self._in_burst = False
        if self._held:
            assert self._transport is not None
            self._transport.write(bytes(self._held))
            self._held.clear()

    async def _ask(self, question: object, waiters: "deque[asyncio.Future[Any]]", timeout_seconds: float) -> Any:
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.send(question)
        waiters.append(waiter)
        try:
            # Shielded: a waiter that gave up stays in the row, so that answers keep meeting their own questions.
            async with asyncio.timeout(timeout_seconds):
                return await asyncio.shield(waiter)
        except TimeoutError:
            raise StartupTimeout("the driver", timeout_seconds) from None

    # -------------------------------------------------------------------------------------- called by the wire

    def on_message(self, message: Any) -> None:
        """One message from the driver."""
        if isinstance(message, TokenDeltas):
            streams = self._streams
            for delta in message.deltas:
                stream = streams.get(delta.stream_id)
                if stream is not None and stream.push(delta):
                    del streams[delta.stream_id]
        elif isinstance(message, Welcome):
            self.info = message.info
            if not self._welcome.done():
                self._welcome.set_result(None)
        elif isinstance(message, StatsReply):
            _answer(self._stats_waiters, message)
        elif isinstance(message, PrefixCacheReset):
            _answer(self._reset_waiters, message.done)

    def connection_lost(self, reason: str) -> None:
        """The driver has gone, or sent what is no message: everything that waits hears of it."""
        if self.closed:
            return
        self.closed, self.closed_reason = True, reason
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.lose(reason)
        waiters: list[asyncio.Future[Any]] = [self._welcome, *self._stats_waiters, *self._reset_waiters]
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(ChannelClosed(reason))
                waiter.exception()  # nobody may be waiting any more: that is no reason for a warning
        self.on_closed.set()


def _answer(waiters: "deque[asyncio.Future[Any]]", value: object) -> None:
    if waiters:
        waiter = waiters.popleft()
        if not waiter.done():
            waiter.set_result(value)


class _Wire(asyncio.BufferedProtocol):
    """Bytes from the transport go straight into the frame reader's buffer."""

    def __init__(self, client: DriverClient):
        self._client = client
        self._reader = FrameReader(ToEdge)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports don't inherit from asyncio's

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        self._reader.filled(nbytes)
        try:
            while (message := self._reader.next()) is not None:
                self._client.on_message(message)
        except ChannelClosed as error:
            if self._transport is not None:
                self._transport.abort()
            self._client.connection_lost(str(error))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.connection_lost("the driver closed the connection" if exc is None else f"connection lost: {exc}")
