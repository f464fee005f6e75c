"""Which layers share a table, how many blocks that costs, and when a prefix is a hit for all of them."""

import random

import pytest

from argosy.cluster.kv_groups import HOLE, GroupRules
from argosy.cluster.prefix_cache import BlockHash, PrefixCache
from argosy.cluster.protocol.kv_groups import KVGroups, kv_groups, layer_places, window_blocks
from argosy.cluster.protocol.model_facts import ModelSpec


def spec(kinds: str, window: int = 1024, longest: int = 131072) -> ModelSpec:
    """A model whose layers are named by letters: F sees everything, w has the window."""
    return ModelSpec(
        architecture="x", num_layers=len(kinds), hidden_size=8, num_heads=1, num_kv_heads=1, head_size=8,
        intermediate_size=8, vocab_size=8, max_position=longest, sliding_window=window,
        windowed_layers=tuple(kind == "w" for kind in kinds),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "windows", "num_places"),
    [
        ("w" * 32, (1024,), 32),  # Mistral v0.1
        ("wF" * 18, (0, 1024), 18),  # gpt-oss 120b
        ("wwwF" * 8, (0, *[1024] * 3), 8),  # Command R7B
        ("wwwwwF" * 8, (0, *[1024] * 5), 8),  # Gemma 3 12B
        (("wwwwwF" * 11)[:62], (0, *[1024] * 6), 10),  # Gemma 3 27B: 10 and 52
        ("F" * 21 + "w" * 7, (0, 0, 0, 1024), 7),  # Qwen2 with max_window_layers
        ("F" * 32, (0,), 32),
    ],
)
def test_groups_of_published_shapes(kinds: str, windows: tuple[int, ...], num_places: int) -> None:
    """Each layer has a place of its own in a group of its kind, on every stage."""
    groups = kv_groups(spec(kinds))
    assert groups.windows == windows
    assert layer_places(spec(kinds), groups, 0, len(kinds)).num_places == num_places
    for first, last in ((0, len(kinds)), (0, len(kinds) // 2), (len(kinds) // 3, len(kinds))):
        places = layer_places(spec(kinds), groups, first, last)
        assert len(set(zip(places.groups, places.places, strict=True))) == last - first
        for layer in range(first, last):
            assert (groups.windows[places.groups[layer - first]] > 0) == (kinds[layer] == "w")
        num_windowed = kinds[first:last].count("w")
        assert places.num_places == groups.num_places(last - first - num_windowed, num_windowed)


def test_windows_that_no_sequence_outgrows_are_none() -> None:
    """`max_model_len` up to the window: one table."""
    assert kv_groups(spec("wF" * 4), 1024).windows == (0,)
    assert kv_groups(spec("w" * 4), 1024).windows == (0,)
    assert kv_groups(spec("w" * 4), 1025).windows == (1024,)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("window", [1, 2, 4, 7, 16, 17, 33])
def test_the_formula_is_the_most_that_positions_ever_lie_in(window: int, block_size: int) -> None:
    """By trying all of them, for single tokens and for chunks."""
    for chunk in (1, 3, 8, 50):
        tried = [
            (last // block_size) - (max(0, last - chunk - window + 2) // block_size) + 1
            for last in range(chunk - 1, chunk + 6 * window + 60)
        ]
        assert window_blocks(window, block_size, chunk) == max(tried)
    assert window_blocks(window, block_size) <= -(-window // block_size) + 1


def test_so_many_blocks_hold_so_many_tokens_and_no_more() -> None:
    """`num_tokens` is the inverse of `num_blocks`, in whole blocks."""
    for windows in ((0,), (0, 0), (0, 9), (0, 9, 9, 9)):
        groups = KVGroups(windows)
        for num_blocks in range(1, 80):
            longest = groups.num_tokens(num_blocks, 4)
            assert longest is not None
            assert groups.num_blocks(longest, 4) <= num_blocks < groups.num_blocks(longest + 1, 4)
    assert KVGroups((9,)).num_tokens(3, 4) is None, "any length, once the window fits"
    assert KVGroups((9,)).num_tokens(2, 4) == 8


@pytest.mark.parametrize("seed", range(40))
def test_the_longest_hit_is_found_whatever_is_known(seed: int) -> None:
    """Against trying every length: all blocks for groups that see everything, the last window's for the others."""
    rng = random.Random(seed)
    windows = tuple(rng.choice([(0,), (7,), (0, 5), (0, 9, 9), (0, 0, 2), (12, 12)]))
    rules = GroupRules(KVGroups(windows), 4, 64)
    hashes: list[BlockHash] = [(bytes([place]), b"tokens") for place in range(12)]
    cache, known = PrefixCache(), dict[tuple[int, int], int]()
    for place in range(12):
        for group in range(len(windows)):
            if rng.random() < 0.85:
                known[place, group] = 100 * group + place
                cache.register(100 * group + place, hashes[place], group)

    def needed(end: int) -> dict[tuple[int, int], bool]:
        return {
            (place, group): place >= (max(0, 4 * end - window + 1) // 4 if window else 0)
            for place in range(end)
            for group, window in enumerate(windows)
        }

    best = max(end for end in range(13) if all(at in known for at, is_needed in needed(end).items() if is_needed))
    found = rules.find(cache, hashes)
    assert len(found) == best * len(windows)
    assert found == [known[at] if is_needed else HOLE for at, is_needed in needed(best).items()]
