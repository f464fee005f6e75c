"""What a plan is asked for, what was judged, and what came of it: values, without the search."""

from typing import Literal

import msgspec

from argosy.placement.calibration import Calibration
from argosy.placement.layout import Layout, Traffic
from argosy.placement.model_shape import ModelShape
from argosy.placement.plan import ClusterPlan
from argosy.placement.rank_memory import Serving
from argosy.placement.topology import ClusterTopology

Objective = Literal["throughput", "latency"]


class PlanOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of the plan. None: the planner chooses."""

    tp_size: int | None = None
    pp_size: int | None = None
    num_replicas: int | None = None
    objective: Objective = "throughput"
    traffic: Traffic = Traffic()
    max_ttft_seconds: float | None = None
    max_tpot_seconds: float | None = None
    price_per_gpu_hour: float | None = None
    calibration: Calibration | None = None


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A layout on the cluster: its replicas, each judged, and the sums."""

    tp_size: int
    pp_size: int
    devices: str  # which of the cluster: "all", or a GPU model
    replicas: tuple[Layout, ...]  # those that fit; empty: none does
    problem: str = ""  # why there is none
    missing_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all replicas."""
        return sum(replica.tokens_per_second for replica in self.replicas)

    @property
    def num_gpus(self) -> int:
        """Devices in use."""
        return len(self.replicas) * self.tp_size * self.pp_size

    @property
    def num_blocks(self) -> int:
        """KV blocks of all replicas."""
        return sum(replica.num_blocks for replica in self.replicas)

    @property
    def concurrency(self) -> int:
        """Requests at once on all replicas."""
        return sum(replica.concurrency for replica in self.replicas)

    def lone_seconds(self, traffic: Traffic) -> float:
        """A lone request from arrival to its last token, on the first replica."""
        first = self.replicas[0]
        return first.ttft_seconds + traffic.output_len * first.lone_tpot_seconds

    def describe(self) -> str:
        """'2 x (TP4 x PP2)'."""
        only = "" if self.devices == "all" else f" on {self.devices} only"
        return f"{max(1, len(self.replicas))} x TP{self.tp_size} x PP{self.pp_size}{only}"


class Loser(msgspec.Struct, frozen=True, kw_only=True):
    """A layout that was not taken, and why."""

    candidate: Candidate
    why: str


class PlanReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was chosen, and what was not."""

    model: ModelShape
    topology: ClusterTopology
    serving: Serving
    options: PlanOptions
    chosen: Candidate
    losers: tuple[Loser, ...]  # the nearest first
    plan: ClusterPlan
    notes: tuple[str, ...] = ()

    @property
    def price_per_hour(self) -> float | None:
        """Of the devices in use; None when no price is known."""
        if self.options.price_per_gpu_hour is not None:
            return self.options.price_per_gpu_hour * self.chosen.num_gpus
        used = {rank.node for replica in self.plan.replicas for rank in replica.ranks}
        prices = [node.price_per_hour for node in self.topology.nodes if node.node_id in used]
        return None if not prices or None in prices else sum(price for price in prices if price is not None)

    @property
    def price_per_million_tokens(self) -> float | None:
        """Of output tokens at full load."""
        price = self.price_per_hour
        return None if price is None else price / (self.chosen.tokens_per_second * 3600.0) * 1e6
