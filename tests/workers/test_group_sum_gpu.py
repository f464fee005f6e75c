"""Sums over two and four real cards, by every way there is, against NCCL: the check of `bench_group_sum.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NUM_CARDS = torch.cuda.device_count()
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "bench_group_sum.py"


@pytest.mark.gpu
@pytest.mark.timeout(150)
@pytest.mark.parametrize("cards", [2, 4])
@pytest.mark.parametrize("width", [4096, 5120])
def test_all_ways_give_the_sum_and_the_same_bits_on_all_ranks(cards: int, width: int) -> None:
    """Two hundred steps of random numbers of rows; a rank that were let go too early would read what is not there."""
    if cards > NUM_CARDS:
        pytest.skip(f"needs {cards} cards")
    command = [sys.executable, str(SCRIPT), "--cards", str(cards), "--width", str(width), "--tokens", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    (error,) = [row["largest_relative_error"] for row in found if "largest_relative_error" in row]
    assert error < 1e-3
    (copied,) = [row for row in found if row.get("check") == "copies"]
    assert copied["recorded"]
    assert max(copied[way]["error"] for way in ("queued", "by_graph")) < 2e-2  # sixteen roundings to 16 bits
