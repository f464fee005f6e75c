"""Room in a Ray cluster: pinned where it was asked for, refused in words when others hold it, nothing left behind."""

import time

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.deploy.ray_session import RaySession
from argosy.placement import ray_cluster
from argosy.placement.seating import StageRoom


def states(name: str) -> list[str]:
    return [row["state"] for row in placement_group_table().values() if row["name"] == name]


def test_stages_are_tied_to_the_node_of_the_plan_and_given_back(ray_session: RaySession) -> None:
    """Ray's own table says where they are; a second reservation of that name replaces the first."""
    (offer,) = ray_cluster.offers()
    stages = [StageRoom(resources={"CPU": 2.0}, node_id=offer.node_id)] * 2
    first = ray_cluster.reserve("test-pinned", stages)
    assert first.stage_node_ids == (offer.node_id,) * 2
    again = ray_cluster.reserve("test-pinned", stages)
    assert states("test-pinned").count("CREATED") == 1
    again.release()
    assert set(states("test-pinned")) == {"REMOVED"}


def test_room_that_others_hold_is_waited_for_and_then_refused_by_name(ray_session: RaySession) -> None:
    """The holder is named, the wait has an end, and no group of ours waits on."""
    (offer,) = ray_cluster.offers()
    holder = placement_group([{"CPU": offer.total["CPU"]}], name="test-holder")
    ray.get(holder.ready(), timeout=20.0)
    try:
        began = time.monotonic()
        with pytest.raises(PlacementImpossible) as caught:
            ray_cluster.reserve("test-waiting", [StageRoom(resources={"CPU": 1.0})], deadline_seconds=1.0)
        assert time.monotonic() - began < ray_cluster.RESERVE_SECONDS
        assert "after 1 s of waiting, the plan needs 1 stage of 1 CPU" in str(caught.value)
        assert "has 0 of 8 CPU free (test-holder holds some)" in str(caught.value)
        assert set(states("test-waiting")) <= {"REMOVED"}
    finally:
        remove_placement_group(holder)


def test_an_unfit_node_is_never_taken(ray_session: RaySession) -> None:
    """What the preflight refused stays refused after a loss, too."""
    (offer,) = ray_cluster.offers()
    with pytest.raises(PlacementImpossible, match="the cluster has no node"):
        ray_cluster.reserve("test-unfit", [StageRoom(resources={"CPU": 1.0})], unfit=[offer.node_id])
