"""How long a start takes: more steps to record, more layers, more ranks; nothing where nobody measured."""

import msgspec
import pytest

from argosy.placement.calibration import default_calibration
from argosy.placement.layout import Traffic
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan_report import PlanOptions, PlanReport
from argosy.placement.planner import make_serving, plan_cluster
from argosy.placement.rank_memory import Serving
from argosy.placement.start_seconds import start_of
from argosy.placement.topology_sources import parse_topology


def plan(model: str, tp_size: int = 1, pp_size: int = 1, *, gpu: str = "H200", **serving: object) -> PlanReport:
    """As `argosy plan` would have it."""
    shape = read_model_shape(model)
    chosen: Serving = msgspec.structs.replace(make_serving(shape), max_num_seqs=1024, **serving)
    topology = parse_topology({"nodes": [{"name": "node", "gpus": f"{tp_size * pp_size} x {gpu}"}]})
    options = PlanOptions(tp_size=tp_size, pp_size=pp_size, num_replicas=1, traffic=Traffic())
    return plan_cluster(shape, topology, options, chosen)


def test_what_is_recorded_takes_the_time() -> None:
    """70B over two cards waits for its groups and for each kernel of 80 layers; unrecorded, for hardly anything."""
    small, large = start_of(plan("qwen3-0.6b")), start_of(plan("llama-3.1-70b", 2))
    assert 4 < small < 9 < 12 < large < 30
    eager = start_of(plan("llama-3.1-70b", 2, graph_rows=0))
    assert eager < large - 4
    assert start_of(plan("llama-3.1-70b", 2, graph_rows=16)) < large - 2


def test_stages_start_side_by_side() -> None:
    """Two stages of 40 layers are ready sooner than two ranks of 80, though both form groups."""
    calibration = default_calibration("H200")
    staged, grouped = start_of(plan("llama-3.1-70b", pp_size=2)), start_of(plan("llama-3.1-70b", 2))
    assert calibration.start_seconds + calibration.start_group_seconds < staged < grouped


@pytest.mark.parametrize("gpu", ["H100", "L4", "CPU"])
def test_nothing_is_said_of_cards_that_nobody_started_on(gpu: str) -> None:
    """Another card's host compiles, launches and reads at another pace."""
    dtype = {"dtype_bytes": 4, "kv_dtype_bytes": 4} if gpu == "CPU" else {}
    assert start_of(plan("qwen3-0.6b", gpu=gpu, **dtype)) == 0.0
