"""What the clients need of HTTP: errors as our classes again, patience with a busy server, events, answers."""

import json
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import msgspec

from argosy.cluster.protocol import errors
from argosy.cluster.protocol.errors import ServingError

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 8.0


class RemoteError(ServingError):
    """What a server answered instead of the result. Also an instance of the class that the server raised."""

    def __init__(self, message: str, status: int, code: str, param: str | None, retry_after_seconds: float | None):
        Exception.__init__(self, message, status, code, param, retry_after_seconds)
        self.message, self.http_status, self.status, self.code = message, status, status, code
        self.param, self.retry_after_seconds = param, retry_after_seconds

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _remote_error, self.args


class ServerUnreachable(errors.ClusterError):
    """Nothing answers at that address, or the connection broke before an answer."""

    code = "server_unreachable"


class StreamBroken(errors.ClusterError):
    """The stream ended in the middle; what came until then is not the whole answer."""

    code = "stream_broken"


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the n answers."""

    text: str
    finish_reason: str | None
    index: int = 0
    logprobs: dict[str, Any] | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the server made of a prompt. `text` is the first choice's; `raw` the whole JSON."""

    choices: tuple[Choice, ...]
    usage: dict[str, Any]
    raw: dict[str, Any]

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    def __str__(self) -> str:
        return self.text


class Patience:
    """How long to wait before a refused request is sent again, within one budget of seconds."""

    def __init__(self, budget_seconds: float):
        self._deadline = time.monotonic() + budget_seconds
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    def pause_before_next_try(self, response: httpx.Response) -> float | None:
        """Seconds to wait, or None when the response is the last word."""
        if response.status_code != 503:
            return None
        asked = _retry_after(response)
        # the jitter keeps clients that were refused together from coming back together
        pause = (asked if asked is not None else self._pause_seconds) * random.uniform(1.0, 1.25)
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        return pause if time.monotonic() + pause < self._deadline else None


def with_json(body: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `httpx` is to be told to send `body` as JSON; nothing where there is none."""
    return {} if body is None else {"content": json_bytes(body), "headers": {"content-type": "application/json"}}


def json_bytes(body: Mapping[str, Any], where: str = "") -> bytes:
    """The body of a request. What JSON can't say is refused by the name of its field."""
    try:
        return _dumped(body)
    except (TypeError, ValueError, RecursionError) as error:
        for name, value in body.items():
            try:
                _dumped(value)
            except (TypeError, ValueError, RecursionError) as reason:
                raise errors.InvalidRequest(f"{where}{name}", *_what_json_lacks(value, reason)) from reason
        raise errors.InvalidRequest(where or "body", *_what_json_lacks(body, error)) from error


def _dumped(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _what_json_lacks(value: object, reason: Exception) -> tuple[str, str]:
    if isinstance(reason, UnicodeEncodeError):
        return "text", "holds half of a surrogate pair, or bytes that are no UTF-8; send valid Unicode text"
    return type(value).__name__, f"can't be sent as JSON: {reason}"


class Events:
    """The server-sent events of one stream: pieces of text, an error, or the end."""

    def __init__(self) -> None:
        self._is_complete, self._num_pieces = False, 0

    def texts(self, line: str) -> list[str]:
        """The text in this line, if any. Raises what the server reports in the middle of a stream."""
        if not line.startswith("data:"):
            return []
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self._is_complete = True
            return []
        try:
            event = json.loads(data)
        except ValueError as error:
            raise StreamBroken(f"the server sent an event that is no JSON: {data[:80]!r}") from error
        if "error" in event:
            raise _error_from_body(event, int(event["error"].get("status") or 500), None)
        pieces = [_text_of(choice) for choice in event.get("choices", ())]
        self._num_pieces += len(pieces)
        return [text for text in pieces if text]

    def check_complete(self) -> None:
        """Raise when the end came without its mark."""
        if not self._is_complete:
            raise StreamBroken(f"the stream ended after {self._num_pieces} pieces without its end mark; ask again")

    def broken(self, url: object, error: Exception) -> ServingError:
        """Our word for a connection that failed."""
        if self._num_pieces:
            return StreamBroken(f"the connection to {url} broke after {self._num_pieces} pieces: {error}")
        return unreachable(url, error)


def http_options(url: str, api_key: str | None, timeout_seconds: float) -> dict[str, Any]:
    """How to reach a server, for either of the clients. Raises `ConfigError` for what can't be one."""
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise errors.ConfigError("api_key: may only have letters of ASCII, in one line")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    url = url if "://" in url else f"http://{url}"  # as curl reads "localhost:8000"
    # A local server is never behind the proxy that the environment names for the rest of the world.
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise errors.ConfigError(f"url={url!r}: must be such as http://127.0.0.1:8000 ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise errors.ConfigError(f"url={url!r}: must be such as http://127.0.0.1:8000")
    is_local = parts.host in ("127.0.0.1", "localhost", "::1")
    base_url = url.rstrip("/").removesuffix("/v1")
    timeout = httpx.Timeout(timeout_seconds, connect=min(10.0, timeout_seconds))
    return {"base_url": base_url, "headers": headers, "timeout": timeout, "trust_env": not is_local}


def _text_of(choice: Mapping[str, Any]) -> str:
    holder = choice.get("delta") or choice.get("message")
    return str((holder.get("content") if holder is not None else choice.get("text")) or "")


def answer_of(body: dict[str, Any]) -> Answer:
    """The JSON of a completion."""
    choices = tuple(
        Choice(
            text=_text_of(choice),
            finish_reason=choice.get("finish_reason"),
            index=choice.get("index", place),
            logprobs=choice.get("logprobs"),
        )
        for place, choice in enumerate(body["choices"])
    )
    return Answer(choices=choices, usage=body.get("usage") or {}, raw=body)


def checked(response: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer. Raises what the server said instead of one."""
    try:
        body = response.json()
    except ValueError:
        body = {}
    if response.status_code >= 400 or not isinstance(body, dict):
        raise error_of(response)
    return body


def error_of(response: httpx.Response) -> RemoteError:
    """What the server said instead of an answer, as an instance of the class that it raised."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict) or "error" not in body:
        body = {"error": {"message": response.text[:500]}}
    return _error_from_body(body, response.status_code, _retry_after(response))


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _error_from_body(body: Mapping[str, Any], status: int, retry_after_seconds: float | None) -> RemoteError:
    error = body["error"] if isinstance(body["error"], dict) else {"message": str(body["error"])}
    message = error.get("message") or f"the server answered with status {status}"
    code = error.get("code") or error.get("type")
    return _remote_error(str(message), status, str(code), error.get("param"), retry_after_seconds)


def unreachable(url: object, error: Exception) -> ServerUnreachable:
    """Our word for a server that can't be talked to."""
    return ServerUnreachable(f"no answer from {url} ({type(error).__name__}: {error}); is the server running?")


def _all_kinds(kind: type[ServingError]) -> Iterator[type[ServingError]]:
    yield kind
    for member in kind.__subclasses__():
        yield from _all_kinds(member)


def _of_kind(kind: type[ServingError]) -> type[RemoteError]:
    return type(kind.__name__, (RemoteError, kind), {"__doc__": kind.__doc__})


# The more specific class wins where a code is shared: subclasses come after their base.
_KINDS = {kind.code: _of_kind(kind) for kind in list(_all_kinds(ServingError)) if kind.__module__ == errors.__name__}
_KIND_OF_STATUS = {
    400: _of_kind(errors.InvalidRequest),
    401: _KINDS["invalid_api_key"],
    404: _of_kind(errors.RequestError),
    413: _KINDS["payload_too_large"],
    503: _KINDS["overloaded"],
}


def _remote_error(message: str, status: int, code: str, param: str | None, retry: float | None) -> RemoteError:
    kind = _KINDS.get(code) or _KIND_OF_STATUS.get(status) or RemoteError
    return kind(message, status, code, param, retry)
