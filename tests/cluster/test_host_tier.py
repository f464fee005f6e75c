"""Blocks that go to host memory and come back: what is copied, what is not, and who waits for whom."""

from collections.abc import Callable
from typing import Any

import pytest

from argosy.cluster.block_manager import BlockManager
from argosy.cluster.host_tier import HostTier, on_host
from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.messages import AbortRequest, BlockSwaps, GenerateRequest
from argosy.cluster.protocol.sampling import FinishReason, TokenParams
from argosy.cluster.protocol.swap import SwapCosts, parse_swap_space
from argosy.cluster.request import Request

CHEAP = SwapCosts(num_host_blocks=64, block_bytes=1000, out_seconds=0.001, in_seconds=0.001, token_seconds=1.0)


def request(prompt: list[int], **fields: Any) -> Request:
    message = GenerateRequest(
        stream_id=0, request_id="0", prompt_token_ids=prompt, params=TokenParams(max_tokens=50, **fields)
    )
    return Request(message, 0, arrival=0, arrival_seconds=0.0, end=len(prompt) + 50, deltas=[])


def tiers(num_blocks: int = 8, costs: SwapCosts = CHEAP) -> tuple[BlockManager, HostTier]:
    blocks = BlockManager(num_blocks, 4)
    return blocks, HostTier(blocks, costs, Metrics())


def compute(blocks: BlockManager, one: Request) -> None:
    """The request's tokens are computed, as `Scheduler` does it."""
    blocks.begin(one, blocks.find_prefix(one))
    assert blocks.grow(one, len(one.token_ids)) is not None
    one.set_computed(len(one.token_ids), blocks.num_slots(one))
    blocks.register_full_blocks(one)


def make_room(blocks: BlockManager, host: HostTier, one: Request) -> bool:
    """As `Scheduler` preempts it."""
    kept = host.swap_out(one, one.num_computed_tokens)
    blocks.free(one)
    return kept


def orders(host: HostTier) -> BlockSwaps:
    """What the next step carries."""
    return host.take_orders() or BlockSwaps()


def test_a_request_leaves_and_comes_back_with_all_it_has_computed() -> None:
    """Two full blocks and a part of one: all three are copied, in the order of its table."""
    blocks, host = tiers()
    compute(blocks, one := request(list(range(10))))
    held = list(one.block_ids)
    assert make_room(blocks, host, one)
    assert [block_id for block_id, _ in orders(host).out] == held
    blocks.reset_prefix_cache()
    sources = host.find(one, [])
    assert sources == [on_host(host_id) for host_id in one.host_table.host_ids]
    one.token_ids.append(7)  # the token that was in flight
    host.load(one, sources, step_id=5)
    assert one.num_computed_tokens == 10
    assert [block_id for _, block_id in orders(host).into] == one.block_ids
    host.settle(one)
    assert orders(host).await_step_id == 5
    assert host.pool.num_held == 0
    host.check([one])
    blocks.check([one])


def test_what_the_device_still_knows_is_not_copied_back() -> None:
    """Nobody took its full blocks meanwhile: only the part of a block, which has no name, comes in."""
    blocks, host = tiers()
    compute(blocks, one := request(list(range(10))))
    held = list(one.block_ids)
    make_room(blocks, host, one)
    orders(host)
    host.load(one, host.find(one, []), step_id=3)
    assert one.block_ids[:2] == held[:2]
    assert len(orders(host).into) == 1


def test_a_block_is_copied_out_once_for_all_who_share_it() -> None:
    """Two requests with one prompt: the second copies only what is its own."""
    blocks, host = tiers()
    compute(blocks, one := request(list(range(9))))
    compute(blocks, two := request([*range(8), 50]))
    assert make_room(blocks, host, one)
    assert len(orders(host).out) == 3
    assert make_room(blocks, host, two)
    assert len(orders(host).out) == 1
    host.check([one, two])
    host.release(one)
    host.release(two)
    assert (host.pool.num_held, host.pool.num_cached) == (0, 2)


@pytest.mark.parametrize(
    ("out_seconds", "in_seconds", "is_worth"), [(0.1, 0.1, True), (0.1, 4.0, False), (4.0, 0.1, False)]
)
def test_both_ways_over_the_link_are_counted(out_seconds: float, in_seconds: float, is_worth: bool) -> None:
    """Three blocks of nine tokens: a link that is slow one way alone makes computing quicker, whichever way it is."""
    costs = SwapCosts(num_host_blocks=64, out_seconds=out_seconds, in_seconds=in_seconds, token_seconds=1.0)
    blocks, host = tiers(costs=costs)
    compute(blocks, one := request(list(range(9))))
    assert make_room(blocks, host, one) == is_worth


def test_nothing_is_swapped_that_is_quicker_computed() -> None:
    """The link is slow: a block out and in takes longer than its four tokens. On a quicker one it doesn't."""
    slow = SwapCosts(num_host_blocks=64, out_seconds=5.0, in_seconds=3.0, token_seconds=1.0)
    blocks, host = tiers(costs=slow)
    compute(blocks, one := request(list(range(9))))
    assert not make_room(blocks, host, one)
    assert host.take_orders() is None
    assert one.host_table is None
    quicker, tier = tiers(costs=SwapCosts(num_host_blocks=64, out_seconds=0.5, in_seconds=3.0, token_seconds=1.0))
    compute(quicker, one := request(list(range(16))))
    assert make_room(quicker, tier, one)


def test_nothing_is_swapped_when_the_host_is_full_of_others() -> None:
    """Prefixes that are only kept give way; what another request holds does not."""
    costs = SwapCosts(num_host_blocks=4, out_seconds=0.001, in_seconds=0.001, token_seconds=1.0)
    blocks, host = tiers(costs=costs)
    compute(blocks, one := request(list(range(12))))
    compute(blocks, two := request(list(range(50, 62))))
    assert make_room(blocks, host, one)
    assert not make_room(blocks, host, two)
    host.release(one)
    assert host.pool.num_cached == 3
    compute(blocks, three := request(list(range(70, 82))))
    assert make_room(blocks, host, three)
    host.check([three])


def test_a_prefix_that_gave_way_on_the_device_comes_in_from_the_host() -> None:
    """A chat goes on after others had the device."""
    blocks, host = tiers(num_blocks=4)
    compute(blocks, chat := request(list(range(12))))
    blocks.free(chat)
    compute(blocks, other := request(list(range(50, 65))))
    assert len(orders(host).out) == 3
    blocks.free(other)
    again = request(list(range(13)))
    found = blocks.find_prefix(again)
    sources = host.find(again, found)
    assert (found, len(sources)) == ([], 3)
    assert host.needs_load(sources)
    host.load(again, sources, step_id=9)
    assert len(orders(host).into) == 3
    assert again.num_computed_tokens == 12


def test_an_order_takes_along_what_gives_way_next() -> None:
    """Rows that grow take a block now and then: the first that has to go takes the others of that chat along, and when
    their turn comes nothing is left to do."""
    blocks, host = tiers()
    compute(blocks, chat := request(list(range(12))))
    blocks.free(chat)
    compute(blocks, other := request(list(range(50, 70))))
    assert not orders(host).out
    assert blocks.grow(other, 24) is not None
    assert len(orders(host).out) == 3
    assert blocks.grow(other, 32) is not None
    assert host.take_orders() is None
    again = request(list(range(13)))
    assert len(host.find(again, blocks.find_prefix(again))) == 3
    host.check([other])


def test_who_begins_like_somebody_whose_blocks_are_coming_in_waits_for_the_same_copies() -> None:
    blocks, host = tiers()
    compute(blocks, one := request(list(range(8))))
    make_room(blocks, host, one)
    blocks.reset_prefix_cache()
    one.token_ids.append(8)
    host.load(one, host.find(one, []), step_id=4)
    two = request([*range(8), 60, 61])
    shared = blocks.find_prefix(two)
    assert shared == one.block_ids[:2]
    assert host.needs_load(shared)
    host.load(two, shared, step_id=6)
    assert len(orders(host).into) == 2
    assert not host.is_in(two)
    host.note(4, (0.0, 0.1))
    assert host.is_in(two)
    assert not host.needs_load(shared)


def test_a_load_that_is_called_off_is_waited_for_before_its_blocks_are_written() -> None:
    """Its owner left: the copies go on, and whoever gets those blocks must not be overwritten by them."""
    blocks, host = tiers()
    compute(blocks, one := request(list(range(9))))
    make_room(blocks, host, one)
    blocks.reset_prefix_cache()
    host.load(one, host.find(one, []), step_id=2)
    orders(host)
    host.call_off(one)
    assert orders(host).await_step_id == 2
    assert one.host_table.host_ids  # its own state: it may ask again
    assert blocks.pool.num_held == 0
    host.release(one)
    assert host.pool.num_held == 0


def test_what_may_be_wrong_is_found_by_nobody() -> None:
    """A row failed: neither tier gives out what it computed."""
    blocks, host = tiers(num_blocks=4)
    compute(blocks, one := request(list(range(8))))
    make_room(blocks, host, one)
    host.release(one)
    compute(blocks, again := request([*range(8), 9]))
    blocks.free(again, trusted=False)
    host.distrust(again)
    fresh = request([*range(8), 9])
    assert host.find(fresh, blocks.find_prefix(fresh)) == []
    assert host.pool.num_cached == 0


def test_a_request_that_shares_nothing_shares_nothing_here() -> None:
    """It asked not to read what others computed: its blocks have no names here, and come back from here alone."""
    blocks, host = tiers()
    compute(blocks, request(list(range(8))))
    compute(blocks, one := request(list(range(8)), read_prefix_cache=False))
    make_room(blocks, host, one)
    assert len(host.names) == 0
    assert all(place < 0 for place in host.find(one, []))


def test_nothing_is_computed_twice_at_four_times_the_room(world: Callable[..., Any]) -> None:
    """All requests at once, each growing to a quarter of the pool, with as many rows as requests."""
    settings = {"num_blocks": 24, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    figures = {}
    for mode, costs in (("recompute", SwapCosts()), ("swap", CHEAP)):
        here = world(swap=costs, swap_lag=2, **settings)
        for number in range(16):
            here.ask([number] * 4, max_tokens=20)
        while next(here.driver.open_requests(), None) is not None:
            here.round()
            here.driver.check()
        for number in range(16):
            here.assert_exact(number)
        figures[mode] = here.metrics
    assert figures["recompute"].tokens_recomputed > 50
    assert figures["swap"].tokens_recomputed == 0
    assert figures["swap"].preemptions_swapped == figures["swap"].preemptions > 3
    values = figures["swap"].values({})
    assert values['argosy_swap_bytes_total{direction="out"}'] == 1000 * figures["swap"].swap_blocks["out"] > 0


def test_requests_whose_copies_take_long_come_in_one_after_the_other(world: Callable[..., Any]) -> None:
    """Six wait on the host when room for all of them comes free at once. Copies of one step are in all together, so
    with one order for all of them the first would wait for the last, and all would go on, and end, together."""
    slow = SwapCosts(num_host_blocks=64, out_seconds=1e-6, in_seconds=0.01, token_seconds=1.0)
    here = world(swap=slow, num_blocks=24, max_num_seqs=16, max_num_batched_tokens=64)
    for turn in range(2):
        for number in range(12):
            here.ask([*[number] * 11, *range(turn)], max_tokens=2)
        here.run()
    for number in range(24):
        here.assert_exact(number)
    carried = [output for output in here.executor.outputs if output.swaps is not None and output.swaps.into]
    assert sum(len(output.swaps.into) for output in carried) > 10
    assert max(len(output.swaps.into) for output in carried) <= 2  # the full blocks of one prompt


def test_lost_ranks_take_the_host_blocks_along(world: Callable[..., Any]) -> None:
    """Some run, some wait with their blocks on the host, some come in: all are computed anew and say the same."""
    here = world(swap=CHEAP, swap_lag=3, num_blocks=24, max_num_seqs=16, max_num_batched_tokens=64)
    for number in range(16):
        here.ask([number] * 4, max_tokens=20)
    while not (here.driver.scheduler.host.loading and any(one.host_table for one in here.driver.scheduler.queue)):
        here.round()
    here.executor.lose()
    here.run()
    for number in range(16):
        here.assert_exact(number)
    assert here.driver.scheduler.host.pool.num_held == 0
    assert here.metrics.tokens_recomputed > 0


def test_an_abort_while_blocks_come_in_leaves_nothing_behind(world: Callable[..., Any]) -> None:
    here = world(swap=CHEAP, swap_lag=3, num_blocks=24, max_num_seqs=16, max_num_batched_tokens=64)
    for number in range(16):
        here.ask([number] * 4, max_tokens=20)
    while not here.driver.scheduler.host.loading:
        here.round()
    gone = here.driver.scheduler.host.loading[0].stream_id
    here.send(AbortRequest(stream_id=gone))
    here.driver.check()
    here.run()
    for number in range(16):
        if number == gone:
            assert here.last(gone).finish_reason is FinishReason.ABORT
        else:
            here.assert_exact(number)
    assert here.driver.scheduler.blocks.pool.num_held == here.driver.scheduler.host.pool.num_held == 0


@pytest.mark.parametrize(
    ("given", "gib"),
    [
        (4, 4.0),
        ("4", 4.0),
        ("0.5", 0.5),
        ("512MiB", 0.5),
        (" 2 GiB ", 2.0),
        ("1tib", 1024.0),
        ("16GB", 16e9 / 2**30),
        ("500mb", 5e8 / 2**30),
        ("3g", 3.0),
    ],
)
def test_amounts_of_host_memory(given: object, gib: float) -> None:
    assert parse_swap_space(given) == gib


def test_amounts_that_mean_nothing_are_refused() -> None:
    assert parse_swap_space("AUTO") == "auto"
    with pytest.raises(ConfigError, match=r"swap_space='4 elephants': must be a number of GiB .* or auto"):
        parse_swap_space("4 elephants")
