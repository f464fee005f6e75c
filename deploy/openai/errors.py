"""The one renderer of errors: OpenAI's shape, the right status, and nothing of ours or of other requests in it."""

import json
import logging
from typing import Any, Final

from argosy.cluster.protocol.errors import InvalidRequest, RequestError, ServingError

log = logging.getLogger("argosy.http")

MAX_MESSAGE_CHARS: Final = 1000
_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    499: "aborted",
    503: "overloaded_error",
}


_TOLD: Final = {"draining": "this server is being stopped and takes no new requests; ask another, or ask again later"}


class HttpRefusal(RequestError):
    """Refused by the HTTP layer itself: no such route, wrong method, a header that is too large."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None):
        super().__init__(status, code, message)
        self.http_status, self.code, self.message, self.param = status, code, message, param

    def __str__(self) -> str:
        return self.message


def status_of(error: BaseException) -> int:
    """The HTTP status of an error; a status that is none of HTTP's own becomes 500."""
    status = error.http_status if isinstance(error, ServingError) else 500
    return status if 400 <= status < 600 else 500


def error_body(error: BaseException, request_id: str = "") -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`. An error that is not ours gives a fixed sentence and the id."""
    status = status_of(error)
    if isinstance(error, RequestError):
        message, code, param = str(error), error.code, error.param
    elif isinstance(error, ServingError):  # of the machines: its text names them, which is for the log
        code, param = error.code, None
        reason = f"the engine can't answer now; the server's log has the reason under request {request_id}"
        message = _TOLD.get(code, reason)
    else:
        code, param = "internal_error", None
        message = f"something went wrong here; the server's log has the reason under request {request_id}"
    return {
        "error": {
            "message": _safe(message, MAX_MESSAGE_CHARS),
            "type": _TYPES.get(status, "server_error"),
            "param": _safe(param, 200) if isinstance(param, str) else None,
            "code": code,
        }
    }


def error_bytes(error: BaseException, request_id: str = "") -> bytes:
    """`error_body` as JSON."""
    return json.dumps(error_body(error, request_id), ensure_ascii=False).encode()


def error_headers(error: BaseException) -> list[tuple[bytes, bytes]]:
    """Headers that go with the status: when to come back, how to prove who one is."""
    status = status_of(error)
    if status in (429, 503):
        seconds = getattr(error, "retry_after_seconds", 1.0) or 1.0
        return [(b"retry-after", str(max(1, min(3600, round(seconds)))).encode())]
    if status == 401:
        return [(b"www-authenticate", b"Bearer")]
    return []


def log_unexpected(error: BaseException, request_id: str) -> None:
    """What is not ours is logged as type and place only: its text may hold a prompt."""
    if isinstance(error, RequestError):
        return
    if isinstance(error, ServingError):
        log.error("request %s failed: %s: %s", request_id, error.code, error)
        return
    frame = error.__traceback__
    places = []
    while frame is not None:
        places.append(f"{frame.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.tb_lineno}")
        frame = frame.tb_next
    log.error("request %s failed: %s at %s", request_id, type(error).__name__, " > ".join(places[-8:]))


def missing(field: str) -> InvalidRequest:
    """A field that must be there is not."""
    return InvalidRequest(field, "nothing", "this field is needed")


def _safe(text: str, limit: int) -> str:
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 1] + "…"
