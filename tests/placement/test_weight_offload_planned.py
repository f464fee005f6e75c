"""What the plan says of weights in the host's memory: bytes as a rank has them, seconds as the link gives them."""

import msgspec
import pytest

from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.placement.calibration import default_calibration
from argosy.placement.cost_model import StepLoad
from argosy.placement.device_groups import find_groups
from argosy.placement.layout import LayoutJudge, Traffic
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan_report import PlanOptions, PlanReport
from argosy.placement.planner import make_serving, plan_cluster
from argosy.placement.rank_memory import StageBytes, rank_memory
from argosy.placement.topology import Gpu
from argosy.placement.topology_sources import parse_topology

GIB = 2**30
SHAPE = read_model_shape("llama-3.1-8b")
LAYER = 436_224_000  # bytes of one, in bfloat16


def plan(model: str, gpus: str, **settings: object) -> PlanReport:
    """On one node."""
    shape = read_model_shape(model)
    serving = make_serving(shape, max_model_len=4096, **settings)
    return plan_cluster(shape, parse_topology({"nodes": [{"name": "n", "gpus": gpus}]}), PlanOptions(), serving)


def memory_of(memory_gib: float, **settings: object) -> tuple[int, int, int, int]:
    """(layers on the host, bytes there, buffers, blocks) of the 8b shape on a card of so much memory."""
    sizes = StageBytes(SHAPE, make_serving(SHAPE, max_model_len=4096, **settings))
    gpu = Gpu(index=0, model="NVIDIA H200", memory_bytes=int(memory_gib * GIB))
    found = rank_memory(sizes, default_calibration("H200"), gpu, tp_size=1, pp_size=1, first_layer=0, last_layer=32)
    return found.offloaded_bytes // LAYER, found.offloaded_bytes, found.buffer_bytes, found.num_blocks


def test_so_many_gib_are_whole_layers_and_two_of_them_stay_as_buffers() -> None:
    """4 GiB are ten layers of 436 MB, at least as much as asked; the card gains eight of them."""
    layers, offloaded, buffers, blocks = memory_of(40, cpu_offload_gb=4)
    assert layers == 10
    assert offloaded == 10 * LAYER >= 4 * GIB
    assert buffers == 2 * LAYER
    gained = (blocks - memory_of(40)[3]) * 16 * 131072
    assert gained == pytest.approx(8 * LAYER, rel=0.01)


def test_auto_takes_as_few_layers_as_a_request_of_full_length_needs() -> None:
    """None where all fits; the less memory there is, the more; and one layer fewer would not fit."""
    assert memory_of(40, cpu_offload_gb="auto")[0] == 0
    counts = []
    for memory in (16, 12, 10, 8):
        layers, _, _, blocks = memory_of(memory, cpu_offload_gb="auto")
        counts.append(layers)
        assert blocks >= 4096 // 16
        fewer = memory_of(memory, cpu_offload_gb=(layers - 1) * LAYER / GIB)
        assert fewer[0] == layers - 1
        assert fewer[3] < 4096 // 16
    assert counts == sorted(counts)
    assert counts[0] >= 3


def test_a_card_too_small_even_for_that_is_refused() -> None:
    """Embedding, head, two layers and the cache have to be on it."""
    with pytest.raises(PlacementImpossible, match="lacks"):
        plan("llama-3.1-70b", "1 x L4", cpu_offload_gb="auto", gpu_memory_utilization=0.3)


def test_a_step_takes_as_long_as_its_copies_and_the_layer_behind_them() -> None:
    """Decode of one is bound by the link whatever the batch; so is every chunk of a prompt that is not long enough."""
    sizes = StageBytes(SHAPE, make_serving(SHAPE, max_model_len=4096, cpu_offload_gb=8))
    (group,) = find_groups(parse_topology({"nodes": [{"name": "n", "gpus": "1 x H200"}]}), 1)
    cost = LayoutJudge(sizes, Traffic()).cost([group], 1, [32], [])
    link = 20 * LAYER / (group.sheet.pcie_gbytes_per_second * 1e9 * default_calibration("H200").host_link_efficiency)
    for rows in (1, 64, 256):
        seconds = cost.step_seconds(StepLoad(rows, rows * 300, 0, 0, rows))
        assert link < seconds < 1.1 * link
    assert cost.step_seconds(StepLoad(0, 0, 32768, 32768**2 // 2, 1)) > 1.5 * link


def test_a_prompt_of_several_chunks_pays_the_link_for_each() -> None:
    """The reason for long steps: in one step the weights pass by once."""
    told = []
    for settings in ({}, {"max_num_batched_tokens": 16384, "activation_offload_gb": "auto"}):
        serving = make_serving(SHAPE, max_model_len=20000, cpu_offload_gb=13, **settings)
        judge = LayoutJudge(StageBytes(SHAPE, serving), Traffic(input_len=16384, output_len=16))
        (group,) = find_groups(parse_topology({"nodes": [{"name": "n", "gpus": "1 x H200"}]}), 1)
        told.append(judge.judge([group], 1, []).ttft_seconds)
    assert told[0] > 2.5 * told[1]


def test_slices_bound_what_a_long_step_needs() -> None:
    """131,072 tokens in slices of 4096 need what a step of 4096 does, and three buffers of hidden states."""
    calibration = default_calibration("H200")
    sizes = [
        StageBytes(SHAPE, make_serving(SHAPE, max_model_len=131072, max_num_batched_tokens=tokens, **settings))
        for tokens, settings in ((131072, {}), (131072, {"activation_offload_gb": "auto"}), (4096, {}))
    ]
    whole, sliced, short = (one.activation_bytes(calibration, 1, 0, 32) for one in sizes)
    assert sliced == short + 3 * 4096 * 4096 * 2
    assert whole > 10 * sliced
    report = plan("llama-3.1-8b", "1 x H200", max_num_batched_tokens=131072, activation_offload_gb="auto")
    assert any("slices of so many" in note and "1.07 GB of the host's memory" in note for note in report.notes)


def test_the_plan_says_what_the_link_costs() -> None:
    """A 13b model on a card of 24 GB, with what doesn't fit in the host's memory."""
    from argosy.deploy.plan_text import plan_json, plan_lines

    report = plan("llama-2-13b", "1 x A10G", cpu_offload_gb="auto")
    text = "\n".join(plan_lines(report))
    assert "live in the host's memory and are copied in every step: " in text
    (replica,) = plan_json(report)["replicas"]
    (stage,) = replica["stages"]
    assert stage["offloaded_bytes"] > stage["buffer_bytes"] > 0
    exact = msgspec.structs.replace(report.serving, offload_bytes=stage["offloaded_bytes"])
    again = plan_cluster(report.model, report.topology, PlanOptions(), exact)
    assert again.chosen.num_blocks == report.chosen.num_blocks


def test_a_host_that_is_too_small_is_named() -> None:
    """Where its memory is known: two cards' weights are not there twice."""
    serving = make_serving(SHAPE, max_model_len=4096, cpu_offload_gb=10)
    topology = parse_topology({"nodes": [{"name": "n", "gpus": "2 x A10G"}]})
    told = []
    for memory in (0, 15 * 10**9, 64 * 10**9):
        nodes = tuple(msgspec.structs.replace(node, memory_bytes=memory) for node in topology.nodes)
        options = PlanOptions(tp_size=1, pp_size=1, num_replicas=2)
        report = plan_cluster(SHAPE, msgspec.structs.replace(topology, nodes=nodes), options, serving)
        told.append([note for note in report.notes if note.startswith("warning: n")])
    assert told[0] == told[2] == []
    assert told[1] == ["warning: n has 15 GB of memory, and its ranks would keep 22 GB in it"]
