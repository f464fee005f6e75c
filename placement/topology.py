"""The machines as values: nodes, their GPUs, and the links inside and between them.

They come from a YAML file of a cluster that need not exist, or from a running Ray cluster and what probes measured
there (`placement/topology_sources.py`). Nodes are ordered by id, so that everybody decides alike.
"""

from typing import Final

import msgspec


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A way between two devices: bandwidth one way, and what the smallest message takes."""

    kind: str  # "nvlink", "xgmi", "pcie", "memory" in a node; "network" between nodes
    gbytes_per_second: float
    latency_us: float
    measured: bool = False  # by a probe on these machines, not from a table

    @property
    def bytes_per_second(self) -> float:
        """The same in bytes."""
        return self.gbytes_per_second * 1e9

    @property
    def latency_seconds(self) -> float:
        """The same in seconds."""
        return self.latency_us * 1e-6

    def describe(self) -> str:
        """For people: 'nvlink 450 GB/s'."""
        return f"{self.kind} {self.gbytes_per_second:g} GB/s{' (measured)' if self.measured else ''}"


NETWORK_25G: Final = Link(kind="network", gbytes_per_second=2.8, latency_us=30.0)
"""What is taken for granted between nodes of which nothing is known: 25 Gbit/s Ethernet through TCP."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One device that a rank may have: a GPU, or a share of a node's CPU (model "CPU")."""

    index: int  # on its node
    model: str  # a name of `data_sheets.DATA_SHEETS`, or what the driver says
    memory_bytes: int  # that programs are given on an idle device
    free_bytes: int | None = None  # None: all of it
    uuid: str = ""

    @property
    def usable_bytes(self) -> int:
        """What is not taken by others."""
        return self.memory_bytes if self.free_bytes is None else min(self.free_bytes, self.memory_bytes)


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One machine of the cluster."""

    node_id: str
    address: str
    num_cpus: float = 0.0
    num_gpus: float = 0.0  # as Ray counts them; `gpus` says more where it is known
    memory_bytes: int = 0
    labels: dict[str, str] = {}
    gpus: tuple[Gpu, ...] = ()
    gpu_link: Link | None = None  # between any two of its GPUs; None: as the data sheet says
    price_per_hour: float | None = None  # of the whole node

    def describe(self) -> str:
        """For the error that says what was offered."""
        gpus = f", {self.num_gpus:g} GPU" if self.num_gpus else ""
        return f"{self.address}: {self.num_cpus:g} CPU{gpus}"

    def describe_gpus(self) -> str:
        """For people: '8 x H200', '4 x H100 + 4 x A100-80GB'."""
        models: dict[str, int] = {}
        for gpu in self.gpus:
            models[gpu.model] = models.get(gpu.model, 0) + 1
        return " + ".join(f"{count} x {model}" for model, count in models.items()) or "no GPU"


class NodeLink(msgspec.Struct, frozen=True, kw_only=True):
    """The link between two nodes, by their ids in either order."""

    first: str
    second: str
    link: Link


class ClusterTopology(msgspec.Struct, frozen=True, kw_only=True):
    """All machines, ordered by node id so that everybody decides alike."""

    nodes: tuple[Node, ...]
    network: Link = NETWORK_25G  # between nodes that `links` doesn't name
    links: tuple[NodeLink, ...] = ()

    @property
    def num_gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.num_gpus for node in self.nodes)

    def node(self, node_id: str) -> Node:
        """The node of that id. Raises `KeyError`."""
        for node in self.nodes:
            if node.node_id == node_id:
                return node
        raise KeyError(node_id)

    def link_between(self, first: str, second: str) -> Link:
        """The link between two nodes."""
        for entry in self.links:
            if {entry.first, entry.second} == {first, second}:
                return entry.link
        return self.network

    def only(self, model: str) -> "ClusterTopology":
        """The GPUs of one model, and the nodes that have any."""
        nodes = tuple(
            msgspec.structs.replace(node, gpus=tuple(gpu for gpu in node.gpus if gpu.model == model))
            for node in self.nodes
        )
        return msgspec.structs.replace(self, nodes=tuple(node for node in nodes if node.gpus))

    def describe(self) -> str:
        """One line for people."""
        return "; ".join(node.describe() for node in self.nodes) or "no node"


class NodeProbe(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe found on one node; anything may be missing."""

    gpus: tuple[Gpu, ...] = ()
    gpu_link: Link | None = None
