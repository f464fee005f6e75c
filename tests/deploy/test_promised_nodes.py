"""A plan waits for the nodes that `ray up` promised, and not for ever."""

from pathlib import Path

import pytest

from argosy.deploy import promised_nodes as module
from argosy.deploy.promised_nodes import promised_nodes, wait_for_nodes

FILE = """
head_node_type: local.cluster.node
available_node_types:
  local.cluster.node: {min_workers: 2, max_workers: 2, resources: {}, node_config: {}}
"""


def test_the_head_and_its_workers_are_promised(tmp_path: Path) -> None:
    """Elsewhere, or where the file is not what it was, nothing is."""
    assert promised_nodes(tmp_path) == 0
    (tmp_path / "ray_bootstrap_config.yaml").write_text(FILE)
    assert promised_nodes(tmp_path) == 3
    (tmp_path / "ray_bootstrap_config.yaml").write_text("[1, 2")
    assert promised_nodes(tmp_path) == 0


def test_it_goes_on_when_all_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says who it waits for until then."""
    (tmp_path / "ray_bootstrap_config.yaml").write_text(FILE)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)
    counts, told = iter([1, 1, 2, 3]), []
    assert wait_for_nodes(lambda: next(counts), tmp_path, lambda text, part: told.append(text)) == ""
    assert told == ["waiting for nodes (1 of 3)"] * 2 + ["waiting for nodes (2 of 3)"]


def test_it_goes_on_without_those_that_don_t_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is switched off must not keep the others idle."""
    (tmp_path / "ray_bootstrap_config.yaml").write_text(FILE)
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.0)
    assert wait_for_nodes(lambda: 1, tmp_path, lambda text, part: None).startswith("1 of the 3 nodes")
