"""What Ray leaves open in HAProxy's configuration is closed before HAProxy reads it."""

import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import door_keeper, haproxy, server
from argosy.deploy.owned_folder import short_temp_folder
from argosy.placement.ports import free_port

AS_RAY_WRITES_IT = """frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
    acl routes path -i /-/routes
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \\'%[path]\\' not found. Ping http://.../"
backend other
    http-request return status 404 if { path /x }
listen stats
  bind *:8404
  stats enable
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private folder with a stand-in for HAProxy that prints what it was given to read."""
    real = tmp_path / "real"
    real.write_text('#!/bin/sh\nfor last; do :; done\ncat "$last"\n')
    real.chmod(0o700)
    monkeypatch.setattr(haproxy, "find", lambda: str(real))
    return tmp_path


def test_every_setting_is_one_that_ray_reads(folder: Path) -> None:
    """A name that Ray changed would be ignored without a word: a front that died was away for half a minute."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations
    read = (Path(spec.submodule_search_locations[0]) / "serve" / "_private" / "constants.py").read_text("utf-8")
    settings = haproxy.environment(folder)
    assert [name for name in settings if f'"{name}"' not in read] == []
    assert settings["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] == "1"


def test_every_port_listens_on_loopback_unless_it_is_the_door(folder: Path) -> None:
    """Two ports for figures were open to every network; the door's own address stays as it was asked for."""
    settings = haproxy.environment(folder)
    config = folder / "haproxy.cfg"
    config.write_text(AS_RAY_WRITES_IT)
    program = settings["RAY_SERVE_HAPROXY_BINARY_PATH"]
    run = subprocess.run([program, "-db", "-f", config], capture_output=True, text=True, timeout=10, check=True)
    binds = [line.strip() for line in run.stdout.splitlines() if line.strip().startswith("bind ")]
    assert binds == ["bind 127.0.0.1:9101", "bind 127.0.0.1:8000", "bind 127.0.0.1:8404"]
    for name in ("x-request-timeout-seconds", "x-request-disconnect-disabled", "x-session-id", "serve_ -m beg"):
        assert f"http-request del-header {name}\n" in run.stdout
    assert "del-header x-request-id unless { req.fhdr(x-request-id) -m reg ^[!-~]*$ }" in run.stdout
    assert "timeout http-request 30s" in run.stdout
    (starting,) = [line for line in run.stdout.splitlines() if "status 503" in line]
    body = starting[starting.index('string "') + len('string "') : -1].replace('\\"', '"')
    assert "starting" in json.loads(body)["error"]["message"]
    assert "hdr retry-after 1" in starting
    assert "status 404 if { path /x }" in run.stdout


def test_nothing_lies_where_another_server_would_look(folder: Path) -> None:
    """Ray's defaults are one folder for all users of a machine."""
    settings = haproxy.environment(folder)
    paths = [value for value in settings.values() if value.startswith(os.sep)]
    assert len(paths) == 6
    assert all(Path(path).is_relative_to(folder) for path in paths)


def test_its_sockets_have_room_for_their_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """HAProxy takes 97 bytes, Ray puts 57 between folder and name: beyond that no door opened at all."""
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(haproxy, "find", lambda: "/bin/true")
    with server._private_folder() as folder:
        settings = haproxy.environment(folder)
        for name in ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"):
            socket = Path(settings[name])
            assert len(os.fsencode(socket.parent / ("0" * 56) / socket.name)) <= 97


def test_without_the_program_serve_keeps_its_own_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is no such package for every platform."""
    monkeypatch.setattr(haproxy, "find", lambda: None)
    assert haproxy.environment(tmp_path) == {}


def test_the_door_listens_where_it_is_asked_to_and_replicas_stay_on_loopback(folder: Path) -> None:
    """Ray looks for replicas of its own node on loopback, and had them listen at the door's address."""
    program = haproxy.environment(folder)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert haproxy.listen_at(folder, "192.0.2.7") == "127.0.0.1"
    config = folder / "haproxy.cfg"
    config.write_text(AS_RAY_WRITES_IT)
    run = subprocess.run([program, "-f", config], capture_output=True, text=True, timeout=10, check=True)
    binds = [line.strip() for line in run.stdout.splitlines() if line.strip().startswith("bind ")]
    assert binds == ["bind 127.0.0.1:9101", "bind 192.0.2.7:8000", "bind 127.0.0.1:8404"]
    with pytest.raises(ConfigError, match="must be an address"):
        haproxy.listen_at(folder, "x; rm -rf")
    assert haproxy.listen_at(folder / "none", "192.0.2.7") == "192.0.2.7"  # Serve's own proxy


STATS = """# pxname,svname,qcur,qmax,scur,smax
default_backend,BACKEND,0,0,9,9
http-argosy-1,BACKEND,0,0,2,7
http-argosy-2,BACKEND,0,0,1,1

"""


def test_requests_that_the_doors_have_are_counted(folder: Path) -> None:
    """Behind the front alone, of whatever application; where nobody answers, nobody knows."""
    assert haproxy.num_open_requests(folder) is None
    path = Path(haproxy.environment(folder)["RAY_SERVE_HAPROXY_SOCKET_PATH"])
    place = path.parent / "node" / path.name  # Ray puts a folder between
    place.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()

        def answer() -> None:
            asker = listener.accept()[0]
            with asker:
                assert asker.recv(100) == b"show stat -1 2 -1\n"
                asker.sendall(STATS.encode())

        thread = threading.Thread(target=answer)
        thread.start()
        assert haproxy.num_open_requests(folder) == 3
        thread.join(10)
    assert haproxy.num_open_requests(folder) is None


def test_two_servers_never_share_a_port_for_their_replicas(folder: Path) -> None:
    """The replica of one died, the other's took its port, and questions to the first were answered by the second."""
    spans = []
    for _ in range(3):
        settings = haproxy.environment(folder)
        names = [f"DIRECT_INGRESS_{end}_{kind}" for kind in ("HTTP", "GRPC") for end in ("MIN", "MAX")]
        names += ["FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC"]
        ports = [int(settings[f"RAY_SERVE_{name}_PORT"]) for name in names]
        assert ports == sorted(set(ports))
        spans.append(range(ports[0] - 1, ports[-1] + 1))
    assert len(set().union(*spans)) == sum(len(span) for span in spans)
    sign = min(spans[0])
    program = f"from argosy.deploy import haproxy; haproxy._PORT_RANGES = ({sign}, {sign + 1})"
    told = subprocess.run(
        [sys.executable, "-P", "-c", f"{program}; haproxy.reserve_ports()"], capture_output=True, text=True, check=False
    )
    assert "no range of ports is free" in told.stderr


def test_without_a_socket_of_ours_the_front_takes_what_ray_writes(folder: Path) -> None:
    """On a node of a cluster that is not the server's own: doors of a server that was stopped must not come back."""
    program = haproxy.environment(folder)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    shown = []
    for text in (AS_RAY_WRITES_IT + "backend http-doors\n", AS_RAY_WRITES_IT):
        (folder / "haproxy.cfg").write_text(text)
        run = subprocess.run([program, "-f", folder / "haproxy.cfg"], capture_output=True, text=True, timeout=10)
        shown.append("backend http-doors" in run.stdout)
    assert shown == [True, False]


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="this machine has no setpriv")
def test_the_front_does_not_outlive_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's actor is killed with -9: its HAProxy would go on, and hold the port."""
    monkeypatch.setattr(haproxy, "find", lambda: shutil.which("sleep"))
    program = haproxy.environment(tmp_path)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    start = f"import subprocess; print(subprocess.Popen([{program!r}, '300']).pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as actor:
        assert actor.stdout is not None
        front = psutil.Process(int(actor.stdout.readline()))
        deadline = time.monotonic() + 60
        while front.name() != "sleep" and time.monotonic() < deadline:  # a shell and setpriv first
            time.sleep(0.01)
        actor.kill()
    while (lives := front.is_running() and front.status() != psutil.STATUS_ZOMBIE) and time.monotonic() < deadline:
        time.sleep(0.01)
    if lives:
        front.kill()
    assert not lives


def test_a_door_is_kept_where_there_is_a_front_and_a_port(folder: Path) -> None:
    """Serve's own proxy opens its own; port 0 is any, which nobody could be told of."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with haproxy.keeps_door(folder, "127.0.0.1", port):  # no script: it doesn't even look at the port
            pass
        haproxy.environment(folder)
        with haproxy.keeps_door(folder, "127.0.0.1", 0):
            assert not (folder / door_keeper.ASK).exists()
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 can't be listened at"):
            haproxy.keeps_door(folder, "127.0.0.1", port).__enter__()


def ask_for_door(folder: Path) -> socket.socket:
    """As a front's first words do."""
    with socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(10)
        asked.connect(str(folder / door_keeper.ASK))
        return socket.socket(fileno=socket.recv_fds(asked, 1, 1)[1][0])


def test_a_front_that_dies_while_it_asks_costs_the_next_one_nothing() -> None:
    """Twenty ask and are gone; the next one gets the socket, on which those who came meanwhile wait."""
    with tempfile.TemporaryDirectory(dir=short_temp_folder(20)) as name:
        port = free_port("127.0.0.1")
        with door_keeper.DoorKeeper(Path(name), "127.0.0.1", port), socket.socket() as client:
            for _ in range(20):
                with socket.socket(socket.AF_UNIX) as asked:
                    asked.connect(f"{name}/{door_keeper.ASK}")
            client.connect(("127.0.0.1", port))
            with ask_for_door(Path(name)) as door:
                door.settimeout(10)
                with door.accept()[0] as taken:
                    assert taken.getpeername() == client.getsockname()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_every_network_means_both_kinds() -> None:
    """`--host ::` is how people ask for all addresses; IPv4 was refused."""
    with tempfile.TemporaryDirectory(dir=short_temp_folder(20)) as name:
        port = free_port("127.0.0.1")
        with door_keeper.DoorKeeper(Path(name), "::", port):
            for address in ("127.0.0.1", "::1"):
                socket.create_connection((address, port), timeout=10).close()


@contextmanager
def door_that_dies_once() -> Iterator[tuple[int, list[str]]]:
    """Its port, and the first line of each request that it read; the first of each path it leaves without an answer."""
    read: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                with connection:
                    got = b""
                    while not got.endswith(b"}"):
                        got += connection.recv(65536)
                    read.append(got.split(b"\r\n")[0].decode())
                    if read.count(read[-1]) > 1:
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield listener.getsockname()[1], read
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


DEFAULTS = """    timeout connect 5s
    timeout client 20s
    timeout server 20s"""


@contextmanager
def front_of(folder: Path, settings: dict[str, str], text: str) -> Iterator[None]:
    """HAProxy as Ray starts it, with that configuration."""
    (folder / "haproxy.cfg").write_text(text)
    with subprocess.Popen([settings["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", folder / "haproxy.cfg"]) as front:
        try:
            yield
        finally:
            front.kill()


def until_open(port: int) -> None:
    """Until somebody listens there, for half a minute."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)


@pytest.mark.skipif(haproxy.find() is None, reason="Ray Serve has no HAProxy for this machine")
def test_an_answer_whose_door_was_killed_is_computed_anew(tmp_path: Path) -> None:
    """Clients send head and body apart: what HAProxy passed on before it had both could not be sent again."""
    settings = haproxy.environment(tmp_path)
    port = free_port("127.0.0.1")
    with door_that_dies_once() as (door, read):
        text = f"""global
    tune.bufsize {settings["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]}
defaults
    mode http
    option redispatch 1
    retry-on {settings["RAY_SERVE_HAPROXY_RETRY_ON"]}
    retries {settings["RAY_SERVE_HAPROXY_RETRIES"]}
{DEFAULTS}
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend default_backend
backend default_backend
    server door 127.0.0.1:{door}
"""
        with front_of(tmp_path, settings, text):
            until_open(port)
            statuses = {}
            for path in ("/v1/completions", "/v1/files"):
                client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                client.putrequest("POST", path)
                client.putheader("Content-Length", "40002")
                client.endheaders()
                time.sleep(0.1)
                client.send(b"{" + b" " * 40_000 + b"}")
                statuses[path] = client.getresponse().status
                client.close()
    assert statuses == {"/v1/completions": 200, "/v1/files": 502}
    assert [line.split()[1] for line in read] == ["/v1/completions"] * 2 + ["/v1/files"]


@pytest.mark.skipif(haproxy.find() is None, reason="Ray Serve has no HAProxy for this machine")
def test_what_the_front_refuses_by_itself_has_our_shape(tmp_path: Path) -> None:
    """A client that closed its side when it had sent all, and one whose body stays away, got pages for browsers."""
    settings = haproxy.environment(tmp_path)
    script = tmp_path / "haproxy"
    script.write_text(script.read_text().replace("http-request 30s", "http-request 300ms"))
    port, answers = free_port("127.0.0.1"), []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        text = f"""defaults
    mode http
    option abortonclose
{DEFAULTS}
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend default_backend
backend default_backend
    server door 127.0.0.1:{silent.getsockname()[1]}
"""
        with front_of(tmp_path, settings, text):
            until_open(port)
            for length in (1, 2):
                with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                    client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n{" % length)
                    if length == 1:
                        client.shutdown(socket.SHUT_WR)
                    answer = http.client.HTTPResponse(client)
                    answer.begin()
                    answers.append((answer.status, json.loads(answer.read())["error"]["type"]))
    assert answers == [(400, "invalid_request_error"), (408, "invalid_request_error")]


@pytest.mark.skipif(haproxy.find() is None, reason="Ray Serve has no HAProxy for this machine")
def test_who_comes_while_the_front_is_dead_waits_for_its_next_life() -> None:
    """Connections were refused for seconds. Ray starts a front with no doors, and tells it later which there are."""
    with tempfile.TemporaryDirectory(dir=short_temp_folder(20)) as name, door_that_dies_once() as (door, read):
        folder, port = Path(name), free_port("127.0.0.1")
        settings = haproxy.environment(folder)
        empty = f"""defaults
    mode http
{DEFAULTS}
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend default_backend
backend default_backend
    http-request return status 404
"""
        full = empty.replace("default_backend default_backend", "default_backend http-doors")
        with haproxy.keeps_door(folder, "127.0.0.1", port):
            for text in (full + f"backend http-doors\n    server door 127.0.0.1:{door}\n", empty):
                client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                client.request("POST", "/v1/files", b"{}")  # before there is a front
                with front_of(folder, settings, text):
                    status = client.getresponse().status
                client.close()
        assert (status, len(read)) == (200, 2)  # the second life asked the first one's door, which answers then
        assert not (folder / "l").exists()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
