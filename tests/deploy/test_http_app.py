"""The HTTP doors from outside: answers, streams, keys, health, figures, and clients that leave or stop reading."""

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest

import argosy
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError, WorkerLost
from argosy.cluster.protocol.messages import StatsReply, TokenDelta
from argosy.cluster.protocol.sampling import FinishReason
from argosy.deploy import http_io
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_app import HttpApp, build_http_app
from argosy.deploy.http_limits import LimitsMiddleware
from argosy.deploy.scripted_engine import ScriptedClient, Submitted, delta, tokens_script
from argosy.deploy.tokenizer import Tokenizer

MODEL = Path(argosy.__file__).parent / "default_model"
TOKENIZER = Tokenizer.load(MODEL)
WORDS = TOKENIZER.encode(" there is a way", add_special_tokens=False)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]
JSON = [(b"content-type", b"application/json")]


def gateway(client: ScriptedClient, **settings: Any) -> Gateway:
    """The embedded model over a scripted engine."""
    config = ServingConfig.from_mapping({"model": str(MODEL), "served_model_name": "tiny", **settings})
    return Gateway(client, TOKENIZER, config)


def call(app: Any, method: str, path: str, **more: Any) -> httpx.Response:
    """One request, straight into the application."""

    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
            return await http.request(method, path, **more)

    return asyncio.run(asyncio.wait_for(main(), 20))


def app_of(client: ScriptedClient | None = None, **settings: Any) -> Any:
    """The application."""
    door = gateway(client or ScriptedClient(tokens_script(WORDS)), **settings)
    return build_http_app(door, door.config.server)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events; the stream must have ended as a whole one."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_has_openais_shape() -> None:
    """Every key that the official client reads, and vLLM's own."""
    value = call(app_of(), "POST", TEXT, json={"prompt": "Hi", "n": 2, "logprobs": 2, "echo": True}).json()
    assert value["object"] == "text_completion"
    assert value["model"] == "tiny"
    assert [choice["index"] for choice in value["choices"]] == [0, 1]
    choice = value["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hi there is a way", "length", None)
    columns = choice["logprobs"]
    assert len(columns["tokens"]) == len(TOKENIZER.encode("Hi")) + len(WORDS)
    assert columns["token_logprobs"][0] is None
    assert "".join(columns["tokens"]) == "<|begin|>Hi there is a way"
    assert {len(column) for column in columns.values()} == {len(columns["tokens"])}
    assert value["usage"] == {
        "prompt_tokens": len(TOKENIZER.encode("Hi")),
        "completion_tokens": 2 * len(WORDS),
        "total_tokens": len(TOKENIZER.encode("Hi")) + 2 * len(WORDS),
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_a_stream_of_completions_says_the_same_as_the_whole() -> None:
    """Two prompts, two answers each: indexes as in the whole answer, pieces that join to it, usage when asked for."""
    fields = {"prompt": ["Hi", "Why"], "n": 2, "logprobs": 1, "echo": True, "return_token_ids": True}
    whole = call(app_of(), "POST", TEXT, json=fields).json()
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    pieces = events(call(app_of(), "POST", TEXT, json={**fields, **options}))
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in pieces if e["choices"] and e["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert list(chain.from_iterable(piece["token_ids"] for piece in mine)) == choice["token_ids"]
        assert [piece["finish_reason"] for piece in mine][-1] == "length"
        for column in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = chain.from_iterable(p["logprobs"][column] for p in mine if p["logprobs"])
            assert list(joined) == choice["logprobs"][column]
    assert pieces[-1]["usage"] == whole["usage"]
    assert pieces[-1]["choices"] == []
    assert all(event["usage"] for event in pieces)
    assert {event["id"] for event in pieces} == {pieces[0]["id"]}


def test_without_being_asked_a_stream_has_no_usage_event() -> None:
    """SGLang's load generator fails on an event without choices that nobody asked for."""
    pieces = events(call(app_of(), "POST", TEXT, json={"prompt": "Hi", "stream": True}))
    assert all(event["choices"] for event in pieces)
    assert "usage" not in pieces[0]


def test_events_are_numbered_for_clients_that_read_numbers() -> None:
    """Whoever says `text/event-stream` gets `id: N`, without gaps; load generators read each line as data."""
    plain = call(app_of(), "POST", TEXT, json={"prompt": "Hi", "stream": True})
    assert "id: 0" not in plain.text
    numbered = call(
        app_of(), "POST", TEXT, json={"prompt": "Hi", "stream": True}, headers={"accept": "text/event-stream"}
    )
    ids = [int(line.removeprefix("id: ")) for line in numbered.text.split("\n") if line.startswith("id: ")]
    assert ids == list(range(len(WORDS)))


def test_a_chat_has_openais_shape_whole_and_streamed() -> None:
    """Role first, content, a final event with the reason; logprobs with bytes and the best ones in order."""
    fields = {"messages": USER, "n": 2, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 3}
    whole = call(app_of(), "POST", CHAT, json=fields).json()
    assert whole["object"] == "chat.completion"
    choice = whole["choices"][1]
    text = TOKENIZER.decode(WORDS[:3])
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    first = choice["logprobs"]["content"][0]
    assert bytes(first["bytes"]).decode() == first["token"]
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -1.0]
    pieces = [e["choices"][0] for e in events(call(app_of(), "POST", CHAT, json={**fields, "stream": True}))]
    for index in range(2):
        mine = [piece for piece in pieces if piece["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"].get("content", "") for piece in mine) == text
        assert (mine[-1]["delta"], mine[-1]["finish_reason"]) == ({}, "length")
        joined = chain.from_iterable(p["logprobs"]["content"] for p in mine if p["logprobs"])
        assert list(joined) == choice["logprobs"]["content"]


def test_the_conversation_goes_through_the_template() -> None:
    """Parts are joined, a developer speaks as the system, the end is the assistant's turn; also in /tokenize."""
    client = ScriptedClient(tokens_script(WORDS))
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    app = app_of(client)
    assert call(app, "POST", CHAT, json={"messages": messages}).status_code == 200
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
    want = TOKENIZER.encode(TOKENIZER.apply_chat_template(plain), add_special_tokens=False)
    assert list(client.submitted[0].prompt_token_ids) == want
    value = call(app, "POST", "/tokenize", json={"messages": messages, "return_token_strs": True}).json()
    assert (value["tokens"], value["count"], value["max_model_len"]) == (want, len(want), 256)
    assert value["token_strs"][0] == TOKENIZER.piece(want[0])
    back = call(app, "POST", "/detokenize", json={"tokens": want}).json()
    assert back["prompt"] == TOKENIZER.apply_chat_template(plain)


def test_scoring_a_prompt_needs_no_answer() -> None:
    """Evaluation harnesses ask with echo, logprobs and max_tokens 0."""
    value = call(app_of(), "POST", TEXT, json={"prompt": "Hi", "echo": True, "logprobs": 1, "max_tokens": 0}).json()
    choice = value["choices"][0]
    assert choice["text"] == "Hi"
    assert len(choice["logprobs"]["tokens"]) == len(TOKENIZER.encode("Hi"))
    assert value["usage"]["completion_tokens"] == 0


def test_the_best_of_several_are_chosen_by_their_mean_logprob() -> None:
    """`best_of` 3, `n` 1: the one whose tokens were likeliest."""

    def script(asked: Submitted) -> Iterable[list[TokenDelta]]:
        from argosy.cluster.protocol.messages import TokenLogprobs

        for index, logprob in enumerate((-2.0, -0.5, -1.0)):
            figures = [TokenLogprobs(1, [WORDS[index]], [logprob])]
            yield [delta(index, [WORDS[index]], logprobs=figures, finish_reason=FinishReason.LENGTH)]

    value = call(app_of(ScriptedClient(script)), "POST", TEXT, json={"prompt": "Hi", "best_of": 3}).json()
    assert [choice["text"] for choice in value["choices"]] == [TOKENIZER.decode([WORDS[1]])]
    assert value["choices"][0]["logprobs"] is None


def test_models_version_and_ids() -> None:
    """What tools ask first; and the client's own id comes back if it is a fit label."""
    app = app_of(served_model_name=["tiny", "other/name"])
    assert [card["id"] for card in call(app, "GET", "/v1/models").json()["data"]] == ["tiny", "other/name"]
    assert call(app, "GET", "/v1/models/other%2Fname").json()["max_model_len"] == 256
    assert call(app, "GET", "/version").json()["version"]
    assert call(app, "GET", "/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("x" * 129, "a b", "a\tb"):
        assert len(call(app, "GET", "/v1/models", headers={"x-request-id": bad}).headers["x-request-id"]) == 32


def test_health_follows_the_engine_and_costs_it_little() -> None:
    """A load balancer asks often; the driver is asked once a second. Not healthy, silent, gone: 503 each."""
    client = ScriptedClient()
    app = app_of(client)

    async def main() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
            return [answer.status_code for answer in await asyncio.gather(*[http.get("/health") for _ in range(50)])]

    assert asyncio.run(main()) == [200] * 50
    assert client.num_stats == 1
    client.reply = StatsReply(values={}, healthy=False, status="rebuilding")
    answer = call(app_of(client), "GET", "/ping")
    assert (answer.status_code, answer.json()["status"]) == (503, "rebuilding")
    assert answer.headers["retry-after"]
    client.closed = True
    assert call(app_of(client), "GET", "/health").status_code == 503


def test_metrics_are_prometheus_text_with_labels_from_closed_sets() -> None:
    """The driver's figures, vLLM's names and this edge's own; a path that a stranger made up is "other"."""
    from prometheus_client.parser import text_string_to_metric_families

    client = ScriptedClient()
    client.reply = StatsReply(
        values={
            "argosy_requests_running": 2.0,
            "vllm:num_requests_running": 2.0,
            'argosy_requests_finished_total{reason="stop"}': 5.0,
        },
        histograms={"vllm:time_to_first_token_seconds": ([0.1, 1.0], [1, 2, 3], 4.5)},
    )
    app = app_of(client, served_model_name='a"b')
    for path in ("/nonsense", "/v1/models", "/also/nonsense"):
        call(app, "GET", path)
    families = {f.name: f for f in text_string_to_metric_families(call(app, "GET", "/metrics").text)}
    assert families["argosy_requests_running"].samples[0].labels == {"model_name": 'a"b'}
    assert families["vllm:num_requests_running"].type == "gauge"
    assert families["argosy_requests_finished"].samples[0].labels["reason"] == "stop"
    buckets = [s.value for s in families["vllm:time_to_first_token_seconds"].samples if s.name.endswith("_bucket")]
    assert buckets == [1, 3, 6]
    routes = {s.labels["route"]: s.value for s in families["argosy_http_requests"].samples}
    assert routes == {"other": 2.0, "models": 1.0}


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    """Two keys."""
    path = tmp_path / "keys"
    path.write_bytes(b"# team a\nsecret-one\n\n  secret-two-\xc3\xa9  \n")
    return str(path)


def test_without_a_key_every_route_but_health_is_closed(keys_file: str) -> None:
    """Deny by default: also for paths that don't exist, in odd spellings, and for half a key."""
    app = app_of(api_keys_file=keys_file)
    for path in ("/v1/models", "/metrics", "/nonsense", "/v1/completions", "//health", "/health/", "/version", "/%2e"):
        assert call(app, "GET", path).status_code == 401, path
    assert call(app, "GET", "/health").status_code == 200
    for given in ("Bearer secret-on", "Bearer secret-one2", "secret-one", "Basic secret-one", "Bearer", "Bearer ", ""):
        answer = call(app, "GET", "/v1/models", headers={"authorization": given})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "secret" not in answer.text
    for given in (b"Bearer secret-one", b"bearer secret-one", b"Bearer secret-two-\xc3\xa9"):  # type: ignore[assignment]
        assert call(app, "GET", "/v1/models", headers={b"authorization": given}).status_code == 200


def test_two_keys_never_meet_in_the_prefix_cache(keys_file: str, tmp_path: Path) -> None:
    """Who can measure time can tell whether somebody else sent a prompt; so each key has its own salt."""
    client = ScriptedClient(tokens_script(WORDS))
    app = app_of(client, api_keys_file=keys_file)
    for key in (b"secret-one", b"secret-two-\xc3\xa9"):
        headers = {b"authorization": b"Bearer " + key}
        assert call(app, "POST", TEXT, json={"prompt": "Hi", "cache_salt": "x"}, headers=headers).status_code == 200
    salts = [asked.cache_salt for asked in client.submitted]
    assert salts[0] != salts[1]
    assert all(salt.endswith("x") and hashlib.sha256(b"secret-one").hexdigest() not in salt for salt in salts)
    alone = tmp_path / "alone"
    alone.write_text("secret-one\n")
    call(
        app_of(client, api_keys_file=str(alone)),
        "POST",
        TEXT,
        json={"prompt": "Hi"},
        headers={"authorization": "Bearer secret-one"},
    )
    assert client.submitted[-1].cache_salt == ""


@pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"short\n"])
def test_a_keys_file_without_a_fit_key_opens_nothing(tmp_path: Path, content: bytes | None) -> None:
    """An empty file must not mean an open door."""
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="api_keys_file"):
        app_of(api_keys_file=str(path))


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
    assert answer.json()["error"]["message"] == "temperature=string: must be number or null"


@pytest.mark.parametrize("stream", [False, True])
def test_overload_is_a_503_that_says_when_to_come_back(stream: bool) -> None:
    """Also for a stream: the status is not sent before the first token is there."""
    app = app_of(failing(0, "overloaded", 503, retry_after_seconds=12.4))
    answer = call(app, "POST", CHAT, json={"messages": USER, "stream": stream})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "12")
    assert answer.json()["error"]["code"] == "overloaded"


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

        wire.receive = receive  # type: ignore[method-assign]
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
    asyncio.run(LimitsMiddleware(inner, max_body_bytes=10)(wire, None, None))  # type: ignore[arg-type]
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
