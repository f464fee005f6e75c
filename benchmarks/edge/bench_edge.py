"""How many SSE chunks a second one edge process can make: gateway, detokenizer, JSON and ASGI, without an engine.

    python benchmarks/edge/bench_edge.py [--streams 64] [--tokens 256] [--endpoint chat|completions]

Every stream gets one token a step, as from a driver that steps all of them together. `send` of ASGI is a counter, so
sockets are not part of it; `--uvicorn` puts a real server and real sockets in front.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import EngineInfo, StatsReply, TokenDelta
from argosy.cluster.protocol.sampling import FinishReason, TokenParams
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_app import build_http_app
from argosy.deploy.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parents[2] / "argosy" / "default_model"


class SteppingClient:
    """Hands every open stream one token whenever all of them have read theirs."""

    def __init__(self, num_tokens: int):
        self.info = EngineInfo(
            model="bench",
            max_model_len=1 << 20,
            vocab_size=4096,
            num_blocks=1,
            block_size=16,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            dtype="float32",
            max_logprobs=20,
            max_num_seqs=1024,
        )
        self.closed = False
        self.num_tokens = num_tokens

    def submit(self, prompt_token_ids: Sequence[int], params: TokenParams, **options: Any) -> "SteppingStream":
        """A stream of `num_tokens` tokens."""
        return SteppingStream(self.num_tokens)

    async def stats(self) -> StatsReply:
        """Nothing."""
        return StatsReply(values={})

    async def reset_prefix_cache(self) -> bool:
        """Nothing to forget."""
        return True


class SteppingStream:
    """One token at a time, and a turn of the event loop between two."""

    def __init__(self, num_tokens: int):
        self._left = num_tokens

    def __aiter__(self) -> "SteppingStream":
        return self

    async def __anext__(self) -> list[TokenDelta]:
        if not self._left:
            raise StopAsyncIteration
        self._left -= 1
        waiter = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(waiter.set_result, None)
        await waiter  # as in the real client: woken by a future
        finish = None if self._left else FinishReason.LENGTH
        return [TokenDelta(stream_id=0, index=0, token_ids=(300 + self._left % 1000,), finish_reason=finish)]

    def abort(self, index: int | None = None) -> None:
        """Nobody works."""


def app_for(num_tokens: int) -> Any:
    """The whole application over the stand-in."""
    config = ServingConfig.from_mapping({"model": str(MODEL), "served_model_name": "bench"})
    gateway = Gateway(SteppingClient(num_tokens), Tokenizer.load(MODEL), config)
    return build_http_app(gateway, config.server)


def request_of(endpoint: str, num_tokens: int) -> tuple[str, bytes]:
    """Path and body."""
    body: dict[str, Any] = {"stream": True, "max_tokens": num_tokens}
    if endpoint == "chat":
        return "/v1/chat/completions", json.dumps({**body, "messages": [{"role": "user", "content": "Hi"}]}).encode()
    return "/v1/completions", json.dumps({**body, "prompt": "Hi"}).encode()


async def call(app: Any, path: str, body: bytes) -> int:
    """One request straight into ASGI; how many chunks came."""
    num_chunks = 0
    given = False

    async def receive() -> dict[str, Any]:
        nonlocal given
        if given:
            await asyncio.Event().wait()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal num_chunks
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message
        else:
            num_chunks += message["body"].count(b"data: ")

    headers = [(b"content-type", b"application/json")]
    await app({"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}, receive, send)
    return num_chunks


async def in_process(endpoint: str, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """All streams at once, in this process."""
    app = app_for(num_tokens)
    path, body = request_of(endpoint, num_tokens)
    await call(app, path, body)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    counts = await asyncio.gather(*[call(app, path, body) for _ in range(num_streams)])
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    return _figures("in process", endpoint, num_streams, num_tokens, sum(counts), seconds, cpu_seconds)


def _figures(
    how: str, endpoint: str, num_streams: int, num_tokens: int, chunks: int, seconds: float, cpu_seconds: float
) -> dict[str, Any]:
    return {
        "how": how,
        "endpoint": endpoint,
        "streams": num_streams,
        "tokens": num_tokens,
        "chunks": chunks,
        "seconds": round(seconds, 3),
        "chunks_per_second": round(chunks / seconds),
        "chunks_per_cpu_second": round(chunks / cpu_seconds),
        "us_per_chunk": round(cpu_seconds / chunks * 1e6, 1),
    }


def _serve(port_socket: socket.socket, num_tokens: int, ready: Any, cpu: Any) -> None:
    import uvicorn  # only this mode needs it

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            cpu.value = time.process_time()
            ready.set()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            cpu.value = time.process_time() - cpu.value
            await super().shutdown(sockets)

    Server(uvicorn.Config(app_for(num_tokens), log_level="error")).run(sockets=[port_socket])


def over_sockets(endpoint: str, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """The same behind uvicorn, read over loopback by this process."""
    context = multiprocessing.get_context("spawn")
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    ready, cpu = context.Event(), context.Value("d", 0.0)
    server = context.Process(target=_serve, args=(listener, num_tokens, ready, cpu))
    server.start()
    assert ready.wait(30)
    path, body = request_of(endpoint, num_tokens)
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"

    async def one() -> int:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(head.encode() + b"connection: close\r\n\r\n" + body)
        data = await reader.read(-1)
        writer.close()
        return data.count(b"data: ")

    async def everything() -> int:
        return sum(await asyncio.gather(*[one() for _ in range(num_streams)]))

    begin = time.perf_counter()
    chunks = asyncio.run(everything())
    seconds = time.perf_counter() - begin
    server.terminate()
    server.join(30)
    return _figures("uvicorn", endpoint, num_streams, num_tokens, chunks, seconds, cpu.value)


def main() -> None:
    """Print one JSON line a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--endpoint", choices=("chat", "completions", "both"), default="both")
    parser.add_argument("--uvicorn", action="store_true")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    for endpoint in ("completions", "chat") if given.endpoint == "both" else (given.endpoint,):
        for _ in range(given.repeat):
            if given.uvicorn:
                print(json.dumps(over_sockets(endpoint, given.streams, given.tokens)), flush=True)
            else:
                print(json.dumps(asyncio.run(in_process(endpoint, given.streams, given.tokens))), flush=True)


if __name__ == "__main__":
    main()
