"""Which replica gets a request: where its prefix lies cached, as far as that makes up for more requests there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

ANSWER_TOKENS: Final = 512
"""What being answered beside one more request costs, in prompt tokens that could be computed in that time: an 8B model
on an H200 computes 45 of them in a millisecond, a row more makes each of some 256 steps 27 us longer, for itself and
for those that are half done already: (7 + 3.5) ms.
"""
FIRST_TOKEN_WEIGHT: Final = 5
"""A second until the first token is worth so many that are spread over the others: who waits sees nothing at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What is known of one replica when a request comes."""

    replica_id: int
    num_waiting: int
    num_running: int
    kv_usage: float = 0.0
    num_cached_tokens: int = 0  # of this request's prompt, as far as is known
    takes_requests: bool = True


def has_queue(num_waiting: int, num_running: int) -> bool:
    """Whether requests wait there for room. A few always wait for the step that runs to end: beside those that are
    answered about as many as one is of an answer's steps.
    """
    return num_waiting > 1 + num_running // 8


def choose_replica(loads: Sequence[ReplicaLoad], *, num_prompt_tokens: int) -> int | None:
    """The replica's id; None when none takes requests. Equal ones are taken in order of their id.

    A request waits for its prompt's new tokens, which hold up all that run there, and shares its further steps with
    them. With FIRST_TOKEN_WEIGHT those seconds are new + (new + ANSWER_TOKENS) x requests / 5, the least of which is
    the least of (requests + 5) x (new + ANSWER_TOKENS). The longest prefix alone would send every chat to one
    replica, since all begin with the same few words of their template. A long prefix is worth nothing behind a queue: a
    replica where requests wait for room counts only if they do so everywhere.
    """
    open_ones = [load for load in loads if load.takes_requests]
    if not open_ones:
        return None

    def rank(load: ReplicaLoad) -> tuple[bool, int, int, float, int]:
        requests = load.num_waiting + load.num_running
        new_tokens = max(0, num_prompt_tokens - load.num_cached_tokens)
        cost = (requests + FIRST_TOKEN_WEIGHT) * (new_tokens + ANSWER_TOKENS)
        return has_queue(load.num_waiting, load.num_running), cost, requests, load.kv_usage, load.replica_id

    return min(open_ones, key=rank).replica_id
