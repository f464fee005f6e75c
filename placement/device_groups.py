"""The places that a tensor-parallel group can take, and how they are dealt to the replicas of a layout."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import msgspec

from argosy.placement.data_sheets import DataSheet, find_data_sheet
from argosy.placement.topology import ClusterTopology, Gpu, Link, Node

FAST_NETWORK_GBYTES: Final = 100.0  # between nodes; from here on a group may span them


class DeviceGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Devices for the ranks of one stage: their nodes and indexes, the least of them, and the link of the group."""

    devices: tuple[tuple[str, int], ...]  # (node id, GPU index) of each rank
    gpu: Gpu  # with the least memory that is free
    sheet: DataSheet  # of the slowest
    link: Link

    @property
    def node_ids(self) -> tuple[str, ...]:
        """The nodes it lies on, each once."""
        return tuple(dict.fromkeys(node for node, _ in self.devices))

    @property
    def kind(self) -> tuple[str, int, int, float]:
        """Groups of one kind are worth the same."""
        return self.sheet.name, self.gpu.memory_bytes, self.gpu.usable_bytes, self.link.gbytes_per_second


def find_groups(topology: ClusterTopology, tp_size: int) -> list[DeviceGroup]:
    """All places for groups of `tp_size`, in order of nodes; alike GPUs of a node go together where they can.

    Groups stay in a node. Where no node is large enough and the network is fast, they take whole alike nodes.
    """
    groups = [
        _group([(node, gpu) for gpu in group], node.gpu_link)
        for node in topology.nodes
        for group in _cut(node, tp_size)
    ]
    if groups or topology.network.gbytes_per_second < FAST_NETWORK_GBYTES:
        return groups
    return _wide_groups(topology, tp_size)


def deal_groups(groups: Sequence[DeviceGroup], pp_size: int, num_replicas: int | None) -> list[list[DeviceGroup]]:
    """Which groups each replica gets: neighbours, and alike ones first. Fewer replicas than asked: none at all."""
    most = len(groups) // pp_size
    count = most if num_replicas is None else num_replicas
    if count > most or count < 1:
        return []
    by_node: dict[str, list[DeviceGroup]] = {}
    for group in groups:
        by_node.setdefault(group.node_ids[0], []).append(group)
    dealt, rest = [], []
    for found in by_node.values():  # whole replicas inside a node first: their hops are short
        whole = len(found) // pp_size * pp_size
        dealt += [found[at : at + pp_size] for at in range(0, whole, pp_size)]
        rest += found[whole:]
    dealt += [rest[at : at + pp_size] for at in range(0, len(rest) - pp_size + 1, pp_size)]
    return dealt[:count]


def hop_links(topology: ClusterTopology, replica: Sequence[DeviceGroup]) -> list[Link]:
    """The links between the stages of a replica."""
    links = []
    for here, there in pairwise(replica):
        first, second = here.devices[-1][0], there.devices[0][0]
        links.append(here.link if first == second else topology.link_between(first, second))
    return links


def _cut(node: Node, tp_size: int) -> list[list[Gpu]]:
    ordered = sorted(node.gpus, key=lambda gpu: (gpu.model, -gpu.usable_bytes, gpu.index))
    return [ordered[at : at + tp_size] for at in range(0, len(ordered) - tp_size + 1, tp_size)]


def _wide_groups(topology: ClusterTopology, tp_size: int) -> list[DeviceGroup]:
    groups: list[DeviceGroup] = []
    gathered: list[tuple[Node, Gpu]] = []
    for node in topology.nodes:
        if gathered and gathered[-1][0].describe_gpus() != node.describe_gpus():
            gathered = []
        gathered += [(node, gpu) for gpu in node.gpus]
        if len(gathered) == tp_size:
            groups.append(_group(gathered, topology.network))
            gathered = []
        elif len(gathered) > tp_size:
            gathered = []
    return groups


def _group(devices: Sequence[tuple[Node, Gpu]], link: Link | None) -> DeviceGroup:
    sheets = [_sheet(gpu) for _, gpu in devices]
    slowest = min(sheets, key=lambda sheet: (sheet.gbytes_per_second, sheet.bf16_tflops))
    return DeviceGroup(
        devices=tuple((node.node_id, gpu.index) for node, gpu in devices),
        gpu=min((gpu for _, gpu in devices), key=lambda gpu: gpu.usable_bytes),
        sheet=slowest,
        link=link or slowest.link,
    )


def _sheet(gpu: Gpu) -> DataSheet:
    """The sheet of a GPU; one that is not known is taken for an A10G, the slowest of those we know well."""
    sheet = find_data_sheet(gpu.model) or find_data_sheet("A10G")
    assert sheet is not None
    return sheet
