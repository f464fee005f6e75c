"""The smallest of HTTP clients: it must see what a server sends, however the bytes are cut, and when."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.deploy import bench_doors, bench_http, workload
from argosy.deploy.bench_load import Timing
from argosy.deploy.client import StreamBroken

Answer = Callable[[asyncio.StreamWriter, dict[str, object]], Awaitable[None]]
EVENT = b'data: {"choices": [{"text": "a"}]}\n\n'
LISTING = json.dumps({"data": [{"id": "m"}]}).encode()


def chunk(data: bytes) -> bytes:
    """As HTTP sends it."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Server:
    """Lists one model and lets `answer` do the rest; counts connections."""

    def __init__(self, answer: Answer):
        self.answer, self.num_connections, self.asked = answer, 0, 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"GET"):
                    length = f"Content-Length: {len(LISTING)}\r\n\r\n".encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + length + LISTING)
                    continue
                size = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Len"))
                self.asked += 1
                await self.answer(writer, json.loads(await reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


def load(answer: Answer, *, count: int = 6, concurrency: int = 2) -> tuple[Server, list[bench_http.Timing]]:
    """That many requests to a server that answers so."""
    server = Server(answer)

    async def everything() -> list[bench_http.Timing]:
        async with await asyncio.start_server(server, "127.0.0.1", 0) as listening:
            host, port = listening.sockets[0].getsockname()[:2]
            requests = workload.fixed(count, 4, 3, vocab=4096)
            _, timings = await bench_http.run_load(f"http://{host}:{port}", requests, concurrency=concurrency)
            return timings

    return server, asyncio.run(everything())


async def stream(writer: asyncio.StreamWriter, body: dict[str, object]) -> None:
    """Three tokens with pauses between, in pieces that end anywhere."""
    assert body["stream"]
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}}\n\n'
    events = [EVENT, EVENT, EVENT, usage, b"data: [DONE]\n\n"]
    whole = HEAD + b"".join(chunk(event) for event in events) + b"0\r\n\r\n"
    for start in range(0, len(whole), 50):
        writer.write(whole[start : start + 50])
        await writer.drain()
        await asyncio.sleep(0.002)


def test_answers_in_pieces_over_connections_that_are_kept() -> None:
    """Two clients, six requests, and no more connections than clients (and one for the listing)."""
    server, timings = load(stream)
    assert server.asked == 6
    assert server.num_connections == 3
    assert [t.num_tokens for t in timings] == [3] * 6
    assert all(0 < t.first_seconds < t.last_seconds for t in timings)
    assert all(t.gap_seconds == pytest.approx((t.last_seconds - t.first_seconds) / 2) for t in timings)


def test_a_refusal_is_our_error_of_the_same_kind() -> None:
    """Not a figure."""

    async def refuse(writer: asyncio.StreamWriter, body: dict[str, object]) -> None:
        text = json.dumps({"error": {"message": "no", "type": "invalid_request_error", "code": 400}}).encode()
        writer.write(f"HTTP/1.1 400 Bad Request\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)

    with pytest.raises(InvalidRequest, match="no"):
        load(refuse)


@pytest.mark.parametrize(
    ("bytes_sent", "problem"),
    [
        (HEAD + chunk(EVENT) + b"0\r\n\r\n", "without its usage"),
        (HEAD + chunk(EVENT)[:9], "closed the connection"),
    ],
)
def test_an_answer_that_breaks_off_is_no_figure(bytes_sent: bytes, problem: str) -> None:
    """A server that dies, or one that does not count."""

    async def break_off(writer: asyncio.StreamWriter, body: dict[str, object]) -> None:
        writer.write(bytes_sent)
        await writer.drain()
        writer.close()

    with pytest.raises(StreamBroken, match=problem):
        load(break_off, count=1, concurrency=1)


def test_doors_cost_what_is_lacking_beside_the_engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of other requests, in turns, after one of each to warm up that does not count: half the tokens a second
    over HTTP, and 2 ms more to the first one."""
    asked: list[tuple[str, tuple[int, ...]]] = []

    def timings(requests: workload.Workload, first: float) -> list[Timing]:
        return [Timing(one.max_tokens, first, first + 0.127) for one in requests]

    async def near(config: object, engine: object, requests: workload.Workload, concurrency: int) -> Any:
        asked.append(("in process", tuple(requests[0].prompt)))
        return (1.0 if len(asked) > 2 else 100.0), timings(requests, 0.010 if len(asked) > 2 else 9.0)

    async def far(url: str, requests: workload.Workload, *, concurrency: int, extra: object) -> Any:
        asked.append(("HTTP", tuple(requests[0].prompt)))
        return 2.0, timings(requests, 0.012)

    monkeypatch.setattr(bench_doors, "_in_process", near)
    monkeypatch.setattr(bench_doors.bench_http, "run_load", far)
    unused: Any = None
    row = bench_doors._compare(unused, None, "http://here:1", 4096, 32, repeats=3)
    assert (row["figure"], row["repeats"], row["requests"]) == (0.5, 2, 128)
    assert (row["ttft_ms_p50_in_process"], row["ttft_ms_p50"], row["ttft_ms_more"]) == (10.0, 12.0, 2.0)
    assert row["output_tokens_per_second"] == 128 * 128 / 2
    assert row["ms_per_token"] == pytest.approx(1.0)
    assert [where for where, _ in asked] == ["in process", "HTTP"] * 3
    assert len({prompt for _, prompt in asked}) == 6, "what one found in the cache the other must not"
