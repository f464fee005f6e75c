"""The client against servers that answer, refuse, come late, and break off."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from argosy import AsyncClient, Client
from argosy.cluster.protocol import errors
from argosy.deploy import cli, jobs_cli, jobs_client
from argosy.deploy import client as client_module
from argosy.deploy.client import RemoteError, ServerUnreachable, StreamBroken
from argosy.placement.ports import free_port

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries are asked for and not slept."""

    async def rest(seconds: float) -> None:
        return None

    monkeypatch.setattr(client_module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(client_module.asyncio, "sleep", rest)


def talk_to(handler: Handler, **options: float) -> Client:
    """A client whose server is a function."""
    return Client("http://server/v1/", transport=httpx.MockTransport(handler), **options)


def refusal(status: int, code: str, message: str = "no", **headers: str) -> httpx.Response:
    """The server's error shape."""
    body = {"error": {"message": message, "type": "t", "param": "temperature", "code": code}}
    return httpx.Response(status, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def events(*payloads: str) -> httpx.Response:
    """A stream of server-sent events."""
    return httpx.Response(200, text="".join(f"data: {payload}\n\n" for payload in payloads))


def piece(text: str) -> str:
    """One event of a streamed completion."""
    return json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": None}]})


def test_a_completion_comes_back_as_text_reason_and_usage() -> None:
    """The model is asked for once when none is named; parameters travel as they are."""
    seen: list[tuple[str, dict[str, object]]] = []

    def server(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        seen.append((request.url.path, json.loads(request.content)))
        choices = [{"index": 0, "text": " time", "finish_reason": "length"}]
        return httpx.Response(200, json={"choices": choices, "usage": {"completion_tokens": 1}})

    with talk_to(server) as client:
        answer = client.complete("once upon a", max_tokens=1)
    assert (answer.text, answer.finish_reason, answer.usage["completion_tokens"]) == (" time", "length", 1)
    assert seen == [("/v1/completions", {"model": "m", "prompt": "once upon a", "max_tokens": 1})]


def test_a_chat_streams_pieces_and_needs_its_end_mark() -> None:
    """Comments and empty deltas are not text."""

    def server(request: httpx.Request) -> httpx.Response:
        first = json.dumps({"choices": [{"delta": {"role": "assistant"}}]})
        second = json.dumps({"choices": [{"delta": {"content": "hi"}}]})
        return events(first, second, json.dumps({"choices": [], "usage": {}}), "[DONE]")

    assert list(talk_to(server).stream_chat([{"role": "user", "content": "x"}], model="m")) == ["hi"]


def test_a_stream_that_just_ends_is_an_error() -> None:
    """A proxy that gives up looks like a short answer, and must not be taken for one."""
    pieces: Iterator[str] = talk_to(lambda request: events(piece("half"))).stream_complete("p", model="m")
    assert next(pieces) == "half"
    with pytest.raises(StreamBroken, match="after 1 pieces"):
        next(pieces)


def test_an_error_in_the_middle_of_a_stream_is_the_servers() -> None:
    """The cluster lost the request: what came is there, then its error."""
    error = json.dumps({"error": {"message": "lost", "type": "t", "code": "request_lost"}})
    pieces = talk_to(lambda request: events(piece("half"), error)).stream_complete("p", model="m")
    assert next(pieces) == "half"
    with pytest.raises(errors.RequestLost, match="lost"):
        next(pieces)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_request_error", errors.InvalidRequest),
        (400, "context_length_exceeded", errors.ContextTooLong),
        (404, "model_not_found", errors.UnknownModel),
        (401, "invalid_api_key", errors.Unauthorized),
        (413, "payload_too_large", errors.PayloadTooLarge),
        (408, "deadline_exceeded", errors.DeadlineExceeded),
        (500, "anything_else", RemoteError),
    ],
)
def test_the_servers_error_is_the_same_class_here(status: int, code: str, kind: type[Exception]) -> None:
    """`except ContextTooLong` works on both sides of the wire, with the server's own sentence."""
    with pytest.raises(kind) as caught:
        talk_to(lambda request: refusal(status, code, "because")).complete("p", model="m")
    error = caught.value
    assert isinstance(error, RemoteError)
    assert (str(error), error.status, error.param) == ("because", status, "temperature")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, kind)
    assert str(copy) == "because"


def test_a_full_queue_is_tried_again_and_then_answers() -> None:
    """Two refusals with Retry-After, then room."""
    answers = [refusal(503, "overloaded", retry_after="1"), refusal(503, "overloaded"), events(piece("ok"), "[DONE]")]
    assert list(talk_to(lambda request: answers.pop(0)).stream_complete("p", model="m")) == ["ok"]


@pytest.mark.parametrize(
    ("prompt", "params", "named"),
    [
        ("\udcff", {}, "prompt=text: holds half of a surrogate pair, or bytes that are no UTF-8"),
        ("a", {"top_p": float("nan")}, "top_p=float: can't be sent as JSON"),
        ("a", {"stop": {"a", "b"}}, "stop=set: can't be sent as JSON"),
    ],
)
def test_what_json_cannot_say_is_refused_by_the_name_of_its_field(
    prompt: str, params: dict[str, object], named: str
) -> None:
    """`argosy complete` with a Latin 1 word, or a script with a set, ended with the encoder's traceback."""

    def server(request: httpx.Request) -> httpx.Response:
        raise AssertionError("nothing is sent")

    client = talk_to(server)
    with pytest.raises(errors.InvalidRequest, match=named):
        client.complete(prompt, model="m", **params)
    with pytest.raises(errors.InvalidRequest, match=named):
        list(client.stream_complete(prompt, model="m", **params))


def test_a_line_of_a_job_that_json_cannot_say_is_named(tmp_path: Path) -> None:
    """JSON has an escape for half a surrogate pair, so a file may hold one."""
    with (tmp_path / "in.jsonl").open("w+b") as file, pytest.raises(errors.InvalidRequest, match=r"requests\[1\].body"):
        jobs_client.write_input(file, ["fine", "\ud800"], None, {"model": "m"})


@pytest.mark.parametrize("key", ["", "a\nb", "\xe9", " a", "x" * 257])
def test_a_key_that_no_header_can_hold_is_refused_before_anything_is_sent(key: str) -> None:
    """One with a line break was tried again for ten minutes, as if no server ran."""

    def server(request: httpx.Request) -> httpx.Response:
        raise AssertionError("nothing is sent")

    with pytest.raises(errors.InvalidRequest, match="1 to 256 characters of ASCII"):
        talk_to(server).submit(["a"], key=key, model="m")


def test_patience_ends() -> None:
    """The server asks for longer than the caller would wait: the refusal is the answer, at once."""
    asked = []

    def server(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return refusal(503, "overloaded", retry_after="60")

    with pytest.raises(errors.Overloaded) as caught:
        talk_to(server, retry_seconds=5).complete("p", model="m")
    assert len(asked) == 1
    assert caught.value.retry_after_seconds == 60  # type: ignore[attr-defined]  # RemoteError's


def test_an_address_without_a_scheme_is_http() -> None:
    """As people type it, and as curl reads it; it was told that no server was running."""
    asked: list[str] = []

    def server(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, json={"data": [{"id": "m"}]})

    assert Client("localhost:8000", transport=httpx.MockTransport(server)).models() == ["m"]
    assert asked == ["http://localhost:8000/v1/models"]


def test_a_request_that_may_have_run_is_not_sent_twice() -> None:
    """A 500 or a broken connection says nothing about what happened before."""
    asked = []

    def server(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        raise httpx.ReadError("gone")

    with pytest.raises(ServerUnreachable, match="is the server running"):
        talk_to(server).complete("p", model="m")
    assert len(asked) == 1


def test_an_answer_that_is_no_json_is_still_an_error_of_ours() -> None:
    """A proxy in between answers in HTML."""
    with pytest.raises(RemoteError, match="Bad gateway"):
        talk_to(lambda request: httpx.Response(502, text="<h1>Bad gateway</h1>")).complete("p", model="m")


@pytest.mark.anyio
async def test_the_asynchronous_client_does_the_same(anyio_backend: str) -> None:
    """Completion, stream, health, tokens."""

    def server(request: httpx.Request) -> httpx.Response:
        match request.url.path:
            case "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "m"}]})
            case "/tokenize":
                return httpx.Response(200, json={"tokens": [1, 2]})
            case "/detokenize":
                return httpx.Response(200, json={"prompt": "ab"})
            case "/health":
                return httpx.Response(503)
        if json.loads(request.content).get("stream"):
            return events(piece("a"), piece("b"), "[DONE]")
        return httpx.Response(200, json={"choices": [{"text": "ab", "finish_reason": "stop"}]})

    async with AsyncClient("http://server", transport=httpx.MockTransport(server)) as client:
        assert (await client.complete("p")).text == "ab"
        assert [text async for text in client.stream_complete("p")] == ["a", "b"]
        assert await client.tokenize("ab") == [1, 2]
        assert await client.detokenize([1, 2]) == "ab"
        assert await client.health() is False


@pytest.fixture
def anyio_backend() -> str:
    """asyncio is what we run on."""
    return "asyncio"


def test_who_looks_for_jobs_where_no_server_is_hears_so_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not after the ten minutes that a program waits which sees its job through."""
    assert jobs_cli._LOOK_SECONDS < 5.0
    monkeypatch.setattr(jobs_cli, "_LOOK_SECONDS", 0.1)
    port = free_port("127.0.0.1")
    for words in (["list"], ["show", "batch_1"], ["cancel", "batch_1"]):
        assert cli.main(["jobs", *words, "--url", f"http://127.0.0.1:{port}"]) == 1
        assert "no answer from" in capsys.readouterr().err


def test_a_program_that_waits_for_its_server_says_that_it_does(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line an outage."""
    monkeypatch.setattr(jobs_client, "_SILENT_SECONDS", 0.0)
    port = free_port("127.0.0.1")
    with Client(f"http://127.0.0.1:{port}") as client, pytest.raises(ServerUnreachable):
        client.job("batch_1", outage_seconds=0.6)
    (record,) = [record for record in caplog.records if record.name.endswith("jobs_client")]
    assert "Trying again for up to 1 s" in record.getMessage()


@pytest.mark.parametrize("url", ["http://[::1", "ftp://server", "http://", "http://a:b:c", "http://host:port"])
def test_an_address_that_can_be_none_is_told_at_once(url: str) -> None:
    """As a mistake in what was written, not as a server that is not running."""
    for kind in (Client, AsyncClient):
        with pytest.raises(errors.ConfigError, match=r"must be such as http://127\.0\.0\.1:8000") as caught:
            kind(url)
        assert repr(url) in str(caught.value)


def test_a_key_that_no_header_can_hold_is_told_without_showing_it() -> None:
    """Pasted with a line's end, or in another alphabet."""
    for key in ("secret\n", "\u043a\u043b\u044e\u0447"):
        with pytest.raises(errors.ConfigError, match="api_key: may only have letters of ASCII") as caught:
            Client("http://127.0.0.1:1", api_key=key)
        assert key.strip() not in str(caught.value)
