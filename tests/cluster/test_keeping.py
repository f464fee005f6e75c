"""What gives way is copied to the host while enough of it comes back, and whoever stops copying sees when to begin."""

from argosy.cluster.keeping import LEAST_WINDOW, Keeping
from argosy.cluster.prefix_cache import BlockHash
from argosy.cluster.protocol.swap import SwapCosts

# 16 tokens take 0.16 s to compute, 0.04 to copy in: a copy out of 0.12 s, a tenth of it charged, pays from 10 % on
COSTS = SwapCosts(num_host_blocks=1000, out_seconds=0.12, in_seconds=0.04, token_seconds=0.01)


def names(first: int, count: int) -> list[BlockHash]:
    return [(b"%d" % number, b"") for number in range(first, first + count)]


def let_go(keeping: Keeping, first: int, count: int) -> int:
    """So many blocks give way; how many of them are copied."""
    return sum(keeping.give_way(name) for name in names(first, count))


def test_prompts_that_never_repeat_are_copied_until_the_host_is_full_once() -> None:
    assert let_go(Keeping(COSTS, 16), 0, 50_000) == 1000


def test_what_comes_back_often_enough_goes_on_being_copied() -> None:
    """A tenth has to, at these prices: 10 % do for ever, 9 % do not."""
    for back, copied in ((10, 5000), (9, 1000)):
        keeping, total = Keeping(COSTS, 16), 0
        for part in range(50):
            total += let_go(keeping, 100 * part, 100)
            keeping.come_back(back)
        assert total == copied


def test_a_load_that_begins_to_repeat_is_seen_by_names_alone() -> None:
    """Nothing is copied any more; then chats go on whose blocks were let go: what they ask for counts, once."""
    keeping = Keeping(COSTS, 16)
    let_go(keeping, 0, 3000)
    assert not keeping.is_copying
    for _ in range(5):
        keeping.ask_for(names(2000, 60))
    assert not keeping.is_copying
    keeping.ask_for(names(2500, 40))
    assert keeping.is_copying
    assert let_go(keeping, 4000, 1000) == 1000


def test_what_was_let_go_too_long_ago_would_not_have_come_back() -> None:
    """Names are kept for as many blocks as the host has: its own would be gone by then."""
    keeping = Keeping(COSTS, 16)
    let_go(keeping, 0, 3000)
    keeping.ask_for(names(1500, 400))
    assert not keeping.is_copying
    keeping.ask_for(names(2200, 1))  # asked for a prefix: what follows a block that is not known is of no use
    keeping.ask_for([*names(1, 1), *names(2300, 300)])
    assert not keeping.is_copying


def test_where_computing_is_quicker_than_the_link_nothing_is_ever_worth_it() -> None:
    slow = SwapCosts(num_host_blocks=10, out_seconds=0.1, in_seconds=5.0, token_seconds=0.01)
    keeping = Keeping(slow, 16)
    let_go(keeping, 0, LEAST_WINDOW + 1)
    keeping.come_back(10_000)
    assert let_go(keeping, 0, 5000) == 0
