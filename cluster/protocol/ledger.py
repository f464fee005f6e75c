"""A rank's bytes by purpose, for people. `total`, where there is one, is what the device has.

Purposes that begin with `HOST` are bytes of the host's memory: no part of the device's sum.
"""

from collections.abc import Mapping

_LEAST_SHOWN = 2**20
HOST = "host: "


def describe_ledger(entries: Mapping[str, int]) -> str:
    """One line: `weights 15.0 + kv 100.1 + ... + free 9.8 = 139.8 GiB`, then `; host: weights 4.1 GiB`."""
    host = [f"{name.removeprefix(HOST)} {size / 2**30:.2f}" for name, size in entries.items() if name.startswith(HOST)]
    return _describe_device(entries) + (f"; {HOST}{' + '.join(host)} GiB" if host else "")


def _describe_device(entries: Mapping[str, int]) -> str:
    parts = {name: size for name, size in entries.items() if name != "total" and not name.startswith(HOST)}
    words = [f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size >= _LEAST_SHOWN or name == "free"]
    total = entries.get("total")
    return " + ".join(words) + (f" = {total / 2**30:.2f} GiB" if total else " GiB")


def gib(num_bytes: float) -> str:
    """Such as 15.0 GiB, or 12.5 MiB where that would say too little."""
    return f"{num_bytes / 2**30:.1f} GiB" if not 0 < num_bytes < 2**27 else f"{num_bytes / 2**20:.1f} MiB"
