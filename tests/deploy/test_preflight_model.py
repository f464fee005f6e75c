"""What a node says of its copy of a model's folder."""

import json
import shutil
from pathlib import Path

import pytest

import argosy
from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy import preflight
from argosy.deploy.preflight_model import Wish, examine_model

DEFAULT = Path(argosy.__file__).parent / "default_model"
RENAMED = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Somebody's Llama, under a name that nobody knows."""
    copy = tmp_path / "model"
    shutil.copytree(DEFAULT, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["OurOwn"], "model_type": "ours"}))
    return copy


def test_a_model_that_overrides_make_servable_is_no_fault(folder: Path) -> None:
    """`--hf-overrides` says what it is; the nodes refused it all the same, each by itself."""
    assert "OurOwn" in examine_model(Wish(str(folder))).problem
    facts = examine_model(Wish(str(folder), overrides=RENAMED))
    assert (facts.problem, facts.num_bytes > 0) == ("", True)


def test_nodes_look_at_the_model_as_it_is_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "inspect_cluster", lambda **given: given["wish"])
    config = ServingConfig.from_mapping({"model": str(folder), "hf_overrides": RENAMED, "load_format": "dummy"})
    assert preflight.inspect_for(config, print) == Wish(str(folder), False, RENAMED)


def test_copies_that_differ_are_told_apart(folder: Path, tmp_path: Path) -> None:
    """A download that broke off, and was filled with zeros; without weights nobody opens them."""
    wish = Wish(str(folder), overrides=RENAMED)
    before = examine_model(wish).marks
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-100, 2)
        file.write(bytes(100))
    after = examine_model(wish).marks
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
    assert "model.safetensors" not in examine_model(wish._replace(with_weights=False)).marks


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "gone") in examine_model(Wish(str(tmp_path / "gone"))).problem
