"""A plan for people (a drawing of nodes, stages and ranks, predictions, and why the others lost) and for programs."""

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.ledger import gb
from argosy.placement.calibration import Calibration, default_calibration
from argosy.placement.layout import Layout, Stage
from argosy.placement.model_shape import ModelShape
from argosy.placement.model_sources import servable_name
from argosy.placement.plan_reasons import length_that_fits
from argosy.placement.plan_report import Candidate, PlanReport
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.start_seconds import start_of
from argosy.placement.topology import ClusterTopology

BAR: Final = 32  # characters of a memory bar
SHOWN_REPLICAS: Final = 4
SHOWN_LOSERS: Final = 8


def describe_model(shape: ModelShape, serving: Serving) -> str:
    """One line: parameters, weights, KV of a token."""
    weights = StageBytes(shape, serving).stage_bytes(1, 0, shape.num_layers)
    kv = StageBytes(shape, serving).kv_bytes_per_token(1, shape.num_layers)
    stored = (
        shape.spec.dtype
        if serving.weight_format.bits == 16
        else f"{serving.weight_format.name}, rest {shape.spec.dtype}"
    )
    files = f"; its files hold {gb(shape.checkpoint_bytes, 2)}" if shape.checkpoint_bytes else ""
    windows = ""
    if serving.groups.has_windows:
        long = kv_bytes_a_token(shape, serving, serving.max_model_len)
        windows = f" ({long / 1e3:,.1f} kB at {serving.max_model_len:,} tokens: layers have windows)"
    return (
        f"{shape.name}: {_count(shape.num_parameters)} parameters, {gb(weights, 2)} of weights ({stored}), "
        f"{kv / 1e3:,.1f} kB of KV a token{windows}{files}"
    )


def _count(number: int) -> str:
    """Parameters: 8.03 B, or 0.13 M."""
    return f"{number / 1e9:,.2f} B" if number >= 1e8 else f"{number / 1e6:,.2f} M"


def kv_bytes_a_token(shape: ModelShape, serving: Serving, num_tokens: int) -> float:
    """What each token of a sequence of so many takes of the blocks of all layers."""
    block_bytes = StageBytes(shape, serving).block_bytes(1, 0, shape.num_layers)
    return serving.blocks_of(num_tokens) * block_bytes / num_tokens


def describe_topology(topology: ClusterTopology) -> str:
    """One line: alike nodes counted together."""
    kinds: dict[str, list[str]] = {}
    for node in topology.nodes:
        link = f", {node.gpu_link.describe()}" if node.gpu_link else ""
        free = {round(gpu.usable_bytes / 2**30, 1) for gpu in node.gpus}
        size = f" ({' or '.join(f'{value:g}' for value in sorted(free))} GiB each)" if free else ""
        kinds.setdefault(f"{node.describe_gpus()}{size}{link}", []).append(node.node_id)
    parts = [f"{len(names)} x [{kind}]" if len(names) > 1 else f"{names[0]} [{kind}]" for kind, names in kinds.items()]
    network = f"; between nodes {_network(topology)}" if len(topology.nodes) > 1 else ""
    return "cluster: " + ", ".join(parts) + network


def _network(topology: ClusterTopology) -> str:
    """The default where some pair has it, and the range of the links that are known."""
    num_pairs = len(topology.nodes) * (len(topology.nodes) - 1) // 2
    words = [topology.network.describe()] if len(topology.links) < num_pairs else []
    if topology.links:
        slow, fast = (pick(entry.link.gbytes_per_second for entry in topology.links) for pick in (min, max))
        rate = f"{slow:.3g}" if f"{slow:.3g}" == f"{fast:.3g}" else f"{slow:.3g} to {fast:.3g}"
        measured = " (measured)" if all(entry.link.measured for entry in topology.links) else ""
        words.append(f"{len(topology.links)} link{'s' * (len(topology.links) > 1)} of {rate} GB/s{measured}")
    return ", ".join(words)


def plan_lines(report: PlanReport, *, all_losers: bool = False, given: str = "") -> Iterator[str]:
    """The whole answer of `argosy plan`. `given`: flags of `argosy serve` that it was planned with."""
    chosen, options = report.chosen, report.options
    yield describe_model(report.model, report.serving)
    yield describe_topology(report.topology)
    yield ""
    yield f"plan: {chosen.describe()}, {chosen.num_gpus} of {_count_devices(report.topology)} devices"
    yield ""
    for place, replica in enumerate(chosen.replicas[:SHOWN_REPLICAS]):
        yield from _draw_replica(place, replica, report.serving)
    if len(chosen.replicas) > SHOWN_REPLICAS:
        yield f"  ... and {len(chosen.replicas) - SHOWN_REPLICAS} replicas more"
    yield "  █ weights   ▒ KV blocks   ░ activations and workspace   · not used"
    yield ""
    first = chosen.replicas[0]
    traffic = options.traffic
    yield f"predicted for {traffic.input_len} tokens in, {traffic.output_len} out:"
    yield f"  KV cache            {first.num_blocks:,} blocks = {first.capacity_tokens:,} tokens a replica"
    yield f"  requests at once    {first.concurrency:,} a replica, {chosen.concurrency:,} in all"
    yield f"  first token         {1e3 * first.ttft_seconds:,.1f} ms for a lone request"
    lone, load = 1e3 * first.lone_tpot_seconds, 1e3 * first.tpot_seconds
    yield f"  every further token {lone:,.1f} ms alone, {load:,.1f} ms under full load"
    yield f"  throughput          {chosen.tokens_per_second:,.0f} output tokens/s"
    if (price := report.price_per_million_tokens) is not None:
        yield f"  cost                {price:,.3f} a million output tokens at {report.price_per_hour:,.2f} an hour"
    if ready := start_of(report):
        yield f"  start               {ready:,.0f} s with kernels compiled before, and what reading the weights takes"
    for note in report.notes:
        yield f"  note: {note}"
    yield from how_sure(report)
    yield ""
    shown = report.losers if all_losers else report.losers[:SHOWN_LOSERS]
    yield "why not another:" if shown else "there was no other layout to choose from"
    for loser in shown:
        yield f"  {loser.candidate.describe():28} {loser.why}"
    if len(report.losers) > len(shown):
        yield f"  ... {len(report.losers) - len(shown)} more (--all shows them)"
    start = report.plan.settings()
    flags = f"-tp {start['tensor_parallel_size']} -pp {start['pipeline_parallel_size']}"
    if len(chosen.replicas) > 1:
        flags += f" -dp {len(chosen.replicas)}"
    if start["pipeline_layers"]:
        flags += f" --pipeline-layers [{','.join(map(str, start['pipeline_layers']))}]"
    if report.model.deals_experts(start["tensor_parallel_size"]):
        flags += " --enable-expert-parallel"
        moe = report.model.spec.moe
        if moe is not None and moe.all2all != "auto":
            flags += f" --all2all-backend {moe.all2all}"
    if (fitting := length_that_fits(chosen, report.serving)) is not None and "--max-model-len" not in given:
        flags += f" --max-model-len {fitting}"  # without it the start would be refused
    yield ""
    yield f"the same by hand: argosy serve {servable_name(report.model.name)} {flags} {given}".rstrip()


def how_sure(report: PlanReport) -> Iterator[str]:
    """For each kind of device in use: how far off forecasts were of what was measured on it."""
    for name, calibration in _calibrations(report):
        if calibration.device != name and report.options.calibration is not None:
            continue  # a note says so
        if calibration.device != name:
            yield f"  how sure            nobody measured on {name}: {calibration.device}'s ratios, its own data sheet"
            continue
        if not calibration.judged:
            yield f"  how sure            {name}: {calibration.source}"
            continue
        yield f"  how sure            of rows measured on {name}, half were foretold within; the worst:"
        for one in calibration.judged:
            rows = f"{one.rows} {one.kind}{'' if one.rows == 1 or one.kind.endswith('s') else 's'}"
            yield f"                      {rows:17} {one.middle:6.1%}; {one.most:+6.1%} ({one.row})"


def _draw_replica(place: int, replica: Layout, serving: Serving) -> Iterator[str]:
    yield f"  replica {place}: {replica.num_blocks:,} KV blocks of {serving.block_size} tokens"
    for number, stage in enumerate(replica.stages):
        seats = " + ".join(f"{node} {stage.group.sheet.name} {_ranges(stage, node)}" for node in stage.group.node_ids)
        layers = f"layers {stage.first_layer}-{stage.last_layer - 1}"
        memory = stage.memory
        rest = memory.other_bytes
        figures = " + ".join(gb(size).removesuffix(" GB") for size in (memory.weight_bytes, memory.kv_bytes, rest))
        figures += f" of {memory.limit_bytes / 1e9:.1f} GB"
        yield f"    stage {number}  {layers:15} {seats:22} {_bar(stage)} {figures} each"


def _ranges(stage: Stage, node_id: str) -> str:
    indexes = [index for node, index in stage.group.devices if node == node_id]
    is_run = len(indexes) > 2 and indexes == list(range(indexes[0], indexes[0] + len(indexes)))
    return f"{indexes[0]}-{indexes[-1]}" if is_run else ",".join(map(str, indexes))


def _bar(stage: Stage) -> str:
    memory = stage.memory
    parts = (
        ("█", memory.weight_bytes),
        ("▒", memory.kv_bytes),
        ("░", memory.other_bytes),
    )
    drawn, before, edge = "", 0, 0
    for sign, size in parts:
        before += size
        until = max(edge, min(BAR, round(BAR * before / max(memory.limit_bytes, 1))))
        drawn += sign * (until - edge)
        edge = until
    return "[" + drawn + "·" * (BAR - edge) + "]"


def _count_devices(topology: ClusterTopology) -> int:
    return sum(len(node.gpus) for node in topology.nodes)


def plan_json(report: PlanReport) -> dict[str, Any]:
    """The same for programs; sizes in bytes, times in seconds."""
    shape, serving = report.model, report.serving
    return {
        "model": {
            "name": shape.name,
            "architecture": shape.spec.architecture,
            "parameters": shape.num_parameters,
            "active_parameters": shape.num_active_parameters,
            "weight_bytes": StageBytes(shape, serving).stage_bytes(1, 0, shape.num_layers),
            "kv_bytes_per_token": StageBytes(shape, serving).kv_bytes_per_token(1, shape.num_layers),
            "kv_bytes_per_token_at_max_model_len": kv_bytes_a_token(shape, serving, serving.max_model_len),
            "kv_windows": serving.groups.windows,
            "weight_format": serving.weight_format.name,
            "checkpoint_bytes": shape.checkpoint_bytes,
        },
        "chosen": _candidate_json(report.chosen),
        "settings": report.plan.settings(),
        "replicas": [_replica_json(replica) for replica in report.chosen.replicas],
        "ranks": [
            {"replica": number, "global_rank": rank.global_rank, "tp_rank": rank.tp_rank, "pp_rank": rank.pp_rank,
             "node": rank.node, "gpu": rank.gpu, "first_layer": rank.first_layer, "last_layer": rank.last_layer}
            for number, replica in enumerate(report.plan.replicas)
            for rank in replica.ranks
        ],
        "price_per_hour": report.price_per_hour,
        "price_per_million_tokens": report.price_per_million_tokens,
        "start_seconds": start_of(report) or None,
        "forecasts_judged": _judged_json(report),
        "notes": list(report.notes),
        "losers": [{**_candidate_json(loser.candidate), "why": loser.why} for loser in report.losers],
    }  # fmt: skip


def _judged_json(report: PlanReport) -> dict[str, Any]:
    """By device in use: of each kind of forecast how far off it was of measured rows; None: nobody measured there."""
    return {
        name: [msgspec.structs.asdict(one) for one in calibration.judged] if calibration.device == name else None
        for name, calibration in _calibrations(report)
    }


def _calibrations(report: PlanReport) -> Iterator[tuple[str, Calibration]]:
    """Each kind of device in use, by name, with what its forecasts were calibrated by."""
    names = {stage.group.sheet.name for replica in report.chosen.replicas for stage in replica.stages}
    for name in sorted(names):
        yield name, report.options.calibration or default_calibration(name)


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "layout": candidate.describe(),
        "tp_size": candidate.tp_size,
        "pp_size": candidate.pp_size,
        "replicas": len(candidate.replicas),
        "devices": candidate.devices,
        "num_gpus": candidate.num_gpus,
        "fits": bool(candidate.replicas),
        "missing_bytes": candidate.missing_bytes,
        "tokens_per_second": candidate.tokens_per_second,
        "num_blocks": candidate.num_blocks,
        "concurrency": candidate.concurrency,
    }


def _replica_json(replica: Layout) -> dict[str, Any]:
    return {
        "num_blocks": replica.num_blocks,
        "capacity_tokens": replica.capacity_tokens,
        "concurrency": replica.concurrency,
        "tokens_per_second": replica.tokens_per_second,
        "ttft_seconds": replica.ttft_seconds,
        "tpot_seconds": replica.tpot_seconds,
        "lone_tpot_seconds": replica.lone_tpot_seconds,
        "layer_counts": replica.layer_counts,
        "stages": [
            {"devices": [list(device) for device in stage.group.devices], "gpu": stage.group.sheet.name,
             "first_layer": stage.first_layer, "last_layer": stage.last_layer, "step_seconds": stage.step_seconds,
             "weight_bytes": stage.memory.weight_bytes, "offloaded_bytes": stage.memory.offloaded_bytes,
             "buffer_bytes": stage.memory.buffer_bytes,
             "activation_bytes": stage.memory.activation_bytes, "workspace_bytes": stage.memory.workspace_bytes,
             "kv_budget_bytes": stage.memory.kv_budget_bytes, "block_bytes": stage.memory.block_bytes,
             "num_blocks": stage.memory.num_blocks, "limit_bytes": stage.memory.limit_bytes}
            for stage in replica.stages
        ],
    }  # fmt: skip
