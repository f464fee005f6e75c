"""Block tables: grow, share, fork, copy on write, give back."""

import pytest

from argosy.cluster.block_manager import BlockManager
from argosy.cluster.protocol.messages import GenerateRequest
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.request import Request


def request(prompt: list[int], *, salt: str = "", index: int = 0, reads: bool = True) -> Request:
    message = GenerateRequest(
        stream_id=0,
        request_id="0",
        prompt_token_ids=prompt,
        params=TokenParams(max_tokens=50, read_prefix_cache=reads),
        n=2,
        cache_salt=salt,
    )
    return Request(message, index, arrival=0, arrival_seconds=0.0, end=len(prompt) + 50, deltas=[])


def compute(manager: BlockManager, one: Request) -> None:
    """The request's tokens are computed, as `Scheduler` does it."""
    manager.begin(one, manager.find_prefix(one))
    assert manager.grow(one, len(one.token_ids)) is not None
    one.set_computed(len(one.token_ids), manager.num_slots(one))
    manager.register_full_blocks(one)


def test_a_table_grows_by_whole_blocks_or_not_at_all() -> None:
    """A pool of two blocks can't hold nine tokens, and nothing is taken in vain."""
    manager = BlockManager(2, 4)
    one = request(list(range(9)))
    manager.begin(one, [])
    assert manager.grow(one, 9) is None
    assert manager.pool.num_free == 2
    assert len(manager.grow(one, 5) or ()) == 2
    assert manager.grow(one, 8) == []
    manager.check([one])


def test_the_last_prompt_token_is_computed_even_on_a_full_hit() -> None:
    """Without it there is no logit to draw from."""
    manager = BlockManager(8, 4)
    compute(manager, first := request(list(range(8))))
    assert manager.find_prefix(request(list(range(8)))) == first.block_ids[:1]
    assert manager.find_prefix(request(list(range(9)))) == first.block_ids[:2]


def test_blocks_that_were_given_back_are_found_until_they_are_needed() -> None:
    """A chat comes back after its first answer ended."""
    manager = BlockManager(3, 4)
    compute(manager, first := request(list(range(9))))
    held = list(first.block_ids)
    manager.free(first)
    assert manager.find_prefix(request(list(range(9)))) == held[:2]
    compute(manager, request([50, 51, 52, 53, 54]))  # takes the spare one, then the tail of the prefix
    assert manager.find_prefix(request(list(range(9)))) == held[:1]


def test_salt_and_wish_keep_requests_from_reading() -> None:
    """Another tenant, or a caller who wants a fresh computation."""
    manager = BlockManager(8, 4)
    compute(manager, request(list(range(8)), salt="a"))
    assert manager.find_prefix(request(list(range(9)), salt="a"))
    assert not manager.find_prefix(request(list(range(9)), salt="b"))
    assert not manager.find_prefix(request(list(range(9)), salt="a", reads=False))


def test_a_fork_shares_the_prompt_and_copies_the_tail_before_it_writes() -> None:
    """n = 2 with a prompt of ten tokens: two blocks are shared, the third is copied for the second answer."""
    manager = BlockManager(8, 4)
    compute(manager, parent := request(list(range(10))))
    child = request(list(range(10)), index=1)
    manager.fork(parent, child)
    assert child.block_ids == parent.block_ids
    assert child.num_computed_tokens == 9
    ((source, destination),) = manager.own_tail(child)
    assert (source, destination) == (parent.block_ids[2], child.block_ids[2])
    assert source != destination
    manager.check([parent, child])
    manager.free(parent)
    assert manager.pool.ref_counts[source] == 1, "the source may not be written before the copy was sent"
    manager.end_step()
    assert manager.pool.ref_counts[source] == 0
    manager.check([child])


def test_a_fork_at_a_block_border_has_no_tail_to_copy() -> None:
    """Only the last prompt token is in the last block, and the fork computes that one itself."""
    manager = BlockManager(8, 4)
    compute(manager, parent := request(list(range(9))))
    child = request(list(range(9)), index=1)
    manager.fork(parent, child)
    assert child.block_ids == parent.block_ids[:2]
    assert manager.own_tail(child) == []


def test_a_fork_does_not_write_into_a_block_that_can_be_found() -> None:
    """The parent has ended, the fork is the only holder, but the prefix cache knows the block."""
    manager = BlockManager(8, 4)
    compute(manager, parent := request(list(range(8))))
    child = request(list(range(8)), index=1)
    manager.fork(parent, child)
    manager.free(parent)
    assert len(manager.own_tail(child)) == 1


def test_blocks_of_a_failed_row_are_not_found() -> None:
    """What a rank could not compute must not serve others."""
    manager = BlockManager(8, 4)
    compute(manager, one := request(list(range(8))))
    manager.free(one, trusted=False)
    assert not manager.find_prefix(request(list(range(9))))
    assert manager.pool.num_cached == 0


def test_a_reset_forgets_all_prefixes_and_leaves_tables_alone() -> None:
    """An operator empties the cache under load."""
    manager = BlockManager(8, 4)
    compute(manager, one := request(list(range(8))))
    manager.reset_prefix_cache()
    assert not manager.find_prefix(request(list(range(9))))
    manager.check([one])
    manager.free(one)
    manager.check([])


def test_check_sees_a_table_that_is_too_short() -> None:
    """A check that can't fail is a wish."""
    manager = BlockManager(8, 4)
    compute(manager, one := request(list(range(8))))
    lost = one.block_ids.pop()
    manager.pool.release(lost, keep=True)
    with pytest.raises(AssertionError):
        manager.check([one])
