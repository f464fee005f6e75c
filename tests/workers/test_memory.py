"""How many blocks a rank says it has room for, and that the ledger adds up."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rig import SHAPE, InProcessRank, make_config, oracle_config

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.cluster.protocol.ledger import describe_ledger
from argosy.cluster.protocol.messages import WorkerError
from argosy.placement.calibration import default_calibration
from argosy.placement.data_sheets import DATA_SHEETS
from argosy.placement.model_families import shape_from_spec
from argosy.placement.rank_memory import Serving, StageBytes, rank_memory
from argosy.placement.step_memory import graph_bytes
from argosy.placement.swap_space import staging_bytes
from argosy.placement.topology import Gpu
from argosy.workers import memory
from argosy.workers.device import MemoryReading
from argosy.workers.memory import MemoryLedger, measure_num_blocks
from argosy.workers.memory_advice import check_cache_fits, less_cache
from argosy.workers.worker import Worker

GIB = 2**30
BLOCK_BYTES = 2 * 4 * 4 * 4 * 2 * 4  # k and v, layers, slots, heads, size, float32


def measure(config: ServingConfig) -> tuple[int, MemoryLedger]:
    """What a rank with this config reports."""
    ledger = MemoryLedger()
    return measure_num_blocks(InProcessRank(config, 4).runner, ledger), ledger


def test_the_override_wins_over_everything(tmp_path: Path) -> None:
    """Somebody who names the number gets the number."""
    config = oracle_config(tmp_path, num_gpu_blocks_override=77, kv_cache_memory_bytes=10**9)
    assert measure(config)[0] == 77


def test_bytes_given_for_the_cache_become_blocks(tmp_path: Path) -> None:
    """kv_cache_memory_bytes is for each rank, and is not exceeded."""
    config = oracle_config(tmp_path, num_gpu_blocks_override=None, kv_cache_memory_bytes=10 * BLOCK_BYTES + 5)
    assert measure(config)[0] == 10


def test_no_more_blocks_than_could_ever_be_used(tmp_path: Path) -> None:
    """Eight requests of 2048 tokens fill 4096 blocks of 4; a CPU with much memory takes no more."""
    config = oracle_config(tmp_path, num_gpu_blocks_override=None)
    num_blocks, ledger = measure(config)
    assert num_blocks == 8 * 2048 // 4
    assert ledger.room_bytes >= num_blocks * BLOCK_BYTES


def test_a_small_machine_gives_a_part_of_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop with 64 KiB to spare: three tenths of it for the cache, and the ledger adds up to the machine."""

    class Little:
        available, total = 64 * 1024, 8 * GIB

    monkeypatch.setattr(memory.psutil, "virtual_memory", Little)
    num_blocks, ledger = measure(oracle_config(tmp_path, num_gpu_blocks_override=None))
    assert ledger.room_bytes == int(64 * 1024 * memory.CPU_CACHE_FRACTION)
    assert num_blocks == ledger.room_bytes // BLOCK_BYTES
    ledger.mark_cpu(1000)
    entries = ledger.entries()
    assert entries["total"] == 8 * GIB == sum(size for name, size in entries.items() if name != "total")
    assert entries["workspace"] > 10_000_000, "an interpreter with torch is more than that"


def test_on_a_cpu_others_are_those_that_are_not_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 GiB 2 are to be had, and this process holds 1: 5 are other programs'. What was promised to the cache counts
    as taken, though no page of it was touched."""
    machine = SimpleNamespace(total=8 * GIB, available=2 * GIB)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB))
    monkeypatch.setattr(memory, "psutil", SimpleNamespace(virtual_memory=lambda: machine, Process=lambda: process))
    ledger = MemoryLedger()
    ledger.mark_cpu(GIB // 4)
    ledger.purposes["kv"] = GIB // 2
    ledger.host["kv"] = 3 * GIB
    assert ledger.entries() == {
        "weights": GIB // 4, "workspace": GIB - GIB // 4, "kv": GIB // 2, "activations": 0, "others": 5 * GIB,
        "free": 8 * GIB - GIB - GIB // 2 - 5 * GIB, "total": 8 * GIB, "host: kv": 3 * GIB,
    }  # fmt: skip


class FakeCard:
    """A card whose numbers a test moves by hand; a step needs `step_bytes`."""

    def __init__(self, *, total: int = 100 * GIB, used: int = 0, step_bytes: int = 0):
        self.now = MemoryReading(total=total, used=used)
        self.step_bytes, self.released = step_bytes, 0

    def move(self, **grown: int) -> None:
        self.now = replace(self.now, **{name: getattr(self.now, name) + size for name, size in grown.items()})

    def read(self) -> MemoryReading:
        return self.now

    def release(self) -> None:
        self.released += 1

    def start_peak(self) -> int:
        return self.now.allocated

    def peak(self) -> int:
        return self.now.allocated + self.step_bytes


def test_the_ledger_names_each_growth_and_adds_up_to_the_card() -> None:
    """Others hold 1 GiB from the beginning; torch keeps 2 GiB more than its tensors have; graphs cost in two places."""
    card = FakeCard(used=1 * GIB)
    ledger = MemoryLedger(meter=card)
    ledger.mark("context", outside="context")
    card.move(used=16 * GIB, allocated=15 * GIB, reserved=16 * GIB)
    ledger.mark("weights")
    card.move(used=51 * GIB, allocated=50 * GIB, reserved=51 * GIB)
    ledger.mark("kv")
    card.move(used=3 * GIB, graphs=2 * GIB)
    ledger.mark("graphs", outside="graphs")
    entries = ledger.entries()
    assert entries == {
        "context": GIB, "weights": 15 * GIB, "workspace": 0, "kv": 50 * GIB, "graphs": 3 * GIB,
        "activations": 2 * GIB, "free": 29 * GIB, "total": 100 * GIB,
    }  # fmt: skip
    assert sum(entries.values()) == 2 * entries["total"]
    assert describe_ledger(entries).endswith("free 29.00 = 100.00 GiB")


def test_the_cache_gets_what_the_share_leaves_beside_all_else(tmp_path: Path) -> None:
    """90 of 100 GiB may be used: 4 are others', 10 are tensors', a step needs 6."""
    card = FakeCard(used=14 * GIB, step_bytes=6 * GIB)
    card.move(allocated=10 * GIB, reserved=10 * GIB)
    config = oracle_config(tmp_path, num_gpu_blocks_override=None, gpu_memory_utilization=0.9)
    ledger = MemoryLedger(meter=card)
    rank = InProcessRank(config, 4)
    memory.measure_num_blocks(rank.runner, ledger)
    assert ledger.room_bytes == pytest.approx(70 * GIB, abs=16)
    assert card.released
    assert rank.runner.kv_cache is None, "the block that the steps were tried with is given back"


@pytest.mark.parametrize("needs", [[6, 1], [1, 6]])
def test_the_step_that_needs_most_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: list[int]) -> None:
    """Prompts of a full budget, or all rows sampling: whichever it is for this model."""
    monkeypatch.setattr(memory, "largest_shapes", lambda runner: [(1, 4), (2, 1)])
    card = FakeCard(used=GIB)
    steps = iter(needs)
    monkeypatch.setattr(card, "peak", lambda: card.now.allocated + next(steps) * GIB, raising=False)
    ledger = MemoryLedger(meter=card)
    rank = InProcessRank(oracle_config(tmp_path, num_gpu_blocks_override=None, gpu_memory_utilization=0.9), 4)
    memory.measure_num_blocks(rank.runner, ledger)
    assert ledger.activation_bytes == 6 * GIB
    assert ledger.room_bytes == pytest.approx(83 * GIB, abs=16)


def test_buffers_for_swapped_blocks_come_out_of_the_cache(tmp_path: Path) -> None:
    """The copies' buffers are allocated when the cache stands: there must be room for them then."""
    rooms = []
    for swap_space in (0, 1):
        card = FakeCard(used=GIB)
        config = oracle_config(tmp_path, num_gpu_blocks_override=None, swap_space=swap_space)
        ledger = MemoryLedger(meter=card)
        rank = InProcessRank(config, 4)
        memory.measure_num_blocks(rank.runner, ledger)
        rooms.append(ledger.room_bytes)
    assert rooms[0] - rooms[1] == staging_bytes(rank.runner.block_bytes) > 0


def test_ranks_of_all_replicas_share_a_host() -> None:
    """Two replicas of TP2 x PP2 on one machine divide what it has by eight; a start of one of them by four."""
    runner: Any = SimpleNamespace(
        rank=SimpleNamespace(tp_size=2, pp_size=2), device=torch.device("cpu"),
        config=SimpleNamespace(parallel=SimpleNamespace(data_parallel_size=2)),
    )  # fmt: skip
    assert memory.num_ranks_here(runner, of_all_replicas=True) == 8
    assert memory.num_ranks_here(runner, of_all_replicas=False) == 4


def test_steps_that_are_recorded_twice_are_reckoned_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for rows of about one length come beside those for any."""
    rank = InProcessRank(oracle_config(tmp_path, num_gpu_blocks_override=None), 4)
    monkeypatch.setattr(memory, "graph_sizes", lambda runner: [1, 2, 4])
    reckoned = []
    for even in ([], [2, 4]):
        monkeypatch.setattr(memory, "even_ladder", lambda most, spec, tp_size, even=even: even if most == 4 else [])
        ledger = MemoryLedger(meter=FakeCard(used=GIB, step_bytes=2**20))
        memory.measure_num_blocks(rank.runner, ledger)
        reckoned.append(ledger.graph_bytes)
    num_layers = rank.runner.spec.num_layers
    assert reckoned[1] - reckoned[0] == graph_bytes(5, num_layers, 0) - graph_bytes(3, num_layers, 0) > 0


def test_a_full_share_leaves_a_little_for_fragments() -> None:
    """gpu_memory_utilization=1 must not fail with the first step."""
    reading = MemoryReading(total=100 * GIB, used=GIB)
    room = memory.cache_room(reading, utilization=1.0, activation_bytes=GIB, graph_bytes=GIB)
    assert room == 97 * GIB - memory.MIN_SLACK
    assert memory.cache_room(reading, utilization=0.02, activation_bytes=GIB, graph_bytes=GIB) == 0


def test_weights_that_do_not_fit_are_told_before_any_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the flag that would make them fit: a larger share, more cards, or a card that nobody else is on."""
    monkeypatch.setattr(memory, "MIN_SLACK", 0)
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", **SHAPE}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "hidden_act": "silu", "rms_norm_eps": 1e-6}))
    runner = InProcessRank(make_config(tmp_path, load_format="dummy", gpu_memory_utilization=0.5), 4).runner
    needed = sum(parameter.nbytes for parameter in runner.model.parameters())
    memory.check_weights_fit(runner, MemoryLedger())
    memory.check_weights_fit(runner, MemoryLedger(meter=FakeCard(total=3 * needed)))
    for total, used, advice in (
        (2 * needed, 0, "--gpu-memory-utilization 0.55"),
        (needed, 0, "--tensor-parallel-size 4"),
        (int(1.06 * needed), 0, "card's .*; use --tensor-parallel-size 4"),  # 0.99 of it would be asked for
        (3 * needed, needed, "taken already"),
    ):
        with pytest.raises(PlacementImpossible, match=advice):
            memory.check_weights_fit(runner, MemoryLedger(meter=FakeCard(total=total, used=used)))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kv_cache_memory_bytes": 200 * GIB, "num_gpu_blocks_override": None}, "cache-memory-bytes 79GiB or less"),
        ({"num_gpu_blocks_override": 80 * GIB // BLOCK_BYTES + 1}, rf"override {80 * GIB // BLOCK_BYTES} or less"),
        ({"num_gpu_blocks_override": 80 * GIB // BLOCK_BYTES}, None),
        ({"num_gpu_blocks_override": None, "gpu_memory_utilization": 1.0}, None),
    ],
)  # fmt: skip
def test_a_cache_that_was_asked_for_and_has_no_room_names_one_that_has(
    tmp_path: Path, given: dict[str, Any], told: str | None
) -> None:
    """100 GiB: 4 are others', 10 tensors', a step needs 6. The share has no say in it, so it is no advice."""
    card = FakeCard(used=14 * GIB, step_bytes=6 * GIB)
    card.move(allocated=10 * GIB, reserved=10 * GIB)
    runner = InProcessRank(oracle_config(tmp_path, **given), 4).runner
    assert runner.block_bytes == BLOCK_BYTES
    ledger = MemoryLedger(meter=card)
    memory.measure_num_blocks(runner, ledger)
    cache = runner.config.cache
    num_blocks = cache.num_gpu_blocks_override or (cache.kv_cache_memory_bytes or ledger.room_bytes) // BLOCK_BYTES
    if told is None:
        check_cache_fits(runner, ledger, num_blocks)
        return
    if "GiB" in told:
        card.move(allocated=1, used=1)  # rounds down
    with pytest.raises(PlacementImpossible, match=told):
        check_cache_fits(runner, ledger, num_blocks)


def test_the_setting_that_decides_the_cache_is_the_one_to_lower(tmp_path: Path) -> None:
    """Should an allocation fail after all."""
    for given, told in (
        ({"num_gpu_blocks_override": 9}, "--num-gpu-blocks-override from 9"),
        ({"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 5}, "--kv-cache-memory-bytes from 5"),
        ({"num_gpu_blocks_override": None}, "--gpu-memory-utilization from 0.92 to 0.87"),
    ):
        assert told in less_cache(oracle_config(tmp_path, **given))


def test_memory_that_ends_where_nobody_foresaw_it_names_the_setting_that_decides(tmp_path: Path) -> None:
    """While groups are joined or steps run: a share of the card is no advice to whoever gave the cache in bytes."""
    told: list[WorkerError] = []
    for given, flag in (
        ({"num_gpu_blocks_override": None}, "lower --gpu-memory-utilization from 0.92"),
        (
            {"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 5 * GIB},
            f"--kv-cache-memory-bytes from {5 * GIB}",
        ),
    ):
        worker = object.__new__(Worker)
        worker.config, worker.epoch = oracle_config(tmp_path, **given), 0
        worker.rank = SimpleNamespace(global_rank=1)  # type: ignore[assignment]  # a stand-in
        worker.channel = SimpleNamespace(send=told.append)  # type: ignore[assignment]  # a stand-in
        worker._tell_failure(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 50 GiB."))
        assert told[-1].code == "out_of_memory"
        assert flag in told[-1].message
        assert "50 GiB" in told[-1].message


def test_an_allocation_that_fails_names_what_to_change() -> None:
    """The first sentence of torch's page, and ours."""
    with (
        pytest.raises(PlacementImpossible, match=r"while recording graphs .*50 GiB.*; use fewer"),
        memory.explain_out_of_memory("recording graphs", "use fewer"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 50 GiB. GPU 0 has ...\nmore")


def test_a_card_gets_the_blocks_that_were_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is a promise where its device was measured; a card with less room than that gets what there is."""
    monkeypatch.setattr(memory, "describe_device", lambda device: "NVIDIA H200")
    total = DATA_SHEETS["H200"].memory_bytes
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", **SHAPE}
    (tmp_path / "config.json").write_text(json.dumps({**llama, "hidden_act": "silu", "rms_norm_eps": 1e-6}))
    given = {"max_num_seqs": 1 << 14, "max_num_batched_tokens": 1 << 14, "gpu_memory_utilization": 0.02}
    config = make_config(tmp_path, load_format="dummy", num_gpu_blocks_override=None, **given)
    rank = InProcessRank(config, 4)
    shape = shape_from_spec(rank.runner.spec)
    sizes = StageBytes(shape, Serving.from_config(config, shape))
    gpu = Gpu(index=0, model="H200", memory_bytes=total)
    calibration = default_calibration("H200")
    planned = rank_memory(sizes, calibration, gpu, tp_size=1, pp_size=1, first_layer=0, last_layer=shape.num_layers)
    monkeypatch.setattr(memory, "largest_shapes", lambda runner: [(1, 4)])
    for others, is_promised in ((0, True), (2 * GIB, False)):
        card = FakeCard(total=total, used=calibration.context_bytes)
        ledger = MemoryLedger(meter=card)
        ledger.mark("context", outside="context")
        card.move(used=others)
        measured = measure_num_blocks(rank.runner, ledger)
        assert (measured == planned.num_blocks) == is_promised
        assert (ledger.room_bytes == planned.kv_budget_bytes) == is_promised
        assert measured <= planned.num_blocks
    gpu = msgspec.structs.replace(gpu, free_bytes=total - GIB)  # another program was there first: so it was planned
    planned = rank_memory(sizes, calibration, gpu, tp_size=1, pp_size=1, first_layer=0, last_layer=shape.num_layers)
    ledger = MemoryLedger(meter=FakeCard(total=total, used=calibration.context_bytes + GIB))
    ledger.mark("context", outside="context")
    assert memory.planned_room(rank.runner, ledger) == planned.kv_budget_bytes
    monkeypatch.setattr(memory, "describe_device", lambda device: "NVIDIA L4")  # takes the ratios of another card
    assert memory.planned_room(rank.runner, ledger) is None
