"""The cluster as Ray sees it: what nodes there are, and placement groups reserved and given back.

A group has one bundle for each pipeline stage, so that the ranks of a tensor-parallel group share a node by
construction. Groups outlive the actor that made them; they are named, and whoever comes next with the same name
removes what its predecessor left.
"""

import time
from collections.abc import Sequence
from typing import Any, Final

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.placement.topology import ClusterTopology, Node

RESERVE_SECONDS: Final = 15.0
_REMOVE_SECONDS: Final = 10.0


class Reservation:
    """Room for the stages of one replica."""

    def __init__(self, name: str, group: PlacementGroup, stage_node_ids: Sequence[str]):
        self.name, self.group, self.stage_node_ids = name, group, tuple(stage_node_ids)

    def release(self) -> None:
        """Give it back; what still runs in it is killed by Ray."""
        _remove([self.group])


def discover() -> ClusterTopology:
    """The nodes that are alive."""
    nodes = [
        Node(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            num_cpus=node["Resources"].get("CPU", 0.0),
            num_gpus=node["Resources"].get("GPU", 0.0),
            memory_bytes=int(node["Resources"].get("memory", 0)),
            labels=dict(node.get("Labels") or {}),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]  # Ray's own
        if node["Alive"]
    ]
    return ClusterTopology(nodes=tuple(sorted(nodes, key=lambda node: node.node_id)))


def reserve(
    name: str, num_stages: int, bundle: dict[str, float], *, deadline_seconds: float = RESERVE_SECONDS
) -> Reservation:
    """Reserve `bundle` for each stage, on a node each where there are enough nodes.

    Raises `PlacementImpossible`, at once when no node is large enough and after the deadline when others hold the
    room; it says what was asked for and what there is. Ray itself would wait for ever.
    """
    release(name)
    topology = discover()
    fitting = [node for node in topology.nodes if _fits(node, bundle)]
    asked = f"{num_stages} x {_describe(bundle)}, each within one node"
    slots = sum(_num_fitting(node, bundle) for node in fitting)
    if slots < num_stages:
        raise PlacementImpossible(
            f"the plan needs {asked}; the cluster has {topology.describe()}. "
            "Add nodes, use a smaller --tensor-parallel-size or --pipeline-parallel-size, or --device cpu"
        )
    strategy = "STRICT_SPREAD" if num_stages > 1 and len(fitting) >= num_stages else "PACK"
    group = placement_group([bundle] * num_stages, strategy=strategy, name=name)
    if not group.wait(deadline_seconds):
        _remove([group])
        free = {key: value for key, value in sorted(_available().items()) if key in ("CPU", "GPU")}
        raise PlacementImpossible(
            f"the plan needs {asked}; after {deadline_seconds:g} s only {_describe(free)} of {topology.describe()} is "
            "free: something else holds the rest"
        )
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return Reservation(name, group, [nodes[stage] for stage in range(num_stages)])


def release(name: str) -> None:
    """Remove every group of that name, whoever made it."""
    table = placement_group_table()
    found = [key for key, row in table.items() if row["name"] == name and row["state"] != "REMOVED"]
    _remove([PlacementGroup(ray.PlacementGroupID.from_hex(key)) for key in found])


def _remove(groups: Sequence[PlacementGroup]) -> None:
    for group in groups:
        remove_placement_group(group)
    deadline = time.monotonic() + _REMOVE_SECONDS
    for group in groups:
        while placement_group_table(group)["state"] != "REMOVED" and time.monotonic() < deadline:
            time.sleep(0.01)


def _available() -> dict[str, float]:
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]  # Ray's own
    return free


def _fits(node: Node, bundle: dict[str, float]) -> bool:
    return _num_fitting(node, bundle) > 0


def _num_fitting(node: Node, bundle: dict[str, float]) -> int:
    offered = {"CPU": node.num_cpus, "GPU": node.num_gpus}
    return min((int(offered.get(key, 0.0) // amount) for key, amount in bundle.items() if amount > 0), default=1)


def _describe(resources: dict[str, Any]) -> str:
    return " + ".join(f"{value:g} {key}" for key, value in resources.items()) or "nothing"
