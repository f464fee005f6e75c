"""A layer behind its attention in one launch, on one card and over two: the check of `tune_chain.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NUM_CARDS = torch.cuda.device_count()
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels" / "tune_chain.py"


@pytest.mark.gpu
@pytest.mark.timeout(150)
@pytest.mark.parametrize(("layout", "cards"), [("8b:1", 1), ("8b:4", 2), ("70b:4", 2)])
def test_a_layer_in_one_launch_is_what_its_products_give(layout: str, cards: int) -> None:
    """Against plain torch in float32; the residual is the same on all ranks, bit by bit."""
    if cards > NUM_CARDS:
        pytest.skip(f"needs {cards} cards")
    command = [sys.executable, str(SCRIPT), "--over", str(cards), "--layouts", layout, "--check", "--compiled"]
    ran = subprocess.run([*command, "--limit", "100"], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (row,) = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    ((of_product, of_residual),) = row["errors"].values()
    assert of_product < 1e-2
    assert of_residual < 1e-2
