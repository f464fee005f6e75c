"""The best split of layers over unequal stages, against trying them all."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.placement.partition import split_layers


def best_of_all(num_layers: int, num_stages: int, worth: object) -> float:
    """The best worst stage over every split."""
    best = float("-inf")
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        edges = (0, *cuts, num_layers)
        best = max(best, min(worth(s, edges[s], edges[s + 1]) for s in range(num_stages)))  # type: ignore[operator]  # every cut has a worth
    return best


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_split_is_better(data: st.DataObject) -> None:
    """Random layers of unequal size on stages of unequal room and speed."""
    num_layers = data.draw(st.integers(1, 9))
    num_stages = data.draw(st.integers(1, num_layers))
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=num_layers, max_size=num_layers))
    rooms = data.draw(st.lists(st.integers(1, 300), min_size=num_stages, max_size=num_stages))
    speeds = data.draw(st.lists(st.integers(1, 9), min_size=num_stages, max_size=num_stages))

    def blocks(stage: int, first: int, last: int) -> float:
        left = rooms[stage] - sum(sizes[first:last])
        return left / (last - first) if left >= 0 else left

    def speed(stage: int, first: int, last: int) -> float:
        if sum(sizes[first:last]) > rooms[stage]:
            return float("-inf")
        return -sum(sizes[first:last]) / speeds[stage]

    for worth in (blocks, speed):
        found = split_layers(num_layers, num_stages, worth)
        best = best_of_all(num_layers, num_stages, worth)
        if best == float("-inf"):
            assert found is None
            continue
        assert found is not None
        value, counts = found
        assert sum(counts) == num_layers
        assert min(counts) >= 1
        edges = [sum(counts[:s]) for s in range(num_stages + 1)]
        assert value == best == min(worth(s, edges[s], edges[s + 1]) for s in range(num_stages))


def test_equal_stages_get_equal_shares() -> None:
    """Nothing to gain elsewhere."""
    assert split_layers(12, 4, lambda stage, first, last: -(last - first)) == (-3, (3, 3, 3, 3))


def test_more_stages_than_layers_is_impossible() -> None:
    """Every stage computes something."""
    assert split_layers(2, 3, lambda stage, first, last: 0.0) is None
