"""Which node each pipeline stage goes to, decided before Ray is asked, so that a refusal can say why.

A stage is a tensor-parallel group and never leaves its node. A plan's wish is kept while the node is there. Stages
without one go to a node each where there are enough nodes, and else fill nodes one after the other, so that
neighbouring stages are neighbours.
"""

from collections.abc import Mapping, Sequence

import msgspec

from argosy.cluster.protocol.errors import PlacementImpossible

_SLACK = 1e-6  # Ray counts in ten-thousandths


class StageRoom(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage asks for: resources by Ray's names, on the node of that id (empty: anywhere)."""

    resources: dict[str, float]
    node_id: str = ""


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What one node has, by Ray's names, and how much of it nobody holds."""

    node_id: str
    address: str
    total: dict[str, float]
    free: dict[str, float]
    holders: tuple[str, ...] = ()  # names of placement groups that hold some of it

    def describe(self, names: Sequence[str]) -> str:
        """ "10.0.0.5 has 1 of 8 GPU free (argosy-1f2e-ranks holds some)"."""
        parts = [f"{self.free.get(name, 0.0):g} of {self.total.get(name, 0.0):g} {name}" for name in names]
        held = f" ({', '.join(self.holders)} hold{'s' if len(self.holders) == 1 else ''} some)" if self.holders else ""
        return f"{self.address} has {' and '.join(parts)} free{held}"


def seat_stages(stages: Sequence[StageRoom], offers: Sequence[Offer], *, by_total: bool = False) -> list[str]:
    """The node id of each stage, in order. `by_total` asks what an idle cluster would hold.

    Raises `PlacementImpossible` saying what was asked and what each node has.
    """
    ordered = sorted(offers, key=lambda offer: (offer.address, offer.node_id))
    left = {offer.node_id: dict(offer.total if by_total else offer.free) for offer in ordered}
    seats: dict[int, str] = {}
    for place, stage in enumerate(stages):
        if stage.node_id in left:
            if not _take(left[stage.node_id], stage.resources):
                raise _impossible(stages, ordered)
            seats[place] = stage.node_id
    unseated = [place for place in range(len(stages)) if place not in seats]
    used = set(seats.values())
    most = {
        name: max(stage.resources.get(name, 0.0) for stage in stages) for stage in stages for name in stage.resources
    }
    apart = [node_id for node_id in left if node_id not in used and _holds(left[node_id], most)]
    for number, place in enumerate(unseated):
        candidates = apart[number : number + 1] if len(apart) >= len(unseated) else list(left)
        node_id = next((node for node in candidates if _take(left[node], stages[place].resources)), None)
        if node_id is None:
            raise _impossible(stages, ordered)
        seats[place] = node_id
    return [seats[place] for place in range(len(stages))]


def _impossible(stages: Sequence[StageRoom], offers: Sequence[Offer]) -> PlacementImpossible:
    """Needed against offered, node by node."""
    names = sorted({name for stage in stages for name in stage.resources})
    offered = "; ".join(offer.describe(names) for offer in offers) or "the cluster has no node"
    gone = sorted({stage.node_id for stage in stages if stage.node_id} - {offer.node_id for offer in offers})
    lost = f" (planned for {len(gone)} node{'s' if len(gone) > 1 else ''} that left the cluster)" if gone else ""
    return PlacementImpossible(
        f"the plan needs {describe_stages(stages)}{lost}; {offered}. Add nodes, end what holds them, use a smaller "
        "--tensor-parallel-size or --pipeline-parallel-size, or --device cpu"
    )


def describe_stages(stages: Sequence[StageRoom]) -> str:
    """ "2 stages of 4 GPU, each within one node"."""
    kinds: dict[str, int] = {}
    for stage in stages:
        text = " + ".join(f"{amount:g} {name}" for name, amount in sorted(stage.resources.items())) or "nothing"
        kinds[text] = kinds.get(text, 0) + 1
    parts = [f"{count} stage{'s' if count > 1 else ''} of {text}" for text, count in kinds.items()]
    return " and ".join(parts) + ", each within one node"


def _holds(left: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(left.get(name, 0.0) + _SLACK >= amount for name, amount in wanted.items())


def _take(left: dict[str, float], wanted: Mapping[str, float]) -> bool:
    if not _holds(left, wanted):
        return False
    for name, amount in wanted.items():
        left[name] = left.get(name, 0.0) - amount
    return True
