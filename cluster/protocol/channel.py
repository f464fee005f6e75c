"""The wire: msgpack messages in frames, over AF_UNIX inside a node and TCP between nodes.

A frame is a 4-byte little-endian length and that many bytes of msgpack; what may be in it is a union of `messages`, so
that a peer can send nothing that we did not expect. `Channel` blocks (ranks, tests, tools); the driver's loop has
`cluster.connection`, which never does; an edge, which lives in asyncio, uses `FrameReader` itself.

Addresses are text: "unix:/path" or "tcp:host:port". One more form, "tcp:host:port|relay=unix:/path", is for one rank of
each node that is not the driver's: it passes the driver's frames on to its neighbours, which connect to that path. So a
step crosses the network once for a node (see `cluster.protocol.relay`; whoever calls `Channel.connect` need not know).
"""

import contextlib
import hmac
import os
import select
import socket
import struct
import threading
import time
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.errors import ChannelClosed, ConfigError
from argosy.cluster.protocol.messages import Hello

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024
MAX_HELLO_BYTES: Final = 16 * 1024  # what a stranger may send before it has shown the secret
MAX_UNIX_PATH_BYTES: Final = 100  # Linux takes 107
RELAY: Final = "|relay="
_HEADER: Final = struct.Struct("<I")
_FIRST_BUFFER_BYTES: Final = 64 * 1024
_KEPT_BUFFER_BYTES: Final = 4 * 1024 * 1024
_UNIX_BUFFER_BYTES: Final = 1024 * 1024
# A cut cable sends no EOF. Ten seconds of silence to unacknowledged data, or of unanswered probes, count as one.
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 4), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))
_USER_TIMEOUT_MS: Final = 10_000
_encoder: Final = msgspec.msgpack.Encoder()


def encode_frame(message: object) -> bytearray:
    """The bytes of one message, ready to be sent to any number of peers."""
    frame = bytearray(4)
    _encoder.encode_into(message, frame, 4)
    size = len(frame) - 4
    if size > MAX_FRAME_BYTES:
        raise ConfigError(
            f"a message of {size} bytes exceeds the limit of {MAX_FRAME_BYTES}; send fewer tokens at once"
        )
    _HEADER.pack_into(frame, 0, size)
    return frame


def secret_matches(hello: Hello, secret: str) -> bool:
    """Whether the peer knows our secret; takes as long for a wrong one as for a right one."""
    return hmac.compare_digest(hello.secret.encode("utf-8", "surrogatepass"), secret.encode())


class FrameReader:
    """Bytes in, messages out. Keeps what is left of a frame until the rest arrives."""

    def __init__(self, receive: Any, max_frame_bytes: int = MAX_FRAME_BYTES):
        self.decoder = msgspec.msgpack.Decoder(receive)
        self.max_frame_bytes = max_frame_bytes
        self._buffer = bytearray(_FIRST_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0  # [start, end) holds bytes that are not yet messages
        self._end = 0

    def space(self) -> memoryview:
        """Where the next bytes may be written. It grows as a large frame arrives, never by its word alone."""
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._buffer) > _KEPT_BUFFER_BYTES:  # one huge prompt must not cost its size for ever
                self._buffer = bytearray(_FIRST_BUFFER_BYTES)
                self._view = memoryview(self._buffer)
        elif self._end == len(self._buffer):
            kept = self._end - self._start
            larger = self._buffer if kept * 2 <= len(self._buffer) else bytearray(len(self._buffer) * 2)
            larger[:kept] = bytes(self._view[self._start : self._end])
            self._buffer, self._view = larger, memoryview(larger)
            self._start, self._end = 0, kept
        return self._view[self._end :]

    def filled(self, num_bytes: int) -> None:
        """So many bytes were written into `space()`."""
        self._end += num_bytes

    def feed(self, data: bytes) -> None:
        """Take bytes that somebody else read."""
        rest = memoryview(data)
        while rest:
            space = self.space()
            part = min(len(space), len(rest))
            space[:part] = rest[:part]
            self.filled(part)
            rest = rest[part:]

    def next_frame(self) -> memoryview | None:
        """The body of the next whole frame, valid until `space` is called; None when more bytes are needed."""
        start = self._start
        if self._end - start < 4:
            return None
        size = _HEADER.unpack_from(self._buffer, start)[0]
        if size > self.max_frame_bytes:
            raise ChannelClosed(f"a frame of {size} bytes was announced; the limit is {self.max_frame_bytes}")
        if self._end - start - 4 < size:
            return None
        self._start = start + 4 + size
        return self._view[start + 4 : self._start]

    def next(self) -> Any:
        """The next whole message, or None. Raises `ChannelClosed` for a frame that holds none of ours."""
        frame = self.next_frame()
        return None if frame is None else self.decode(frame)

    def decode(self, frame: memoryview) -> Any:
        """The message in the body of a frame."""
        try:
            return self.decoder.decode(frame)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            # The text of the error names types and places, never values.
            raise ChannelClosed(f"the peer sent something that is not a message: {error}") from None

    @property
    def num_waiting_bytes(self) -> int:
        """Bytes of a frame whose rest has not arrived."""
        return self._end - self._start


class Channel:
    """A blocking connection that carries messages. Any thread may send; one at a time receives."""

    def __init__(self, sock: socket.socket, receive: Any, *, max_frame_bytes: int = MAX_FRAME_BYTES):
        tune_socket(sock)
        self._socket = sock
        self._reader = FrameReader(receive, max_frame_bytes)
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, address: str, receive: Any, *, timeout_seconds: float = 30.0) -> "Channel":
        """Open a connection. `receive` is the union to decode: `FromRank`, `ToRank`, `FromEdge` or `ToEdge`.

        Tries again until the deadline when nobody listens yet; then raises `ChannelClosed`.
        """
        address, _, relay_address = address.partition(RELAY)
        sock = open_socket(address, timeout_seconds)
        if not relay_address:
            return cls(sock, receive)
        # Here, since that file builds on this one and few ranks are relays.
        from argosy.cluster.protocol.relay import RelayChannel

        return RelayChannel(sock, receive, relay_address)

    def send(self, message: object) -> None:
        """Send one message; blocks while the peer does not read. Raises `ChannelClosed` when it has gone."""
        self.send_frame(encode_frame(message))

    def send_frame(self, frame: bytes | bytearray | memoryview) -> None:
        """Send a message that was encoded before."""
        with self._lock:
            try:
                self._socket.sendall(frame)
            except OSError as error:
                raise ChannelClosed(f"the peer went away: {error.strerror or error}") from error

    def recv(self, timeout_seconds: float | None = None) -> Any:
        """The next message. Raises `TimeoutError` at the deadline (nothing is lost), `ChannelClosed` at the end."""
        return self._reader.decode(self.recv_frame(timeout_seconds))

    def recv_frame(self, timeout_seconds: float | None = None) -> memoryview:
        """The body of the next frame, valid until the next call."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while (frame := self._reader.next_frame()) is None:
            self._fill(deadline)
        return frame

    def _fill(self, deadline: float | None) -> None:
        space = self._reader.space()
        try:
            if deadline is None:
                num_bytes = self._socket.recv_into(space)
            else:
                # Wait without settimeout: that would apply to senders in other threads as well.
                num_bytes = _recv_before(self._socket, space, deadline)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosed(f"the connection broke: {error.strerror or error}") from error
        if num_bytes == 0:
            rest = self._reader.num_waiting_bytes
            raise ChannelClosed(
                f"the peer closed the connection{f' inside a frame ({rest} bytes of it)' if rest else ''}"
            )
        self._reader.filled(num_bytes)

    def decode(self, frame: memoryview) -> Any:
        """The message in the body of a frame."""
        return self._reader.decode(frame)

    def fileno(self) -> int:
        """For `select`; note that a whole message may wait in our own buffer already."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the connection; a thread that waits in `recv` gets `ChannelClosed`. May be called twice."""
        with contextlib.suppress(OSError):  # the other end was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Listener:
    """A place where others connect."""

    def __init__(self, sock: socket.socket, address: str):
        self._socket, self.address = sock, address

    @classmethod
    def bind(cls, address: str) -> "Listener":
        """Listen at "unix:/path" (for this user alone) or "tcp:host:port"; port 0 takes a free one (see `address`)."""
        kind, target = parse_address(address)
        if kind == "unix":
            assert isinstance(target, str)
            if len(target.encode()) > MAX_UNIX_PATH_BYTES:
                raise ConfigError(f"the socket path {target!r} is too long; set TMPDIR to a shorter folder")
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with contextlib.suppress(FileNotFoundError):  # the usual case
                os.unlink(target)  # left by a predecessor that was killed; the folder is private to one engine
            sock.bind(target)
            os.chmod(target, 0o600)
        else:
            family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(target)
            except OSError as error:
                sock.close()
                raise ConfigError(f"can't listen at {address}: {error.strerror or error}") from error
            address = format_tcp(target[0], sock.getsockname()[1])
        sock.listen(128)
        return cls(sock, address)

    def accept(self, timeout_seconds: float | None = None) -> socket.socket:
        """The next peer's socket, blocking. Raises `TimeoutError` at the deadline."""
        self._socket.settimeout(timeout_seconds)
        sock, _ = self._socket.accept()
        sock.settimeout(None)
        return sock

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening and remove the socket's file. May be called twice."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        kind, target = parse_address(self.address)
        if kind == "unix":
            with contextlib.suppress(OSError):  # removed with its folder
                os.unlink(str(target))


def parse_address(address: str) -> tuple[str, Any]:
    """("unix", path) or ("tcp", (host, port))."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        return kind, rest
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isascii() and port.isdigit():
        return kind, (host.strip("[]"), int(port))
    raise ConfigError(f"address={address!r}: must be unix:/path or tcp:host:port")


def format_tcp(host: str, port: int) -> str:
    """The address of a TCP port."""
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def open_socket(address: str, timeout_seconds: float) -> socket.socket:
    """A connected socket; tries until the deadline while nobody listens."""
    kind, target = parse_address(address)
    deadline = time.monotonic() + timeout_seconds
    while True:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            if kind == "tcp":
                sock = socket.create_connection(target, timeout=left)
            else:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.settimeout(left)
                try:
                    sock.connect(target)
                except OSError:
                    sock.close()
                    raise
            sock.settimeout(None)
            return sock
        except OSError as error:
            if time.monotonic() + 0.02 >= deadline:
                raise ChannelClosed(f"nobody answers at {address} ({error.strerror or error})") from error
            time.sleep(0.02)


def _recv_before(sock: socket.socket, space: memoryview, deadline: float) -> int:
    """`recv_into` with a deadline and without touching the socket's own mode."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    left = deadline - time.monotonic()
    if not poller.poll(max(left, 0.0) * 1000.0):
        raise TimeoutError("no message within the deadline")
    return sock.recv_into(space)


def tune_socket(sock: socket.socket) -> None:
    """Blocking, without Nagle's delay, and aware of a cut cable."""
    sock.settimeout(None)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
