"""The second tier of KV blocks, in host memory: what goes there, what comes back, and when that is worth it.

    device block  --out-->  host block       of a request that has to make room, or of cached content that gives way
    host block    --in--->  device block     of a request that goes on, or that begins like one before it

Orders travel in the next `SchedulerOutput`; every rank copies its own shard. A request whose blocks are on their way in
is LOADING: it holds device blocks and host blocks, and no handle. It goes on once the ranks say that its blocks are in,
or at once when nobody else runs; either way that step names the copies it has to wait for (`await_step_id`), since one
rank may be behind the others. Names (prefix hashes) are kept for each tier: what is named on one may be on both.

Where tokens are found is one number here: a device block, HOLE, or below that what `on_host` makes of a host block.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from argosy.cluster.block_manager import BlockManager
from argosy.cluster.block_pool import BlockPool
from argosy.cluster.keeping import Keeping
from argosy.cluster.kv_groups import HOLE
from argosy.cluster.metrics import Metrics
from argosy.cluster.prefix_cache import BlockHash, PrefixCache
from argosy.cluster.protocol.messages import BlockSwaps
from argosy.cluster.protocol.swap import SwapCosts
from argosy.cluster.request import Request

ORDER_SECONDS: Final = 0.016
"""Of copies in that one step orders; the next request's are left to the next step. What a step orders in is said to be
in all at once: requests that come in together go on together and end together, with an idle link in between. But each
step that begins requests costs as much as two others, so those of some milliseconds come in a few at a time."""
AHEAD: Final = 32
"""Blocks that an order of content that gives way carries beyond what has to go now: the next ones in line. Rows that
grow take a few blocks a step, and an order of one block holds up a step for as long as one of many."""


class HostTable:
    """The host blocks that a waiting request holds.

    `is_own`: they are all that it has computed, in the order of its device table, holes included, and outlive a load
    that is called off. Else they are the part of somebody else's prefix that is on its way in.
    """

    __slots__ = ("host_ids", "is_own", "num_computed", "step_id")

    def __init__(self, host_ids: list[int], num_computed: int, *, is_own: bool):
        self.host_ids, self.num_computed, self.is_own = host_ids, num_computed, is_own
        self.step_id = -1  # of the latest step whose copies it needs


def on_host(number: int) -> int:
    """From a host block to the number that says so, and back."""
    return HOLE - 1 - number


def num_on_host(sources: Iterable[int]) -> int:
    """How many of these places are host blocks."""
    return sum(place < HOLE for place in sources)


class _BothTiers(PrefixCache):
    """What either tier knows by name; the device's block where both do."""

    def __init__(self, device: PrefixCache, host: PrefixCache):
        super().__init__()
        self._device, self._host = device, host

    def get(self, block_hash: BlockHash, group: int = 0) -> int | None:
        """A device block, or a number that says where on the host."""
        if (block_id := self._device.get(block_hash, group)) is not None:
            return block_id
        host_id = self._host.get(block_hash, group)
        return None if host_id is None else on_host(host_id)


class HostTier:
    """Host blocks of one replica in one epoch, beside the device's `blocks`."""

    def __init__(self, blocks: BlockManager, costs: SwapCosts, metrics: Metrics):
        self.blocks, self.costs, self.num_host_blocks = blocks, costs, costs.num_host_blocks
        self.names = PrefixCache()
        self.pool = BlockPool(costs.num_host_blocks, on_evict=self.names.forget)
        self.loading: list[Request] = []  # in the order in which their copies were ordered
        self.await_step_id = -1  # the next step has to wait for the copies in that steps up to this one ordered
        self._sent_await_id = -1
        self._metrics = metrics
        self._out: list[tuple[int, int]] = []
        self._in: list[tuple[int, int]] = []
        self._fresh: list[int] = []  # host blocks that the next step fills; not to be filled twice
        self._arriving: dict[int, int] = {}  # device block -> the step that ordered its content in
        self._keeping = Keeping(costs, blocks.block_size / blocks.rules.num_groups)
        if costs.num_host_blocks:
            blocks.on_evict = self._keep

    # -------------------------------------------------------------------------------------------------- going out

    def swap_out(self, request: Request, num_computed: int) -> bool:
        """Copy the first `num_computed` tokens of `request` to the host if there is room and it is worth it.

        Its device blocks stay its own until they are freed; blocks whose names are known here are not copied again.
        """
        blocks, pool, num_groups = self.blocks, self.pool, self.blocks.rules.num_groups
        table = request.block_ids[: -(-num_computed // blocks.block_size) * num_groups]
        num_named = request.num_registered_blocks if blocks.reads_prefixes(request) else 0
        held = self._known(self.names, request, table, num_named)
        num_blocks, num_shared = len(table) - table.count(HOLE), len(held) - held.count(None) - held.count(HOLE)
        num_new = num_blocks - num_shared
        num_free = pool.num_free - sum(one is not None and one != HOLE and not pool.ref_counts[one] for one in held)
        if num_new > num_free or not self.costs.is_worth(num_new, num_blocks, num_computed):
            return False
        for host_id in held:
            if host_id is not None and host_id != HOLE:
                pool.share(host_id)
        host_ids = [
            self._order_out(block_id) if one is None else one for block_id, one in zip(table, held, strict=True)
        ]
        for at, host_id in enumerate(host_ids[: num_named * num_groups]):
            if host_id != HOLE:
                place, group = divmod(at, num_groups)
                self.names.register(host_id, request.block_hashes[place], group)
        request.host_table = HostTable(host_ids, num_computed, is_own=True)
        return True

    def _known(self, names: PrefixCache, request: Request, table: Sequence[int], num_named: int) -> list[int | None]:
        """For each entry of `table` the block that has the same name in `names`; holes stay holes."""
        num_groups, known = self.blocks.rules.num_groups, list[int | None]()
        for at, block_id in enumerate(table):
            place, group = divmod(at, num_groups)
            if block_id == HOLE:
                known.append(HOLE)
            else:
                known.append(names.get(request.block_hashes[place], group) if place < num_named else None)
        return known

    def _keep(self, block_id: int, block_hash: BlockHash) -> None:
        """Cached content leaves the device: here it stays for as long as there is room."""
        is_copied = self._keeping.give_way(block_hash)
        known = self.names.get(block_hash)
        if known is not None:
            self.pool.share(known)  # and released: among those that wait for their end it is the youngest now
            self.pool.release(known, keep=True)
        elif is_copied and self.pool.num_free:
            self._copy(block_id, block_hash)
            for other in self.blocks.pool.next_to_go(AHEAD):  # an order has a price, whatever it carries
                other_hash = self.blocks.prefix_cache.hash_of(other)
                if self.pool.num_free and other_hash is not None and self.names.get(other_hash) is None:
                    self._copy(other, other_hash)

    def _copy(self, block_id: int, block_hash: BlockHash) -> None:
        """Nobody but its name holds the copy, once the step has it."""
        host_id = self._order_out(block_id)
        self.names.register(host_id, block_hash)
        self._fresh.append(host_id)

    def _order_out(self, block_id: int) -> int:
        host_id = self.pool.allocate()
        self._out.append((block_id, host_id))
        return host_id

    # -------------------------------------------------------------------------------------------------- coming in

    def find(self, request: Request, found: list[int]) -> list[int]:
        """The places where computed tokens of the request are: its own, or those of a prefix that is known.

        `found`: the blocks that the device knows. What the host adds is taken when that is cheaper than to compute it.
        """
        table, blocks = request.host_table, self.blocks
        reads = blocks.reads_prefixes(request)
        if table is not None:
            num_named = min(table.num_computed // blocks.block_size, len(request.block_hashes)) if reads else 0
            known = self._known(blocks.prefix_cache, request, table.host_ids, num_named)
            return [on_host(host) if one is None else one for one, host in zip(known, table.host_ids, strict=True)]
        if not reads:
            return found
        num_blocks = (len(request.token_ids) - 1) // blocks.block_size
        sources = blocks.rules.find(_BothTiers(blocks.prefix_cache, self.names), request.block_hashes[:num_blocks])
        self._keeping.ask_for(request.block_hashes[len(sources) // blocks.rules.num_groups : num_blocks])
        num_tokens = blocks.num_cached_tokens(sources) - blocks.num_cached_tokens(found)
        return sources if num_tokens and self.costs.is_worth(0, num_on_host(sources), num_tokens) else found

    def needs_load(self, sources: Iterable[int]) -> bool:
        """Whether the content of some of these places is not on the device, or not yet."""
        return any(place < HOLE or self._arriving.get(place, -1) > self.await_step_id for place in sources)

    @property
    def is_link_taken(self) -> bool:
        """Whether the next step orders as much in as the link carries in a step's time."""
        return len(self._in) * self.costs.in_seconds >= ORDER_SECONDS

    def load(self, request: Request, sources: list[int], step_id: int) -> None:
        """Order the blocks of `sources` in with step `step_id`, and take room for the tokens that it computes next.

        There must be enough free blocks.
        """
        blocks, pool, table = self.blocks, self.blocks.pool, request.host_table
        if table is None:
            host_ids = [on_host(place) for place in sources if place < HOLE]
            table = HostTable(host_ids, blocks.num_cached_tokens(sources), is_own=False)
            for host_id in host_ids:
                self.pool.share(host_id)
            self._metrics.host_hits += len(host_ids) * blocks.block_size // blocks.rules.num_groups
            self._keeping.come_back(len(host_ids))
            request.host_table = table
        for place in sources:  # first: a new block must not take the place of one of these
            if place >= 0:
                pool.share(place)
                table.step_id = max(table.step_id, self._arriving.get(place, -1))
        num_named = min(table.num_computed // blocks.block_size, len(request.block_hashes))
        for at, place in enumerate(sources):
            request.block_ids.append(place if place >= HOLE else self._order_in(on_host(place), step_id))
            if place < HOLE:
                table.step_id = step_id
                row, group = divmod(at, blocks.rules.num_groups)
                if row < num_named and blocks.reads_prefixes(request):
                    blocks.prefix_cache.register(request.block_ids[-1], request.block_hashes[row], group)
        num_tokens = len(request.token_ids)
        if blocks.rules.has_windows:  # the rest finds room when windows have moved on
            num_tokens = min(num_tokens, blocks.most_tokens(request), table.num_computed + blocks.rules.max_chunk)
        added = blocks.grow(request, num_tokens)
        assert added is not None, request
        request.set_computed(table.num_computed, blocks.num_slots(request))
        self.loading.append(request)

    def _order_in(self, host_id: int, step_id: int) -> int:
        block_id = self.blocks.pool.allocate()
        self._in.append((host_id, block_id))
        self._arriving[block_id] = step_id
        return block_id

    def is_in(self, request: Request) -> bool:
        """Whether the ranks have said that the request's blocks are in."""
        table: HostTable = request.host_table
        return table.step_id <= self.await_step_id

    def settle(self, request: Request) -> None:
        """The request goes on with the next step, which will wait for its blocks; it needs its host blocks no more."""
        self.loading.remove(request)
        self._await(request)
        self.release(request)

    def call_off(self, request: Request) -> None:
        """The request has to make room, or has ended: its device blocks are free as soon as the copies are done."""
        self.loading.remove(request)
        self._await(request)
        self.blocks.free(request)
        table: HostTable = request.host_table
        table.step_id = -1
        if not table.is_own:
            self.release(request)

    def release(self, request: Request) -> None:
        """Give back the request's host blocks. Those with a name stay known."""
        table: HostTable | None = request.host_table
        request.host_table = None
        if table is not None:
            for host_id in reversed([one for one in table.host_ids if one != HOLE]):
                self.pool.release(host_id, keep=self.names.knows(host_id))

    def distrust(self, request: Request) -> None:
        """What the request computed may be wrong: nobody is to find it."""
        for block_hash in request.block_hashes:
            for group in range(self.blocks.rules.num_groups):
                if (host_id := self.names.get(block_hash, group)) is not None:
                    self.names.forget(host_id)
                    self.pool.uncache(host_id)

    def _await(self, request: Request) -> None:
        table: HostTable = request.host_table
        self.await_step_id = max(self.await_step_id, table.step_id)

    # --------------------------------------------------------------------------------------------------- the ranks

    def take_orders(self) -> BlockSwaps | None:
        """What the next step has to carry, if anything."""
        if not (self._out or self._in or self.await_step_id > self._sent_await_id):
            return None
        swaps = BlockSwaps(out=self._out, into=self._in, await_step_id=self.await_step_id)
        metrics, block_bytes = self._metrics, self.costs.block_bytes
        metrics.swap_blocks["out"] += len(self._out)
        metrics.swap_blocks["in"] += len(self._in)
        metrics.swap_bytes["out"] += len(self._out) * block_bytes
        metrics.swap_bytes["in"] += len(self._in) * block_bytes
        for host_id in self._fresh:
            self.pool.release(host_id, keep=self.names.knows(host_id))
        if self.await_step_id > self._sent_await_id:
            self._arriving = {one: step for one, step in self._arriving.items() if step > self.await_step_id}
        self._out, self._in, self._fresh, self._sent_await_id = [], [], [], self.await_step_id
        return swaps

    @property
    def has_orders(self) -> bool:
        """Whether copies are ordered that no step carries yet."""
        return bool(self._out or self._in)

    def note(self, swapped_in_step_id: int, seconds: tuple[float, float]) -> None:
        """A step's answer: all that steps up to that one ordered in has come in, and what copies took since."""
        self.await_step_id = max(self.await_step_id, swapped_in_step_id)  # the other ranks may be a little behind
        self._metrics.swap_seconds["out"] += seconds[0]
        self._metrics.swap_seconds["in"] += seconds[1]

    # ----------------------------------------------------------------------------------------------------- figures

    def reset_names(self) -> None:
        """Forget all names. Blocks that requests hold stay theirs."""
        for host_id in range(self.num_host_blocks):
            if self.names.forget(host_id) is not None:
                self.pool.uncache(host_id)

    def gauges(self) -> dict[str, float]:
        """The live figures, by metric name."""
        return {
            "argosy_host_blocks_total": self.num_host_blocks,
            "argosy_host_blocks_used": self.pool.num_held,
            "argosy_host_blocks_cached": self.pool.num_cached,
            "argosy_requests_loading": len(self.loading),
        }

    def check(self, requests: Iterable[Request]) -> None:
        """Every host block is held as often as tables name it, and names of both directions agree."""
        held = list(self._fresh)
        for request in requests:
            table: HostTable | None = request.host_table
            if table is not None:
                ids = [host_id for host_id in table.host_ids if host_id != HOLE]
                held += ids
                assert len(set(ids)) == len(ids), request
                if table.is_own:
                    self.blocks.rules.check(table.host_ids, table.num_computed)
        self.pool.check(held)
        self.names.check()
        for request in self.loading:
            assert request.host_table is not None, request
