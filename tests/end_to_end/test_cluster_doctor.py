"""The doctor of a cluster: what is sound is shown, what is not has a line with its fix, and nothing of it stays."""

import json
import shutil
from pathlib import Path

import pytest
import ray

from argosy.deploy import doctor_cluster, preflight
from argosy.deploy.ray_session import RaySession
from argosy.placement import ray_cluster

MODEL = Path(__file__).parents[2] / "argosy" / "default_model"


def test_a_sound_node_and_a_model_that_was_cut_off(
    ray_session: RaySession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same look as before a start, for people and for programs."""
    ask = {"address": "of this test", "with_sums": False}
    doctor_cluster.main(model=str(MODEL), as_json=False, **ask)  # type: ignore[arg-type]  # one dict for both
    shown = capsys.readouterr().out
    assert "127.0.0.1 has" in shown
    assert "1 nodes looked at" in shown

    broken = Path(shutil.copytree(MODEL, tmp_path / "model"))
    with (broken / "model.safetensors").open("r+b") as weights:
        weights.truncate(100_000)
    assert doctor_cluster.main(model=str(broken), as_json=True, **ask) == 1  # type: ignore[arg-type]
    faults = json.loads(capsys.readouterr().out)["faults"]
    (fault,) = [fault for fault in faults if fault["check"] == "model-broken"]
    assert (fault["node"], fault["level"]) == ("127.0.0.1", "fail")
    assert "model.safetensors" in fault["found"]


def test_a_probe_answers_as_an_actor_on_its_node_and_goes(ray_session: RaySession) -> None:
    """On a cluster of several nodes each has one; here the one node calls itself."""
    (offer,) = ray_cluster.offers()
    with preflight._probes([offer.node_id]) as probes:
        probe = probes[offer.node_id]
        port = ray.get(probe.listen.remote("127.0.0.1", "s" * 32), timeout=30.0)
        link = json.loads(ray.get(probe.call.remote("a", "b", "127.0.0.1", port, "s" * 32), timeout=30.0))
        assert link.get("problem", "") == ""
        facts = json.loads(ray.get(probe.facts.remote("127.0.0.1", "", False), timeout=30.0))
        assert facts["address"] == "127.0.0.1"
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(probe.listen.remote("127.0.0.1", "s" * 32), timeout=30.0)
