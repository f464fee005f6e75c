"""Whether content that gives way on the device is worth a copy to the host: as long as enough of it comes back.

    copying    what gives way is copied; what comes in again has come back
    quiet      only names are kept, as many as there are host blocks; what somebody asks for again would have come back

Both are counted over as many blocks as the host holds, so that content had the time to be asked for: prompts that never
repeat are copied until the host is full of them, and from then on not. A load whose prompts begin to repeat is seen in
the names, and copied again before a window is over.
"""

from collections.abc import Sequence
from typing import Final

from argosy.cluster.prefix_cache import BlockHash
from argosy.cluster.protocol.swap import SwapCosts

SHARE_OF_COPY: Final = 0.1
"""Of a copy's seconds, that steps are charged with: they wait for its gather alone, and the link is idle otherwise."""
LEAST_WINDOW: Final = 512


class Keeping:
    """Counts what gives way and what comes back; `is_copying` says what to do with the next block."""

    def __init__(self, costs: SwapCosts, tokens_per_block: float):
        gain = tokens_per_block * costs.token_seconds - costs.in_seconds
        self._least = SHARE_OF_COPY * costs.out_seconds / gain if gain > 0.0 else float("inf")  # that has to come back
        self._window = max(costs.num_host_blocks, LEAST_WINDOW)
        self._gone: dict[bytes, None] = {}  # names of what was not copied, the oldest first
        self._num_gone = self._num_back = 0  # blocks, in this window
        self.is_copying = True

    def give_way(self, block_hash: BlockHash) -> bool:
        """A block of this name is about to be overwritten. Whether to copy it."""
        if self._num_gone >= self._window:
            self.is_copying = self._num_back >= self._least * self._num_gone
            self._num_gone = self._num_back = 0
        self._num_gone += 1
        if not self.is_copying:
            self._gone[block_hash[0]] = None
            if len(self._gone) > self._window:
                del self._gone[next(iter(self._gone))]
        return self.is_copying

    def come_back(self, num_blocks: int) -> None:
        """So many blocks come in from the host, or would have if they had been copied."""
        self._num_back += num_blocks
        if not self.is_copying and self._num_back >= self._least * self._window:
            self.is_copying = True
            self._num_gone = self._num_back = 0
            self._gone.clear()

    def ask_for(self, block_hashes: Sequence[BlockHash]) -> None:
        """These blocks would have been used; each that was let go counts, once."""
        num_missed = 0
        for digest, _ in block_hashes:
            if digest not in self._gone:
                break
            del self._gone[digest]
            num_missed += 1
        if num_missed:
            self.come_back(num_missed)
