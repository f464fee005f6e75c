"""Replicas x tensor-parallel ranks x pipeline stages for this model on this cluster, and why not the others.

`plan_cluster` judges every layout that divides the model, on all devices and on those of each kind alone, and keeps for
each what it lacks or by how much it is worse. Nothing here needs a GPU, Ray or torch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError, PlacementImpossible
from argosy.placement.device_groups import DeviceGroup, deal_groups, find_groups, hop_links
from argosy.placement.layout import Layout, LayoutJudge
from argosy.placement.model_shape import ModelShape
from argosy.placement.plan import ClusterPlan, PlacementPlan, make_plan
from argosy.placement.plan_reasons import CLOSE, explain_refusal, name_losers, name_oddities, score_of, why_too_slow
from argosy.placement.plan_report import Candidate, PlanOptions, PlanReport
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.topology import ClusterTopology
from argosy.placement.weight_format import format_by_name

PP_SIZES: Final = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
PATIENCE: Final = 4  # longer pipelines are no longer tried after so many that fit and were each slower


def make_serving(shape: ModelShape, *, quantization: str | None = None, **settings: Any) -> Serving:
    """The settings that decide bytes, from few words; `quantization` None is the checkpoint's own."""
    config = ServingConfig.from_mapping({"model": shape.name or "model", **settings})
    return Serving.from_config(config, shape, None if quantization is None else format_by_name(quantization))


def plan_cluster(
    shape: ModelShape, topology: ClusterTopology, options: PlanOptions | None = None, serving: Serving | None = None
) -> PlanReport:
    """The best layout of the model on the cluster.

    Raises `PlacementImpossible` with what each layout lacks when none fits, and `ConfigError` for wishes that nothing
    could fulfil.
    """
    options, serving = options or PlanOptions(), serving or make_serving(shape)
    if not any(node.gpus for node in topology.nodes):
        raise PlacementImpossible("the cluster has no GPU (and no 'CPU' device) that a rank could have")
    _check_wishes(shape, topology, options)
    judge = LayoutJudge(
        StageBytes(shape, serving),
        options.traffic,
        calibration=options.calibration,
    )
    candidates = list(_candidates(judge, topology, options))
    fitting = [candidate for candidate in candidates if candidate.replicas]
    within = [candidate for candidate in fitting if why_too_slow(candidate, options) is None]
    if not within:
        raise PlacementImpossible(explain_refusal(shape, serving, topology, candidates, options))
    ranked = sorted(within, key=lambda candidate: _order(candidate, options))
    chosen = _best_of_close(ranked, options)
    return PlanReport(
        model=shape,
        topology=topology,
        serving=serving,
        options=options,
        chosen=chosen,
        losers=tuple(name_losers(chosen, ranked, candidates, options)),
        plan=_cluster_plan(shape, chosen),
        notes=tuple(name_oddities(chosen, serving, shape, topology, options.calibration)),
    )


def fits(shape: ModelShape, topology: ClusterTopology, options: PlanOptions, serving: Serving) -> bool:
    """Whether any layout of the model fits the cluster; sooner told than which is the best."""
    sizes = StageBytes(shape, serving)
    usable = sum(gpu.usable_bytes for node in topology.nodes for gpu in node.gpus)
    if serving.offload_bytes == 0 and sizes.stage_bytes(1, 0, shape.num_layers) > usable:
        return False
    judge = LayoutJudge(sizes, options.traffic, calibration=options.calibration)
    return any(candidate.replicas for candidate in _candidates(judge, topology, options))


# -------------------------------------------------------------------------------------------------------- candidates


def _candidates(judge: LayoutJudge, topology: ClusterTopology, options: PlanOptions) -> Iterator[Candidate]:
    models = sorted({gpu.model for node in topology.nodes for gpu in node.gpus})
    choices = [("all", topology)]
    if len(models) > 1:
        choices += [(model, topology.only(model)) for model in models]
    for devices, part in choices:
        for tp_size in _tp_sizes(judge.sizes.shape, part, options):
            yield from _pipelines(judge, part, devices, tp_size, options)


def _pipelines(
    judge: LayoutJudge, topology: ClusterTopology, devices: str, tp_size: int, options: PlanOptions
) -> Iterator[Candidate]:
    groups = find_groups(topology, tp_size)
    most = min(len(groups), judge.sizes.shape.num_layers)
    sizes = PP_SIZES if options.pp_size is None else (options.pp_size,)
    best, worse = 0.0, 0
    judged: dict[object, Layout] = {}
    for pp_size in (size for size in sizes if size <= most):
        candidate = _judge_all(judge, topology, devices, groups, tp_size, pp_size, options.num_replicas, judged)
        if candidate is None:
            continue
        yield candidate
        if candidate.replicas:
            worse = worse + 1 if candidate.tokens_per_second <= best else 0
            best = max(best, candidate.tokens_per_second)
            if worse >= PATIENCE:
                return


def _judge_all(
    judge: LayoutJudge,
    topology: ClusterTopology,
    devices: str,
    groups: Sequence[DeviceGroup],
    tp_size: int,
    pp_size: int,
    num_replicas: int | None,
    judged: dict[object, Layout],
) -> Candidate | None:
    dealt = deal_groups(groups, pp_size, num_replicas)
    if not dealt:
        return None
    layouts = []
    for replica in dealt:
        hops = hop_links(topology, replica)
        key = (tuple(group.kind for group in replica), tuple(hops))
        if key not in judged:
            judged[key] = judge.judge(replica, tp_size, hops)
        layouts.append(_on_devices(judged[key], replica))
    fitting = [layout for layout in layouts if layout.fits]
    if num_replicas is not None and len(fitting) < num_replicas:
        fitting = []
    worst = next((layout for layout in layouts if not layout.fits), None)
    return Candidate(
        tp_size=tp_size,
        pp_size=pp_size,
        devices=devices,
        replicas=tuple(fitting),
        problem=worst.problem if worst is not None and not fitting else "",
        missing_bytes=worst.missing_bytes if worst is not None and not fitting else 0,
    )


def _on_devices(layout: Layout, replica: Sequence[DeviceGroup]) -> Layout:
    """A layout that was judged on devices of the same kinds."""
    if not layout.stages:
        return layout
    stages = tuple(
        msgspec.structs.replace(stage, group=group) for stage, group in zip(layout.stages, replica, strict=True)
    )
    return msgspec.structs.replace(layout, stages=stages)


def _tp_sizes(shape: ModelShape, topology: ClusterTopology, options: PlanOptions) -> list[int]:
    if options.tp_size is not None:
        return [options.tp_size]
    largest = max((len(node.gpus) for node in topology.nodes), default=0)
    sizes = set(range(1, largest + 1))
    sizes |= {2 * largest, 4 * largest, 8 * largest}  # over a fast network
    return [size for size in sorted(sizes) if shape.why_not_tp(size) is None]


# ------------------------------------------------------------------------------------------------------ choice, words


def _order(candidate: Candidate, options: PlanOptions) -> tuple[float, int, int]:
    if options.objective == "latency":
        return candidate.lone_seconds(options.traffic), candidate.pp_size, candidate.tp_size
    return -candidate.tokens_per_second, candidate.pp_size, candidate.tp_size


def _best_of_close(ranked: Sequence[Candidate], options: PlanOptions) -> Candidate:
    """Of those that can't be told apart: the shortest lone request, or the most tokens where that was the objective."""
    best = score_of(ranked[0], options)
    close = [candidate for candidate in ranked if score_of(candidate, options) >= best * (1 - CLOSE)]
    if options.objective == "latency":
        return max(close, key=lambda candidate: (candidate.tokens_per_second, -candidate.pp_size))
    return min(close, key=lambda candidate: (candidate.lone_seconds(options.traffic), candidate.pp_size))


def _check_wishes(shape: ModelShape, topology: ClusterTopology, options: PlanOptions) -> None:
    for name, value in (("tp", options.tp_size), ("pp", options.pp_size), ("replicas", options.num_replicas)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    if options.tp_size is not None and (problem := shape.why_not_tp(options.tp_size)):
        raise ConfigError(problem)
    asked = (options.tp_size or 1) * (options.pp_size or 1) * (options.num_replicas or 1)
    there = sum(len(node.gpus) for node in topology.nodes)
    if asked > there:
        raise PlacementImpossible(f"the plan asks for {asked} devices; the cluster has {there}")
    if options.tp_size is not None and not find_groups(topology, options.tp_size):
        sizes = ", ".join(f"{node.node_id}: {len(node.gpus)}" for node in topology.nodes[:8])
        raise PlacementImpossible(
            f"tensor_parallel_size={options.tp_size} needs so many devices in one node; there are {sizes}"
        )


def _cluster_plan(shape: ModelShape, chosen: Candidate) -> ClusterPlan:
    return ClusterPlan(replicas=tuple(_replica_plan(shape, layout) for layout in chosen.replicas))


def _replica_plan(shape: ModelShape, layout: Layout) -> PlacementPlan:
    plan = make_plan(shape.num_layers, layout.tp_size, layout.pp_size, layout.layer_counts)
    cpu = layout.stages[0].group.sheet.name == "CPU"
    return plan.placed([(node, None if cpu else gpu) for stage in layout.stages for node, gpu in stage.group.devices])
