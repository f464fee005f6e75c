"""What `swap_space` takes of cards and hosts, before anything is started."""

import pytest

from argosy.cluster.protocol.swap import NO_SWAP
from argosy.placement.layout import LayoutJudge, Traffic
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan_report import PlanOptions, PlanReport
from argosy.placement.planner import make_serving, plan_cluster
from argosy.placement.rank_memory import StageBytes
from argosy.placement.swap_plan import host_bytes_by_node, plan_host_blocks, plan_swap
from argosy.placement.swap_space import num_host_blocks, staging_bytes
from argosy.placement.topology_sources import parse_topology

GIB = 2**30


def plan(swap_space: float | str, *, memory_gib: int = 0, tp_size: int = 2) -> PlanReport:
    """llama-3.1-8b on a node of two H200."""
    shape = read_model_shape("llama-3.1-8b")
    serving = make_serving(shape, max_model_len=8192, swap_space=swap_space)
    node = {"name": "node", "gpus": "2 x H200", "memory_gib": memory_gib} if memory_gib else {
        "name": "node", "gpus": "2 x H200"}  # fmt: skip
    options = PlanOptions(tp_size=tp_size, pp_size=1, num_replicas=1)
    return plan_cluster(shape, parse_topology({"nodes": [node]}), options, serving)


def test_buffers_for_the_copies_come_out_of_what_blocks_could_have() -> None:
    """An 8B model's block has 1 MiB on each of two ranks; the buffers are a little more than half a GiB."""
    plain, swapping = (plan(amount).chosen.replicas[0].stages[0].memory for amount in (0, 16))
    assert swapping.kv_budget_bytes == plain.kv_budget_bytes - staging_bytes(plain.block_bytes)
    assert staging_bytes(plain.block_bytes) == (4 * 128 + 64) * 2**20
    assert staging_bytes(300 * 2**20) == 5 * 300 * 2**20


def test_a_number_is_taken_at_its_word_and_auto_is_bounded() -> None:
    layout = plan(16).chosen.replicas[0]
    nodes = plan(16).topology.nodes
    assert plan_host_blocks(layout, plan(16).serving, nodes) == 16 * 1024
    assert host_bytes_by_node(layout, 16 * 1024) == {"node": 32 * GIB}
    assert plan_host_blocks(layout, plan(0).serving, nodes) == 0
    auto = plan("auto", memory_gib=64)
    assert plan_host_blocks(auto.chosen.replicas[0], auto.serving, auto.topology.nodes) == 16 * 1024
    assert num_host_blocks(None, 2**20, 100, 0) == 400


def test_the_plan_says_what_it_takes_of_a_host_and_that_it_is_too_much() -> None:
    (said,) = [note for note in plan(16, memory_gib=512).notes if "swap_space" in note]
    assert "16,384 blocks = 262,144 tokens a replica in the hosts' memory, 32.0 GiB of node" in said
    assert any("node has 24.0 GiB of memory: too little" in note for note in plan(16, memory_gib=24).notes)
    assert not any("swap_space" in note for note in plan(0).notes)


def test_costs_are_those_of_the_link_and_of_a_full_step() -> None:
    """A token of 8B takes tens of microseconds on an H200, its keys and values two or three on the link."""
    report = plan(16, tp_size=1)
    layout = report.chosen.replicas[0]
    judge = LayoutJudge(StageBytes(report.model, report.serving), Traffic())
    group = layout.stages[0].group
    cost = judge.cost([group], 1, layout.layer_counts, [])
    costs = plan_swap(layout, report.serving, report.topology.nodes, cost, judge.calibration_of(group))
    assert costs.num_host_blocks == 8 * 1024
    assert costs.block_bytes == 2 * 2**20
    assert costs.in_seconds == pytest.approx(2 * 2**20 / 50e9, rel=0.1)
    assert 10e-6 < costs.token_seconds < 60e-6
    assert costs.is_worth(1, 1, 16)
    plain = plan(0, tp_size=1)
    nothing = plan_swap(
        plain.chosen.replicas[0], plain.serving, plain.topology.nodes, cost, judge.calibration_of(group)
    )
    assert nothing is NO_SWAP
