"""Which replica gets a request: the longest cached prefix, then the least load."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What is known of one replica when a request comes."""

    replica_id: int
    num_waiting: int
    num_running: int
    kv_usage: float = 0.0
    num_cached_tokens: int = 0  # of this request's prompt, as far as is known
    takes_requests: bool = True


def choose_replica(loads: Sequence[ReplicaLoad]) -> int | None:
    """The replica's id; None when none takes requests. Equal ones are taken in order of their id.

    A long prefix is worth nothing behind a queue: a replica where requests wait counts only if they wait everywhere.
    """
    open_ones = [load for load in loads if load.takes_requests]
    if not open_ones:
        return None
    best = min(
        open_ones,
        key=lambda load: (
            load.num_waiting > 0,
            -load.num_cached_tokens,
            load.num_waiting + load.num_running,
            load.kv_usage,
            load.replica_id,
        ),
    )
    return best.replica_id
