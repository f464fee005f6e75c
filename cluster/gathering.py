"""Requests that are made together begin together: when a driver with nothing to do waits for the rest of them.

Without it the first of 256 requests is a step of its own: all others wait for that one, and half of them for one more
of the long steps that follow. The wait is short and bounded, and ends as soon as one request more would not change the
next step.
"""

from collections.abc import Sequence
from typing import Final

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import Burst, GenerateRequest

GATHER_SECONDS: Final = 0.025
"""A client that has begun to send writes a thousand prompts in this time; where it was stopped, others go on."""


class Gathering:
    """The bursts that edges have begun and not ended, since nobody waited for any."""

    def __init__(self, config: ServingConfig, most_tokens: int):
        """`most_tokens`: beyond so many waiting ones the next step is the same."""
        self._most_tokens, self._most_requests = most_tokens, config.scheduler.max_num_seqs
        self._block_size, self._shares_prefixes = config.cache.block_size, config.cache.enable_prefix_caching
        self._has_stages = config.parallel.pipeline_parallel_size > 1
        self._edges: set[int] = set()
        self._until = 0.0
        self._found_idle = False  # nothing ran when it was first asked whether to wait
        self._num_tokens = self._num_requests = 0  # that no step has begun with
        self._latest: GenerateRequest | None = None

    @property
    def is_open(self) -> bool:
        """Whether some edge has said that more of its requests follow."""
        return bool(self._edges)

    def note(self, edge_id: int, burst: Burst, now: float) -> None:
        """More of this edge's follow, or all were sent. Bursts that overlap are waited for no longer than the first."""
        if not burst.begins:
            self.end(edge_id)
            return
        if not self._edges:
            self._until, self._found_idle, self._latest = now + GATHER_SECONDS, False, None
            self._num_tokens = self._num_requests = 0
        self._edges.add(edge_id)

    def add(self, message: GenerateRequest) -> None:
        """A request that was taken up, whoever sent it."""
        if not self._edges:
            return
        latest, self._latest = self._latest, message
        known = 0
        if self._shares_prefixes and latest is not None and latest.cache_salt == message.cache_salt:
            known = num_shared_tokens(latest.prompt_token_ids, message.prompt_token_ids, self._block_size)
        self._num_tokens += len(message.prompt_token_ids) - known
        self._num_requests += message.n

    def end(self, edge_id: int) -> None:
        """Nothing more comes of this edge's burst."""
        self._edges.discard(edge_id)

    def seconds_left(self, now: float) -> float:
        """Until nobody is waited for any longer; 0 when nobody is."""
        return max(self._until - now, 0.0) if self._edges else 0.0

    def holds(self, now: float, is_idle: bool, num_in_flight: int) -> bool:
        """Whether the next step had better wait for more.

        The first one does while nothing runs. Those behind it do while one of them is under way, so that each is full,
        too; none waits that ranks wait for.
        """
        if not self._edges:
            return False
        self._found_idle = self._found_idle or is_idle
        if not self._found_idle or now >= self._until:
            self._edges.clear()
            return False
        is_full = self._num_tokens >= self._most_tokens or self._num_requests >= self._most_requests
        return not is_full and (is_idle or num_in_flight > 0)

    def begin_step(self) -> None:
        """A step begins with what is here: those that come now are for the next one.

        With stages only the first one waits: each step takes a piece of what is here, and the first stage should not
        stand still between two.
        """
        if self._has_stages:
            self._edges.clear()
        self._num_tokens = max(0, self._num_tokens - self._most_tokens)
        self._num_requests = 0


def num_shared_tokens(first: Sequence[int], second: Sequence[int], block_size: int) -> int:
    """Tokens at the front of both, in whole blocks: computed once."""
    most = min(len(first), len(second)) // block_size
    if not most or first[:block_size] != second[:block_size]:
        return 0
    low, high = 1, most  # blocks known to be the same, and those that may be
    while low < high:
        middle = (low + high + 1) // 2
        if first[low * block_size : middle * block_size] == second[low * block_size : middle * block_size]:
            low = middle
        else:
            high = middle - 1
    return low * block_size
