"""What is refused for its size is refused in a way that its sender hears."""

import asyncio
from typing import Any

import pytest

from argosy.deploy.http_limits import LimitsMiddleware

MOST = 1000
PIECES = 40


def send_body(headers: dict[bytes, bytes]) -> tuple[int, int]:
    """(status, pieces of the body that were read before it was said), for a body that takes that many pieces."""
    read, status, read_before = 0, 0, -1

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it was let through")

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"x" * MOST, "more_body": read < PIECES}

    async def send(message: Any) -> None:
        nonlocal status, read_before
        if message["type"] == "http.response.start":
            status, read_before = message["status"], read

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": list(headers.items())}
    asyncio.run(LimitsMiddleware(app, max_body_bytes=MOST)(scope, receive, send))
    return status, read_before


@pytest.mark.parametrize(
    ("headers", "read"),
    [
        ({b"content-length": str(PIECES * MOST).encode()}, PIECES),
        ({b"content-length": b"99999999999"}, 0),
        ({b"content-length": b"-1"}, 0),
        ({b"content-length": str(PIECES * MOST).encode(), b"expect": b"100-continue"}, 0),
    ],
    ids=["a few too many", "no end of them", "no number", "who asks before sending"],
)
def test_who_is_still_sending_hears_why_it_is_refused(headers: dict[bytes, bytes], read: int) -> None:
    """A connection that was closed in the face of a sender took the answer with it: 10 MB from an asynchronous client
    of httpx, as the `openai` package is one, ended in a read error, and were sent again twice."""
    assert send_body(headers) == (413, read)
