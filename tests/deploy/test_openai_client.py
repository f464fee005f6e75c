"""The unmodified official client against a real server on loopback, with the real driver and scheduler behind it."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import uvicorn

import argosy
from argosy.cluster.clock import MonotonicClock
from argosy.cluster.driver import Driver
from argosy.cluster.driver_client import DriverClient
from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.channel import FrameReader
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import FromEdge, ToEdge
from argosy.cluster.simulation import SimulatedExecutor
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_app import build_http_app
from argosy.deploy.tokenizer import Tokenizer

MODEL = Path(argosy.__file__).parent / "default_model"
USER: list[Any] = [{"role": "user", "content": "What does len return?"}]


class InProcessClient(DriverClient):
    """The real client and the real driver in one process: messages are encoded as on the wire and handed over."""

    def __init__(self, driver: Driver, executor: SimulatedExecutor):
        super().__init__()
        self.driver, self.executor = driver, executor
        self.wake = asyncio.Event()
        self._to_driver = FrameReader(FromEdge)
        self._to_edge = msgspec.msgpack.Decoder(ToEdge)
        self._transport = self  # type: ignore[assignment]  # as far as it is written to

    def write(self, data: bytes) -> None:
        """In the transport's place: straight to the driver."""
        self._to_driver.feed(data)
        while (message := self._to_driver.next()) is not None:
            self.driver.on_edge_message(0, message)
        self.wake.set()

    async def run(self) -> None:
        """The driver's loop."""
        self.driver.start()
        while True:
            self.driver.advance()
            for event in self.executor.poll(0.0):
                self.driver.on_executor_event(event)
            for _, message in self.driver.take_outbox():
                self.on_message(self._to_edge.decode(msgspec.msgpack.encode(message)))
            with contextlib.suppress(TimeoutError):  # looks again
                await asyncio.wait_for(self.wake.wait(), 0.001)
            self.wake.clear()


@contextlib.asynccontextmanager
async def engine(config: ServingConfig, *, step_seconds: float = 0.002) -> AsyncIterator[InProcessClient]:
    """A driver with simulated ranks that take two milliseconds a step."""
    clock = MonotonicClock()
    executor = SimulatedExecutor(config, clock, num_blocks=256, step_seconds=step_seconds, vocab_size=4096)
    driver = Driver(config, executor, clock, Metrics())
    client = InProcessClient(driver, executor)
    client.info = msgspec.structs.replace(
        driver.info, max_model_len=256, vocab_size=4096, max_logprobs=20, eos_token_ids=(1, 6)
    )
    running = asyncio.create_task(client.run())
    try:
        yield client
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class Server:
    """uvicorn in a thread."""

    def __init__(self, **settings: Any) -> None:
        given = {"model": str(MODEL), "served_model_name": "tiny", "max_model_len": 256, "max_num_seqs": 8}
        self.config = ServingConfig.from_mapping({**given, "max_num_batched_tokens": 512, **settings})
        self.engine: InProcessClient | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    async def _main(self) -> None:
        async with engine(self.config) as client:
            self.engine = client
            app = build_http_app(Gateway(client, Tokenizer.load(MODEL), self.config), self.config.server)
            self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=2))
            serving = asyncio.create_task(self.server.serve())
            while not self.server.started:
                await asyncio.sleep(0.01)
            host, port = self.server.servers[0].sockets[0].getsockname()
            self.url = f"http://{host}:{port}"
            self._ready.set()
            await serving

    def stop(self) -> None:
        """End it."""
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for all stories."""
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """The official client, which does not try again on its own here."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30) as found:
        yield found


def test_models(client: openai.OpenAI) -> None:
    """The first thing that tools ask."""
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "argosy"


def test_completions_are_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    """Greedy: the same tokens, the same text, the same end, the same count."""
    asked: dict[str, Any] = {"model": "tiny", "prompt": "def f(x):", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=3)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or ()) == len(logprobs.token_logprobs or ()) == len(logprobs.top_logprobs or ()) == 24
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 24


def test_chat_whole_streamed_and_with_several_answers(client: openai.OpenAI) -> None:
    """n answers with seeds of their own; a stream that joins to the whole; logprobs with bytes."""
    asked: dict[str, Any] = {"model": "tiny", "messages": USER, "max_completion_tokens": 16, "seed": 5, "n": 3}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    texts = [choice.message.content for choice in whole.choices]
    assert len(texts) == 3
    assert all(choice.message.role == "assistant" for choice in whole.choices)
    content = whole.choices[0].logprobs.content
    assert content is not None
    assert all(len(entry.top_logprobs) == 2 and entry.bytes is not None for entry in content)
    joined = ["", "", ""]
    reasons: dict[int, str | None] = {}
    for piece in client.chat.completions.create(**asked, stream=True):
        for choice in piece.choices:
            joined[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert joined == texts
    assert reasons == {0: "length", 1: "length", 2: "length"}


def test_a_stop_string_ends_the_answer(client: openai.OpenAI, server: Server) -> None:
    """Taken from the middle of the text that would have come; nothing of it or after it is seen, nothing runs on."""
    asked: dict[str, Any] = {"model": "tiny", "prompt": "def f(x):", "max_tokens": 200, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[40:46]
    before = text[: text.index(stop)]
    for stream in (False, True):
        if stream:
            got = "".join(piece.choices[0].text for piece in client.completions.create(**asked, stop=stop, stream=True))
        else:
            choice = client.completions.create(**asked, stop=stop).choices[0]
            got = choice.text
            assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
        assert got == before
    assert_at_rest(server)


def test_errors_arrive_as_the_clients_own_classes(client: openai.OpenAI, server: Server) -> None:
    """What a program catches, with the field and our code."""
    asked: dict[str, Any] = {"model": "tiny", "messages": USER}
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**asked, "model": "gpt-4"})
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(**asked, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[5] * 300)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**asked, stream=True, n=10_000)


def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(client: openai.OpenAI, server: Server) -> None:
    """Twenty streams, each dropped after its first event: no request and no block stays."""
    for _ in range(20):
        with client.completions.create(
            model="tiny", prompt="def f(x):", max_tokens=240, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            next(iter(stream))
    assert_at_rest(server)


def test_overload_is_refused_and_the_accepted_are_served() -> None:
    """More than the queue holds: 503 with a time to come back, as the client's own error; all others end well."""
    small = Server(max_num_seqs=1, max_num_waiting=2)
    try:

        async def main() -> list[object]:
            async with openai.AsyncOpenAI(base_url=f"{small.url}/v1", api_key="x", max_retries=0, timeout=30) as ask:
                asks = [ask.completions.create(model="tiny", prompt=f"x{i}", max_tokens=20) for i in range(12)]
                return list(await asyncio.gather(*asks, return_exceptions=True))

        answers = asyncio.run(main())
        refused = [answer for answer in answers if isinstance(answer, openai.InternalServerError)]
        assert 0 < len(refused) < 12
        assert len(refused) + sum(isinstance(answer, openai.types.Completion) for answer in answers) == 12
        assert all(error.status_code == 503 and error.response.headers["retry-after"] for error in refused)
        assert_at_rest(small)
    finally:
        small.stop()


def test_a_broken_stream_is_an_error_for_the_client(server: Server) -> None:
    """The driver goes away in mid-stream: the client raises, it does not take the half for the whole."""
    broken = Server()
    try:
        with openai.OpenAI(base_url=f"{broken.url}/v1", api_key="x", max_retries=0, timeout=30) as client:
            stream = client.completions.create(
                model="tiny", prompt="x", max_tokens=250, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            assert broken.engine is not None
            broken.engine._welcome.get_loop().call_soon_threadsafe(broken.engine.connection_lost, "gone")
            with pytest.raises(openai.APIError):
                list(stream)
            assert httpx.get(f"{broken.url}/health", timeout=10).status_code == 503
    finally:
        broken.stop()


def assert_at_rest(server: Server) -> None:
    """No request runs or waits, and every block is free, within a few steps."""
    names = ("argosy_requests_running", "argosy_requests_waiting", "argosy_kv_blocks_used")
    for _ in range(100):
        lines = httpx.get(f"{server.url}/metrics", timeout=10).text.splitlines()
        figures = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if "{" in line}
        if all(figures[name] == 0 for name in names):
            return
        time.sleep(0.05)
    raise AssertionError([figures[name] for name in names])


def test_a_flood_of_tiny_chunks_is_answered_and_cut_off(server: Server) -> None:
    """One byte a chunk, as fast as the socket takes it, and never an end: 413, and the connection is closed."""
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    answer = b""
    with socket.create_connection((host, int(port)), timeout=60) as flood:
        with contextlib.suppress(ConnectionError):  # refused: looked at below
            flood.sendall(head)
            while True:
                flood.sendall(b"1\r\n \r\n" * 1000)
        with contextlib.suppress(ConnectionError):  # refused: looked at below
            while piece := flood.recv(65536):
                answer += piece
    assert not answer or b" 413 " in answer.splitlines()[0]  # a reset may overtake the answer
    with httpx.Client(base_url=server.url, timeout=30) as http:
        assert http.get("/v1/models").status_code == 200
