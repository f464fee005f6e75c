"""Which layout a model gets, why the others don't, and the goldens: node counts, super-linear blocks, uneven memory."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from argosy.cluster.protocol.errors import ConfigError, PlacementImpossible
from argosy.placement.calibration import Calibration, default_calibration
from argosy.placement.device_groups import find_groups
from argosy.placement.layout import LayoutJudge, Traffic
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan_report import PlanOptions, PlanReport
from argosy.placement.planner import make_serving, plan_cluster
from argosy.placement.rank_memory import Serving, StageBytes, rank_memory
from argosy.placement.topology import ClusterTopology, Gpu
from argosy.placement.topology_sources import parse_topology

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = sorted((ROOT / "examples" / "clusters").glob("*.yaml"))


def cluster(gpus: str, nodes: int = 1, network: str = "400Gbit") -> ClusterTopology:
    """Alike nodes."""
    return parse_topology({"network": network, "nodes": [{"name": "node", "gpus": gpus, "count": nodes}]})


def plan(
    model: str,
    topology: ClusterTopology,
    quantization: str | None = None,
    offload: float | str = 0.0,
    **options: Any,
) -> PlanReport:
    """A plan with sequences of 8192 tokens."""
    shape = read_model_shape(model)
    longest = min(8192, shape.spec.max_position)
    serving = make_serving(shape, quantization=quantization, max_model_len=longest, cpu_offload_gb=offload)
    return plan_cluster(shape, topology, PlanOptions(**options), serving)


def test_a_group_over_a_fast_network_has_a_place_on_each_node() -> None:
    """What is planned is what the launcher reserves: a bundle on each node, its ranks in order."""
    fast = parse_topology({"network": "900GB", "nodes": [{"name": "n", "count": 2, "gpus": "8 x H200"}]})
    report = plan("llama-3.1-405b", fast, tp_size=16)
    (replica,) = report.plan.replicas
    assert [(place[0].node, [rank.tp_rank for rank in place]) for place in replica.places()] == [
        ("n-0", list(range(8))),
        ("n-1", list(range(8, 16))),
    ]
    assert any("groups span nodes" in note for note in report.notes)
    slow = parse_topology({"network": "100Gbit", "nodes": [{"name": "n", "count": 2, "gpus": "8 x H200"}]})
    with pytest.raises(PlacementImpossible, match="needs so many devices in one node"):
        plan("llama-3.1-405b", slow, tp_size=16)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_the_example_clusters_get_the_layouts_that_their_files_tell(path: Path) -> None:
    """Each file names its command and its layout in comments; docs and README quote them."""
    from argosy.deploy import cli, plan_command  # the command's own way from flags to options

    text = path.read_text(encoding="utf-8")
    command = re.search(r"^# argosy (plan .*)$", text, re.MULTILINE)
    layout = re.search(r"^# layout: (.*)$", text, re.MULTILINE)
    assert command, path
    assert layout, path
    words = shlex.split(command[1].replace(f"examples/clusters/{path.name}", str(path)))
    args = cli.build_parser().parse_args(words)
    shape = read_model_shape(args.model)
    topology = plan_command.topology_from(args)
    serving = plan_command.serving_from(args, shape, topology)
    report = plan_cluster(shape, topology, plan_command.options_from(args), serving)
    found = report.chosen.describe()
    if report.chosen.pp_size > 1:
        splits = sorted({replica.layer_counts for replica in report.chosen.replicas})
        found += ", layers " + " or ".join(" | ".join(map(str, split)) for split in splits)
    assert found == layout[1]


def test_there_are_twenty_examples() -> None:
    """Of all kinds: one card to 64 nodes, PCIe and NVLink, alike and unequal, GPUs and none."""
    assert len(CLUSTERS) >= 20


@pytest.mark.parametrize(
    ("model", "quantization", "gpus"),
    [
        ("llama-3.1-405b", None, 8),
        ("llama-3.1-405b", "fp8", 4),
        ("deepseek-r1", None, 8),  # FP8 as published
        ("gpt3-175b", None, 4),
        ("gpt3-175b", "fp8", 2),
        ("llama-2-13b", None, 1),
    ],
)
def test_golden_counts_of_h200(model: str, quantization: str | None, gpus: int) -> None:
    """405B takes 8 H200 in bfloat16 and 4 in FP8, R1 takes 8, GPT-3 fits 4; half as many never do."""
    assert plan(model, cluster(f"{gpus} x H200"), quantization).chosen.replicas
    if gpus > 1:
        with pytest.raises(PlacementImpossible, match="lacks"):
            plan(model, cluster(f"{gpus // 2} x H200"), quantization)


def test_gpt3_in_bfloat16_on_two_cards_needs_the_hosts_memory() -> None:
    """Quantise, or let some weights live in the host's memory; the note says how much is read in every step."""
    report = plan("gpt3-175b", cluster("2 x H200"), offload="auto")
    assert any("host's memory" in note for note in report.notes)
    fast = plan("gpt3-175b", cluster("2 x H200"), "fp8")
    assert fast.chosen.tokens_per_second > 5 * report.chosen.tokens_per_second


EXACT = Calibration(device="none", source="test", workspace_bytes=0, group_bytes=0, hidden_copies=0, inner_copies=0,
                    logit_bytes=0)  # fmt: skip


def test_two_cards_hold_13_9_times_the_blocks_of_one_when_weights_fill_it() -> None:
    """r = (2 - f) / (1 - f): with weights at 92.25 % of a card's usable memory, r is 13.9 (claim N8)."""
    shape = read_model_shape("llama-2-7b")
    serving = Serving(
        dtype_bytes=2, kv_dtype_bytes=2, weight_format=shape.weight_format, max_num_batched_tokens=1,
        gpu_memory_utilization=0.5, max_num_seqs=16, max_model_len=4096,
    )  # fmt: skip
    sizes = StageBytes(shape, serving)
    usable = int(sizes.stage_bytes(1, 0, 32) / 0.9225)
    blocks = [
        rank_memory(sizes, EXACT, Gpu(index=0, model="H200", memory_bytes=2 * usable), tp_size=tp_size, pp_size=1,
                    first_layer=0, last_layer=32).num_blocks
        for tp_size in (1, 2)
    ]  # fmt: skip
    assert blocks[1] / blocks[0] == pytest.approx(13.9, abs=0.15)


def test_uneven_layers_use_the_memory_of_unequal_cards() -> None:
    """Two ranks, one with half its memory: 97 % of the free bytes of both, 1.4 times the blocks of the even split."""
    shape = read_model_shape("llama-3.1-8b")
    serving = make_serving(shape, max_model_len=8192, max_num_seqs=256, max_num_batched_tokens=8192)
    whole = 40 * 2**30
    topology = parse_topology(
        {"nodes": [{"name": "pair", "gpus": [{"model": "L4", "memory_gib": 40}, {"model": "L4", "memory_gib": 20}]}]}
    )
    judge = LayoutJudge(StageBytes(shape, serving), Traffic(input_len=2048, output_len=2048))
    groups = find_groups(topology, 1)
    assert [group.gpu.memory_bytes for group in groups] == [whole, whole // 2]
    best = judge.judge(groups, 1, [groups[0].link])
    even = judge.judge_split(groups, 1, [groups[0].link], (16, 16))
    assert best.num_blocks >= 1.4 * even.num_blocks
    free = sum(stage.memory.kv_budget_bytes for stage in best.stages)
    used = sum(best.num_blocks * stage.memory.block_bytes for stage in best.stages)
    assert used >= 0.97 * free


def test_a_refusal_says_what_each_layout_lacks_and_what_would_help() -> None:
    """Nobody should have to work out 811.7 GB by hand."""
    with pytest.raises(PlacementImpossible) as caught:
        plan("llama-3.1-405b", cluster("4 x A10G"))
    text = str(caught.value)
    assert "811.7 GB of weights" in text
    assert re.search(r"TP\d x PP\d: node.*: each A10G lacks \d+\.\d\d GB: weights", text)
    assert "--quantization" in text
    assert "--cpu-offload-gb auto" in text


def test_every_loser_has_a_reason() -> None:
    """Too little memory on which node and how many bytes, or slower by how much."""
    report = plan("llama-3.1-70b", cluster("4 x H200"))
    assert {loser.candidate.describe() for loser in report.losers} >= {"1 x TP4 x PP1", "1 x TP1 x PP1"}
    for loser in report.losers:
        assert re.search(r"lacks [\d.]+ [GM]B|% slower|within", loser.why), loser.why


def test_wishes_are_kept_or_refused_in_words() -> None:
    """What the user fixes is not second-guessed."""
    report = plan("llama-3.1-8b", cluster("8 x H100"), tp_size=2, pp_size=2, num_replicas=1)
    assert report.chosen.describe() == "1 x TP2 x PP2"
    assert report.plan.settings()["pipeline_layers"] == report.chosen.replicas[0].layer_counts
    with pytest.raises(ConfigError, match="num_attention_heads=32"):
        plan("llama-3.1-8b", cluster("8 x H100"), tp_size=3)
    with pytest.raises(PlacementImpossible, match="asks for 16 devices; the cluster has 8"):
        plan("llama-3.1-8b", cluster("8 x H100"), tp_size=8, num_replicas=2)
    with pytest.raises(PlacementImpossible, match="in one node"):
        plan("llama-3.1-8b", cluster("2 x H100", 4), tp_size=4)
    with pytest.raises(PlacementImpossible, match="fast enough"):
        plan("llama-3.1-405b", cluster("8 x H200"), max_ttft_seconds=0.001)


def test_ranks_sit_where_the_plan_says_and_nowhere_twice() -> None:
    """Ranks of a group share a node; all ranks are in order; no device is given to two of them."""
    report = plan("deepseek-r1", cluster("8 x H100", 4))
    devices = [(rank.node, rank.gpu) for replica in report.plan.replicas for rank in replica.ranks]
    assert len(devices) == len(set(devices)) == report.chosen.num_gpus
    for replica in report.plan.replicas:
        assert [rank.global_rank for rank in replica.ranks] == list(range(len(replica.ranks)))
        assert sum(replica.layer_counts) == 61
        for stage in range(replica.pp_size):
            assert len({rank.node for rank in replica.stage(stage)}) == 1


def test_money() -> None:
    """Two dollars a GPU and hour, so many tokens a second."""
    report = plan("llama-3.1-8b", cluster("2 x H200"), price_per_gpu_hour=2.0)
    assert report.price_per_hour == 4.0
    expected = 4.0 / (report.chosen.tokens_per_second * 3600) * 1e6
    assert report.price_per_million_tokens == pytest.approx(expected)
    priced = parse_topology({"nodes": [{"name": "a", "gpus": "1 x H200", "price_per_hour": 7}]})
    assert plan("llama-3.1-8b", priced).price_per_hour == 7.0
    assert plan("llama-3.1-8b", cluster("1 x H200")).price_per_million_tokens is None


def test_planning_needs_no_torch_and_no_ray() -> None:
    """Also for the largest models on 64 nodes; so it starts in a moment, anywhere."""
    code = (
        "import sys\nfrom argosy.deploy import cli\n"
        "for model in ('llama-3.1-405b', 'deepseek-r1', 'bloom-176b'):\n"
        "    assert cli.main(['plan', model, '--gpus', '8 x H200', '--nodes', '64', '--json']) == 0\n"
        "found = [name for name in ('torch', 'ray', 'transformers', 'numpy') if name in sys.modules]\n"
        "print(found, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stderr.strip() == "[]"


def test_a_large_cluster_is_planned_without_working_a_size_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 nodes took 2.3 s, most of it sizes of the same blocks; the promise is an answer within 2 s."""
    asked: list[tuple[int, int]] = []
    work_out = StageBytes.kv_bytes_per_token

    def kv_bytes_per_token(self: StageBytes, tp_size: int, num_layers: int) -> int:
        asked.append((tp_size, num_layers))
        return work_out(self, tp_size, num_layers)

    monkeypatch.setattr(StageBytes, "kv_bytes_per_token", kv_bytes_per_token)
    report = plan("llama-3.1-405b", cluster("8 x H100", nodes=64))
    assert report.chosen.replicas
    # once for each size of a stage, and for each ledger; every layout asks for tens of thousands
    assert len(asked) < 3_000


def test_the_shipped_calibrations_can_be_read() -> None:
    """A device without one of its own takes the H200's ratios."""
    assert default_calibration("H200") is default_calibration("H200")
    assert default_calibration("A10G").device == default_calibration("H200").device
    assert default_calibration("CPU").device == "CPU"


def test_bytes_that_are_asked_for_must_be_there() -> None:
    """kv_cache_memory_bytes is taken at its word by ranks; a plan that can't keep it is no plan."""
    shape = read_model_shape("llama-3.1-8b")
    for asked, is_there in ((4, True), (7, False)):
        serving = make_serving(shape, max_model_len=8192, kv_cache_memory_bytes=asked * 2**30)
        if is_there:
            assert plan_cluster(shape, cluster("1 x A10G"), None, serving).chosen.replicas[0].num_blocks == asked * 512
        else:
            with pytest.raises(PlacementImpossible, match="lacks"):
                plan_cluster(shape, cluster("1 x A10G"), None, serving)
