"""Any JSON in any field, and any bytes as a body: an answer below 500, and a server that still serves."""

import asyncio
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import argosy
from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_app import build_http_app
from argosy.deploy.openai.fields import ChatFields, CompletionFields
from argosy.deploy.scripted_engine import ScriptedClient
from argosy.deploy.tokenizer import Tokenizer

MODEL = Path(argosy.__file__).parent / "default_model"
CONFIG = ServingConfig.from_mapping({"model": str(MODEL), "served_model_name": "tiny"})
APP = build_http_app(Gateway(ScriptedClient(), Tokenizer.load(MODEL), CONFIG), CONFIG.server)

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**300, 4095, 4096]),
    st.floats(width=32, allow_nan=False),
)
WORDS = st.one_of(
    st.text(max_size=8), st.sampled_from(["text", "user", "tiny", "json_object", "\ud800", "\x00", "none", "left"])
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
KEYS = st.one_of(WORDS, st.sampled_from(["role", "content", "type", "text", "include_usage", "1", "name", "function"]))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)
PLAIN = st.one_of(  # often right, so that requests get past the first check
    st.none(),
    st.booleans(),
    st.integers(1, 5),
    st.floats(0.125, 1.0, width=16),
    st.lists(st.integers(0, 100), min_size=1, max_size=3),
    st.lists(st.text("ab 🙂", min_size=1, max_size=3), min_size=1, max_size=3),
    st.text("ab 🙂", min_size=1, max_size=3),
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": WORDS, "content": VALUES}, optional={"tool_calls": VALUES, "name": VALUES}),
    max_size=3,
)


def post(path: str, body: bytes) -> tuple[int, bytes]:
    """(status, body) of a POST straight into the application."""

    async def main() -> tuple[int, bytes]:
        status, parts, asked = 0, [], False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:
                await asyncio.Event().wait()
            asked = True
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await APP(scope, receive, send)
        return status, b"".join(parts)

    return asyncio.run(asyncio.wait_for(main(), 20))


def check(path: str, body: bytes) -> None:
    """Served, or refused in OpenAI's shape."""
    status, answer = post(path, body)
    assert 200 <= status < 500, (status, answer, body)
    answer.decode("utf-8")
    if status >= 400:
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert status != 422
    elif b"data: " in answer[:100] or b"\ndata: " in answer:
        assert answer.endswith(b"data: [DONE]\n\n"), (answer[-300:], body)


def fields_of(kind: Any, basis: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A request that is right but for a few fields that may hold anything."""
    names = st.sampled_from(sorted(set(kind.__struct_fields__)))
    return st.dictionaries(names, st.one_of(PLAIN, PLAIN, PLAIN, VALUES), max_size=3).map(lambda odd: {**basis, **odd})


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=fields_of(CompletionFields, {"prompt": "Hi"}))
def test_completions_stand_any_value_in_any_field(body: dict[str, Any]) -> None:
    """Types, ranges and combinations that nobody thought of."""
    check("/v1/completions", json.dumps(body).encode())


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=fields_of(ChatFields, {"messages": [{"role": "user", "content": "Hi"}]}))
def test_chats_stand_any_value_in_any_field(body: dict[str, Any]) -> None:
    """The same for conversations."""
    check("/v1/chat/completions", json.dumps(body).encode())


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=MESSAGES, stream=st.booleans())
def test_chats_stand_any_message(messages: list[Any], stream: bool) -> None:
    """Roles and contents of every kind, through the model's own template."""
    check("/v1/chat/completions", json.dumps({"messages": messages, "stream": stream}).encode())


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.one_of(st.binary(max_size=60), VALUES.map(lambda value: json.dumps(value).encode())))
def test_any_bytes_as_a_body(body: bytes) -> None:
    """What is no JSON, and JSON that is no request."""
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        check(path, body)
