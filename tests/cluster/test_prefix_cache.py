"""Prefixes by chained SHA-256."""

import pytest

from argosy.cluster.prefix_cache import BlockHash, PrefixCache, extend_hashes, root_digest


def hashes_of(token_ids: list[int], salt: str = "", block_size: int = 2) -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, token_ids, block_size, salt, len(token_ids) // block_size)
    return hashes


def test_the_longest_known_prefix_is_found() -> None:
    """Two chats share their system prompt and part ways."""
    cache = PrefixCache()
    for block_id, block_hash in enumerate(hashes_of([1, 2, 3, 4, 5, 6])):
        cache.register(block_id, block_hash)
    cache.check()
    assert cache.find(hashes_of([1, 2, 3, 4, 9, 9])) == [0, 1]
    assert cache.find(hashes_of([7, 2, 3, 4, 5, 6])) == []


def test_a_block_means_nothing_without_what_came_before() -> None:
    """Keys and values depend on all earlier tokens: the same tokens after another prefix are another block."""
    first, second = hashes_of([1, 2, 8, 8]), hashes_of([3, 4, 8, 8])
    assert first[1][1] == second[1][1]
    assert first[1][0] != second[1][0]


def test_tenants_with_different_salts_never_meet() -> None:
    """Otherwise the time to the first token tells what others have asked."""
    cache = PrefixCache()
    cache.register(0, hashes_of([1, 2], "tenant a")[0])
    assert cache.find(hashes_of([1, 2], "tenant b")) == []
    assert cache.find(hashes_of([1, 2], "tenant a")) == [0]
    assert len({root_digest(salt) for salt in ("", "a", "b", "\ud800")}) == 4


def test_names_are_extended_as_tokens_come() -> None:
    """Hashing a growing answer must give what hashing it at once gives."""
    hashes = hashes_of([1, 2])
    extend_hashes(hashes, [1, 2, 3, 4, 5], 2, "", 2)
    assert hashes == hashes_of([1, 2, 3, 4])


def test_a_digest_is_not_believed_without_its_tokens() -> None:
    """If two contents ever had one digest, the token ids say that they differ."""
    cache = PrefixCache()
    digest, packed = hashes_of([1, 2])[0]
    cache.register(0, (digest, packed))
    assert cache.find([(digest, packed[::-1])]) == []


def test_the_first_holder_of_a_content_stays_the_one_that_is_found() -> None:
    """Two requests computed the same prompt side by side."""
    cache = PrefixCache()
    name = hashes_of([1, 2])[0]
    cache.register(0, name)
    cache.register(1, name)
    assert not cache.knows(1)
    cache.forget(1)
    assert cache.find([name]) == [0]
    cache.forget(0)
    assert len(cache) == 0
    cache.check()


def test_check_sees_a_one_sided_name() -> None:
    """A check that can't fail is a wish."""
    cache = PrefixCache()
    cache.register(0, hashes_of([1, 2])[0])
    cache._hash_of.clear()
    with pytest.raises(AssertionError):
        cache.check()


def test_a_place_of_several_groups_is_registered_as_its_blocks_one_by_one() -> None:
    """Holes have no name; a block that has one, and a name that has a block, stay as they are."""
    first, second = hashes_of([1, 2, 3, 4])
    one_by_one, at_once = PrefixCache(), PrefixCache()
    for block_ids, name in (((4, -1, 6), first), ((7, 8, 9), first), ((4, 10, -1), second)):
        at_once.register_place(block_ids, name)
        for group, block_id in enumerate(block_ids):
            if block_id >= 0:
                one_by_one.register(block_id, name, group)
    found = [
        [cache.get(name, group) for name in (first, second) for group in range(3)] for cache in (one_by_one, at_once)
    ]
    assert found[0] == found[1] == [4, 8, 6, None, 10, None]
    at_once.check()
