"""What stands in front of Ray Serve's own proxy."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
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


def test_ray_can_write_what_it_writes_whatever_the_locale(tmp_path: Path) -> None:
    """Its template of HAProxy's file has an arrow in it: with a Latin 1 locale of old no server started at all."""
    templates = pytest.importorskip("ray.serve._private.haproxy_templates").__file__
    write = "import sys; open(sys.argv[2], 'w').write(open(sys.argv[1], encoding='utf-8').read())"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for environment, works in ((plain, False), ({**plain, **ENVIRONMENT}, True)):
        command = [sys.executable, "-c", write, templates, str(tmp_path / "haproxy.cfg")]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
        assert (done.returncode == 0) == works, done.stderr
