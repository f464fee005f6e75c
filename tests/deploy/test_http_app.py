"""The HTTP doors from outside: answers, streams, keys, health and figures."""

import asyncio
import hashlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import httpx
import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.messages import StatsReply, TokenDelta
from argosy.cluster.protocol.sampling import FinishReason
from argosy.deploy.scripted_engine import ScriptedClient, Submitted, delta, tokens_script

from .http_rig import CHAT, TEXT, TOKENIZER, USER, WORDS, app_of, call, events


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


@pytest.mark.parametrize(("path", "asked"), [(TEXT, {"prompt": "Hi"}), (CHAT, {"messages": USER})])
def test_each_event_has_the_tokens_that_came_up_to_it(path: str, asked: dict[str, object]) -> None:
    """On a busy machine a door is handed several tokens at once; their events all counted the last of them."""

    def script(asked: Submitted) -> Iterable[list[TokenDelta]]:
        yield [delta(0, [word]) for word in WORDS[:-1]]
        yield [delta(0, [WORDS[-1]], finish_reason=FinishReason.LENGTH)]

    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    pieces = events(call(app_of(ScriptedClient(script)), "POST", path, json={**asked, **options, "max_tokens": 9}))
    told = [
        event["usage"]["completion_tokens"]
        for event in pieces
        if event["choices"] and (event["choices"][0].get("text") or event["choices"][0].get("delta", {}).get("content"))
    ]
    assert told == list(range(1, len(WORDS) + 1))


def test_an_answer_goes_by_the_name_that_its_request_was_given() -> None:
    """vLLM's `request_id` was taken without effect. The engine has a name of its own: two may be given the same."""
    named = {"request_id": "mine-7"}
    for _ in range(2):
        assert call(app_of(), "POST", TEXT, json={"prompt": "Hi", **named}).json()["id"] == "cmpl-mine-7"
    assert call(app_of(), "POST", CHAT, json={"messages": USER, **named}).json()["id"] == "chatcmpl-mine-7"
    answers = call(app_of(), "POST", TEXT, json={"prompt": "Hi", "stream": True, **named})
    assert {event["id"] for event in events(answers)} == {"cmpl-mine-7"}
    refused = call(app_of(), "POST", TEXT, json={"prompt": "Hi", "request_id": "x" * 257})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "request_id"


@pytest.mark.parametrize("given", [{}, {"json_schema": {}}, {"type": None}, {"type": "json_object"}])
def test_a_form_of_answers_without_a_kind_is_refused(given: dict[str, object]) -> None:
    """A schema whose `type` was forgotten was answered with any text."""
    answer = call(app_of(), "POST", TEXT, json={"prompt": "Hi", "response_format": given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"
    assert call(app_of(), "POST", TEXT, json={"prompt": "Hi", "response_format": None}).status_code == 200


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
    long = call(app, "POST", "/tokenize", json={"prompt": "word " * 20_000}).json()  # who counts, counts long texts
    assert long["count"] == len(long["tokens"]) > 20_000 > long["max_model_len"]
    back = call(app, "POST", "/detokenize", json={"tokens": want}).json()
    assert back["prompt"] == TOKENIZER.apply_chat_template(plain)


def test_scoring_a_prompt_needs_no_answer() -> None:
    """Evaluation harnesses ask with echo, logprobs and max_tokens 0."""
    asked = {"prompt": "Hi", "echo": True, "logprobs": 1, "max_tokens": 0}
    streamed = call(app_of(), "POST", TEXT, json={**asked, "stream": True}).text
    assert "token_logprobs" in streamed
    assert "prompt_logprobs" not in streamed  # that is vLLM's own field, and was not asked for
    value = call(app_of(), "POST", TEXT, json=asked).json()
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


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/embeddings", "embeddings are not served yet; this server continues texts"),
        ("/v1/chat/completion", "there is nothing at this path; see /v1/models"),
        ("/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/tokenize", "did you mean /tokenize?"),
        ("/v1/chat/completions/", "did you mean /v1/chat/completions?"),
        ("/v2/rerank", "rankings are not served yet"),
    ],
)
def test_a_path_that_is_none_leads_to_what_was_meant(path: str, said: str) -> None:
    """A base URL without its /v1 is the commonest slip of all; what we lack is no slip."""
    answer = call(app_of(), "POST", path, json={"model": "x", "input": "a"})
    assert answer.status_code == 404
    assert said in answer.json()["error"]["message"]


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
    for given in (b"Bearer secret-one", b"bearer secret-one", b"Bearer secret-two-\xc3\xa9"):  # type: ignore[assignment]  # bytes now
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
