"""No flag says how: the layout follows from what the nodes have, and nodes that are unfit are left out or named."""

from typing import Any

import msgspec
import pytest

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import PlacementImpossible, PreflightFailed
from argosy.deploy import model_folder, settings
from argosy.deploy.cluster_layout import Layout, choose_layout

pytest.importorskip("ray")

from argosy.deploy.preflight import Inspection
from argosy.deploy.ray_launch import ranks_as_ray_starts_them
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan_report import PlanOptions
from argosy.placement.planner import plan_cluster
from argosy.placement.preflight_facts import GpuFacts, NodeFacts
from argosy.placement.preflight_rules import Wanted
from argosy.placement.rank_memory import Serving
from argosy.placement.seating import Offer
from argosy.placement.topology_sources import parse_topology, topology_from_ray

NEEDED = ("torch", "ray", "transformers", "tokenizers", "safetensors", "msgspec", "numpy")
SOUND = NodeFacts(
    address="", hostname="h", python="3.11.7", system="Linux x86_64", packages=dict.fromkeys(NEEDED, "1"), code="c",
    interface="eth0", interfaces=("eth0",), mtu=1500, memory_bytes=8 << 30, free_memory_bytes=8 << 30,
    free_shm_bytes=4 << 30, free_temp_bytes=9 << 30, num_cpus=4, open_files=65536,
)  # fmt: skip


def config(**given: Any) -> ServingConfig:
    """Of the model that ships, as `argosy serve` reads it."""
    given = {"model": settings.default_model(), "max_model_len": 256, **given}
    made, _ = settings.make_config(settings.plan_what_is_open(given))
    return model_folder.localize(made)


def choose(wanted: ServingConfig, memory_mib: dict[str, int], **odd: NodeFacts) -> tuple[Layout, list[str]]:
    """On nodes of two CPUs each with so much memory; `odd` replaces some nodes' facts."""
    nodes = {name: odd.get(name, msgspec.structs.replace(SOUND, address=name)) for name in memory_mib}
    memory = {name: mib << 20 for name, mib in memory_mib.items()}
    inspection = Inspection(nodes=nodes, ray_memory=memory)
    rows = [
        {"Alive": True, "NodeID": name, "NodeManagerAddress": name, "Resources": {"CPU": 2.0, "memory": size}}
        for name, size in memory.items()
    ]
    offers = [Offer(node_id=name, address=name, total={"CPU": 2.0}, free={"CPU": 2.0}) for name in memory]
    notes: list[str] = []
    return choose_layout(wanted, topology_from_ray(rows, inspection.probes()), inspection, offers, notes.append), notes


def nodes_of(layout: Layout) -> list[list[str]]:
    return [[rank.node for rank in plan.ranks] for plan in layout.plans]


def test_one_node_is_one_rank() -> None:
    """`argosy serve` on a laptop."""
    layout, notes = choose(config(), {"a": 4096})
    assert nodes_of(layout) == [["a"]]
    assert any("planned" in note for note in notes)


def test_two_nodes_that_hold_it_are_two_replicas_and_two_that_don_t_are_two_stages() -> None:
    """The same command on both; the second pair has too little memory for a node alone."""
    assert nodes_of(choose(config(), {"a": 4096, "b": 4096})[0]) == [["a"], ["b"]]
    layout, _ = choose(config(), {"a": 24, "b": 24})
    assert nodes_of(layout) == [["a", "b"]]
    assert layout.config.parallel.pipeline_parallel_size == 2


def test_a_head_without_gpus_gets_no_rank_beside_nodes_that_have_some() -> None:
    """It runs the doors and Ray's own services; on a cluster of CPUs it would take part."""
    card = GpuFacts(index=0, uuid="GPU-1", name="NVIDIA H100", memory_mib=81559, used_mib=0, driver="580.1")
    big = msgspec.structs.replace(SOUND, address="b", gpus=(card,))
    nodes = {"a": msgspec.structs.replace(SOUND, address="a"), "b": big}
    inspection = Inspection(nodes=nodes, wanted=Wanted(ray_gpus={"b": 1.0}))
    resources = {"a": {"CPU": 2.0}, "b": {"CPU": 2.0, "GPU": 1.0}}
    rows = [{"Alive": True, "NodeID": n, "NodeManagerAddress": n, "Resources": r} for n, r in resources.items()]
    offers = [Offer(node_id=n, address=n, total=r, free=r) for n, r in resources.items()]
    topology = topology_from_ray(rows, inspection.probes())
    for wanted in (config(), config(tensor_parallel_size=1)):
        assert nodes_of(choose_layout(wanted, topology, inspection, offers, lambda text: None)) == [["b"]]


def test_sizes_that_are_given_are_kept() -> None:
    """A stage on each node, whatever the planner would like."""
    layout, _ = choose(config(pipeline_parallel_size=2), {"a": 4096, "b": 4096})
    assert nodes_of(layout) == [["a", "b"]]
    layout, _ = choose(config(data_parallel_size=2), {"a": 4096, "b": 4096})
    assert nodes_of(layout) == [["a"], ["b"]]


def test_an_unfit_node_is_left_out_and_said() -> None:
    """One healthy node is enough for this model."""
    broken = msgspec.structs.replace(SOUND, address="b", free_shm_bytes=1 << 20)
    layout, notes = choose(config(), {"a": 4096, "b": 4096}, b=broken)
    assert nodes_of(layout) == [["a"]]
    assert layout.unfit == ("b",)
    assert any(note.startswith("not used: b: /dev/shm has 1 MiB free") for note in notes)


def test_where_the_rest_is_not_enough_every_fault_is_named() -> None:
    """Two stages were asked for, and one of two nodes is unfit."""
    broken = msgspec.structs.replace(SOUND, address="b", code="other")
    with pytest.raises(PreflightFailed, match="b: sources of argosy: other here, c on a"):
        choose(config(pipeline_parallel_size=2), {"a": 4096, "b": 4096}, b=broken)


def test_a_model_that_fits_nowhere_is_refused_with_numbers() -> None:
    """Before any rank starts."""
    with pytest.raises(PlacementImpossible, match="lacks"):
        choose(config(), {"a": 8})


def test_a_group_that_no_node_holds_spans_nodes_where_it_was_asked_for() -> None:
    """Half of it on each of two nodes, in order, and what that costs is said; a bundle for each half."""
    layout, notes = choose(config(tensor_parallel_size=4), {"a": 4096, "b": 4096, "c": 4096})
    assert nodes_of(layout) == [["a", "a", "b", "b"]]
    assert [[rank.tp_rank for rank in place] for place in layout.plans[0].places()] == [[0, 1], [2, 3]]
    assert any("each spans 2 nodes" in note for note in notes)
    layout, notes = choose(config(tensor_parallel_size=2, pipeline_parallel_size=2), {"a": 4096, "b": 4096})
    assert nodes_of(layout) == [["a", "a", "b", "b"]]
    assert [len(place) for place in layout.plans[0].places()] == [2, 2]
    assert notes == []
    with pytest.raises(PlacementImpossible, match="1 stage of 8 CPU"):
        choose(config(tensor_parallel_size=8), {"a": 4096, "b": 4096})


def test_ray_s_ranks_know_no_card_s_number() -> None:
    """The plan counts the cards of a node from 0; a rank under Ray sees one, and its number is 0 again."""
    topology = parse_topology({"nodes": [{"name": "n", "gpus": "4 x H200"}]})
    report = plan_cluster(read_model_shape("llama-3.1-8b"), topology, PlanOptions(pp_size=1))
    planned = [rank.gpu for replica in report.plan.replicas for rank in replica.ranks]
    assert planned == [0, 1, 2, 3]
    started = [rank for replica in report.plan.replicas for rank in ranks_as_ray_starts_them(replica)]
    assert [rank.gpu for rank in started] == [None] * 4
    assert [rank.node for rank in started] == ["n"] * 4


@pytest.mark.parametrize(("free", "caps", "is_uneven"), [((140, 70), [], True), ((140, 140), [0, 70], True),
                                                         ((140, 138), [], False)])  # fmt: skip
def test_stages_of_unequal_room_are_split_by_it(free: tuple[int, int], caps: list[int], is_uneven: bool) -> None:
    """`argosy serve -pp 2` on two nodes with a card each: of what is free, or of what the settings allow."""
    nodes = [
        {"name": name, "gpus": [{"model": "H200", "count": 1, "free_gib": gib}]}
        for name, gib in zip("ab", free, strict=True)
    ]
    topology = parse_topology({"nodes": nodes})
    wanted = config(pipeline_parallel_size=2, stage_memory_gb=caps, layout="given", device="cuda", max_num_seqs=1 << 20,
                    max_num_batched_tokens=1 << 20)  # fmt: skip
    offers = [Offer(node_id=name, address=name, total={"GPU": 1.0}, free={"GPU": 1.0}) for name in "ab"]
    facts = {name: msgspec.structs.replace(SOUND, address=name) for name in "ab"}
    notes: list[str] = []
    inspection = Inspection(nodes=facts, ray_memory=dict.fromkeys("ab", 8 << 30))
    (plan,) = choose_layout(wanted, topology, inspection, offers, notes.append).plans
    alike = parse_topology({"nodes": [{"name": "n", "gpus": "2 x H200"}]})
    shape, options = read_model_shape(wanted.model.model), PlanOptions(tp_size=1, pp_size=2)
    serving = msgspec.structs.replace(Serving.from_config(wanted, shape), stage_bytes=())
    planned = plan_cluster(shape, alike, options, serving).chosen.replicas[0].layer_counts
    assert (plan.layer_counts != planned) == is_uneven  # stages that are alike: as `argosy plan` would
    assert (
        plan.layer_counts[0] >= plan.layer_counts[1] + is_uneven
    )  # by room; else since the last stage has the head besides
    assert any("layers split to suit" in note for note in notes) == (plan.layer_counts != (4, 4))
    assert {rank.node for rank in plan.ranks} == {"a", "b"}
