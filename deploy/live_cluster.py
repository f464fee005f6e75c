"""The cluster that runs at a Ray address, as a value that `argosy plan` and `argosy simulate` take like a file's.

What is free counts, as it does for `argosy serve`: devices that nobody holds, and what memory they have left.
"""

import sys

import msgspec

from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.deploy import preflight
from argosy.deploy.cluster_layout import free_part
from argosy.deploy.ray_session import RaySession
from argosy.placement import ray_cluster
from argosy.placement.topology import ClusterTopology


def read_live_topology(address: str) -> ClusterTopology:
    """The free devices of all nodes and the measured links between them; nodes go by their addresses.

    Raises `ClusterError` when no cluster can be joined there, `PlacementImpossible` when nothing of it is free.
    """
    session = RaySession.open(address, num_cpus=1)
    try:
        found = preflight.inspect_cluster(tell=lambda text: print(f"{text} ...", file=sys.stderr, flush=True))
        offers = ray_cluster.offers()
        topology = free_part(ray_cluster.discover(found.probes(), links=found.node_links()), offers)
    finally:
        session.close()
    if not topology.nodes:
        held = "; ".join(offer.describe(sorted({"CPU", "GPU"} & offer.total.keys())) for offer in offers)
        raise PlacementImpossible(f"nothing is free on the Ray cluster at {address!r}: {held}")
    return named_by_address(topology)


def named_by_address(topology: ClusterTopology) -> ClusterTopology:
    """Nodes by what people know them by, not by Ray's ids; several on one machine get a number."""
    names: dict[str, str] = {}
    for node in topology.nodes:
        name, number = node.address, 2
        while name in names.values():
            name, number = f"{node.address}-{number}", number + 1
        names[node.node_id] = name
    nodes = [msgspec.structs.replace(node, node_id=names[node.node_id]) for node in topology.nodes]
    links = [
        msgspec.structs.replace(link, first=names[link.first], second=names[link.second])
        for link in topology.links
        if link.first in names and link.second in names
    ]
    return msgspec.structs.replace(
        topology, nodes=tuple(sorted(nodes, key=lambda node: node.node_id)), links=tuple(links)
    )
