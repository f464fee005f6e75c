"""Which network interface of this machine leads to another one, so that nobody has to set NCCL or gloo variables.

Left to themselves, gloo asks what the host's own name means (on Debian that is 127.0.1.1) and NCCL takes the first
interface that is up, which may be a container bridge: both then wait for peers that can't reach them.
"""

import os
import socket
from collections.abc import MutableMapping
from typing import Final

import psutil

_VARIABLES: Final = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def own_address_towards(host: str) -> str:
    """The address of ours that packets to `host` leave from; nothing is sent. `OSError` when no way leads there."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
        return own


def interface_of(address: str) -> str:
    """The name of the interface with that address; empty when none has it."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in entries):
            return name
    return ""


def choose_interface(host: str, environment: MutableMapping[str, str] | None = None) -> str:
    """Have gloo and NCCL of this process use the interface that leads to `host`; its name.

    What the operator set stands. Empty, and nothing is set, when no interface leads there.
    """
    environment = os.environ if environment is None else environment
    try:
        name = interface_of(own_address_towards(host))
    except OSError:
        return ""
    if name:
        for variable in _VARIABLES:
            # "=" has NCCL take this name and not every one that begins with it
            environment.setdefault(variable, f"={name}" if variable.startswith("NCCL") else name)
    return name
