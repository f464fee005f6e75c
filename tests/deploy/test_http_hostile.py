"""What strangers send. Each line: what, to where, the status, and the field that the error names. Never a 5xx."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

import argosy
from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_app import build_http_app
from argosy.deploy.scripted_engine import ScriptedClient
from argosy.deploy.tokenizer import Tokenizer

MODEL = Path(argosy.__file__).parent / "default_model"
TOKENIZER = Tokenizer.load(MODEL)
JSON = {"content-type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]


def app(client: ScriptedClient | None = None, **settings: Any) -> Any:
    """The whole application over a scripted engine."""
    config = ServingConfig.from_mapping({"model": str(MODEL), "served_model_name": "tiny", **settings})
    return build_http_app(Gateway(client or ScriptedClient(), TOKENIZER, config), config.server)


def send(method: str, path: str, *, client: ScriptedClient | None = None, **more: Any) -> httpx.Response:
    """One request, straight into the application."""

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app=app(client))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, **more)

    return asyncio.run(asyncio.wait_for(main(), 20))


def chat(**fields: Any) -> tuple[str, bytes]:
    """A chat request with these fields."""
    return CHAT, json.dumps({"messages": USER, **fields}).encode()


def text(**fields: Any) -> tuple[str, bytes]:
    """A completion request with these fields."""
    return TEXT, json.dumps({"prompt": "Hi", **fields}).encode()


HOSTILE: list[tuple[tuple[str, bytes], int, str | None]] = [
    # the body itself
    ((TEXT, b""), 400, "body"),
    ((TEXT, b"   "), 400, "body"),
    ((TEXT, b"null"), 400, "body"),
    ((TEXT, b"[]"), 400, "body"),
    ((TEXT, b'"x"'), 400, "body"),
    ((TEXT, b"{"), 400, "body"),
    ((TEXT, b'{"prompt": "Hi",}'), 400, "body"),
    ((TEXT, b"\xff\xfe{}"), 400, "body"),
    ((TEXT, b'{"prompt": "\xc3\x28"}'), 400, "body"),
    ((TEXT, b'{"prompt": "\\ud800"}'), 400, "prompt"),
    ((TEXT, b'{"prompt": ["ok", "\\udfff"]}'), 400, "prompt"),
    ((TEXT, b'{"prompt": "Hi", "stop": "\\ud83d"}'), 400, "stop"),
    ((TEXT, b'{"prompt": "Hi", "\\ud800": 1}'), 400, "body"),
    ((TEXT, b'{"prompt": "Hi", "model": "\\ud800"}'), 400, "model"),
    ((TEXT, b'{"prompt": "Hi", "temperature": NaN}'), 400, "body"),
    ((TEXT, b'{"prompt": "Hi", "temperature": -Infinity}'), 400, "body"),
    ((TEXT, b'{"prompt": "Hi", "temperature": 1e999}'), 400, "temperature"),
    ((TEXT, b'{"prompt": "Hi", "seed": ' + b"9" * 5000 + b"}"), 400, "body"),
    ((TEXT, b'{"prompt": "Hi", "seed": ' + b"9" * 50 + b"}"), 400, "seed"),
    ((TEXT, b'{"prompt": "Hi", "n": 1, "n": 2}'), 400, "body"),
    ((TEXT, b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}"), 400, "body"),
    ((TEXT, b"[" * 100_000), 400, "body"),
    ((TEXT, b'{"a":' * 5000 + b"1" + b"}" * 5000), 400, "body"),
    ((TEXT, b'{"x":"' + b'\\"' * 200_000 + b"[" * 100), 400, "body"),
    ((TEXT, b'{"prompt": "a\nb"}'), 400, "body"),
    # prompts
    ((TEXT, b"{}"), 400, "prompt"),
    (text(prompt=""), 200, None),  # the beginning token alone is a prompt
    (text(prompt="", add_special_tokens=False), 400, "prompt"),
    (text(prompt=[]), 400, "prompt"),
    (text(prompt=[[]]), 400, "prompt"),
    (text(prompt=[""] * 257), 400, "prompt"),
    (text(prompt=["a", [1]]), 400, "prompt"),
    (text(prompt=[1, "a"]), 400, "prompt"),
    (text(prompt=[1.5]), 400, "prompt"),
    (text(prompt=[True]), 400, "prompt"),
    (text(prompt={"a": 1}), 400, "prompt"),
    (text(prompt=7), 400, "prompt"),
    (text(prompt=[4096]), 400, "prompt"),
    (text(prompt=[-1]), 400, "prompt"),
    (text(prompt=[2**70]), 400, "prompt"),
    (text(prompt=[5] * 5000), 400, "prompt"),
    (text(prompt="word " * 100_000), 400, "prompt"),
    # numbers and types
    (text(model="other"), 404, "model"),
    (text(model="x" * 10_000), 404, "model"),
    (text(model=7), 400, "model"),
    (text(max_tokens=0), 400, "max_tokens"),
    (text(max_tokens=-1), 400, "max_tokens"),
    (text(max_tokens=2**40), 400, "max_tokens"),
    (text(prompt=[5] * 200, max_tokens=57), 400, "max_tokens"),
    (chat(max_tokens=256), 400, "max_tokens"),
    (chat(max_completion_tokens=256), 400, "max_completion_tokens"),
    (chat(n=129), 400, "n"),
    (text(best_of=129), 400, "best_of"),
    (text(prompt=["a"] * 3, n=100), 400, "prompt"),
    (text(max_tokens="16"), 400, "max_tokens"),
    (text(max_tokens=1.5), 400, "max_tokens"),
    (text(max_tokens=True), 400, "max_tokens"),
    (text(n=0), 400, "n"),
    (text(n=-5), 400, "n"),
    (text(n=10**9), 400, "n"),
    (text(n=129), 400, "n"),
    (text(n=2, temperature=0), 400, "n"),
    (text(best_of=10**6), 400, "best_of"),
    (text(n=3, best_of=2), 400, "best_of"),
    (text(best_of=2, stream=True), 400, "best_of"),
    (text(prompt=["a"] * 100, n=100), 400, "prompt"),
    (text(temperature=-0.1), 400, "temperature"),
    (text(temperature="hot"), 400, "temperature"),
    (text(top_p=0), 400, "top_p"),
    (text(top_p=1.1), 400, "top_p"),
    (text(top_k=-2), 400, "top_k"),
    (text(min_p=2), 400, "min_p"),
    (text(presence_penalty=3), 400, "presence_penalty"),
    (text(frequency_penalty=-3), 400, "frequency_penalty"),
    (text(repetition_penalty=0), 400, "repetition_penalty"),
    (text(min_tokens=-1), 400, "min_tokens"),
    (text(min_tokens=20, max_tokens=10), 400, "min_tokens"),
    (text(min_tokens=1000, max_tokens=2000), 400, "min_tokens"),
    (text(logprobs=21), 400, "logprobs"),
    (text(logprobs=-1), 400, "logprobs"),
    (text(logprobs=True), 400, "logprobs"),
    (text(prompt_logprobs=10**9), 400, "prompt_logprobs"),
    (text(logprob_token_ids=[5000]), 400, "logprob_token_ids"),
    (text(stop=[""]), 400, "stop"),
    (text(stop=["x"] * 17), 400, "stop"),
    (text(stop="x" * 2000), 400, "stop"),
    (text(stop=[1]), 400, "stop[0]"),
    (text(stop={"a": 1}), 400, "stop"),
    (text(stop_token_ids=[4096]), 400, "stop_token_ids"),
    (text(stop_token_ids=[1] * 5000), 400, "stop_token_ids"),
    (text(stop_token_ids="1"), 400, "stop_token_ids"),
    (text(logit_bias={"x": 1}), 400, "logit_bias"),
    (text(logit_bias={"9999": 1}), 400, "logit_bias"),
    (text(logit_bias={"-1": 1}), 400, "logit_bias"),
    (text(logit_bias={"1": "x"}), 400, "logit_bias[...]"),
    (text(logit_bias={str(i): 0 for i in range(1025)}), 400, "logit_bias"),
    (text(logit_bias=[1]), 400, "logit_bias"),
    (text(allowed_token_ids=[]), 400, "allowed_token_ids"),
    (text(allowed_token_ids=[4096]), 400, "allowed_token_ids"),
    (text(bad_words=[""]), 400, "bad_words"),
    (text(bad_words=["x"] * 300), 400, "bad_words"),
    (text(priority=1), 400, "priority"),
    (text(truncate_prompt_tokens=0), 400, "truncate_prompt_tokens"),
    (text(truncate_prompt_tokens=10**6), 400, "truncate_prompt_tokens"),
    (text(truncation_side="up"), 400, "truncation_side"),
    (text(cache_salt="x" * 300), 400, "cache_salt"),
    (text(stream="yes"), 400, "stream"),
    (text(stream_options={"include_usage": True}), 400, "stream_options"),
    (text(stream=True, stream_options={"include_usage": 1}), 400, "stream_options.include_usage"),
    (text(suffix="tail"), 400, "suffix"),
    (text(use_beam_search=True), 400, "use_beam_search"),
    (text(response_format={"type": "json_object"}), 400, "response_format"),
    (text(response_format={"type": ["x"]}), 400, "response_format"),
    (text(guided_json={}), 400, "guided_json"),
    (text(structured_outputs={"regex": "(a+)+$"}), 400, "structured_outputs"),
    (text(prompt_embeds="AAAA"), 400, "prompt_embeds"),
    # conversations
    ((CHAT, b"{}"), 400, "messages"),
    (chat(messages=[]), 400, "messages"),
    (chat(messages="Hi"), 400, "messages"),
    (chat(messages=["Hi"]), 400, "messages[0]"),
    (chat(messages=[{}]), 400, "messages[0].role"),
    (chat(messages=[{"role": 1, "content": "x"}]), 400, "messages[0].role"),
    (chat(messages=[{"role": "user"}]), 400, "messages[0].content"),
    (chat(messages=[{"role": "user", "content": None}]), 400, "messages[0].content"),
    (chat(messages=[{"role": "user", "content": 7}]), 400, "messages[0].content"),
    (chat(messages=[{"role": "user", "content": [7]}]), 400, "messages[0].content[0]"),
    (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), 400, "messages[0].content[0].text"),
    (
        chat(
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.1.1"}}]}]
        ),
        400,
        "messages[0].content[0].type",
    ),
    (chat(messages=[{"role": "assistant", "tool_calls": [1]}]), 400, "messages[0].tool_calls[0].function"),
    (
        chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
        400,
        "messages[0].tool_calls[0].function.arguments",
    ),
    (chat(messages=[{"role": "user", "content": "word " * 10_000}]), 400, "prompt"),
    (chat(messages=USER * 2000), 400, "prompt"),
    (chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools"),
    (chat(tool_choice="required"), 400, "tool_choice"),
    (chat(tool_choice={"type": "function"}), 400, "tool_choice"),
    (chat(functions=[]), 400, "functions"),
    (chat(response_format={"type": "json_schema", "json_schema": {}}), 400, "response_format"),
    (chat(chat_template="{{ 7 * 7 }}"), 400, "chat_template"),
    (chat(chat_template_kwargs={"messages": "x"}), 400, "chat_template_kwargs.messages"),
    (chat(chat_template_kwargs={"tokenize": True}), 400, "chat_template_kwargs.tokenize"),
    (chat(chat_template_kwargs={"x": {"y": 1}}), 400, "chat_template_kwargs.x"),
    (chat(add_generation_prompt=True, continue_final_message=True), 400, "continue_final_message"),
    (chat(reasoning_effort="huge"), 400, "reasoning_effort"),
    (chat(modalities=["audio"]), 400, "modalities"),
    (chat(top_logprobs=2), 400, "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (chat(logprobs=True, top_logprobs=-1), 400, "top_logprobs"),
    (chat(logprobs=2), 400, "logprobs"),
    (chat(max_completion_tokens=0), 400, "max_completion_tokens"),
    (chat(max_completion_tokens=10**12), 400, "max_completion_tokens"),
    (chat(n=200), 400, "n"),
    # ids and text
    (("/tokenize", b"{}"), 400, "prompt"),
    (("/tokenize", b'{"prompt": 1}'), 400, "prompt"),
    (("/tokenize", b'{"prompt": "x", "messages": []}'), 400, "prompt"),
    (("/detokenize", b"{}"), 400, "tokens"),
    (("/detokenize", b'{"tokens": [4096]}'), 400, "tokens"),
    (("/detokenize", b'{"tokens": [-1]}'), 400, "tokens"),
    (("/detokenize", b'{"tokens": "1"}'), 400, "tokens"),
    (("/detokenize", b'{"tokens": [1], "model": "other"}'), 404, "model"),
]


@pytest.mark.parametrize(("sent", "status", "param"), HOSTILE, ids=lambda value: repr(value)[:60])
def test_a_bad_request_is_answered_with_the_field_that_is_wrong(
    sent: tuple[str, bytes], status: int, param: str | None
) -> None:
    """OpenAI's shape, one sentence, nothing of ours in it; and the engine never hears of it."""
    client = ScriptedClient()
    answer = send("POST", sent[0], content=sent[1], headers=JSON, client=client)
    assert answer.status_code == status, answer.text
    if status == 200:
        return
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) <= 500
    for leak in ("Traceback", ".py", "msgspec", "jinja", "0x"):
        assert leak not in error["message"]
    assert client.submitted == []


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status", "code"),
    [
        ("GET", "/", {}, b"", 404, "not_found"),
        ("POST", "/v1/embeddings", JSON, b"{}", 404, "not_found"),
        ("GET", "/v1/models/nope", {}, b"", 404, "model_not_found"),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", {}, b"", 404, "model_not_found"),
        ("GET", TEXT, {}, b"", 405, "method_not_allowed"),
        ("DELETE", CHAT, {}, b"", 405, "method_not_allowed"),
        ("POST", "/v1/models", JSON, b"{}", 405, "method_not_allowed"),
        ("POST", TEXT, {}, b'{"prompt": "x"}', 400, "invalid_request_error"),
        ("POST", TEXT, {"content-type": "text/plain"}, b'{"prompt": "x"}', 400, "invalid_request_error"),
        ("POST", TEXT, {"content-type": "application/x-www-form-urlencoded"}, b"a=b", 400, "invalid_request_error"),
        ("POST", TEXT, {**JSON, "content-encoding": "gzip"}, b"\x1f\x8b", 400, "encoded_body"),
        ("POST", TEXT, JSON, b" " * (4 * 1024 * 1024 + 1), 413, "payload_too_large"),
        ("POST", TEXT, {**JSON, "content-length": "99999999999999999999"}, b"{}", 413, "payload_too_large"),
        ("POST", TEXT, {**JSON, "content-length": "-1"}, b"{}", 413, "payload_too_large"),
        ("GET", "/health?" + "x" * 9000, {}, b"", 414, "url_too_long"),
        ("GET", "/health", {"x": "y" * 40_000}, b"", 431, "headers_too_large"),
        ("GET", "/health", {f"x{i}": "y" for i in range(101)}, b"", 431, "headers_too_large"),
    ],
)
def test_what_is_wrong_with_the_message_itself(
    method: str, path: str, headers: dict[str, str], content: bytes, status: int, code: str
) -> None:
    """Routes, methods, types and sizes, in the same shape as all other errors."""
    answer = send(method, path, headers=headers, content=content)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code


@pytest.mark.parametrize(
    "fields",
    [
        {"frobnicate": 1, "x" * 100: 2},
        {"user": None, "stop": None, "temperature": None, "n": None, "logit_bias": None, "stream": None, "seed": None},
        {"temperature": 0, "top_p": 1, "seed": -1, "stop": [], "logit_bias": {}, "top_k": -1},
        {"response_format": {"type": "text"}, "use_beam_search": False, "suffix": ""},
        {"prompt": [5] * 200, "max_tokens": 56},
        {"seed": 2**63 - 1},
        {"prompt": "\x00\x07 🙂 \u2028 \ufeff"},
        {"prompt": [0, 4095], "request_id": "mine"},
    ],
)
def test_what_is_odd_but_fine_is_served(fields: dict[str, Any]) -> None:
    """Unknown fields never fail, null means the default, and the limits themselves are within the limits."""
    answer = send("POST", *text(**fields)[:1], content=text(**fields)[1], headers=JSON)
    assert answer.status_code == 200, answer.text


def test_unknown_fields_are_named_in_a_header() -> None:
    """A typo is not an error, and not a secret either."""
    path, body = text(temprature=1, **{"bad\nname": 1})
    answer = send("POST", path, content=body, headers=JSON)
    assert answer.headers["x-argosy-ignored-fields"] == "?, temprature"
