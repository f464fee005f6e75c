"""Blocks: held, spare or cached, and never two of these."""

import random

import pytest

from argosy.cluster.block_pool import BlockPool


def test_spare_blocks_are_handed_out_before_cached_ones() -> None:
    """What may be found again is worth more than what means nothing."""
    pool = BlockPool(3)
    first, second = pool.allocate(), pool.allocate()
    pool.release(first, keep=True)
    pool.release(second, keep=False)
    assert {pool.allocate(), pool.allocate()} == {second, 2}
    assert pool.allocate() == first


def test_the_cached_block_given_back_the_longest_ago_is_evicted_first_and_its_owner_is_told() -> None:
    """The prefix cache must forget the name before the block gets new content."""
    evicted: list[int] = []
    pool = BlockPool(3, on_evict=evicted.append)
    blocks = [pool.allocate() for _ in range(3)]
    for block_id in (blocks[1], blocks[0], blocks[2]):
        pool.release(block_id, keep=True)
    pool.share(blocks[1])  # found again: no longer the oldest
    pool.release(blocks[1], keep=True)
    assert [pool.allocate() for _ in range(3)] == [blocks[0], blocks[2], blocks[1]] == evicted


def test_a_shared_block_is_free_when_its_last_holder_leaves() -> None:
    """Two requests with one system prompt."""
    pool = BlockPool(1)
    block_id = pool.allocate()
    pool.share(block_id)
    pool.release(block_id, keep=True)
    assert pool.num_free == 0
    pool.release(block_id, keep=True)
    assert (pool.num_free, pool.num_cached, pool.num_held) == (1, 1, 0)


def test_releasing_a_free_block_is_our_own_mistake() -> None:
    """A double free would hand one block to two requests."""
    pool = BlockPool(1)
    with pytest.raises(AssertionError):
        pool.release(0, keep=False)


@pytest.mark.parametrize("seed", range(10))
def test_any_order_of_changes_leaves_the_pool_sound(seed: int) -> None:
    """Random allocate, share, release and uncache; counted on the side and compared after each."""
    rng, held = random.Random(seed), list[int]()
    pool = BlockPool(8)
    for _ in range(400):
        action = rng.random()
        if action < 0.4 and pool.num_free:
            held.append(pool.allocate())
        elif action < 0.55 and held:
            block_id = rng.choice(held)
            pool.share(block_id)
            held.append(block_id)
        elif action < 0.95 and held:
            pool.release(held.pop(rng.randrange(len(held))), keep=rng.random() < 0.5)
        else:
            pool.uncache(rng.randrange(8))
        pool.check(held)
        assert pool.num_held == len(set(held))


def test_check_sees_a_lost_and_a_doubled_block() -> None:
    """A check that can't fail is a wish."""
    pool = BlockPool(4)
    block_id = pool.allocate()
    with pytest.raises(AssertionError):
        pool.check([])
    pool._spare.append(block_id)
    with pytest.raises(AssertionError):
        pool.check([block_id])


def test_many_blocks_come_in_the_order_in_which_they_would_come_one_by_one() -> None:
    """Spare ones first, then cached ones, the oldest first."""
    for spare in (0, 2, 3, 5):
        evicted: list[list[int]] = [[], []]
        pools = [BlockPool(6, on_evict=told.append) for told in evicted]
        for pool in pools:
            held = [pool.allocate() for _ in range(6)]
            for block_id in held[spare:]:
                pool.release(block_id, keep=True)
            for block_id in held[:spare]:
                pool.release(block_id, keep=False)
        assert pools[0].allocate_many(3) == [pools[1].allocate() for _ in range(3)]
        assert pools[0].allocate_many(0) == []
        assert evicted[0] == evicted[1]
        assert len(evicted[0]) == max(3 - spare, 0)
        assert pools[0].ref_counts == pools[1].ref_counts
        assert pools[0].num_free == pools[1].num_free == 3
