"""The links between nodes, tried: can they be reached, how fast, how late, and do their clocks agree.

Each node opens a port like those that gloo and NCCL open, and the nodes call each other pairwise, so that a firewall
that lets Ray's ports through and ours not is found here and not by a hang. A caller shows a secret first.
"""

import contextlib
import hmac
import socket
import struct
import threading
import time
from typing import Final

import msgspec

CONNECT_SECONDS: Final = 2.0
_ANSWER_SECONDS: Final = 3.0
_PINGS: Final = 16
_BLOCK: Final = bytes(256 * 1024)
_FLOOD_SECONDS: Final = 0.15
_MOST_BYTES: Final = 256 * 1024 * 1024
_PING, _FLOOD, _END = b"p", b"f", b"e"
_LENGTH: Final = struct.Struct("<Q")
_TIME: Final = struct.Struct("<d")


class LinkFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What one node found when it called another."""

    caller: str  # node ids
    callee: str
    problem: str = ""  # why it could not; empty: it could
    gbytes_per_second: float = 0.0
    latency_us: float = 0.0
    clock_offset_seconds: float = 0.0  # how far the callee's clock is ahead of the caller's


class LinkServer:
    """Answers calls at `address` until closed. Bounded: a call may last some seconds, and a few may be under way."""

    def __init__(self, address: str, secret: str):
        self._secret = secret.encode()
        self._socket = socket.create_server(
            (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=16
        )
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, name="link-server", daemon=True).start()

    def close(self) -> None:
        """Take no more calls."""
        with contextlib.suppress(OSError):  # nobody waits
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                call, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(call,), daemon=True).start()

    def _answer(self, call: socket.socket) -> None:
        with call, contextlib.suppress(OSError):  # a caller that hung up
            call.settimeout(_ANSWER_SECONDS)
            call.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not hmac.compare_digest(_receive(call, len(self._secret)), self._secret):
                return
            while (kind := _receive(call, 1)) != _END:
                if kind == _PING:
                    call.sendall(_TIME.pack(time.time()))
                elif kind == _FLOOD:
                    left = min(_LENGTH.unpack(_receive(call, _LENGTH.size))[0], _MOST_BYTES)
                    _skip(call, left)
                    call.sendall(_PING)


def call_link(caller: str, callee: str, address: str, port: int, secret: str) -> LinkFacts:
    """Call the server of node `callee`; what can go wrong is in the result."""
    try:
        call = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
    except TimeoutError:
        return LinkFacts(caller=caller, callee=callee, problem="blocked: nothing came back (a firewall drops packets)")
    except OSError as error:
        return LinkFacts(caller=caller, callee=callee, problem=f"unreachable: {error.strerror or error}")
    with call:
        try:
            call.settimeout(_ANSWER_SECONDS)
            call.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            call.sendall(secret.encode())
            latency, offset = _ping(call)
            rate = _flood(call)
            call.sendall(_END)
        except OSError as error:
            return LinkFacts(
                caller=caller, callee=callee,
                problem=f"connects, then fails ({error.strerror or error}): large packets may be lost on the way",
            )  # fmt: skip
    return LinkFacts(
        caller=caller, callee=callee, gbytes_per_second=round(rate / 1e9, 3), latency_us=round(latency * 1e6, 1),
        clock_offset_seconds=round(offset, 4),
    )  # fmt: skip


def rounds_of_pairs(num_nodes: int, most_rounds: int = 12) -> list[list[tuple[int, int]]]:
    """Who calls whom at the same time: in each round a node is in one pair, so that calls don't disturb each other.

    All pairs for up to `most_rounds` + 1 nodes, in both directions; beyond that as many rounds as that.
    """
    places = list(range(num_nodes)) + ([-1] if num_nodes % 2 else [])
    rounds = []
    for _ in range(min(len(places) - 1, most_rounds)):
        half = len(places) // 2
        pairs = [(a, b) for a, b in zip(places[:half], reversed(places[half:]), strict=True) if -1 not in (a, b)]
        rounds += [pairs, [(b, a) for a, b in pairs]]
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def _ping(call: socket.socket) -> tuple[float, float]:
    """(the median round trip's half, the clock's offset as the quickest round trip shows it), in seconds."""
    trips = []
    for _ in range(_PINGS):
        sent, began = time.time(), time.perf_counter()
        call.sendall(_PING)
        theirs = _TIME.unpack(_receive(call, _TIME.size))[0]
        seconds = time.perf_counter() - began
        trips.append((seconds, theirs - sent - seconds / 2))
    trips.sort()
    return trips[len(trips) // 2][0] / 2, trips[0][1]


def _flood(call: socket.socket) -> float:
    """Bytes per second one way: doubles the amount until it takes long enough to be measured."""
    amount = 4 * len(_BLOCK)
    while True:
        began = time.perf_counter()
        call.sendall(_FLOOD + _LENGTH.pack(amount))
        for _ in range(amount // len(_BLOCK)):
            call.sendall(_BLOCK)
        _receive(call, 1)
        seconds = time.perf_counter() - began
        if seconds >= _FLOOD_SECONDS / 2 or amount * 4 > _MOST_BYTES:
            return amount / seconds
        amount *= 4


def _receive(call: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = call.recv(count)
        if not part:
            raise ConnectionError("the other side closed the connection")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _skip(call: socket.socket, count: int) -> None:
    buffer = bytearray(1 << 20)
    while count:
        received = call.recv_into(buffer, min(count, len(buffer)))
        if not received:
            raise ConnectionError("the other side closed the connection")
        count -= received
