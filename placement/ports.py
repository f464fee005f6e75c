"""A port that somebody will listen on in a moment."""

import random
import socket
from pathlib import Path

_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000  # below are ports that services are known by
_TRIES = 64


def free_port(host: str) -> int:
    """A port of this host that is free now, below those that the system gives to outgoing connections.

    Ranks listen seconds after the port was chosen, when they have loaded their libraries. On a busy host the system had
    given one of its own ports to somebody else by then, once in some hundred starts.
    """
    begin = outgoing_begin()
    ports = range(max(_LOWEST, begin - 20_000), begin)
    for port in random.sample(ports, min(_TRIES, len(ports))) if len(ports) >= _TRIES else ():
        if _bind(host, port):
            return port
    return _bind(host, 0)


def outgoing_begin() -> int:
    """The first port that outgoing connections are given; 0 where the system does not say."""
    try:
        return int(_RANGE_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _bind(host: str, port: int) -> int:
    """The port that could be bound; 0 if it is taken. Raises `OSError` if that is not the reason."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        try:
            sock.bind((host, port))
        except OSError:
            if port == 0:
                raise
            return 0
        bound: int = sock.getsockname()[1]
        return bound
