"""What stands in front of Ray Serve's own proxy."""

import asyncio
from typing import Any

import pytest

from argosy.deploy.proxy_guard import ENVIRONMENT, ProxyGuard


def ask(path: str, headers: list[tuple[bytes, bytes]]) -> tuple[int, list[tuple[bytes, bytes]]]:
    """(status, or 0 when it was let through; the header that went on)."""
    passed: list[tuple[bytes, bytes]] = []
    sent: list[Any] = []

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        passed.extend(scope["headers"])

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": headers, "query_string": b""}
    asyncio.run(ProxyGuard(serve)(scope, None, send))  # type: ignore[arg-type]  # nothing is received
    return (sent[0]["status"] if sent else 0), passed


@pytest.mark.parametrize("value", [b"0", b"nan", b"\xff\xfe", b"30"])
def test_a_stranger_sets_no_timeouts_of_ours(value: bytes) -> None:
    """Serve would obey the number, and answer 500 to what is none."""
    headers = [(b"x-request-timeout-seconds", value), (b"x-request-disconnect-disabled", value), (b"accept", b"*/*")]
    assert ask("/v1/models", headers) == (0, [(b"accept", b"*/*")])


def test_what_runs_here_is_nobodys_business() -> None:
    """Serve's list of routes is public; its health check stays, load balancers use it."""
    assert ask("/-/routes", [])[0] == 404
    assert ask("/-/healthz", [])[0] == 0
    assert ask("/v1/models", [(b"x", b"y" * 40_000)])[0] == 431


def test_serve_finds_it_by_name() -> None:
    """The name is text in the environment; a renamed module would silently leave the proxy without us."""
    http_util = pytest.importorskip("ray.serve._private.utils")
    path = ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    (middleware,) = http_util.call_function_from_import_path(path)
    assert middleware.cls is ProxyGuard
