"""Why a layout was not taken, in words: what it lacks, by how much it is slower, what is odd about the one that was."""

from collections.abc import Iterator, Sequence
from typing import Final

from argosy.cluster.protocol.ledger import gb, gib
from argosy.placement.calibration import Calibration
from argosy.placement.model_shape import ModelShape
from argosy.placement.plan_report import Candidate, Loser, PlanOptions
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.swap_plan import host_bytes_by_node, plan_host_blocks
from argosy.placement.topology import ClusterTopology

# What the cost model can't tell apart: throughputs are foretold within 7.4 %, and within 10 % for layouts that were not
# fitted. Of such layouts the better one by the other objective is taken.
CLOSE: Final = 0.08


def score_of(candidate: Candidate, options: PlanOptions) -> float:
    """More is better: output tokens a second, or what a lone request takes, inverted."""
    if options.objective == "latency":
        return 1.0 / candidate.lone_seconds(options.traffic)
    return candidate.tokens_per_second


def why_too_slow(candidate: Candidate, options: PlanOptions) -> str | None:
    """Which limit of the options it breaks and by how much; None when it keeps all."""
    slowest = max(candidate.replicas, key=lambda replica: replica.ttft_seconds)
    if options.max_ttft_seconds is not None and slowest.ttft_seconds > options.max_ttft_seconds:
        return (f"first token after {1e3 * slowest.ttft_seconds:.0f} ms, "
                f"{1e3 * (slowest.ttft_seconds - options.max_ttft_seconds):.0f} ms more than asked for")  # fmt: skip
    tpot = max(replica.tpot_seconds for replica in candidate.replicas)
    if options.max_tpot_seconds is not None and tpot > options.max_tpot_seconds:
        return (f"a token every {1e3 * tpot:.1f} ms under load, "
                f"{1e3 * (tpot - options.max_tpot_seconds):.1f} ms more than asked for")  # fmt: skip
    return None


def name_losers(
    chosen: Candidate, ranked: Sequence[Candidate], candidates: Sequence[Candidate], options: PlanOptions
) -> Iterator[Loser]:
    """All but the chosen one, the nearest first: slower ones, those beyond a limit, those that don't fit."""
    best = score_of(chosen, options)
    for candidate in ranked:
        if candidate is chosen:
            continue
        share = score_of(candidate, options) / best
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
        if candidate.replicas and candidate not in ranked and (why_slow := why_too_slow(candidate, options)):
            yield Loser(candidate=candidate, why=why_slow)
    misfits = [candidate for candidate in candidates if not candidate.replicas]
    for candidate in sorted(misfits, key=lambda one: (one.missing_bytes, one.pp_size)):
        yield Loser(candidate=candidate, why=candidate.problem)


def explain_refusal(
    shape: ModelShape,
    serving: Serving,
    topology: ClusterTopology,
    candidates: Sequence[Candidate],
    options: PlanOptions,
) -> str:
    """What each layout lacks when none can be taken, and what would help."""
    sizes = StageBytes(shape, serving)
    weights = sizes.stage_bytes(1, 0, shape.num_layers) / 1e9
    there = ", ".join(f"{node.node_id}: {node.describe_gpus()}" for node in topology.nodes[:8])
    there += f" and {len(topology.nodes) - 8} more nodes" if len(topology.nodes) > 8 else ""
    too_slow = [(one, why) for one in candidates if one.replicas and (why := why_too_slow(one, options))]
    if too_slow:
        lines = [f"  {one.describe()}: {why}" for one, why in too_slow[:5]]
        return f"no layout of {shape.name} is fast enough on {there}:\n" + "\n".join(lines)
    misfits = sorted((one for one in candidates if one.missing_bytes), key=lambda one: one.missing_bytes)
    others = [one for one in candidates if not one.missing_bytes and not one.replicas]
    lines = [f"  {one.describe()}: {one.problem}" for one in (*misfits[:4], *others[:2])]
    hints = "Add GPUs or nodes, store the weights smaller (--quantization fp8 or int4)"
    hints += ", or let some live in the host's memory (--cpu-offload-gb auto)" if serving.offload_bytes == 0 else ""
    stored = shape.spec.dtype if serving.weight_format.bits == 16 else serving.weight_format.name
    what = f"{shape.name} ({weights:.1f} GB of weights, {stored}) does not fit {there}"
    return "\n".join([what + ":", *(lines or ["  no layout divides the model over these devices"]), hints])


def length_that_fits(chosen: Candidate, serving: Serving) -> int | None:
    """The longest request that every replica's cache holds, where that is less than `max_model_len`; else None."""
    num_blocks = min(replica.num_blocks for replica in chosen.replicas)
    least = serving.groups.num_tokens(num_blocks, serving.block_size)
    return least if least is not None and least < serving.max_model_len else None


def name_oddities(
    chosen: Candidate,
    serving: Serving,
    shape: ModelShape,
    topology: ClusterTopology,
    calibration: Calibration | None = None,
) -> Iterator[str]:
    """What its user should know of the chosen layout. `calibration`: one that was asked for by name."""
    yield from _host_tier(chosen, serving, topology)
    devices = dict.fromkeys(stage.group.sheet.name for replica in chosen.replicas for stage in replica.stages)
    if calibration is not None and calibration.device not in devices:
        names = ", ".join(devices)
        yield f"the calibration was measured on {calibration.device}: its ratios may be far off for {names}"
    if (fitting := length_that_fits(chosen, serving)) is not None:
        yield (f"a replica's cache holds {fitting:,} tokens, fewer than the {serving.max_model_len:,} that "
               f"max_model_len allows one request: it starts with --max-model-len {fitting} or less")  # fmt: skip
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
            f"{gb(offloaded)} of each device's weights live in the host's memory and are copied in every "
            f"step: {offloaded / rate / 1e6:.{0 if offloaded > 1e9 else 3}f} ms at {rate:g} GB/s, whatever the batch"
        )
    parked = 0
    if serving.slice_tokens is not None:
        parked = serving.max_num_batched_tokens * shape.spec.hidden_size * serving.dtype_bytes
        yield (
            f"steps of more than {serving.slice_tokens} tokens are computed in slices of so many; hidden states of the "
            f"longest take {gb(parked, 2)} of the host's memory a rank"
        )
    yield from _hosts_too_small(chosen, parked, topology)
    if chosen.tp_size > 1:
        slow = min(group.link.gbytes_per_second for group in groups)
        if slow < 60:
            yield f"tensor parallelism over {slow:g} GB/s: prompts will wait for the links"
    unequal = {replica.layer_counts for replica in chosen.replicas}
    if len(unequal) > 1:
        yield "replicas differ: each is split to suit its own devices"


def _hosts_too_small(chosen: Candidate, parked_bytes: int, topology: ClusterTopology) -> Iterator[str]:
    """Nodes whose memory is known and has no room for weights and hidden states of their ranks."""
    taken: dict[str, int] = {}
    for replica in chosen.replicas:
        for stage in replica.stages:
            for node_id, _ in stage.group.devices:
                taken[node_id] = taken.get(node_id, 0) + stage.memory.offloaded_bytes + parked_bytes
    for node in topology.nodes:
        if node.memory_bytes and taken.get(node.node_id, 0) > node.memory_bytes:
            yield (
                f"warning: {node.node_id} has {node.memory_bytes / 1e9:.0f} GB of memory, and its ranks would keep "
                f"{taken[node.node_id] / 1e9:.0f} GB in it"
            )


def _host_tier(chosen: Candidate, serving: Serving, topology: ClusterTopology) -> Iterator[str]:
    """What `swap_space` takes of the hosts, and whether they have it."""
    taken: dict[str, int] = {}
    for replica in chosen.replicas:
        count = plan_host_blocks(replica, serving, topology.nodes)
        for node_id, num_bytes in host_bytes_by_node(replica, count).items():
            taken[node_id] = taken.get(node_id, 0) + num_bytes
    if not any(taken.values()):
        return
    count = plan_host_blocks(chosen.replicas[0], serving, topology.nodes)
    names = {node.node_id: node.address for node in topology.nodes}  # Ray's ids are for programs
    worst = max(taken, key=lambda node_id: taken[node_id])
    yield (
        f"swap_space keeps {count:,} blocks = {count * serving.block_size:,} tokens a replica in the hosts' memory, "
        f"{gib(taken[worst])} of {names[worst]}"
    )
    has = {node.node_id: node.memory_bytes for node in topology.nodes}
    for node_id, num_bytes in sorted(taken.items()):
        if 0 < has[node_id] < num_bytes:
            yield f"{names[node_id]} has {gib(has[node_id])} of memory: too little for swap_space; ask for less"
            return
