"""Layers whose weights live in the host's memory: the same tokens in every layout, and which bytes lie where."""

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from rig import (
    InProcessRank,
    RankHosts,
    Run,
    answers,
    greedy,
    make_config,
    oracle_config,
    start,
    transformers_greedy,
    write_family,
)
from test_parallel_ranks import LAYOUTS, prompts

from argosy.cluster.protocol.errors import ConfigError, PlacementImpossible
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.deploy import bench_models
from argosy.placement.calibration import default_calibration
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.placement.rank_memory import Serving, StageBytes, rank_memory
from argosy.placement.topology import Gpu
from argosy.placement.weight_offload import (
    buffer_bytes,
    count_for,
    count_to_gain,
    offloaded_bytes,
    offloaded_places,
)
from argosy.workers import host_memory, memory
from argosy.workers.device import MemoryReading
from argosy.workers.memory import MemoryLedger, choose_num_offloaded
from argosy.workers.model_runner import ModelRunner
from argosy.workers.weight_offload import WeightOffload

NUM_TOKENS = 8
CPU = torch.device("cpu")
LAYER_BYTES = 4 * (64 * 128 + 64 * 64 + 3 * 64 * 96 + 2 * 64)  # of the tiny llama, norms included
GIB = 2**30


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A folder of four layers, and what transformers says."""
    folder = write_family(tmp_path_factory.mktemp("offload"), "llama")
    return folder, transformers_greedy(folder, prompts(), NUM_TOKENS)


def layers_gib(count: float) -> float:
    """GiB of so many layers."""
    return count * LAYER_BYTES / GIB


# ------------------------------------------------------------------------------------------------------------ the rule


def test_offloaded_layers_are_spread_and_the_last_is_one_of_them() -> None:
    """Between two copies as many layers as possible, before the first as many as between others, none at the end."""
    assert offloaded_places(8, 3) == (1, 4, 7)
    assert offloaded_places(32, 2) == (15, 31)
    assert offloaded_places(4, 4) == offloaded_places(4, 9) == (0, 1, 2, 3)
    assert offloaded_places(4, 0) == ()
    for count in range(1, 33):
        places = (-1, *offloaded_places(32, count))
        gaps = {after - before for before, after in pairwise(places)}
        assert places[-1] == 31
        assert max(gaps) - min(gaps) <= 1


def test_the_bytes_that_are_asked_for_become_whole_layers() -> None:
    """At least as much as asked; for a gain on the device the two buffers come off."""
    layers = [10] * 6
    assert [count_for(layers, asked) for asked in (0, 1, 10, 11, 59, 600)] == [0, 1, 1, 2, 6, 6]
    assert (offloaded_bytes(layers, 4), buffer_bytes(layers, 1), buffer_bytes(layers, 4)) == (40, 10, 20)
    assert [count_to_gain(layers, missing) for missing in (-5, 0, 1, 10, 11, 40)] == [0, 0, 3, 3, 4, 6]


def test_layers_of_several_sizes_count_with_their_own() -> None:
    """A dense layer before layers of experts: the buffers are as large as the largest that comes through them."""
    layers = [2, 2, 10, 10, 10, 10]
    assert offloaded_places(6, 2) == (2, 5)
    assert offloaded_bytes(layers, 3) == 2 + 10 + 10
    assert buffer_bytes(layers, 3) == 20


# --------------------------------------------------------------------------------------------------------- the tokens


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_any_number_of_layers_gives_the_same_tokens(count: int, llama: tuple[Path, list[list[int]]]) -> None:
    """Prompts in chunks and decode steps, with none to all of four layers in the host's memory."""
    folder, expected = llama
    config = make_config(folder, cpu_offload_gb=layers_gib(count))
    rank = InProcessRank(config, 128)
    offload = rank.runner.offload
    assert (0 if offload is None else len(offload.layers)) == count
    run = Run(rank, config, 128)
    made = [run.add(greedy(prompt, NUM_TOKENS, stream_id=n))[0] for n, prompt in enumerate(prompts())]
    run.finish()
    assert answers(made) == expected


@pytest.mark.parametrize("layout", ["TP2", "PP2", "TP2xPP2"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_every_layout_gives_the_same_tokens(
    layout: str, share: float, llama: tuple[Path, list[list[int]]], hosts: RankHosts, tmp_path: Path
) -> None:
    """Each rank has its own part of its own layers in the host's memory; the setting is for each rank."""
    folder, expected = llama
    tp_size, pp_size = LAYOUTS[layout]
    of_rank = LAYER_BYTES * 4 / tp_size / pp_size / GIB
    config = make_config(
        folder, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, cpu_offload_gb=share * of_rank
    )
    ranks = start(hosts, config, 128, tmp_path)
    try:
        run = Run(ranks, config, 128)
        made = [run.add(greedy(prompt, NUM_TOKENS, stream_id=n))[0] for n, prompt in enumerate(prompts())]
        run.finish()
        assert answers(made) == expected
        for report in ranks.reports:
            assert report.ledger["host: weights"] >= share * of_rank * GIB * 0.98
    finally:
        ranks.stop()


FORMATS: list[dict[str, Any]] = [{"quantization": "fp8"}, {"quantization": "fp8_block"}, {"quantization": "int8"}]


@pytest.mark.parametrize("settings", FORMATS, ids=lambda settings: settings["quantization"])
def test_packed_weights_move_with_all_their_tensors(settings: dict[str, Any], tmp_path: Path) -> None:
    """Whatever a format keeps of a layer goes through the buffer; tokens are those of the same weights at rest."""
    folder = write_family(tmp_path, "qwen2")
    told = []
    for offloaded in (0.0, 1.0):
        config = make_config(folder, cpu_offload_gb=offloaded, **settings)
        rank = InProcessRank(config, 128)
        run = Run(rank, config, 128)
        made = [run.add(greedy(prompt, NUM_TOKENS, stream_id=n))[0] for n, prompt in enumerate(prompts())]
        run.finish()
        told.append(answers(made))
    assert told[0] == told[1]


# ---------------------------------------------------------------------------------------------------------- the bytes


def test_weights_lie_in_one_block_a_layer_and_pass_through_two_buffers(llama: tuple[Path, list[list[int]]]) -> None:
    """What has two dimensions is a view of a buffer, turn about; norms stay where they are."""
    rank = InProcessRank(make_config(llama[0], cpu_offload_gb=layers_gib(4)), 8)
    offload = rank.runner.offload
    assert offload is not None
    matrices = LAYER_BYTES - 4 * 2 * 64
    assert offload.host_bytes >= 4 * matrices
    buffers = [buffer.untyped_storage().data_ptr() for buffer in offload._buffers]
    assert len(buffers) == 2
    for place, layer in enumerate(rank.runner.model.layers.values()):
        large = [parameter for parameter in layer.parameters() if parameter.ndim > 1]
        assert large
        assert {parameter.untyped_storage().data_ptr() for parameter in large} == {buffers[place % 2]}
        small = [parameter for parameter in layer.parameters() if parameter.ndim == 1]
        assert not {parameter.untyped_storage().data_ptr() for parameter in small} & set(buffers)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_weights_are_counted_once_wherever_they_are(family: str, tmp_path: Path) -> None:
    """A head that is the embedding counts as one; a layer that went to the host still counts."""
    folder = write_family(tmp_path, family)
    counted = []
    for count in (0, 2, 4):
        config = make_config(folder, cpu_offload_gb=layers_gib(count))
        spec = read_model_spec(folder)
        (rank,) = make_plan(spec.num_layers, 1, 1).ranks
        parallel = ParallelContext(rank, CPU, 5.0)
        runner = ModelRunner(config, spec, parallel, device=CPU, dtype=torch.float32, cache_dtype=torch.float32)
        counted.append(runner.load(folder, None, num_offloaded=count).num_bytes)
    numbers = 4 * LAYER_BYTES // 4 + 128 * 64 * (1 if family == "llama_tied" else 2) + 64
    assert counted == [4 * numbers] * 3


class Part(nn.Module):
    """A layer with an alias of its weight outside of the parameters, and a module that another layer has as well."""

    def __init__(self, size: int, shared: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, 8), requires_grad=False)
        self.row = self.weight.data[1:3]
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(x @ self.weight.t() @ self.weight) + self.row.sum()


def test_steps_with_prompts_are_not_recorded_while_weights_come_through_the_link(
    llama: tuple[Path, list[list[int]]],
) -> None:
    """Such a step waits for the link, not for its launches."""
    for count, is_recorded in ((0, True), (2, False)):
        config = make_config(llama[0], cpu_offload_gb=count * LAYER_BYTES / GIB)
        rank = InProcessRank(config, 64)
        assert rank.runner.model.records_prompts(16) == is_recorded


def test_a_layer_sees_its_own_bytes_and_what_is_shared_stays() -> None:
    """Aliases follow their weight; a module of several layers is left on the device; sizes may differ."""
    shared = nn.Linear(8, 8)
    model = nn.Module()
    model.parts = nn.ModuleList([Part(size, shared) for size in (4, 16, 3, 9, 5)])
    layers = [part for part in model.parts if isinstance(part, Part)]
    x = torch.randn(2, 8)
    expected = [layer(x) for layer in layers]
    offload = WeightOffload(model, layers[1:], torch.device("cpu"))
    for layer in layers[1:]:
        offload.pack(layer)
        assert layer.weight.numel() == 0
    offload.open()
    assert offload.buffer_bytes == 2 * 512
    for _ in range(2):
        assert all(
            torch.equal(layer(x), wanted) for layer, wanted in zip(offload.in_turn(layers), expected, strict=True)
        )
    assert shared.weight.untyped_storage().data_ptr() not in {b.untyped_storage().data_ptr() for b in offload._buffers}


def test_a_rank_offloads_what_the_plan_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 8B shape with "auto" on cards of several sizes: the planner's figure, with our context in use by then."""
    folder, _ = bench_models.make_folder("8b", tmp_path)
    config = make_config(
        folder, cpu_offload_gb="auto", dtype="bfloat16", max_model_len=4096, block_size=16, max_num_batched_tokens=2048,
        num_gpu_blocks_override=None,
    )  # fmt: skip
    spec = read_model_spec(folder)
    (rank,) = make_plan(spec.num_layers, 1, 1).ranks
    parallel = ParallelContext(rank, CPU, 5.0)
    runner = ModelRunner(config, spec, parallel, device=CPU, dtype=torch.bfloat16, cache_dtype=torch.bfloat16)
    monkeypatch.setattr(memory, "describe_device", lambda device: "NVIDIA H200")
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    shape = read_model_shape(folder)
    sizes = StageBytes(shape, Serving.from_config(config, shape))
    counts = []
    for total in (40 * GIB, 16 * GIB, 12 * GIB):
        gpu = Gpu(index=0, model="NVIDIA H200", memory_bytes=total)
        said = rank_memory(sizes, default_calibration("H200"), gpu, tp_size=1, pp_size=1, first_layer=0, last_layer=32)
        reading = MemoryReading(total=total, used=550 << 20)
        meter = SimpleNamespace(read=lambda reading=reading: reading)
        count = choose_num_offloaded(runner, MemoryLedger(meter=meter))  # type: ignore[arg-type]  # all that is asked
        assert count * 436_224_000 == said.offloaded_bytes
        counts.append(count)
    assert counts[0] == 0 < counts[1] < counts[2] <= 32


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_host_without_room_refuses_before_anything_is_read(
    llama: tuple[Path, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line says how much is asked for, how much there is, and what to do."""

    class Little:
        available = host_memory.KEPT_FREE + 1000

    monkeypatch.setattr(host_memory.psutil, "virtual_memory", Little)
    with pytest.raises(PlacementImpossible, match=r"cpu_offload_gb=.* KiB are free: set a smaller one"):
        InProcessRank(make_config(llama[0], cpu_offload_gb=layers_gib(1)), 8)


def test_models_without_layers_of_ours_refuse(tmp_path: Path) -> None:
    """Said at once, not ignored; "auto" leaves them as they are."""
    with pytest.raises(
        ConfigError, match=r"cpu_offload_gb=2: OracleForCausalLM runs through modules that are not ours"
    ):
        InProcessRank(oracle_config(tmp_path, cpu_offload_gb=2), 8)
    assert InProcessRank(oracle_config(tmp_path, cpu_offload_gb="auto"), 8).runner.offload is None
    long = {"activation_offload_gb": 1, "max_num_batched_tokens": 64, "activation_slice_tokens": 8}
    with pytest.raises(ConfigError, match="its steps can't be cut"):
        InProcessRank(oracle_config(tmp_path, **long), 8)


@pytest.mark.parametrize("value", [-1.0, float("inf"), "much", None])
def test_the_setting_is_a_number_of_gib_or_auto(value: object, llama: tuple[Path, list[list[int]]]) -> None:
    """With field, value and what it must be."""
    with pytest.raises(ConfigError, match=r"cpu_offload_gb=.*number of GiB from 0 on, or auto"):
        make_config(llama[0], cpu_offload_gb=value)
    assert make_config(llama[0], cpu_offload_gb="auto").offload.cpu_offload_gb == "auto"
