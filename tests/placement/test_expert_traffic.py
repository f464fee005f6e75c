"""What whole experts cost on the wire: chances are counted, and the planner sizes what ranks then hold."""

import itertools
from typing import Any

import pytest

from argosy.cluster.protocol.model_spec import MoESpec
from argosy.placement.expert_traffic import exchange_numbers, least_tokens, share_elsewhere, sum_numbers
from argosy.placement.model_sources import read_model_shape
from argosy.placement.planner import make_serving
from argosy.placement.rank_memory import StageBytes


def mixture(num_experts: int, top_k: int, **more: Any) -> MoESpec:
    return MoESpec(num_experts=num_experts, top_k=top_k, intermediate_size=8, expert_parallel=True, **more)


@pytest.mark.parametrize(("num_experts", "top_k", "world"), [(8, 2, 2), (8, 2, 4), (8, 1, 8), (6, 3, 3)])
def test_the_chance_is_that_of_counting_all_choices(num_experts: int, top_k: int, world: int) -> None:
    """Rank 0 has the first experts."""
    choices = list(itertools.combinations(range(num_experts), top_k))
    hits = sum(any(expert < num_experts // world for expert in choice) for choice in choices)
    assert share_elsewhere(mixture(num_experts, top_k), world) == pytest.approx(hits / len(choices))


@pytest.mark.parametrize("world", [2, 4])
def test_experts_chosen_by_groups_leave_whole_ranks_out(world: int) -> None:
    """Eight experts in four groups, two experts out of two groups: counted again."""
    hits = total = 0
    for groups in itertools.combinations(range(4), 2):
        experts = [2 * group + member for group in groups for member in range(2)]
        for choice in itertools.combinations(experts, 2):
            total += 1
            hits += any(expert < 8 // world for expert in choice)
    moe = mixture(8, 2, num_groups=4, top_groups=2)
    assert share_elsewhere(moe, world) == pytest.approx(hits / total)
    assert share_elsewhere(moe, world) <= share_elsewhere(mixture(8, 2), world) + 1e-9


def test_the_exchange_sends_less_the_more_ranks_and_the_fewer_experts_a_token_has() -> None:
    """Mixtral over 2, 4, 8 ranks; 128 experts of which 8 serve a token are nearly everywhere over two."""
    moe = mixture(8, 2)
    assert [round(exchange_numbers(moe, world) / sum_numbers(world), 2) for world in (2, 4, 8)] == [0.89, 0.73, 0.62]
    assert exchange_numbers(mixture(128, 8), 2) / sum_numbers(2) == pytest.approx(1.0, abs=0.01)


def test_a_shared_expert_that_is_cut_is_summed() -> None:
    """`auto` never exchanges then; who asks for it gets the shared expert whole on each rank."""
    assert least_tokens(mixture(8, 2, shared_size=16), 4, "cuda") is None
    asked = mixture(8, 2, shared_size=16, all2all="all_to_all")
    assert (least_tokens(asked, 4, "cuda"), asked.shared_is_whole) == (1, True)
    assert least_tokens(mixture(8, 2, all2all="sum"), 4, "cuda") is None


def test_a_plan_counts_what_a_rank_then_holds() -> None:
    """DeepSeek-R1 over eight ranks: 32 experts each, and 7/8 of each layer's shared expert more when tokens move."""
    plain, whole, moved = (
        read_model_shape("deepseek-r1", expert_parallel=expert_parallel, all2all=all2all)
        for expert_parallel, all2all in ((False, "auto"), (True, "sum"), (True, "all_to_all"))
    )
    sizes = [StageBytes(shape, make_serving(shape, quantization="none")) for shape in (plain, whole, moved)]
    cut, dealt, exchanged = (size.stage_bytes(8, 0, 61) for size in sizes)
    assert cut == dealt
    spec = plain.spec
    assert spec.moe is not None
    shared = 3 * spec.hidden_size * spec.moe.shared_size * 58 * sizes[0].serving.dtype_bytes
    assert exchanged - dealt == shared * 7 // 8
