"""From a config and the cluster that is there to the plan of each replica: given sizes as they are, else planned.

Nodes that the preflight found unfit are left out where the rest is enough; else the start ends here, with every fault.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import PlacementImpossible, PreflightFailed
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.layout import Traffic
from argosy.placement.model_families import shape_from_spec
from argosy.placement.model_shape import ModelShape
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan import PlacementPlan, make_plan
from argosy.placement.plan_report import PlanOptions, PlanReport
from argosy.placement.planner import plan_cluster
from argosy.placement.preflight_rules import Fault, usable_nodes
from argosy.placement.rank_memory import Serving
from argosy.placement.seating import Offer, StageRoom, seat_stages
from argosy.placement.topology import ClusterTopology, Gpu
from argosy.placement.uneven import layers_for

if TYPE_CHECKING:  # the module needs Ray
    from argosy.deploy.preflight import Inspection

Note = Callable[[str], None]
_CPU: Final = "CPU"


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What to start: a plan for each replica, with the nodes in it, and the config that goes with them."""

    config: ServingConfig
    plans: tuple[PlacementPlan, ...]
    unfit: tuple[str, ...] = ()  # ids of nodes that no rank may run on


def choose_layout(
    config: ServingConfig, topology: ClusterTopology, inspection: "Inspection", offers: Sequence[Offer], note: Note
) -> Layout:
    """The layout. Raises `PreflightFailed` or `PlacementImpossible` with all reasons."""
    faults = inspection.faults
    for fault in faults:
        if fault.level == "warn":
            note(f"warning: {fault.describe()}")
    failures = tuple(fault for fault in faults if fault.level == "fail")
    usable = usable_nodes(inspection.nodes, faults)
    all_ids = [node.node_id for node in topology.nodes]
    unfit = tuple(node_id for node_id in all_ids if node_id not in usable)
    try:
        if config.parallel.layout != "given":
            layout = _planned(config, free_part(topology, [o for o in offers if o.node_id in usable]), note)
        else:
            layout = _given(config, topology, offers, usable, note)
    except PlacementImpossible as error:
        if failures:
            raise PreflightFailed((*_lines(failures), str(error))) from error
        raise
    for line in _lines(failures):
        note(f"not used: {line}")
    return msgspec.structs.replace(layout, unfit=unfit)


def _planned(config: ServingConfig, topology: ClusterTopology, note: Note) -> Layout:
    model = config.model
    asked = config.parallel
    shape = read_model_shape(
        model.model, overrides=model.hf_overrides, expert_parallel=asked.enable_expert_parallel,
        all2all=asked.all2all_backend,
    )  # fmt: skip
    serving = Serving.from_config(config, shape)
    traffic = _traffic(serving)
    # The size of a cache that was given says nothing of where the model fits: judged by what there is room for.
    free = msgspec.structs.replace(serving, num_gpu_blocks_override=None, kv_cache_memory_bytes=None)
    if config.parallel.layout == "auto":
        report = plan_cluster(shape, topology, PlanOptions(traffic=traffic), free)
    else:
        report = _plan_one(shape, topology, traffic, free)
    note(f"planned: {report.chosen.describe()}")
    for text in report.notes:
        note(text)
    replicas = report.plan.replicas
    parallel = config.parallel.replace(
        **report.plan.settings(),
        data_parallel_size=len(replicas),
        enable_expert_parallel=asked.enable_expert_parallel or shape.deals_experts(replicas[0].tp_size),
    )
    return Layout(config=config.replace(parallel=parallel), plans=tuple(replicas))


def _plan_one(shape: ModelShape, topology: ClusterTopology, traffic: Traffic, serving: Serving) -> PlanReport:
    """A single replica: one device where that holds it, so that there is room for the next; else what is best."""
    try:
        small = PlanOptions(tp_size=1, pp_size=1, num_replicas=1, traffic=traffic)
        return plan_cluster(shape, topology, small, serving)
    except PlacementImpossible:
        return plan_cluster(shape, topology, PlanOptions(num_replicas=1, traffic=traffic), serving)


def _traffic(serving: Serving) -> Traffic:
    """The planner's usual requests, shorter where this model or a cache of a given size takes no such long ones."""
    usual, longest = Traffic(), serving.max_model_len
    if serving.num_gpu_blocks_override is not None:
        longest = min(longest, serving.num_gpu_blocks_override * serving.block_size)
    half = max(1, longest // 2)
    return Traffic(input_len=min(usual.input_len, half), output_len=min(usual.output_len, half))


def _given(
    config: ServingConfig, topology: ClusterTopology, offers: Sequence[Offer], usable: Sequence[str], note: Note
) -> Layout:
    """The sizes that were given. A node each for the stages of all replicas where the cluster has so many."""
    parallel = config.parallel
    spec = read_model_spec(config.model.model, config.model.hf_overrides, config.model.quantization)
    plan = make_plan(
        spec.num_layers, parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.pipeline_layers
    )
    num_stages = plan.pp_size * parallel.data_parallel_size
    device = _device(parallel.device, offers)
    able = [offer for offer in offers if offer.total.get(device, 0.0) > 0]
    fit = [offer for offer in able if offer.node_id in usable]
    if len(fit) < min(num_stages, len(able)):
        raise PlacementImpossible(
            f"{num_stages} stages want a node each, and {len(fit)} of {len(able)} nodes are fit for one"
        )
    parts = _nodes_of_a_group(plan.tp_size, num_stages, device, fit)
    if parts > 1:
        rate = topology.network.gbytes_per_second
        measured = [link.link.gbytes_per_second for link in topology.links]
        note(f"warning: no node has {plan.tp_size} {device} for a tensor-parallel group: each spans {parts} nodes, and "
             f"every layer waits for the network ({min(measured, default=rate):.3g} GB/s)")  # fmt: skip
    rooms = [StageRoom(resources={device: plan.tp_size / parts})] * (num_stages * parts)
    try:
        seats = seat_stages(rooms, fit)
    except PlacementImpossible:  # who holds the rest may be about to go: the reservation waits for a while
        seats = seat_stages(rooms, fit or offers, by_total=True)
    plans = []
    num_seats = plan.pp_size * parts
    if layers := layers_for(config, shape_from_spec(spec), _stage_devices(topology, seats[:num_seats], plan, parts)):
        plan = make_plan(spec.num_layers, plan.tp_size, plan.pp_size, layers)
        note(f"layers split to suit: {plan.describe()}")
    for replica in range(parallel.data_parallel_size):
        mine = seats[replica * num_seats : (replica + 1) * num_seats]
        own = [mine[rank.global_rank * parts // plan.tp_size] for rank in plan.ranks]
        plans.append(plan.placed([(node_id, None) for node_id in own]))
    return Layout(config=config, plans=tuple(plans))


def _nodes_of_a_group(tp_size: int, num_stages: int, device: str, offers: Sequence[Offer]) -> int:
    """Over how many nodes each group goes: one wherever an idle cluster would hold that, else as few as can be."""
    for parts in (count for count in range(1, tp_size + 1) if tp_size % count == 0):
        rooms = [StageRoom(resources={device: tp_size / parts})] * (num_stages * parts)
        try:
            seats = seat_stages(rooms, offers, by_total=True)
        except PlacementImpossible:
            continue
        groups = [seats[at : at + parts] for at in range(0, len(seats), parts)]
        if all(len(set(group)) == parts for group in groups):
            return parts
    return 1  # it fits nowhere, which is said of the whole


def _stage_devices(topology: ClusterTopology, seats: Sequence[str], plan: PlacementPlan, parts: int) -> list[Gpu]:
    """For each stage the device of its nodes that it has to expect: the freest that are left; empty: not known."""
    nodes = {node.node_id: node for node in topology.nodes}
    taken: dict[str, int] = {}
    devices = []
    for stage in range(plan.pp_size):
        found = []
        for node_id in seats[stage * parts : (stage + 1) * parts]:
            gpus = sorted(nodes[node_id].gpus, key=lambda gpu: gpu.index) if node_id in nodes else []
            start = taken.get(node_id, 0)
            taken[node_id] = start + plan.tp_size // parts
            on_cpu = bool(gpus) and all(gpu.model == _CPU for gpu in gpus)
            found += gpus[:1] if on_cpu else gpus[start : taken[node_id]]
        if not found:
            return []
        devices.append(min(found, key=lambda gpu: gpu.usable_bytes))
    return devices


def _device(wanted: str, offers: Sequence[Offer]) -> str:
    """What Ray calls the device of a rank: GPUs wherever there are any, so that none is idle by mistake."""
    if wanted == "auto":
        return "GPU" if any(offer.total.get("GPU", 0.0) > 0 for offer in offers) else _CPU
    return "GPU" if wanted == "cuda" else _CPU


def free_part(topology: ClusterTopology, offers: Sequence[Offer]) -> ClusterTopology:
    """The nodes of these offers with as many of their devices as nobody holds, those with the most memory."""
    free = {offer.node_id: offer.free for offer in offers}
    nodes = []
    for node in topology.nodes:
        if node.node_id in free:
            name = _CPU if all(gpu.model == _CPU for gpu in node.gpus) else "GPU"
            count = int(free[node.node_id].get(name, 0.0))
            best = sorted(node.gpus, key=lambda gpu: (-gpu.usable_bytes, gpu.index))[:count]
            nodes.append(msgspec.structs.replace(node, gpus=tuple(sorted(best, key=lambda gpu: gpu.index))))
    return msgspec.structs.replace(topology, nodes=tuple(node for node in nodes if node.gpus))


def _lines(faults: Sequence[Fault]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(fault.describe() for fault in faults))
