"""The HTTP doors when something goes wrong: errors in mid-stream, clients that leave or stop reading, long bodies."""

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import Any

import pytest

from argosy.cluster.protocol.errors import WorkerLost
from argosy.cluster.protocol.messages import TokenDelta
from argosy.cluster.protocol.sampling import FinishReason
from argosy.deploy import http_io
from argosy.deploy.http_app import HttpApp
from argosy.deploy.http_limits import LimitsMiddleware
from argosy.deploy.scripted_engine import ScriptedClient, Submitted, delta, tokens_script

from .http_rig import CHAT, JSON, TEXT, USER, WORDS, app_of, call, gateway


def failing(after: int, code: str, status: int, **more: Any) -> ScriptedClient:
    """An engine that fails the request after so many tokens."""

    def script(asked: Submitted) -> Iterable[list[TokenDelta]]:
        yield from ([delta(0, [WORDS[0]])] for _ in range(after))
        yield [
            delta(
                finish_reason=FinishReason.ERROR,
                error_code=code,
                error_message="told by the driver",
                error_status=status,
                **more,
            )
        ]

    return ScriptedClient(script)


def test_a_value_of_the_wrong_kind_is_refused_in_the_words_of_json() -> None:
    """Whoever wrote the request may not know Python's `float | null`."""
    answer = call(app_of(), "POST", CHAT, json={"messages": USER, "temperature": "hot"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "temperature"
    assert answer.json()["error"]["message"] == 'temperature="hot": must be a number or null'


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("n", "2", 'n="2": must be an integer'),
        ("max_tokens", "16", 'max_tokens="16": must be an integer or null'),
        ("top_k", 1.5, "top_k=1.5: must be an integer or null"),
        ("min_p", True, "min_p=true: must be a number or null"),
        ("top_p", [0.5], "top_p=array: must be a number or null"),
        ("seed", "x" * 100, "seed=string: must be an integer or null"),
        ("stop", 5, "stop=5: must be a string or an array or null"),
        ("stop", ["a", 1], "stop[1]=1: must be a string"),
        ("stop_token_ids", ["x"], 'stop_token_ids[0]="x": must be an integer'),
        ("stream_options", {"include_usage": "no"}, 'stream_options.include_usage="no": must be true or false'),
        ("logit_bias", {"3": 1, "4": "up"}, 'logit_bias[...]="up": must be a number'),
        ("messages", "a secret", "messages=string: must be an array or null"),
        ("messages", ["a secret"], "messages[0]=string: must be an object"),
        ("chat_template_kwargs", "a secret", "chat_template_kwargs=string: must be an object or null"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_told_with_field_value_and_fix(field: str, value: object, said: str) -> None:
    """What was sent is shown where it is short and can't be a prompt."""
    answer = call(app_of(), "POST", CHAT, json={"messages": USER, field: value})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, said)


@pytest.mark.parametrize("stream", [False, True])
def test_overload_is_a_503_that_says_when_to_come_back(stream: bool) -> None:
    """Also for a stream: the status is not sent before the first token is there."""
    app = app_of(failing(0, "overloaded", 503, retry_after_seconds=12.4))
    answer = call(app, "POST", CHAT, json={"messages": USER, "stream": stream})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "12")
    assert answer.json()["error"]["code"] == "overloaded"
    stopping = call(app_of(failing(0, "draining", 503)), "POST", TEXT, json={"prompt": "Hi"})
    assert stopping.status_code == 503
    assert "is being stopped" in stopping.json()["error"]["message"]


def test_a_stream_that_breaks_says_so_and_has_no_done() -> None:
    """A clean end without [DONE] and with an error: the client can tell that this is not the whole answer."""
    answer = call(app_of(failing(2, "request_lost", 500)), "POST", TEXT, json={"prompt": "Hi", "stream": True})
    assert answer.status_code == 200
    assert "[DONE]" not in answer.text
    last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "request_lost"
    whole = call(app_of(failing(2, "request_lost", 500)), "POST", TEXT, json={"prompt": "Hi"})
    assert (whole.status_code, whole.json()["error"]["message"]) == (500, "told by the driver")


@pytest.mark.parametrize("stream", [False, True])
def test_our_own_mistakes_say_nothing_of_themselves(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    """An exception's text may hold a prompt or an address: neither the client nor the log gets it."""

    def script(asked: Submitted) -> Iterable[list[TokenDelta]]:
        yield [delta(0, [WORDS[0]])]
        raise RuntimeError("canary 0x7f in /secret/path")

    body = {"prompt": "my canary prompt", "stream": stream}
    with caplog.at_level(logging.DEBUG):
        answer = call(app_of(ScriptedClient(script)), "POST", TEXT, json=body, headers={"x-request-id": "r-1"})
    assert answer.status_code == (200 if stream else 500)
    assert "canary" not in answer.text
    assert "r-1" in answer.text
    assert "canary" not in caplog.text
    assert "RuntimeError" in caplog.text


def test_trouble_of_the_machines_is_told_without_their_names(caplog: pytest.LogCaptureFixture) -> None:
    """503 and our code for the client, node and rank for the log."""

    def script(asked: Submitted) -> Iterable[list[TokenDelta]]:
        raise WorkerLost(3, "node-of-ours", 1)

    answer = call(app_of(ScriptedClient(script)), "POST", TEXT, json={"prompt": "Hi"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_lost")
    assert "node-of-ours" not in answer.text
    assert "node-of-ours" in caplog.text


class Wire:
    """ASGI by hand: what the client sends, when it leaves, and whether it reads."""

    def __init__(self, body: bytes, *, path: str = TEXT, chunks: int = 1, headers: Any = JSON):
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        size = -(-len(body) // chunks)
        self.parts = [body[at : at + size] for at in range(0, len(body), size)]
        self.left = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self.sent: list[dict[str, Any]] = []
        self.got_chunk = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self.parts:
            part = self.parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.parts)}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.got_chunk.set()
        await self.reads.wait()


@pytest.mark.parametrize("told_by", ["a message", "cancelling"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_work(stream: bool, told_by: str) -> None:
    """It closes its connection in mid-answer: the request is aborted at the driver within a turn of the loop.

    ASGI servers say it by a message, Ray Serve by cancelling our task. Both are counted.
    """

    async def main() -> tuple[ScriptedClient, bytes]:
        client = ScriptedClient(tokens_script(WORDS * 10))
        client.gate = asyncio.Event()
        app = app_of(client)
        wire = Wire(json.dumps({"prompt": ["Hi", "Ho"], "max_tokens": 30, "stream": stream}).encode())
        serving = asyncio.create_task(app(wire.scope, wire.receive, wire.send))
        while not (len(client.submitted) == 2 and all(asked.num_taken for asked in client.submitted)):
            await asyncio.sleep(0)
        if told_by == "a message":
            wire.left.set()
        else:
            serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        asking = Wire(b" ", path="/metrics", headers=[])
        await app({**asking.scope, "method": "GET"}, asking.receive, asking.send)
        return client, b"".join(message.get("body", b"") for message in asking.sent)

    client, metrics = asyncio.run(asyncio.wait_for(main(), 10))
    assert [asked.aborted for asked in client.submitted] == [[None], [None]]
    (count,) = [line for line in metrics.splitlines() if line.startswith(b"argosy_http_disconnects_total{")]
    assert count.endswith(b" 1.0")


def test_a_reader_who_stops_reading_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backpressure reaches us, we make no more events for it, and after a while its request is aborted."""
    monkeypatch.setattr(http_io, "_WATCH_SECONDS", 0.02)
    monkeypatch.setattr(http_io.run_while_client_stays, "__kwdefaults__", {"stall_seconds": 0.05})

    async def main() -> tuple[ScriptedClient, int]:
        client = ScriptedClient(tokens_script(WORDS * 10))
        wire = Wire(json.dumps({"prompt": "Hi", "max_tokens": 40, "stream": True}).encode())
        serving = asyncio.create_task(app_of(client)(wire.scope, wire.receive, wire.send))
        await wire.got_chunk.wait()
        wire.reads.clear()
        await serving
        return client, len(wire.sent)

    client, num_sent = asyncio.run(asyncio.wait_for(main(), 10))
    assert client.submitted[0].aborted == [None]
    assert num_sent < 10


def limited(max_bytes: int, seconds: float = 30.0) -> Any:
    """The application with other limits."""
    door = gateway(ScriptedClient())
    return LimitsMiddleware(HttpApp(door, door.config.server), max_body_bytes=max_bytes, body_seconds=seconds)


def test_a_body_is_counted_while_it_comes_and_may_not_trickle() -> None:
    """No declared length: the limit holds all the same. A body that stops in the middle is not waited for."""

    async def main(app: Any, wire: Wire) -> int:
        await app(wire.scope, wire.receive, wire.send)
        status: int = wire.sent[0]["status"]
        return status

    async def large() -> int:
        return await main(limited(1000), Wire(b" " * 1001, chunks=10))

    async def many() -> int:
        return await main(limited(10**9), Wire(b" " * 70_000, chunks=70_000))

    async def slow() -> int:
        wire = Wire(b"{}" * 10, chunks=2)
        wire.parts.insert(1, b"")
        original = wire.receive

        async def receive() -> dict[str, Any]:
            if len(wire.parts) < 3:
                await asyncio.Event().wait()
            return await original()

        wire.receive = receive  # type: ignore[method-assign]  # silent after three parts
        return await main(limited(1000, seconds=0.05), wire)

    for story, status in ((large, 413), (many, 413), (slow, 408)):
        assert asyncio.run(asyncio.wait_for(story(), 10)) == status


def test_headers_that_only_our_machines_may_set_are_taken_away() -> None:
    """Ray Serve obeys them; from a stranger they end here."""
    seen: list[bytes] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(name for name, _ in scope["headers"])

    names = [b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve_multiplexed_model_id", b"accept"]
    names += [b"x-session-id", b"serve-multiplexed-model-id", b"x-request-id", b"traceparent"]
    wire = {"type": "http", "path": "/", "headers": [(name, b"nan\xff") for name in names], "query_string": b""}
    asyncio.run(LimitsMiddleware(inner, max_body_bytes=10)(wire, None, None))  # type: ignore[arg-type]  # never called
    assert seen == [b"accept"]


def test_the_life_of_the_application_is_acknowledged() -> None:
    """uvicorn and Ray Serve ask for it at start and end."""

    async def main() -> list[str]:
        asked = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
        said: list[str] = []

        async def receive() -> dict[str, Any]:
            return asked.pop(0)

        async def send(message: dict[str, Any]) -> None:
            said.append(message["type"])

        await app_of()({"type": "lifespan"}, receive, send)
        return said

    assert asyncio.run(main()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
