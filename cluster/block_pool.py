"""Ids, reference counts and the free list of one tier of KV blocks.

A block is held (by so many tables), spare (free, its content means nothing) or cached (free, but the prefix cache knows
its content, and it may be taken up again). New blocks come from the spare ones, then from the cached one that was given
back the longest ago. Everything is O(1).
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice


class BlockPool:
    """`num_blocks` blocks with the ids 0 to `num_blocks` - 1.

    `on_evict` is told when a cached block is handed out for new content.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], object] | None = None):
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._spare = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._on_evict = on_evict

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return len(self._spare) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks that some table names."""
        return self.num_blocks - len(self._spare) - len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content may still be taken up."""
        return len(self._cached)

    def allocate(self) -> int:
        """A block for new content, held once. There must be a free one."""
        if self._spare:
            block_id = self._spare.pop()
        else:
            block_id = self._cached.popitem(last=False)[0]
            if self._on_evict is not None:
                self._on_evict(block_id)
        self.ref_counts[block_id] = 1
        return block_id

    def allocate_many(self, count: int) -> list[int]:
        """As so many times `allocate`. So many must be free."""
        spare, cached, on_evict = self._spare, self._cached, self._on_evict
        taken = spare[: -count - 1 : -1]
        del spare[len(spare) - len(taken) :]
        for _ in range(count - len(taken)):
            block_id = cached.popitem(last=False)[0]
            if on_evict is not None:
                on_evict(block_id)
            taken.append(block_id)
        for block_id in taken:
            self.ref_counts[block_id] = 1
        return taken

    def next_to_go(self, count: int) -> list[int]:
        """The cached blocks that give way next, the first first."""
        return list(islice(self._cached, count))

    def share(self, block_id: int) -> None:
        """One more holder; a cached block is taken up again."""
        if self.ref_counts[block_id] == 0:
            del self._cached[block_id]
        self.ref_counts[block_id] += 1

    def release(self, block_id: int, *, keep: bool) -> None:
        """One holder less. `keep`: when it was the last, the content stays known and the block is cached."""
        count = self.ref_counts[block_id] - 1
        assert count >= 0, block_id
        self.ref_counts[block_id] = count
        if count == 0:
            if keep:
                self._cached[block_id] = None
            else:
                self._spare.append(block_id)

    def uncache(self, block_id: int) -> None:
        """The content of a block means nothing any more; a cached one becomes spare."""
        if block_id in self._cached:
            del self._cached[block_id]
            self._spare.append(block_id)

    def check(self, named: Iterable[int]) -> None:
        """Every block is free or held, and is held exactly as often as tables name it (`named`)."""
        held = Counter(named)
        for block_id, count in enumerate(self.ref_counts):
            assert count == held[block_id], (block_id, count, held[block_id])
        free = [*self._spare, *self._cached]
        assert len(free) == len(set(free)), "a block is free twice"
        assert not held.keys() & set(free), held.keys() & set(free)
        assert len(free) + len(held) == self.num_blocks, (len(free), len(held), self.num_blocks)
