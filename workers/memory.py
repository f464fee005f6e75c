"""Where this rank's bytes go, how many KV blocks fit, and what to say when something does not.

On a GPU the ledger is kept by differences of what the driver and torch report, at each mark of the start: so its sum is
what the driver reports, and a purpose that grew is seen by name. Two steps are run to learn what activations need; what
graphs will take is reckoned before they exist, since the cache has to be made first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import psutil
import torch

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError, PlacementImpossible
from argosy.cluster.protocol.kv_groups import ONE_TABLE, KVGroups
from argosy.cluster.protocol.ledger import HOST, gib
from argosy.placement.calibration import Calibration, default_calibration
from argosy.placement.data_sheets import find_data_sheet
from argosy.placement.model_families import shape_from_spec
from argosy.placement.rank_memory import (
    RankMemory,
    Serving,
    StageBytes,
    cap_of,
    cpu_activation_bytes,
    num_offloaded,
    offload_setting,
    rank_memory,
)
from argosy.placement.step_memory import decode_bytes, even_ladder, graph_bytes, prompt_graph_bytes
from argosy.placement.swap_space import staging_bytes
from argosy.placement.topology import Gpu
from argosy.placement.weight_offload import buffer_bytes, count_for, offloaded_bytes
from argosy.workers.device import MemoryReading, describe_device
from argosy.workers.host_memory import check_host_room
from argosy.workers.model_runner import ModelRunner
from argosy.workers.step_recording import graph_sizes, recorded_prompts
from argosy.workers.warm_up import largest_shapes

CPU_CACHE_BYTES = 4 * 2**30  # all ranks of a machine together, unless kv_cache_memory_bytes says otherwise
CPU_CACHE_FRACTION = 0.3  # and never more than this part of what is available
MOST_SHARE = 0.98  # of a card that advice asks for: the rest is fragments and what others take
LARGEST_STEP = (  # what ran out of memory there, and what helps
    "running the largest step",
    "lower --max-num-batched-tokens or --max-num-seqs, or spread the model over more ranks with --tensor-parallel-size",
)
MIN_SLACK = 2**28  # beside the cache: what a later step's fragments and lazily loaded kernels may take


class Meter(Protocol):
    """What the ledger reads from a device; tests have one of their own."""

    def read(self) -> MemoryReading:
        """How it stands now."""

    def release(self) -> None:
        """Give the device back what no tensor uses."""

    def start_peak(self) -> int:
        """Count from here; returns the bytes of tensors now."""

    def peak(self) -> int:
        """The most bytes of tensors since then."""


@dataclass(slots=True)
class MemoryLedger:
    """Bytes of this rank by purpose. On a CPU `activations` is what the tensors of a full step come to."""

    purposes: dict[str, int] = field(default_factory=dict)
    room_bytes: int = 0  # what the cache could be made of
    activation_bytes: int = 0  # the most that a step needs
    graph_bytes: int = 0  # what recorded graphs are reckoned to need
    peaks: list[int] = field(default_factory=list)  # of each step that was run to learn that
    meter: Meter | None = None
    host: dict[str, int] = field(default_factory=dict)  # bytes of the host's memory by purpose
    _last: MemoryReading | None = None

    def mark(self, purpose: str, outside: str = "workspace") -> None:
        """What tensors and graphs took since the last mark went to `purpose`, what others took to `outside`."""
        if self.meter is None:
            return  # on a CPU nobody says whose memory it is
        now = self.meter.read()
        before = self._last or MemoryReading(total=now.total)
        self._add(purpose, now.allocated - before.allocated + now.graphs - before.graphs)
        self._add(outside, now.outside - before.outside)
        self._last = now

    def move(self, source: str, target: str, num_bytes: int) -> None:
        """So many of one purpose's bytes have another."""
        self._add(source, -num_bytes)
        self._add(target, num_bytes)

    def _add(self, purpose: str, num_bytes: int) -> None:
        self.purposes[purpose] = self.purposes.get(purpose, 0) + num_bytes

    def entries(self) -> dict[str, int]:
        """All purposes, what torch holds ready for activations, what is free, and their sum as `total`; then those of
        the host."""
        host = {HOST + purpose: size for purpose, size in self.host.items()}
        if self._last is None:
            return {**self._cpu_entries(), **host}
        last = self._last
        kept = {"activations": last.reserved - last.allocated, "free": last.total - last.used}
        return {**self.purposes, **kept, "total": last.total, **host}

    def mark_cpu(self, weight_bytes: int) -> None:
        """On a CPU, when weights stand: the process has so much more than these."""
        rss = psutil.Process().memory_info().rss
        self.purposes |= {"weights": weight_bytes, "workspace": max(0, rss - weight_bytes)}

    def _cpu_entries(self) -> dict[str, int]:
        """A CPU's pages come when they are touched: what was promised counts as taken, what is left as free."""
        process, machine = psutil.Process().memory_info().rss, psutil.virtual_memory()
        others = max(0, machine.total - machine.available - process)
        taken = {**self.purposes, "activations": self.activation_bytes, "others": others}
        return {**taken, "free": machine.total - sum(taken.values()), "total": machine.total}


def check_weights_fit(runner: ModelRunner, ledger: MemoryLedger, count: int = 0) -> None:
    """Before any is allocated; so many layers are offloaded. Raises `PlacementImpossible` naming what would fit."""
    if ledger.meter is None:
        return
    needed = _bytes_of(runner.model)
    if count:
        layers = [_bytes_of(layer) for layer in runner.model.layers.values()]
        needed += buffer_bytes(layers, count) - offloaded_bytes(layers, count)
    now = ledger.meter.read()
    limit = min(int(now.total * runner.config.cache.gpu_memory_utilization), cap_bytes(runner) or now.total)
    free = min(limit - now.used, now.total - now.used)
    if needed < free:
        return
    rank, spec = runner.rank, runner.spec
    sizes = [size for size in (2, 4, 8, 16) if size > rank.tp_size and not spec.num_heads % size]
    fitting = [size for size in sizes if needed * rank.tp_size / size < 0.9 * limit]
    spread = f"--tensor-parallel-size {fitting[0]}" if fitting else "more pipeline stages (--pipeline-parallel-size)"
    share = (needed + now.used + MIN_SLACK) / now.total + 0.05
    if now.used > 0.2 * now.total:
        advice = f"{gib(now.used)} are taken already (nvidia-smi shows by whom): free them, or use {spread}"
    elif share < MOST_SHARE:
        advice = f"use --gpu-memory-utilization {share:.2f} or more, or {spread}"
    else:
        advice = f"use {spread}"
    advice += ", or keep some in the host's memory (--cpu-offload-gb auto)" if not count else ""
    raise PlacementImpossible(
        f"rank {rank.global_rank} needs {gib(needed)} for its part of the weights and may use {gib(max(free, 0))} of "
        f"the card's {gib(now.total)}; {advice}"
    )


def num_ranks_here(runner: ModelRunner, *, of_all_replicas: bool) -> int:
    """How many ranks share this host at most: of this replica, which start together, or of all."""
    rank = runner.rank
    count = rank.tp_size * rank.pp_size
    if of_all_replicas:
        count *= runner.config.parallel.data_parallel_size
    return max(rank.tp_size, min(count, torch.cuda.device_count())) if runner.device.type == "cuda" else count


def choose_num_offloaded(runner: ModelRunner, ledger: MemoryLedger) -> int:
    """How many layers have their weights in the host's memory: the planner's rule, for what is here.

    Raises `ConfigError` for a model without layers of ours, `PlacementImpossible` where the host has no room.
    """
    config = runner.config
    asked = offload_setting(config)
    if asked == 0:
        return 0
    if not hasattr(runner.model, "layers"):
        if asked is None:
            return 0
        raise ConfigError(
            f"cpu_offload_gb={config.offload.cpu_offload_gb:g}: {runner.spec.architecture} runs through modules that "
            "are not ours, whose weights stay on the device; leave it out, or serve a smaller or quantised model"
        )
    layers = [_bytes_of(layer) for layer in runner.model.layers.values()]
    if asked is not None:
        count = count_for(layers, asked)
    elif ledger.meter is None:
        return 0  # a CPU's weights are there already
    else:
        count = _fewest_offloaded(runner, layers, ledger.meter.read())
    check_host_room(
        offloaded_bytes(layers, count),
        f"cpu_offload_gb={config.offload.cpu_offload_gb}",
        "set a smaller one, or spread the model over more ranks (--tensor-parallel-size)",
        num_ranks=num_ranks_here(runner, of_all_replicas=False),
    )
    return count


def _fewest_offloaded(runner: ModelRunner, layers: list[int], now: MemoryReading) -> int:
    """As `argosy plan` has it for a card with so much free, with this model's own bytes."""
    serving = Serving.from_config(runner.config, shape_from_spec(runner.spec))
    own = _calibration_of(runner).workspace_bytes + _communication_bytes(runner)
    others = max(0, now.used - own)  # our context is in use by now, and the plan counts it
    planned = _planned(runner, msgspec.structs.replace(serving, offload_bytes=0), now.total, others)
    budget = planned.kv_budget_bytes + planned.weight_bytes - _bytes_of(runner.model)
    return num_offloaded(serving, layers, runner.block_bytes, budget)


def planned_room(runner: ModelRunner, ledger: MemoryLedger) -> int | None:
    """Bytes for the cache as `argosy plan` foretells them for this card; None where nobody measured such a card.

    What others have taken is what was in use, beside our context, before we took anything.
    """
    calibration, sheet = _calibration_of(runner), find_data_sheet(describe_device(runner.device))
    if ledger.meter is None or sheet is None or sheet.name != calibration.device or sheet.name == "CPU":
        return None
    serving = Serving.from_config(runner.config, shape_from_spec(runner.spec))
    free = msgspec.structs.replace(serving, kv_cache_memory_bytes=None, num_gpu_blocks_override=None)
    others = max(0, ledger.purposes.get("context", 0) - calibration.context_bytes)
    return max(0, _planned(runner, free, ledger.meter.read().total, others).kv_budget_bytes)


def _calibration_of(runner: ModelRunner) -> Calibration:
    sheet = find_data_sheet(describe_device(runner.device))
    return default_calibration(describe_device(runner.device) if sheet is None else sheet.name)


def _communication_bytes(runner: ModelRunner) -> int:
    shape = shape_from_spec(runner.spec)
    sizes = StageBytes(shape, Serving.from_config(runner.config, shape))
    return sizes.communication_bytes(_calibration_of(runner), runner.rank.tp_size, runner.rank.pp_size)


def _planned(runner: ModelRunner, serving: Serving, total: int, others: int) -> RankMemory:
    rank = runner.rank
    gpu = Gpu(index=0, model=describe_device(runner.device), memory_bytes=total, free_bytes=total - others)
    return rank_memory(
        StageBytes(shape_from_spec(runner.spec), serving), _calibration_of(runner), gpu, tp_size=rank.tp_size,
        pp_size=rank.pp_size, first_layer=rank.first_layer, last_layer=rank.last_layer, cap_bytes=cap_bytes(runner),
    )  # fmt: skip


def _bytes_of(part: torch.nn.Module) -> int:
    """Of its parameters, which may have no memory yet."""
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in part.parameters())


@contextmanager
def explain_out_of_memory(what: str, advice: str) -> Iterator[None]:
    """An allocation that fails inside becomes one line that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).strip().splitlines()[0].split(". GPU")[0]
        raise PlacementImpossible(f"out of device memory while {what} ({first}); {advice}") from error


def measure_num_blocks(runner: ModelRunner, ledger: MemoryLedger) -> int:
    """How many KV blocks this rank has room for. Fills in the ledger."""
    if ledger.meter is not None:
        _measure_device(runner, ledger)
    else:
        _measure_cpu(runner, ledger)
    if runner.config.offload.swap_space and ledger.meter is not None:
        ledger.room_bytes = max(0, ledger.room_bytes - staging_bytes(runner.block_bytes))
    promised = planned_room(runner, ledger)
    if promised is not None:  # as many blocks as were planned, unless the card has room for fewer
        ledger.room_bytes = min(ledger.room_bytes, promised)
    cache = runner.config.cache
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    budget = cache.kv_cache_memory_bytes if cache.kv_cache_memory_bytes is not None else ledger.room_bytes
    most = most_blocks(runner.config, runner.max_model_len, runner.kv_groups)
    return max(0, min(budget // runner.block_bytes, most))


def most_blocks(config: ServingConfig, max_model_len: int, groups: KVGroups = ONE_TABLE) -> int:
    """More blocks than this can't be used: every request at full length at once, and those of one step's chunks."""
    scheduler, size = config.scheduler, config.cache.block_size
    return groups.most_blocks(scheduler.max_num_seqs, max_model_len, size, scheduler.max_num_batched_tokens)


def cap_bytes(runner: ModelRunner) -> int | None:
    """What the settings allow this rank of its device; None: no bound of theirs."""
    return cap_of(runner.config.stage_memory_bytes, runner.rank.pp_rank)


def cache_room(
    reading: MemoryReading, *, utilization: float, activation_bytes: int, graph_bytes: int, cap_bytes: int | None = None
) -> int:
    """Bytes for the KV cache: the share of the card that may be used, less all that is or will be there beside it."""
    limit = min(int(reading.total * utilization), cap_bytes or reading.total)
    taken = reading.outside + reading.allocated + activation_bytes + graph_bytes
    return max(0, min(limit, reading.total - MIN_SLACK) - taken)


def _measure_cpu(runner: ModelRunner, ledger: MemoryLedger) -> None:
    spec, config, rank = runner.spec, runner.config, runner.rank
    available = psutil.virtual_memory().available
    num_ranks = rank.tp_size * rank.pp_size
    ledger.activation_bytes = cpu_activation_bytes(spec, runner.most_tokens, rank.tp_size, runner.dtype.itemsize)
    if runner.long_steps is not None:
        ledger.activation_bytes += runner.long_steps.buffer_bytes
    if rank.is_last_stage:
        ledger.activation_bytes += config.scheduler.max_num_seqs * spec.vocab_size * 4
    if (cap := cap_bytes(runner)) is not None:
        ledger.room_bytes = max(0, min(cap, available) - _bytes_of(runner.model) - ledger.activation_bytes)
    else:
        ledger.room_bytes = int(min(CPU_CACHE_BYTES, available * CPU_CACHE_FRACTION)) // num_ranks


def _measure_device(runner: ModelRunner, ledger: MemoryLedger) -> None:
    meter = ledger.meter
    assert meter is not None
    peaks = ledger.peaks
    with explain_out_of_memory(*LARGEST_STEP):
        runner.allocate(1)
        for shape in largest_shapes(runner):
            before = meter.start_peak()
            runner.warm_up([shape])
            peaks.append(meter.peak() - before)
        runner.kv_cache = None
    meter.release()
    ledger.mark("workspace")
    ledger.activation_bytes = max(peaks)
    if sizes := graph_sizes(runner):
        rank = runner.rank
        most = decode_bytes(
            runner.spec, sizes[-1], tp_size=rank.tp_size, is_last=rank.is_last_stage, dtype_bytes=runner.dtype.itemsize
        )
        num_sizes = len(sizes) + len(even_ladder(sizes[-1], runner.spec, rank.tp_size))
        ledger.graph_bytes = graph_bytes(num_sizes, rank.last_layer - rank.first_layer, min(peaks[-1], most))
        ledger.graph_bytes += prompt_graph_bytes(
            runner.spec, recorded_prompts(runner), rank.last_layer - rank.first_layer, tp_size=rank.tp_size,
            dtype_bytes=runner.dtype.itemsize,
        )  # fmt: skip
        ledger.graph_bytes += runner.kv_groups.more_table_bytes(
            runner.config.scheduler.max_num_seqs, runner.max_model_len, runner.config.cache.block_size
        )
    reading = meter.read()
    ledger.room_bytes = cache_room(
        reading,
        utilization=runner.config.cache.gpu_memory_utilization,
        activation_bytes=ledger.activation_bytes,
        graph_bytes=ledger.graph_bytes,
        cap_bytes=cap_bytes(runner),
    )
