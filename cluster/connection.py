"""The driver's side of a connection: it never blocks its owner."""

import contextlib
import socket
from collections import deque
from typing import Any

import msgspec

from argosy.cluster.protocol.channel import MAX_FRAME_BYTES, FrameReader, encode_frame, tune_socket
from argosy.cluster.protocol.errors import ChannelClosed
from argosy.cluster.protocol.messages import Hello


class Connection:
    """A connection that never blocks its owner: what a slow peer does not take waits here, up to a bound."""

    def __init__(
        self,
        sock: socket.socket,
        receive: Any,
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        max_pending_bytes: int = 64 * 1024 * 1024,
    ):
        tune_socket(sock)
        sock.setblocking(False)
        self._socket = sock
        self._reader = FrameReader(receive, max_frame_bytes)
        self._pending: deque[memoryview] = deque()
        self._max_pending_bytes = max_pending_bytes
        self.num_pending_bytes = 0

    def accept_as(self, receive: Any, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        """The peer has shown who it is: from now on these messages, of this size, are expected of it."""
        self._reader.decoder = msgspec.msgpack.Decoder(receive)
        self._reader.max_frame_bytes = max_frame_bytes

    def receive(self) -> list[Any]:
        """All messages that are here now. Raises `ChannelClosed` at EOF or for anything that is not a message."""
        messages = []
        reader = self._reader
        try:
            space = reader.space()
            num_bytes = self._socket.recv_into(space)
            while num_bytes:
                reader.filled(num_bytes)
                while (message := reader.next()) is not None:
                    messages.append(message)
                    if isinstance(message, Hello):
                        return messages  # what follows is decoded once the owner has judged it: see `accept_as`
                if num_bytes < len(space):
                    return messages
                space = reader.space()
                num_bytes = self._socket.recv_into(space)
        except BlockingIOError:
            return messages
        except OSError as error:
            raise ChannelClosed(f"the connection broke: {error.strerror or error}") from error
        if messages:
            return messages  # EOF is met again at the next call
        raise ChannelClosed("the peer closed the connection")

    def decode_rest(self) -> list[Any]:
        """Messages that arrived right behind a `Hello`, after `accept_as`."""
        messages = []
        while (message := self._reader.next()) is not None:
            messages.append(message)
        return messages

    def send_frame(self, frame: bytes | bytearray) -> None:
        """Send now what goes without waiting, keep the rest. Raises `ChannelClosed` beyond the bound."""
        if self._pending:
            self._keep(memoryview(frame))
            return
        try:
            num_sent = self._socket.send(frame)
        except BlockingIOError:
            num_sent = 0
        except OSError as error:
            raise ChannelClosed(f"the peer went away: {error.strerror or error}") from error
        if num_sent < len(frame):
            self._keep(memoryview(frame)[num_sent:])

    def send(self, message: object) -> None:
        """Encode and send."""
        self.send_frame(encode_frame(message))

    def _keep(self, rest: memoryview) -> None:
        self._pending.append(rest)
        self.num_pending_bytes += len(rest)
        if self.num_pending_bytes > self._max_pending_bytes:
            raise ChannelClosed(f"the peer reads too slowly: {self.num_pending_bytes} bytes wait for it")

    def flush(self) -> None:
        """Send more of what waits; call when the socket is writable."""
        try:
            while self._pending:
                first = self._pending[0]
                num_sent = self._socket.send(first)
                self.num_pending_bytes -= num_sent
                if num_sent < len(first):
                    self._pending[0] = first[num_sent:]
                    return
                self._pending.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelClosed(f"the peer went away: {error.strerror or error}") from error

    @property
    def wants_to_write(self) -> bool:
        """Whether something waits until the socket is writable."""
        return bool(self._pending)

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the connection. May be called twice."""
        with contextlib.suppress(OSError):  # the other end was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
