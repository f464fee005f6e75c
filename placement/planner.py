"""Replicas x tensor-parallel ranks x pipeline stages for this model on this cluster, and why not the others.

`plan_cluster` judges every layout that divides the model, on all devices and on those of each kind alone, and keeps for
each what it lacks or by how much it is worse. Nothing here needs a GPU, Ray or torch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

import msgspec

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError, PlacementImpossible
from argosy.placement.calibration import Calibration
from argosy.placement.device_groups import DeviceGroup, deal_groups, find_groups, hop_links
from argosy.placement.layout import Layout, LayoutJudge, Traffic
from argosy.placement.model_shape import ModelShape
from argosy.placement.plan import ClusterPlan, PlacementPlan, make_plan
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.topology import ClusterTopology
from argosy.placement.weight_format import format_by_name

PP_SIZES: Final = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
CLOSE: Final = (
    0.05  # what the cost model can't tell apart: of such layouts the better one by the other objective is taken
)
PATIENCE: Final = 4  # longer pipelines are no longer tried after so many that fit and were each slower

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
    within = [candidate for candidate in fitting if _why_too_slow(candidate, options) is None]
    if not within:
        raise PlacementImpossible(_explain_refusal(shape, serving, topology, candidates, options))
    ranked = sorted(within, key=lambda candidate: _order(candidate, options))
    chosen = _best_of_close(ranked, options)
    return PlanReport(
        model=shape,
        topology=topology,
        serving=serving,
        options=options,
        chosen=chosen,
        losers=tuple(_losers(chosen, ranked, candidates, options)),
        plan=_cluster_plan(shape, chosen),
        notes=tuple(_notes(chosen, serving, shape)),
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
    best = _score(ranked[0], options)
    close = [candidate for candidate in ranked if _score(candidate, options) >= best * (1 - CLOSE)]
    if options.objective == "latency":
        return max(close, key=lambda candidate: (candidate.tokens_per_second, -candidate.pp_size))
    return min(close, key=lambda candidate: (candidate.lone_seconds(options.traffic), candidate.pp_size))


def _score(candidate: Candidate, options: PlanOptions) -> float:
    if options.objective == "latency":
        return 1.0 / candidate.lone_seconds(options.traffic)
    return candidate.tokens_per_second


def _why_too_slow(candidate: Candidate, options: PlanOptions) -> str | None:
    slowest = max(candidate.replicas, key=lambda replica: replica.ttft_seconds)
    if options.max_ttft_seconds is not None and slowest.ttft_seconds > options.max_ttft_seconds:
        return (f"first token after {1e3 * slowest.ttft_seconds:.0f} ms, "
                f"{1e3 * (slowest.ttft_seconds - options.max_ttft_seconds):.0f} ms more than asked for")  # fmt: skip
    tpot = max(replica.tpot_seconds for replica in candidate.replicas)
    if options.max_tpot_seconds is not None and tpot > options.max_tpot_seconds:
        return (f"a token every {1e3 * tpot:.1f} ms under load, "
                f"{1e3 * (tpot - options.max_tpot_seconds):.1f} ms more than asked for")  # fmt: skip
    return None


def _losers(
    chosen: Candidate, ranked: Sequence[Candidate], candidates: Sequence[Candidate], options: PlanOptions
) -> Iterator[Loser]:
    best = _score(chosen, options)
    for candidate in ranked:
        if candidate is chosen:
            continue
        share = _score(candidate, options) / best
        other = "fewer tokens/s" if options.objective == "latency" else "slower answers"
        if share > 1.0:
            why = f"{100 * (share - 1):.1f} % better, which is within what the model can tell, with {other}"
        elif share > 1 - CLOSE:
            why = f"as good within {100 * CLOSE:.0f} %, with {other}"
        else:
            why = f"{100 * (1 - share):.0f} % slower"
        if options.objective == "latency":
            why += f": {1e3 * candidate.lone_seconds(options.traffic):.0f} ms a lone request"
        else:
            why += f": {candidate.tokens_per_second:,.0f} tokens/s"
        yield Loser(candidate=candidate, why=why)
    for candidate in candidates:
        if candidate.replicas and candidate not in ranked and (why_slow := _why_too_slow(candidate, options)):
            yield Loser(candidate=candidate, why=why_slow)
    misfits = [candidate for candidate in candidates if not candidate.replicas]
    for candidate in sorted(misfits, key=lambda one: (one.missing_bytes, one.pp_size)):
        yield Loser(candidate=candidate, why=candidate.problem)


def _explain_refusal(
    shape: ModelShape,
    serving: Serving,
    topology: ClusterTopology,
    candidates: Sequence[Candidate],
    options: PlanOptions,
) -> str:
    sizes = StageBytes(shape, serving)
    weights = sizes.stage_bytes(1, 0, shape.num_layers) / 1e9
    there = ", ".join(f"{node.node_id}: {node.describe_gpus()}" for node in topology.nodes[:8])
    there += f" and {len(topology.nodes) - 8} more nodes" if len(topology.nodes) > 8 else ""
    too_slow = [(one, why) for one in candidates if one.replicas and (why := _why_too_slow(one, options))]
    if too_slow:
        lines = [f"  {one.describe()}: {why}" for one, why in too_slow[:5]]
        return f"no layout of {shape.name} is fast enough on {there}:\n" + "\n".join(lines)
    misfits = sorted((one for one in candidates if one.missing_bytes), key=lambda one: one.missing_bytes)
    others = [one for one in candidates if not one.missing_bytes and not one.replicas]
    lines = [f"  {one.describe()}: {one.problem}" for one in (*misfits[:4], *others[:2])]
    hints = "Add GPUs or nodes, store the weights smaller (--quantization fp8 or awq)"
    hints += ", or let some live in the host's memory (--cpu-offload-gb auto)" if serving.offload_bytes == 0 else ""
    stored = shape.spec.dtype if serving.weight_format.bits == 16 else serving.weight_format.name
    what = f"{shape.name} ({weights:.1f} GB of weights, {stored}) does not fit {there}"
    return "\n".join([what + ":", *(lines or ["  no layout divides the model over these devices"]), hints])


def _check_wishes(shape: ModelShape, topology: ClusterTopology, options: PlanOptions) -> None:
    for name, value in (("tp", options.tp_size), ("pp", options.pp_size), ("replicas", options.num_replicas)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    if options.tp_size is not None and (problem := shape.why_not_tp(options.tp_size)):
        raise ConfigError(f"tensor_parallel_size={options.tp_size}: {problem}")
    asked = (options.tp_size or 1) * (options.pp_size or 1) * (options.num_replicas or 1)
    there = sum(len(node.gpus) for node in topology.nodes)
    if asked > there:
        raise PlacementImpossible(f"the plan asks for {asked} devices; the cluster has {there}")
    if options.tp_size is not None and not find_groups(topology, options.tp_size):
        sizes = ", ".join(f"{node.node_id}: {len(node.gpus)}" for node in topology.nodes[:8])
        raise PlacementImpossible(
            f"tensor_parallel_size={options.tp_size} needs so many devices in one node; there are {sizes}"
        )


def _notes(chosen: Candidate, serving: Serving, shape: ModelShape) -> Iterator[str]:
    least = min(replica.capacity_tokens for replica in chosen.replicas)
    if least < serving.max_model_len:
        yield (f"a replica's cache holds {least:,} tokens, fewer than the {serving.max_model_len:,} that "
               "max_model_len allows one request")  # fmt: skip
    groups = [stage.group for replica in chosen.replicas for stage in replica.stages]
    spanning = any(len(group.node_ids) > 1 for group in groups)
    if spanning:
        yield "tensor-parallel groups span nodes: only for a network as fast as the file says"
    most = max(
        (stage for replica in chosen.replicas for stage in replica.stages),
        key=lambda stage: stage.memory.offloaded_bytes,
    )
    if offloaded := most.memory.offloaded_bytes:
        rate = most.group.sheet.pcie_gbytes_per_second
        yield (
            f"{offloaded / 1e9:.1f} GB of each device's weights live in the host's memory and are copied in every "
            f"step: {offloaded / rate / 1e6:.0f} ms at {rate:g} GB/s, whatever the batch"
        )
    if chosen.tp_size > 1:
        slow = min(group.link.gbytes_per_second for group in groups)
        if slow < 60:
            yield f"tensor parallelism over {slow:g} GB/s: prompts will wait for the links"
    unequal = {replica.layer_counts for replica in chosen.replicas}
    if len(unequal) > 1:
        yield "replicas differ: each is split to suit its own devices"


def _cluster_plan(shape: ModelShape, chosen: Candidate) -> ClusterPlan:
    return ClusterPlan(replicas=tuple(_replica_plan(shape, layout) for layout in chosen.replicas))


def _replica_plan(shape: ModelShape, layout: Layout) -> PlacementPlan:
    plan = make_plan(shape.num_layers, layout.tp_size, layout.pp_size, layout.layer_counts)
    cpu = layout.stages[0].group.sheet.name == "CPU"
    return plan.placed([(node, None if cpu else gpu) for stage in layout.stages for node, gpu in stage.group.devices])
