"""Who runs which layers, of given numbers of ranks and stages."""

import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.placement.plan import make_plan


@pytest.mark.parametrize(
    ("num_layers", "pp_size", "given", "counts"),
    [(8, 1, (), [8]), (7, 3, (), [2, 3, 2]), (8, 3, (), [3, 3, 2]), (8, 2, (5, 3), [5, 3]), (3, 3, (), [1, 1, 1])],
)
def test_stages_have_layers_in_a_row(num_layers: int, pp_size: int, given: tuple[int, ...], counts: list[int]) -> None:
    """All ranks of a stage the same; what is left over goes to the middle, then to the first: the last has the head."""
    ranks = make_plan(num_layers, 2, pp_size, given).ranks
    assert [rank.global_rank for rank in ranks] == list(range(2 * pp_size))
    assert [rank.last_layer - rank.first_layer for rank in ranks[::2]] == counts
    assert [rank.first_layer for rank in ranks[1::2]] == [sum(counts[:stage]) for stage in range(pp_size)]


def test_what_can_not_be_divided_is_refused_with_a_number_that_can() -> None:
    with pytest.raises(ConfigError, match=r"^pipeline_parallel_size=5 exceeds the model's 4 layers; use 4 or fewer$"):
        make_plan(4, 1, 5)
    with pytest.raises(ConfigError, match=r"^pipeline_layers=\[2, 1\] must be 2 counts that add up to 4 layers$"):
        make_plan(4, 1, 2, (2, 1))
