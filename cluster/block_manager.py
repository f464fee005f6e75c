"""The block table of every request: growing, sharing by prefix, forking with copy-on-write, giving back.

    table of a request      [ 4 | 7 | 9 | 2 ]          position p lives in block table[p // block_size]
    [0, num_cached)         read from the prefix cache; shared, never written
    [num_cached, computed)  written by steps that were submitted

The last prompt token is always computed, even on a full hit: without it there is no logit to sample from.
"""

from collections.abc import Iterable

from argosy.cluster.block_pool import BlockPool
from argosy.cluster.prefix_cache import PrefixCache, extend_hashes
from argosy.cluster.request import Request


class BlockManager:
    """Blocks of one replica in one epoch."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True):
        self.block_size = block_size
        self.prefix_cache = PrefixCache()
        self.pool = BlockPool(num_blocks, on_evict=self.prefix_cache.forget)
        self._enable_prefix_caching = enable_prefix_caching
        self._copy_sources: list[int] = []  # held until the step that copies them is complete

    # ------------------------------------------------------------------------------------------------ looking

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens need."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, request: Request) -> list[int]:
        """The blocks that hold the longest known prefix of the request's tokens, all but the last token at most."""
        reads = self._enable_prefix_caching and request.params.read_prefix_cache and request.prompt_logprobs is None
        if not reads:
            return []
        num_blocks = (len(request.token_ids) - 1) // self.block_size
        if len(request.block_hashes) < num_blocks:
            self._extend(request, num_blocks)
        return self.prefix_cache.find(request.block_hashes[:num_blocks])

    def num_free_after(self, shared: Iterable[int]) -> int:
        """How many blocks are free once `shared` were taken up."""
        counts = self.pool.ref_counts
        return self.pool.num_free - sum(1 for block_id in shared if counts[block_id] == 0)

    def num_missing(self, request: Request) -> int:
        """Blocks that its known tokens need beyond those it has; a fork needs one to write to in any case."""
        missing = self.blocks_for(len(request.token_ids)) - len(request.block_ids)
        return max(missing, 1) if request.block_ids and request.handle < 0 else missing

    def gauges(self, requests: Iterable[Request]) -> dict[str, float]:
        """The live figures of the blocks. Waste is the part of the held slots in which `requests` keep no token."""
        pool = self.pool
        num_unused = sum(len(one.block_ids) * self.block_size - one.num_computed_tokens for one in requests)
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
            self.pool.share(block_id)
        request.block_ids = list(shared)
        request.num_registered_blocks = len(shared)
        request.set_computed(len(shared) * self.block_size, self.block_size)

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Make room for `num_tokens`; the blocks that were added, or None (and no change) when too few are free.

        `Request.set_computed` has to follow: it knows where the longer table ends.
        """
        num_more = -(-num_tokens // self.block_size) - len(request.block_ids)
        if num_more <= 0:
            return []
        if num_more > self.pool.num_free:
            return None
        added = [self.pool.allocate() for _ in range(num_more)]
        request.block_ids += added
        return added

    def fork(self, parent: Request, child: Request) -> None:
        """Let `child` start from the blocks of `parent`'s prompt, all but its last token counted as computed."""
        assert not child.block_ids, child
        num_computed = child.num_prompt_tokens - 1
        child.block_ids = parent.block_ids[: self.blocks_for(num_computed)]
        for block_id in child.block_ids:
            self.pool.share(block_id)
        child.block_hashes = parent.block_hashes[: num_computed // self.block_size]
        child.num_registered_blocks = num_computed // self.block_size
        child.set_computed(num_computed, self.block_size)

    def needs_own_tail(self, request: Request) -> bool:
        """Whether the next token would be written into a block that somebody else reads."""
        place = request.num_computed_tokens // self.block_size
        if place >= len(request.block_ids):
            return False
        block_id = request.block_ids[place]
        return self.pool.ref_counts[block_id] > 1 or self.prefix_cache.knows(block_id)

    def own_tail(self, request: Request) -> tuple[int, int]:
        """Copy-on-write: the pair (source, destination) for the next step. There must be a free block.

        The source stays held until `end_step`: no other block of the same step may take its place.
        """
        place = request.num_computed_tokens // self.block_size
        source, destination = request.block_ids[place], self.pool.allocate()
        request.block_ids[place] = destination
        self._copy_sources.append(source)
        return source, destination

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
        for place in range(request.num_registered_blocks, num_full):
            self.prefix_cache.register(request.block_ids[place], request.block_hashes[place])
        request.num_registered_blocks = num_full

    def free(self, request: Request, *, trusted: bool = True) -> None:
        """Give back all blocks. `trusted`: what they hold is as it should be, others may find it."""
        knows = self.prefix_cache.knows
        for block_id in reversed(request.block_ids):  # the tail is evicted first: a prefix is worth more
            if not trusted:
                self.prefix_cache.forget(block_id)
            self.pool.release(block_id, keep=knows(block_id))
        request.block_ids = []
        request.num_registered_blocks = 0
        request.boundary = request.countdown = 0

    def reset_prefix_cache(self) -> None:
        """Forget all names. Blocks in use stay with who has them."""
        for block_id in range(self.pool.num_blocks):
            self.prefix_cache.forget(block_id)
            self.pool.uncache(block_id)

    def check(self, requests: Iterable[Request]) -> None:
        """Every block is held as often as `requests` name it, and every table is long enough for what is computed."""
        named: list[int] = list(self._copy_sources)
        for request in requests:
            named += request.block_ids
            assert len(set(request.block_ids)) == len(request.block_ids), request
            assert request.num_computed_tokens <= len(request.block_ids) * self.block_size, request
            assert request.num_registered_blocks <= len(request.block_ids), request
        self.pool.check(named)
        self.prefix_cache.check()
        assert self.pool.num_cached <= len(self.prefix_cache)

    def _extend(self, request: Request, num_blocks: int) -> None:
        extend_hashes(request.block_hashes, request.token_ids, self.block_size, request.cache_salt, num_blocks)
