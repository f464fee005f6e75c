"""The block table of every request: growing, sharing by prefix, forking with copy-on-write, giving back.

    table of a request      [ 4 | 7 | 9 | 2 ]          position p lives in block table[p // block_size]
    [0, num_cached)         read from the prefix cache; shared, never written
    [num_cached, computed)  written by steps that were submitted

Where layers have sliding windows there are several blocks a place, and holes among them: see `kv_groups`.

The last prompt token is always computed, even on a full hit: without it there is no logit to sample from.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from argosy.cluster.block_pool import BlockPool
from argosy.cluster.kv_groups import HOLE, GroupRules
from argosy.cluster.prefix_cache import BlockHash, PrefixCache, extend_hashes
from argosy.cluster.prefix_news import PrefixNews
from argosy.cluster.protocol.kv_groups import ONE_TABLE, KVGroups
from argosy.cluster.request import Request

MANY: Final = 1 << 62
"""More tokens than any request has."""


class BlockManager:
    """Blocks of one replica in one epoch."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        groups: KVGroups | None = None,
        max_chunk: int = 1 << 30,
    ):
        """`groups`: of layers that share a table; `max_chunk`: tokens of a request that one step computes at most."""
        self.block_size = block_size
        self.rules = GroupRules(groups or ONE_TABLE, block_size, max_chunk)
        self.prefix_cache = PrefixCache()
        self.pool = BlockPool(num_blocks, on_evict=self._evict)
        self.on_evict: Callable[[int, BlockHash], None] | None = None  # told of content that gives way to other
        self._enable_prefix_caching = enable_prefix_caching
        self._copy_sources: list[int] = []  # held until the step that copies them is complete

    # ------------------------------------------------------------------------------------------------ looking

    def num_slots(self, request: Request) -> int:
        """Tokens that its table has places for."""
        return len(request.block_ids) // self.rules.num_groups * self.block_size

    def capacity(self) -> int:
        """Tokens that a request may have; it can have the pool for itself."""
        longest = self.rules.capacity(self.pool.num_blocks)
        return longest if longest is not None else MANY

    def most_tokens(self, request: Request, shared: Sequence[int] = ()) -> int:
        """Up to how many tokens its table could grow in a step, if it had the pool for itself.

        Without windows whoever fits at all does so at once; with them a prompt may be longer than the pool.
        """
        if not self.rules.has_windows:
            return MANY
        block_ids, num_groups = request.block_ids or shared, self.rules.num_groups
        num_free = self.pool.num_blocks - len(block_ids) + block_ids.count(HOLE)
        return (len(block_ids) // num_groups + num_free // num_groups) * self.block_size

    def find_prefix(self, request: Request) -> list[int]:
        """The blocks that hold the longest known prefix of the request's tokens, all but the last token at most."""
        if not self.reads_prefixes(request):
            return []
        num_blocks = (len(request.token_ids) - 1) // self.block_size
        if len(request.block_hashes) < num_blocks:
            self._extend(request, num_blocks)
        return self.rules.find(self.prefix_cache, request.block_hashes[:num_blocks])

    def num_cached_tokens(self, shared: Sequence[int]) -> int:
        """How many tokens the blocks of a prefix hold."""
        return len(shared) // self.rules.num_groups * self.block_size

    def reads_prefixes(self, request: Request) -> bool:
        """Whether the request may go on from blocks that others computed."""
        return self._enable_prefix_caching and request.params.read_prefix_cache and request.prompt_logprobs is None

    def num_free_after(self, shared: Iterable[int]) -> int:
        """How many blocks are free once `shared` were taken up."""
        counts = self.pool.ref_counts
        return self.pool.num_free - sum(1 for block_id in shared if block_id >= 0 and counts[block_id] == 0)

    def num_missing(self, request: Request, shared: Sequence[int] = ()) -> int:
        """Blocks that its known tokens need beyond those it has or shares; a fork needs some to write to anyway."""
        block_ids = request.block_ids or shared
        missing = self.rules.num_blocks(len(request.token_ids)) - len(block_ids)
        if self.rules.has_windows:
            missing = max(missing + block_ids.count(HOLE), 0)
        return max(missing, self.rules.num_groups) if request.block_ids and request.handle < 0 else missing

    def gauges(self, requests: Iterable[Request]) -> dict[str, float]:
        """The live figures of the blocks. Waste is the part of the held slots in which `requests` keep no token."""
        pool = self.pool
        num_unused = sum(self._num_unused_slots(one) for one in requests)
        return {
            "argosy_kv_blocks_total": pool.num_blocks,
            "argosy_kv_blocks_used": pool.num_held,
            "argosy_kv_blocks_cached": pool.num_cached,
            "argosy_kv_usage_ratio": pool.num_held / max(pool.num_blocks, 1),
            "argosy_kv_waste_ratio": num_unused / max(pool.num_held * self.block_size, 1),
        }

    # ----------------------------------------------------------------------------------------------- changing

    def begin(self, request: Request, shared: list[int]) -> None:
        """Give a request without a table the blocks that hold its prefix."""
        assert not request.block_ids, request
        for block_id in shared:
            if block_id != HOLE:
                self.pool.share(block_id)
        request.block_ids = list(shared)
        request.num_registered_blocks = len(shared) // self.rules.num_groups
        num_slots = self.num_slots(request)
        request.set_computed(num_slots, num_slots)

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Make room for `num_tokens`; the blocks that were added, or None (and no change) when too few are free.

        `Request.set_computed` has to follow: it knows where the longer table ends.
        """
        num_groups = self.rules.num_groups
        num_more = -(-num_tokens // self.block_size) * num_groups - len(request.block_ids)
        if num_more <= 0:
            return []
        if num_more > self.pool.num_free:
            return None
        added = self.pool.allocate_many(num_more)
        request.block_ids += added
        return added

    def trim(self, request: Request) -> None:
        """Give back the blocks that none of its tokens to come looks back on.

        Steps that were sent may still read them: they come before whichever step writes there.
        """
        if not self.rules.has_windows:
            return
        block_ids, knows, release = request.block_ids, self.prefix_cache.knows, self.pool.release
        for at in self.rules.dead(block_ids, request.num_computed_tokens):
            block_id, block_ids[at] = block_ids[at], HOLE
            release(block_id, keep=knows(block_id))

    def fork(self, parent: Request, child: Request) -> None:
        """Let `child` start from the blocks of `parent`'s prompt, all but its last token counted as computed."""
        assert not child.block_ids, child
        num_computed = child.num_prompt_tokens - 1
        child.block_ids = parent.block_ids[: -(-num_computed // self.block_size) * self.rules.num_groups]
        for block_id in child.block_ids:
            if block_id != HOLE:
                self.pool.share(block_id)
        child.block_hashes = parent.block_hashes[: num_computed // self.block_size]
        child.num_registered_blocks = num_computed // self.block_size
        child.set_computed(num_computed, self.num_slots(child))
        self.trim(child)

    def own_tail(self, request: Request) -> list[tuple[int, int]]:
        """Copy-on-write of blocks that the next token is written to and that somebody else reads: the pairs
        (source, destination) for the next step. There must be a free block a group.

        The sources stay held until `end_step`: no other block of the same step may take their place.
        """
        first = request.num_computed_tokens // self.block_size * self.rules.num_groups
        pairs = []
        for at, source in enumerate(request.block_ids[first : first + self.rules.num_groups], start=first):
            if self.pool.ref_counts[source] > 1 or self.prefix_cache.knows(source):
                request.block_ids[at] = self.pool.allocate()
                pairs.append((source, request.block_ids[at]))
                self._copy_sources.append(source)
        return pairs

    def end_step(self) -> None:
        """The step is complete; the sources of its copies may be written by the next one."""
        for block_id in self._copy_sources:
            self.pool.release(block_id, keep=self.prefix_cache.knows(block_id))
        self._copy_sources.clear()

    def register_full_blocks(self, request: Request) -> None:
        """Let others find the blocks whose tokens are all known and computed."""
        num_full = min(request.boundary - request.countdown, len(request.token_ids)) // self.block_size
        if num_full <= request.num_registered_blocks or not self._enable_prefix_caching:
            return
        if len(request.block_hashes) < num_full:
            self._extend(request, num_full)
        num_groups = self.rules.num_groups
        for place in range(request.num_registered_blocks, num_full):
            block_ids = request.block_ids[place * num_groups : (place + 1) * num_groups]
            self.prefix_cache.register_place(block_ids, request.block_hashes[place])
        request.num_registered_blocks = num_full

    def free(self, request: Request, *, trusted: bool = True) -> None:
        """Give back all blocks. `trusted`: what they hold is as it should be, others may find it."""
        knows = self.prefix_cache.knows
        for block_id in reversed(request.block_ids):  # the tail is evicted first: a prefix is worth more
            if block_id == HOLE:
                continue
            if not trusted:
                self.prefix_cache.forget(block_id)
            self.pool.release(block_id, keep=knows(block_id))
        request.block_ids = []
        request.num_registered_blocks = 0
        request.boundary = request.countdown = 0

    def news(self, number: int) -> tuple[bytes, int]:
        """Names of what came into the cache, from that number on (`PrefixNews.since`). Kept from the first call on."""
        if self.prefix_cache.news is None:
            self.prefix_cache.news = PrefixNews()
        return self.prefix_cache.news.since(number)

    def reset_prefix_cache(self) -> None:
        """Forget all names. Blocks in use stay with who has them."""
        for block_id in range(self.pool.num_blocks):
            self.prefix_cache.forget(block_id)
            self.pool.uncache(block_id)

    def check(self, requests: Iterable[Request]) -> None:
        """Every block is held as often as `requests` name it, and every table is long enough for what is computed."""
        named: list[int] = list(self._copy_sources)
        for request in requests:
            held = [block_id for block_id in request.block_ids if block_id != HOLE]
            named += held
            assert len(set(held)) == len(held), request
            assert request.num_computed_tokens <= self.num_slots(request), request
            assert request.num_registered_blocks <= len(request.block_ids), request
            self.rules.check(request.block_ids, request.num_computed_tokens)
        self.pool.check(named)
        self.prefix_cache.check()
        assert self.pool.num_cached <= len(self.prefix_cache)

    def _num_unused_slots(self, request: Request) -> int:
        held = len(request.block_ids) - (request.block_ids.count(HOLE) if self.rules.has_windows else 0)
        return held * self.block_size - self.rules.num_needed_slots(request.num_computed_tokens)

    def _evict(self, block_id: int) -> None:
        block_hash = self.prefix_cache.forget(block_id)
        if self.on_evict is not None and block_hash is not None:
            self.on_evict(block_id, block_hash)

    def _extend(self, request: Request, num_blocks: int) -> None:
        extend_hashes(request.block_hashes, request.token_ids, self.block_size, request.cache_salt, num_blocks)
