"""The doctor of a cluster: what is sound is shown, what is not has a line with its fix, and nothing of it stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray

from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy import cli, doctor_cluster, preflight
from argosy.deploy.cluster_layout import choose_layout, free_part
from argosy.deploy.live_cluster import named_by_address
from argosy.deploy.preflight_model import Wish
from argosy.deploy.ray_session import RaySession
from argosy.placement import ray_cluster
from argosy.placement.topology import ClusterTopology, Link, Node, NodeLink

MODEL = Path(__file__).parents[2] / "argosy" / "default_model"


def test_a_sound_node_and_a_model_that_was_cut_off(
    ray_session: RaySession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same look as before a start, for people and for programs."""
    ask: Any = {"address": "of this test", "with_sums": False}
    doctor_cluster.main(model=str(MODEL), as_json=False, **ask)
    shown = capsys.readouterr().out
    assert "127.0.0.1 has" in shown
    assert "1 nodes looked at" in shown

    broken = Path(shutil.copytree(MODEL, tmp_path / "model"))
    with (broken / "model.safetensors").open("r+b") as weights:
        weights.truncate(100_000)
    assert doctor_cluster.main(model=str(broken), as_json=True, **ask) == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    (fault,) = [fault for fault in faults if fault["check"] == "model-broken"]
    assert (fault["node"], fault["level"]) == ("127.0.0.1", "fail")
    assert "model.safetensors" in fault["found"]


def test_a_plan_of_the_running_cluster_is_what_serve_would_choose(
    ray_session: RaySession, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nodes by their addresses and memory that is really free; what others hold is no room."""
    words = ["plan", str(MODEL), "--ray-address", "of this test", "--max-model-len", "512", "--json"]
    assert cli.main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {rank["node"] for rank in answer["ranks"]} == {"127.0.0.1"}
    offers = ray_cluster.offers()
    config = ServingConfig.from_mapping({"model": str(MODEL), "layout": "auto", "max_model_len": 512})
    inspection = preflight.inspect_cluster()
    topology = ray_cluster.discover(inspection.probes(), links=inspection.node_links())
    layout = choose_layout(config, topology, inspection, offers, print)
    assert answer["settings"]["tensor_parallel_size"] == layout.config.parallel.tensor_parallel_size
    assert len(answer["replicas"]) == len(layout.plans)
    all_taken = [msgspec.structs.replace(offer, free={}) for offer in offers]
    assert free_part(topology, all_taken).nodes == ()


def test_of_two_nodes_that_differ_the_one_that_asks_is_right() -> None:
    """Ray's order is that of random ids, so every other cluster of two named its head as the odd node."""
    nodes = [
        {"NodeID": name, "NodeManagerAddress": address, "Alive": name != "dead"}
        for name, address in (("aa", "10.0.0.12"), ("dead", "10.0.0.1"), ("bb", "10.0.0.11"), ("cc", "10.0.0.10"))
    ]
    assert list(preflight._own_first(nodes, "bb")) == ["bb", "cc", "aa"]


def test_raylets_of_one_machine_have_names_of_their_own() -> None:
    """Ray's ids are 56 hex digits; people know addresses."""
    nodes = [Node(node_id=f"{number:056x}", address=address) for number, address in enumerate(("a", "b", "a"))]
    way = Link(kind="network", gbytes_per_second=1.0, latency_us=9.0)
    links = [NodeLink(first=nodes[0].node_id, second=nodes[2].node_id, link=way)]
    found = named_by_address(ClusterTopology(nodes=tuple(nodes), links=tuple(links)))
    assert [node.node_id for node in found.nodes] == ["a", "a-2", "b"]
    assert found.link_between("a-2", "a") == way


def test_a_probe_answers_as_an_actor_on_its_node_and_goes(ray_session: RaySession) -> None:
    """On a cluster of several nodes each has one; here the one node calls itself."""
    (offer,) = ray_cluster.offers()
    with preflight._probes([offer.node_id]) as probes:
        probe = probes[offer.node_id]
        port = ray.get(probe.listen.remote("127.0.0.1", "s" * 32), timeout=30.0)
        link = json.loads(ray.get(probe.call.remote("a", "b", "127.0.0.1", port, "s" * 32), timeout=30.0))
        assert link.get("problem", "") == ""
        facts = json.loads(ray.get(probe.facts.remote("127.0.0.1", Wish()), timeout=30.0))
        assert facts["address"] == "127.0.0.1"
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(probe.listen.remote("127.0.0.1", "s" * 32), timeout=30.0)
