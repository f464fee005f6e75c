"""Stages find their nodes before Ray is asked, and a refusal names what was asked and what each node has."""

import pytest

from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.placement.seating import Offer, StageRoom, seat_stages


def offer(name: str, gpus: float, free: float | None = None, holders: tuple[str, ...] = ()) -> Offer:
    return Offer(
        node_id=f"id-{name}",
        address=name,
        total={"GPU": gpus},
        free={"GPU": gpus if free is None else free},
        holders=holders,
    )


def stages(*gpus: float, nodes: tuple[str, ...] = ()) -> list[StageRoom]:
    names = nodes or ("",) * len(gpus)
    return [StageRoom(resources={"GPU": amount}, node_id=name) for amount, name in zip(gpus, names, strict=True)]


def test_stages_go_to_a_node_each_where_there_are_enough() -> None:
    """In order of the nodes' addresses, however Ray lists them."""
    assert seat_stages(stages(2, 2), [offer("b", 4), offer("c", 4), offer("a", 4)]) == ["id-a", "id-b"]


def test_too_few_nodes_are_filled_one_after_the_other() -> None:
    """Neighbouring stages stay neighbours: hidden states cross the network once."""
    assert seat_stages(stages(2, 2, 2, 2), [offer("a", 4), offer("b", 4)]) == ["id-a", "id-a", "id-b", "id-b"]


def test_a_plan_is_kept() -> None:
    """Even where another seat would come first."""
    assert seat_stages(stages(1, 1, nodes=("id-b", "id-a")), [offer("a", 1), offer("b", 1)]) == ["id-b", "id-a"]


def test_a_stage_whose_node_left_goes_to_a_spare_one() -> None:
    """The others stay where they are."""
    found = seat_stages(stages(4, 4, nodes=("id-a", "id-gone")), [offer("a", 8), offer("spare", 4)])
    assert found == ["id-a", "id-spare"]


def test_a_tensor_parallel_group_is_never_cut_in_two() -> None:
    """Eight GPUs on two nodes don't hold a group of five; the reason says so node by node."""
    with pytest.raises(PlacementImpossible) as caught:
        seat_stages(stages(5), [offer("10.0.0.1", 4), offer("10.0.0.2", 4, 1, ("other-ranks",))])
    text = str(caught.value)
    assert "needs 1 stage of 5 GPU, each within one node" in text
    assert "10.0.0.1 has 4 of 4 GPU free; 10.0.0.2 has 1 of 4 GPU free (other-ranks holds some)" in text


def test_what_is_held_counts_only_when_idle_is_asked_for() -> None:
    """A predecessor may still be leaving: that is worth waiting for, too few GPUs are not."""
    held = [offer("a", 4, 0.0, ("old",))]
    with pytest.raises(PlacementImpossible, match="old holds some"):
        seat_stages(stages(4), held)
    assert seat_stages(stages(4), held, by_total=True) == ["id-a"]


def test_no_node_at_all_is_said() -> None:
    with pytest.raises(PlacementImpossible, match="the cluster has no node"):
        seat_stages(stages(1), [])
