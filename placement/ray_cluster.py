"""The cluster as Ray sees it: what nodes there are, and placement groups reserved and given back.

A group has one bundle for each pipeline stage, so that the ranks of a tensor-parallel group share a node by
construction, and each bundle is tied to the node that the plan names. Groups outlive the actor that made them; they are
named, and whoever comes next with the same name removes what its predecessor left.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.placement.seating import Offer, StageRoom, describe_stages, seat_stages
from argosy.placement.topology import NETWORK_25G, ClusterTopology, Link, NodeLink, NodeProbe
from argosy.placement.topology_sources import topology_from_ray

RESERVE_SECONDS: Final = 15.0
_REMOVE_SECONDS: Final = 10.0
_TRY_SECONDS: Final = 2.0  # for Ray to grant bundles that its own figures call free
_LOOK_SECONDS: Final = 0.2
_NODE_LABEL: Final = "ray.io/node-id"  # Ray gives it to each node


class Reservation:
    """Room for the stages of one replica."""

    def __init__(self, name: str, group: PlacementGroup, stage_node_ids: Sequence[str]):
        self.name, self.group, self.stage_node_ids = name, group, tuple(stage_node_ids)

    def release(self) -> None:
        """Give it back; what still runs in it is killed by Ray."""
        _remove([self.group])


def discover(
    probes: Mapping[str, NodeProbe] | None = None, *, network: Link = NETWORK_25G, links: Sequence[NodeLink] = ()
) -> ClusterTopology:
    """The nodes that are alive, with what probes found on them."""
    return topology_from_ray(ray_nodes(), probes, network=network, links=links)


def offers() -> list[Offer]:
    """What each node that is alive has, what of it is free, and which placement groups hold some."""
    private: Any = ray._private  # the only place that says what is free node by node
    free: Mapping[str, Mapping[str, float]] = private.state.available_resources_per_node()
    holders: dict[str, set[str]] = {}
    for row in placement_group_table().values():
        if row["state"] == "CREATED":
            for node_id in row["bundles_to_node_id"].values():
                holders.setdefault(node_id, set()).add(row["name"] or "an unnamed placement group")
    return [
        Offer(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            total=dict(node["Resources"]),
            free=dict(free.get(node["NodeID"], {})),
            holders=tuple(sorted(holders.get(node["NodeID"], ()))),
        )
        for node in ray_nodes()
        if node["Alive"]
    ]


def reserve(
    name: str, stages: Sequence[StageRoom], *, unfit: Sequence[str] = (), deadline_seconds: float = RESERVE_SECONDS
) -> Reservation:
    """Reserve a bundle for each stage, on the node that `seat_stages` gives it, and never on one of `unfit` (ids).

    Raises `PlacementImpossible`, at once when an idle cluster would not hold it and after the deadline when others hold
    the room; it says what was asked for and what each node has. Ray itself would wait for ever. Leaves nothing behind.
    """
    release(name)
    seat_stages(stages, _fit_offers(unfit), by_total=True)
    deadline = time.monotonic() + deadline_seconds
    while True:
        try:
            seats = seat_stages(stages, _fit_offers(unfit))
        except PlacementImpossible as error:
            if time.monotonic() >= deadline:
                raise PlacementImpossible(f"after {deadline_seconds:g} s of waiting, {error}") from None
            time.sleep(_LOOK_SECONDS)
            continue
        group = placement_group(
            [dict(stage.resources) for stage in stages],
            strategy="PACK",  # says nothing: each bundle is tied to its node by the label
            name=name,
            bundle_label_selector=[{_NODE_LABEL: node_id} for node_id in seats],
        )
        try:
            if group.wait(_TRY_SECONDS):
                return _checked(name, group, seats)
        except BaseException:
            _remove([group])
            raise
        _remove([group])
        if time.monotonic() >= deadline:
            raise PlacementImpossible(
                f"Ray did not grant {describe_stages(stages)} within {deadline_seconds:g} s, though its own figures "
                f"call it free on {', '.join(sorted(set(seats)))}: see 'ray status'"
            )


def release(name: str) -> None:
    """Remove every group of that name, whoever made it."""
    table = placement_group_table()
    found = [key for key, row in table.items() if row["name"] == name and row["state"] != "REMOVED"]
    _remove([PlacementGroup(ray.PlacementGroupID.from_hex(key)) for key in found])


def _fit_offers(unfit: Sequence[str]) -> list[Offer]:
    return [offer for offer in offers() if offer.node_id not in unfit]


def _checked(name: str, group: PlacementGroup, seats: Sequence[str]) -> Reservation:
    """The reservation, if it is where it was asked to be."""
    placed = placement_group_table(group)["bundles_to_node_id"]
    found = [placed[stage] for stage in range(len(seats))]
    if found != list(seats):
        raise PlacementImpossible(f"Ray put stages on nodes {found} and the plan on {list(seats)}")
    return Reservation(name, group, found)


def _remove(groups: Sequence[PlacementGroup]) -> None:
    for group in groups:
        remove_placement_group(group)
    deadline = time.monotonic() + _REMOVE_SECONDS
    for group in groups:
        while placement_group_table(group)["state"] != "REMOVED" and time.monotonic() < deadline:
            time.sleep(0.01)


def ray_nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster in Ray's words, those that have gone among them."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray's own
    return nodes
