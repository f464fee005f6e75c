"""What becomes of each request whose ranks were lost: recomputed with the tokens it has, or given up."""

from collections.abc import Iterable
from dataclasses import dataclass

from argosy.cluster.request import Request


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """Who is recomputed and who is lost, each in order."""

    recomputed: tuple[Request, ...]
    lost: tuple[Request, ...]


def plan_recovery(requests: Iterable[Request], max_recoveries: int) -> RecoveryPlan:
    """Sort the requests that a loss has hit (this loss already counted in `num_recoveries`).

    A request that was there at each of `max_recoveries` + 1 losses may well be their cause.
    """
    recomputed: list[Request] = []
    lost: list[Request] = []
    for request in requests:
        (lost if request.num_recoveries > max_recoveries else recomputed).append(request)
    return RecoveryPlan(tuple(recomputed), tuple(lost))
