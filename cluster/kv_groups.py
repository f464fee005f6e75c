"""What several tables a sequence mean for the driver: which blocks a window still needs, and which prefixes are a hit.

    block_ids of a request, three groups      [ 4 9 - | 7 1 - | 2 5 8 | 3 6 0 ]
    place 2 of the sequence is block 2 in group 0's layers, 5 in group 1's and 8 in group 2's;
    a hole (`HOLE`) is a block that fell out of its group's window and was given back

All groups have equally many places, since a token is in all layers. A table never shrinks: ranks append to theirs, and
never read a hole.
"""

from collections.abc import Sequence
from typing import Final

from argosy.cluster.prefix_cache import BlockHash, PrefixCache
from argosy.cluster.protocol.kv_groups import KVGroups, window_blocks

HOLE: Final = -1


class GroupRules:
    """The groups of a model with blocks of `block_size` tokens, as its block manager sees them."""

    def __init__(self, groups: KVGroups, block_size: int, max_chunk: int):
        """`max_chunk`: tokens of a sequence that one step computes at most."""
        self.groups, self.block_size, self.max_chunk = groups, block_size, max_chunk
        self.num_groups, self.has_windows = groups.num_groups, groups.has_windows
        self.windowed = [(group, window) for group, window in enumerate(groups.windows) if window]
        self.full = [group for group, window in enumerate(groups.windows) if not window]

    def first_place(self, window: int, num_computed: int) -> int:
        """The first place that the token after `num_computed` others looks back on."""
        return max(0, num_computed - window + 1) // self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """The most blocks that a sequence of so many tokens will hold at once."""
        if self.num_groups == 1 and not self.has_windows:
            return -(-num_tokens // self.block_size)
        return self.groups.num_blocks(num_tokens, self.block_size, self.max_chunk)

    def dead(self, block_ids: Sequence[int], num_computed: int) -> list[int]:
        """Indexes of blocks that nobody will look back on from `num_computed` on, the latest first."""
        found: list[int] = []
        block_size, num_groups = self.block_size, self.num_groups
        for group, window in self.windowed:  # a step of many rows does this some hundred times: nothing is called
            past = num_computed - window + 1
            if past < block_size:
                continue
            at = (past // block_size - 1) * num_groups + group  # before `first_place`
            while at >= 0 and block_ids[at] != HOLE:
                found.append(at)
                at -= num_groups
        return found

    def find(self, cache: PrefixCache, hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks of the longest prefix that is a hit for every group; holes where a window needs none.

        Groups that see everything need all its blocks, one with a window those that the next token looks back on.
        """
        if not self.has_windows and self.num_groups == 1:
            return cache.find(hashes)
        most = len(hashes)
        for group in self.full:
            most = next((i for i in range(most) if cache.get(hashes[i], group) is None), most)
        before = -1
        while most != before:
            before = most
            for group, window in self.windowed:
                most = self._longest(cache, hashes[:most], group, window)
        return [self._at(cache, hashes[place], group, place, most) for place in range(most)
                for group in range(self.num_groups)]  # fmt: skip

    def _longest(self, cache: PrefixCache, hashes: Sequence[BlockHash], group: int, window: int) -> int:
        """The most blocks of `hashes` of which those at the end that a window needs are all known."""
        end = len(hashes)
        for place in range(len(hashes) - 1, -1, -1):
            if cache.get(hashes[place], group) is None:
                end = place
            elif place <= self.first_place(window, end * self.block_size):
                return end
        return 0

    def _at(self, cache: PrefixCache, block_hash: BlockHash, group: int, place: int, num_places: int) -> int:
        window = self.groups.windows[group]
        if window and place < self.first_place(window, num_places * self.block_size):
            return HOLE
        block_id = cache.get(block_hash, group)
        assert block_id is not None
        return block_id

    def num_needed_slots(self, num_computed: int) -> int:
        """Slots, over all groups, of which a sequence of so many tokens has need."""
        return sum(min(num_computed, window) if window else num_computed for window in self.groups.windows)

    def capacity(self, num_blocks: int) -> int | None:
        """The longest sequence that so many blocks hold, however small its chunks; None: any."""
        return self.groups.num_tokens(num_blocks, self.block_size)

    def check(self, block_ids: Sequence[int], num_computed: int) -> None:
        """Holes are where no window reaches, and only there where blocks were given back."""
        assert len(block_ids) % self.num_groups == 0, block_ids
        for group in self.full:
            assert HOLE not in block_ids[group :: self.num_groups], block_ids
        for group, window in self.windowed:
            table = block_ids[group :: self.num_groups]
            assert HOLE not in table[self.first_place(window, num_computed) :], (block_ids, num_computed)
            held = sum(block_id != HOLE for block_id in table)
            assert held <= window_blocks(window, self.block_size, self.max_chunk), (held, window)


def with_zeros(block_ids: Sequence[int]) -> tuple[int, ...]:
    """For the ranks, which have no word for a hole and never look at one."""
    return tuple([block_id if block_id != HOLE else 0 for block_id in block_ids])
