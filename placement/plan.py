"""Who runs which layers where, as a value that can be printed, saved and compared."""

from collections.abc import Sequence
from typing import Any

import msgspec

from argosy.cluster.protocol.errors import ConfigError


class RankInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One worker process: its place in the groups and in the cluster."""

    global_rank: int  # pp_rank * tp_size + tp_rank
    tp_rank: int
    pp_rank: int
    tp_size: int
    pp_size: int
    first_layer: int  # this stage runs layers [first_layer, last_layer)
    last_layer: int
    node: str = ""  # node id or name; empty: wherever there is room
    gpu: int | None = None  # index on its node; None on a CPU

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds token ids."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head and samples."""
        return self.pp_rank == self.pp_size - 1

    @property
    def answers(self) -> bool:
        """Whether this is the one rank that sends the steps' outcomes to the driver."""
        return self.is_last_stage and self.tp_rank == 0


class PlacementPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All ranks of one replica, in order of `global_rank`; a tensor-parallel group's are together, node by node."""

    ranks: tuple[RankInfo, ...]

    @property
    def tp_size(self) -> int:
        """Ranks in each tensor-parallel group."""
        return self.ranks[0].tp_size

    @property
    def pp_size(self) -> int:
        """Pipeline stages."""
        return self.ranks[0].pp_size

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """Layers of each stage: what the setting `pipeline_layers` takes."""
        return tuple(r.last_layer - r.first_layer for r in self.ranks if r.tp_rank == 0)

    def stage(self, pp_rank: int) -> tuple[RankInfo, ...]:
        """The ranks of one stage, in order of `tp_rank`."""
        return self.ranks[pp_rank * self.tp_size : (pp_rank + 1) * self.tp_size]

    def places(self) -> tuple[tuple[RankInfo, ...], ...]:
        """The ranks of each stage on each of its nodes: one place a stage, more where a group spans nodes."""
        found: list[list[RankInfo]] = []
        for rank in self.ranks:
            if found and (found[-1][0].pp_rank, found[-1][0].node) == (rank.pp_rank, rank.node):
                found[-1].append(rank)
            else:
                found.append([rank])
        return tuple(map(tuple, found))

    def placed(self, seats: Sequence[tuple[str, int | None]]) -> "PlacementPlan":
        """The same ranks on devices: (node id, GPU index there) for each, in order of `global_rank`."""
        return PlacementPlan(
            ranks=tuple(
                msgspec.structs.replace(rank, node=node, gpu=gpu)
                for rank, (node, gpu) in zip(self.ranks, seats, strict=True)
            )
        )

    def describe(self) -> str:
        """One line for people, such as 'TP2 x PP2, layers 0-15 | 16-31'."""
        stages = [r for r in self.ranks if r.tp_rank == 0]
        layers = " | ".join(f"{r.first_layer}-{r.last_layer - 1}" for r in stages)
        return f"TP{self.tp_size} x PP{self.pp_size}, layers {layers}"


class ClusterPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All replicas of one model on one cluster; no device sits in two of them."""

    replicas: tuple[PlacementPlan, ...]

    @property
    def num_ranks(self) -> int:
        """Devices in use."""
        return sum(len(replica.ranks) for replica in self.replicas)

    def settings(self) -> dict[str, Any]:
        """The parallel settings of one replica, by the flat names of `ServingConfig.from_mapping`."""
        first = self.replicas[0]
        return {
            "tensor_parallel_size": first.tp_size,
            "pipeline_parallel_size": first.pp_size,
            "pipeline_layers": first.layer_counts if first.pp_size > 1 else (),
        }

    def describe(self) -> str:
        """One line for people: '2 replicas of TP2 x PP2, layers 0-15 | 16-31'."""
        many = f"{len(self.replicas)} replicas of " if len(self.replicas) > 1 else ""
        return many + self.replicas[0].describe()


def make_plan(num_layers: int, tp_size: int, pp_size: int, pipeline_layers: tuple[int, ...] = ()) -> PlacementPlan:
    """The plan of one replica: contiguous layers, as even as can be, earlier stages take the remainder last.

    The last stage has the head besides and the first the embedding, so the remainder goes to the middle first.
    Raises `ConfigError` when there are fewer layers than stages, or the given counts don't add up.
    """
    if pp_size > num_layers:
        raise ConfigError(
            f"pipeline_parallel_size={pp_size} exceeds the model's {num_layers} layers; use {num_layers} or fewer"
        )
    counts = list(pipeline_layers) or _even(num_layers, pp_size)
    if sum(counts) != num_layers or len(counts) != pp_size:
        raise ConfigError(f"pipeline_layers={counts} must be {pp_size} counts that add up to {num_layers} layers")
    ranks, first = [], 0
    for pp_rank, count in enumerate(counts):
        for tp_rank in range(tp_size):
            ranks.append(
                RankInfo(
                    global_rank=pp_rank * tp_size + tp_rank,
                    tp_rank=tp_rank,
                    pp_rank=pp_rank,
                    tp_size=tp_size,
                    pp_size=pp_size,
                    first_layer=first,
                    last_layer=first + count,
                )
            )
        first += count
    return PlacementPlan(ranks=tuple(ranks))


def _even(num_layers: int, pp_size: int) -> list[int]:
    counts = [num_layers // pp_size] * pp_size
    middle_first = sorted(range(pp_size), key=lambda stage: (stage == pp_size - 1, stage == 0, stage))
    for stage in middle_first[: num_layers % pp_size]:
        counts[stage] += 1
    return counts
