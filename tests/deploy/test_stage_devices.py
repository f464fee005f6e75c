"""What a machine's cards have free, read from the driver's tool: each process counts those that it may see."""

import os
from pathlib import Path

import pytest

from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy import stage_devices
from argosy.deploy.stage_devices import local_devices, read_cards, visible

TABLE = """0, NVIDIA H200, 143771, 4, GPU-aa
1, NVIDIA H200, 143771, 70000, GPU-ab
2, NVIDIA H200, 143771, [N/A], GPU-ac
3, NVIDIA H200, 143771, 10, GPU-ad
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `nvidia-smi` that prints the table."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{TABLE}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(stage_devices, "first_card", lambda: "NVIDIA H200")


def config(**given: object) -> ServingConfig:
    return ServingConfig.from_mapping({"model": "m", **given})


def test_cards_are_read_and_lines_that_are_not_understood_left_out(tool: None) -> None:
    """A card in a strange state says [N/A]."""
    cards = read_cards()
    assert [card.index for card in cards] == [0, 1, 3]
    assert cards[1].usable_bytes == (143771 - 70000) << 20


def test_a_process_counts_the_cards_that_it_sees(tool: None) -> None:
    """By index or the beginning of a UUID, in that order; after a wrong name nothing is seen."""
    cards = read_cards()
    assert [card.index for card in visible(cards, None)] == [0, 1, 3]
    assert [card.index for card in visible(cards, "3,GPU-ab")] == [3, 1]
    assert [card.index for card in visible(cards, "1,7,0")] == [1]
    assert visible(cards, "") == []


def test_a_stage_has_what_the_poorest_of_its_cards_has(tool: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank i has card i; too few cards are said elsewhere."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    two = local_devices(config(pipeline_parallel_size=2))
    assert [gpu.index for gpu in two] == [0, 1]
    assert local_devices(config(tensor_parallel_size=2, pipeline_parallel_size=2)) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert [gpu.index for gpu in local_devices(config(tensor_parallel_size=2))] == [1]
    assert [gpu.model for gpu in local_devices(config(pipeline_parallel_size=3, device="cpu"))] == ["CPU"] * 3


def test_without_the_tool_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then layers are split evenly."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_cards() == []
