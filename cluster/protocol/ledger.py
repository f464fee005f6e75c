"""A rank's bytes by purpose, for people and for dashboards. `total`, where there is one, is what the device has.

Purposes that begin with `HOST` are bytes of the host's memory: no part of the device's sum.
"""

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

HOST: Final = "host: "
TOTAL: Final = "total"
_IN_GIB: Final = 2**30 // 10  # what is less would be 0.0 something
_LEAST_SHOWN: Final = 2**16
_BINARY: Final = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_DECIMAL: Final = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


class Entry(NamedTuple):
    """One purpose on one rank; `place` is "device" or "host"."""

    place: str
    purpose: str
    num_bytes: int


def place_entries(entries: Mapping[str, int]) -> Iterator[Entry]:
    """A ledger's parts, each with its place; those of the device come to its `total`, which is none of them."""
    for name, num_bytes in entries.items():
        if name.startswith(HOST):
            yield Entry("host", name.removeprefix(HOST), num_bytes)
        elif name != TOTAL:
            yield Entry("device", name, num_bytes)


def describe_ledger(entries: Mapping[str, int]) -> str:
    """One line: `weights 15.0 + kv 100.1 + ... + free 9.8 = 139.8 GiB`, then `; host: weights 4.1 GiB`.

    What is small has a unit of its own: `weights 3.1 MiB + kv 4.00 + ... GiB`.
    """
    placed = list(place_entries(entries))
    host = [f"{entry.purpose} {gib(entry.num_bytes, 2)}" for entry in placed if entry.place == "host"]
    device = [
        _part(entry)
        for entry in placed
        if entry.place == "device" and (entry.num_bytes >= _LEAST_SHOWN or entry.purpose == "free")
    ]
    total = entries.get(TOTAL)
    line = " + ".join(device) + (f" = {total / 2**30:.2f} GiB" if total else " GiB")
    return line + (f"; {HOST}{' + '.join(host)}" if host else "")


def _part(entry: Entry) -> str:
    is_small = 0 < entry.num_bytes < _IN_GIB
    return f"{entry.purpose} {gib(entry.num_bytes) if is_small else f'{entry.num_bytes / 2**30:.2f}'}"


def gib(num_bytes: float, digits: int = 1) -> str:
    """Such as 15.0 GiB, or 12.5 MiB where that would say too little."""
    size, name = _unit(num_bytes, _BINARY)
    return f"{num_bytes / size:.{digits}f} {name}"


def gb(num_bytes: float, digits: int = 1) -> str:
    """The same in powers of ten, with commas: 1,234.5 GB, or 3.1 MB."""
    size, name = _unit(num_bytes, _DECIMAL)
    return f"{num_bytes / size:,.{digits}f} {name}"


def _unit(amount: float, units: tuple[tuple[int, str], ...]) -> tuple[int, str]:
    """The largest of which there is a tenth at least."""
    return next((unit for unit in units if amount >= unit[0] / 10), units[-1] if amount else units[0])
