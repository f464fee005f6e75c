"""What whole experts on each rank of a group cost on the wire, and from how many tokens an exchange beats sums.

Two ways lead from tokens to the experts of other ranks and back. With sums, every rank has every token, leaves out the
experts of others, and the group sums what was made: 2 (W - 1) / W numbers sent for each of the T x D. With the
exchange, a rank has 1/W of the tokens and sends each to those ranks that hold its experts (`workers/layers/
expert_exchange.py`). No torch here: the planner asks, too.
"""

from math import comb
from typing import Final

from argosy.cluster.protocol.model_spec import MoESpec

# Ranks of the group -> tokens of a step from which the exchange was faster; None: never. On H200 of one host a layer of
# Mixtral with 8192 tokens took 7.74 ms exchanged and 6.51 with sums in one launch over 2 cards, 4.68 and 4.12 over 4;
# with 512 tokens 2.1 and 0.80, since the host waits for sizes in each layer (`benchmarks/results/experts_h200.jsonl`).
MEASURED: Final[dict[str, dict[int, int | None]]] = {"cuda": {2: None, 4: None}, "cpu": {}}


def share_elsewhere(moe: MoESpec, world: int) -> float:
    """The chance that a token has an expert on one given rank of the group, with every choice equally likely."""
    groups, chosen = moe.num_groups, moe.top_groups
    if not 1 <= chosen < groups or groups % world:
        here = moe.num_experts // world
        return 1.0 - comb(moe.num_experts - here, moe.top_k) / comb(moe.num_experts, moe.top_k)
    own, members = groups // world, moe.num_experts // groups
    missed = sum(  # `found` of this rank's groups are among the chosen ones, and none of their experts
        comb(own, found) * comb(groups - own, chosen - found) / comb(groups, chosen)
        * comb((chosen - found) * members, moe.top_k) / comb(chosen * members, moe.top_k)
        for found in range(min(own, chosen) + 1)
    )  # fmt: skip
    return 1.0 - missed


def sum_numbers(world: int) -> float:
    """Numbers that a rank sends for each number of a step's hidden state in a layer of experts, with two sums."""
    return 4 * (world - 1) / world


def exchange_numbers(moe: MoESpec, world: int) -> float:
    """The same with the exchange: gathered before attention, its sum scattered, to experts and back."""
    return (2 + 2 * share_elsewhere(moe, world)) * (world - 1) / world


def least_tokens(moe: MoESpec, world: int, device: str) -> int | None:
    """From how many tokens a step is exchanged; None: never.

    A shared expert that is cut over the group needs its tokens everywhere and a sum of its own: no exchange then.
    """
    if not moe.expert_parallel or world == 1 or moe.all2all == "sum":
        return None
    if moe.all2all == "all_to_all":
        return 1
    return None if moe.shared_size else MEASURED[device].get(world)
