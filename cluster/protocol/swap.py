"""What `swap_space` says, and what ranks measure so that the driver can tell when a swap is cheaper than computing."""

import re
from dataclasses import dataclass
from typing import Final

from argosy.cluster.protocol.errors import ConfigError

AUTO: Final = "auto"
MOST_HOST_BLOCKS: Final = 4
"""With "auto": times the device's blocks."""
_UNITS: Final = {
    "": 2**30,
    "b": 1,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_AMOUNT: Final = re.compile(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", re.IGNORECASE)


def parse_swap_space(given: object) -> float | str:
    """GiB of host memory for each rank, or "auto". A bare number is GiB. Raises `ConfigError`."""
    text = str(given).strip().lower()
    if text == AUTO:
        return AUTO
    found = _AMOUNT.fullmatch(text)
    if found is None or found[2] not in _UNITS:
        raise ConfigError(
            f"swap_space={given!r}: must be a number of GiB for each rank (16), an amount with unit (16GiB), or auto"
        )
    return float(found[1]) * _UNITS[found[2]] / 2**30


@dataclass(frozen=True, slots=True)
class SwapCosts:
    """The host tier of a replica, and what its slowest rank takes. All ranks copy their shards at the same time."""

    num_host_blocks: int = 0
    block_bytes: int = 0  # of one block on all ranks together
    out_seconds: float = 0.0  # one block from the device to the host
    in_seconds: float = 0.0  # and back
    token_seconds: float = 0.0  # to compute one token of a long prompt

    def is_worth(self, num_out: int, num_in: int, num_tokens: int) -> bool:
        """Whether to copy so many blocks out and in again takes less time than to compute so many tokens anew."""
        return num_out * self.out_seconds + num_in * self.in_seconds < num_tokens * self.token_seconds


NO_SWAP: Final = SwapCosts()
