"""The host tier of a layout that nobody has started: how many blocks, and what copies of them should take."""

from collections.abc import Sequence

from argosy.cluster.protocol.swap import NO_SWAP, SwapCosts
from argosy.placement.calibration import Calibration
from argosy.placement.cost_model import ReplicaCost, StepLoad
from argosy.placement.layout import Layout, Stage
from argosy.placement.rank_memory import Serving
from argosy.placement.swap_space import num_host_blocks
from argosy.placement.topology import Node


def plan_host_blocks(layout: Layout, serving: Serving, nodes: Sequence[Node]) -> int:
    """The least that a rank of the layout keeps in its host's memory; 0 without `swap_space`."""
    if serving.swap_bytes == 0:
        return 0
    memory = {node.node_id: node.memory_bytes // max(1, len(node.gpus)) for node in nodes}
    return min(
        num_host_blocks(serving.swap_bytes, stage.memory.block_bytes, layout.num_blocks, _share(stage, memory))
        for stage in layout.stages
    )


def plan_swap(
    layout: Layout, serving: Serving, nodes: Sequence[Node], cost: ReplicaCost, calibration: Calibration
) -> SwapCosts:
    """As ranks would measure it: the slowest link both ways, and a step full of one prompt."""
    count = plan_host_blocks(layout, serving, nodes)
    if not count:
        return NO_SWAP
    seconds = max(
        stage.memory.block_bytes / (stage.group.sheet.pcie_gbytes_per_second * 1e9 * calibration.host_link_efficiency)
        for stage in layout.stages
    )
    tokens = min(serving.max_num_batched_tokens, serving.max_model_len)
    load = StepLoad(prefill_tokens=tokens, prefill_pairs=tokens * (tokens + 1) // 2, num_sampled=1)
    return SwapCosts(
        num_host_blocks=count,
        block_bytes=sum(stage.memory.block_bytes for stage in layout.stages) * layout.tp_size,
        out_seconds=seconds,
        in_seconds=seconds,
        token_seconds=max(cost.stage_seconds(load)) / tokens,
    )


def host_bytes_by_node(layout: Layout, num_blocks: int) -> dict[str, int]:
    """What the blocks take of each node's memory."""
    found: dict[str, int] = {}
    for stage in layout.stages:
        for node_id, _ in stage.group.devices:
            found[node_id] = found.get(node_id, 0) + num_blocks * stage.memory.block_bytes
    return found


def _share(stage: Stage, memory: dict[str, int]) -> int:
    return min((memory.get(node_id, 0) for node_id in stage.group.node_ids), default=0)
