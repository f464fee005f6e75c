"""`argosy serve` as a person starts it: its doors, who can reach what, what it writes down, and what Ctrl-C leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from argosy.placement.ports import free_port

CANARY = "xylophone-73-quicksilver"
KEY = "sk-canary-of-the-key-41"
START_SECONDS = 240


def ask(url: str, body: Any = None, key: str = KEY, more: dict[str, str] | None = None) -> tuple[int, str]:
    """(status, text) of one request."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", **(more or {})}
    data = json.dumps(body).encode() if body is not None else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def texts_below(folder: str) -> Iterator[tuple[Path, bytes]]:
    """Every log and file that the server left readable while it runs."""
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.name != "api_keys":
            yield path, path.read_bytes()


def listening(process: psutil.Process) -> list[Any]:
    """Its listening sockets; a helper process that ended meanwhile has none."""
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):  # ended
        return [c for c in process.net_connections("inet") if c.status == "LISTEN"]
    return []


def words_of(process: psutil.Process) -> list[str]:
    """Its command line; none if it ended meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):  # ended
        return process.cmdline()
    return []


def maps_of(process: psutil.Process) -> list[str]:
    """The files in its memory; of others on this machine we say nothing."""
    with contextlib.suppress(psutil.Error):  # ended, or not ours
        return [region.path for region in process.memory_maps()]
    return []


def test_a_server_from_its_first_line_to_its_last(short_tmp: str) -> None:
    """Every door on loopback, prompts and keys in no log and on no command line, and nothing remains."""
    environment = {**os.environ, "TMPDIR": short_tmp, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("RAY_")}
    flags = ["--max-model-len", "256", "--num-gpu-blocks-override", "64", "--cpu-threads", "1"]
    port = free_port("127.0.0.1")
    command = [sys.executable, "-P", "-m", "argosy.deploy.cli", "serve", *flags, "--port", str(port)]
    command += ["--api-keys-file", f"{short_tmp}.keys"]
    Path(f"{short_tmp}.keys").write_text(f"{KEY}\n")
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=open(f"{short_tmp}.err", "w+b"),  # closed with the process, removed below
        env=environment,
        start_new_session=True,
    ) as server:
        assert server.stdout is not None
        try:
            shown = b""
            while b"Try it" not in shown:
                line = server.stdout.readline()
                assert line, Path(f"{short_tmp}.err").read_text()
                shown += line
            address = f"http://127.0.0.1:{port}"
            assert f"{address}/v1".encode() in shown
            assert KEY.encode() not in shown

            with urllib.request.urlopen(f"{address}/health", timeout=60) as answer:
                assert answer.status == 200
                assert len(answer.headers.get_all("x-request-id")) == 1  # Serve's, and not ours beside it
            assert ask(f"{address}/v1/models", key="wrong")[0] == 401
            status, text = ask(f"{address}/v1/completions", {"prompt": f"Say {CANARY}", "max_tokens": 4})
            assert (status, json.loads(text)["usage"]["completion_tokens"] <= 4) == (200, True)
            for name in ("x-request-id", "x-session-id", "x-request-timeout-seconds", "serve_multiplexed_model_id"):
                assert ask(f"{address}/v1/models", more={name: "\xff\xfe"})[0] == 200
            assert ask(f"{address}/v1/completions", {"prompt": CANARY, "n": 10**9})[0] == 400
            assert ask(f"{address}/v1/completions", {"prompt": CANARY * 500})[0] == 400

            processes = psutil.Process(server.pid).children(recursive=True)
            everybody = [psutil.Process(server.pid), *processes]
            sockets = [c for one in everybody for c in listening(one)]
            assert {c.laddr.ip.removeprefix("::ffff:") for c in sockets} == {"127.0.0.1"}
            assert not any(KEY in word or CANARY in word for one in everybody for word in words_of(one))
            found = [str(path) for path, text in texts_below(short_tmp) if CANARY.encode() in text]
            assert found == []
            found = [str(path) for path, text in texts_below(short_tmp) if KEY.encode() in text]
            assert found == []

            shared = {path for one in everybody for path in maps_of(one) if path.startswith("/dev/shm/")}
            assert shared
            server.send_signal(signal.SIGINT)
            assert server.wait(60.0) == 0
            assert psutil.wait_procs(processes, timeout=20.0)[1] == []
            assert not any(os.path.exists(path) for path in shared)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
            for name in (f"{short_tmp}.keys", f"{short_tmp}.err"):
                Path(name).unlink(missing_ok=True)
