"""An error that the driver ended a request with, as an instance of the class that the driver raised."""

from collections.abc import Mapping
from typing import Any

from argosy.cluster.protocol.errors import (
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestAborted,
    RequestError,
    RequestLost,
    ServingError,
)
from argosy.cluster.protocol.messages import TokenDelta


class _Told:
    """Mixed into an error that the driver raised and told us about: its own sentence, status and time to come back."""

    def __init__(self, code: str, message: str, status: int, retry_after_seconds: float):
        Exception.__init__(self, code, message, status, retry_after_seconds)  # type: ignore[arg-type]  # is a mixin
        self.code, self.message, self.retry_after_seconds = code, message, retry_after_seconds
        if status:
            self.http_status = status

    def __str__(self) -> str:
        return self.message


class _ToldError(_Told, ServingError):
    pass


class _ToldInvalid(_Told, InvalidRequest):
    param = None


class _ToldContextTooLong(_Told, ContextTooLong):
    pass


class _ToldOverloaded(_Told, Overloaded):
    pass


class _ToldDeadline(_Told, DeadlineExceeded):
    pass


class _ToldAborted(_Told, RequestAborted):
    pass


class _ToldLost(_Told, RequestLost):
    pass


class _ToldRow(_Told, RequestError):
    """Of one request alone: its reason names nothing of the machines, and is for its owner."""


_TOLD: Mapping[str, type[Any]] = {
    "invalid_request_error": _ToldInvalid,
    "context_length_exceeded": _ToldContextTooLong,
    "overloaded": _ToldOverloaded,
    "deadline_exceeded": _ToldDeadline,
    "aborted": _ToldAborted,
    "request_lost": _ToldLost,
    "row_failed": _ToldRow,
}


def rebuild_error(delta: TokenDelta) -> ServingError:
    """The error behind a last delta with an error code."""
    kind = _TOLD.get(delta.error_code, _ToldError)
    status = delta.error_status or (500 if kind is _ToldError else 0)
    error: ServingError = kind(
        delta.error_code, delta.error_message or delta.error_code, status, delta.retry_after_seconds
    )
    return error
