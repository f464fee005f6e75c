"""The machines as values: which nodes there are and what they offer."""

import msgspec


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One machine of the cluster."""

    node_id: str
    address: str
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    memory_bytes: int = 0
    labels: dict[str, str] = {}

    def describe(self) -> str:
        """For the error that says what was offered."""
        gpus = f", {self.num_gpus:g} GPU" if self.num_gpus else ""
        return f"{self.address}: {self.num_cpus:g} CPU{gpus}"


class ClusterTopology(msgspec.Struct, frozen=True, kw_only=True):
    """All machines, ordered by node id so that everybody decides alike."""

    nodes: tuple[Node, ...]

    @property
    def num_gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.num_gpus for node in self.nodes)

    def describe(self) -> str:
        """One line for people."""
        return "; ".join(node.describe() for node in self.nodes) or "no node"
