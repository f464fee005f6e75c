"""What the scripts of figures reckon: how long a card waits between steps, and how far rounding moves answers."""

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from scripts import BENCHMARKS, load_script


def kernel(name: str, began: float, took: float, stream: int = 7) -> dict[str, Any]:
    """A line of a profiler's trace, in microseconds."""
    return {"ts": began, "dur": took, "name": name, "args": {"stream": stream}}


def test_the_card_waits_from_a_step_s_last_kernel_to_the_next_one_s_first() -> None:
    """Two steps of 100 us: 3 us and then 6 until the next begins, 2 and 1 between kernels of one; a kernel that begins
    before the one ahead has ended leaves no gap, and copies on another stream count for nothing."""
    idle_of = load_script("gpu/profiled_rank.py").idle_of
    found = idle_of([
        kernel("_prepare_kernel", 0, 10), kernel("gemv", 9, 50), kernel("_attention", 61, 36),
        kernel("_prepare_kernel", 100, 10), kernel("gemv", 111, 83), kernel("copy", 150, 49, stream=9),
        kernel("_prepare_kernel", 200, 10), kernel("gemv", 215, 20),
    ])  # fmt: skip
    assert (found["steps"], found["step_us"]) == (2, 100.0)
    assert found["idle_between_steps"] == pytest.approx((3 + 6) / 200)
    assert found["idle_between_steps_us"] == pytest.approx(4.5)
    assert found["idle_within_steps"] == pytest.approx((2 + 1) / 200)
    assert found["kernels_a_step"] == 2.5
    made = found["made_of_us"]
    assert (made["products"], made["attention"], made["idle"]) == ((49 + 83) / 2, 18.0, (3 + 6 + 2 + 1) / 2)


def test_distributions_are_compared_by_kl_and_by_their_first() -> None:
    """Half and half beside one quarter and three: ln(4/3) / 2 nats; the other position is the same in both."""
    compare = load_script("quality/compare_precision.py").compare
    plain = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    kl = math.log(4 / 3) / 2
    assert compare(plain, other) == {"kl_mean": round(kl / 2, 6), "kl_max": round(kl, 6), "top1": 0.5}
    assert compare(other, plain)["kl_max"] != round(kl, 6), "of the plain one to the other, not back"
    assert compare(plain, plain) == {"kl_mean": 0.0, "kl_max": 0.0, "top1": 1.0}


def test_rounding_the_model_that_ships_moves_its_answers_a_little_and_is_printed() -> None:
    """Weights, with and without inputs, and the cache: each further from the plain model than arithmetic in another
    order is, and none of them another model."""
    command = [sys.executable, str(BENCHMARKS / "quality" / "compare_precision.py")]
    command += ["--tokens", "48", "--one-by-one", "8", "--quantization", "fp8", "fp8_block", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    rows = {row["variant"]: row for row in map(json.loads, done.stdout.splitlines()[: done.stdout.count('{"model"')])}
    assert set(rows) == {
        "plain again, token by token", "fp8, weights only", "fp8, weights and inputs", "fp8_block, weights only",
        "fp8_block, weights and inputs", "cache int8", "cache e4m3", "cache e4m3 with scales", "fp8 and cache e4m3",
    }  # fmt: skip
    again = rows.pop("plain again, token by token")
    assert again["kl_mean"] < 1e-3
    for name, row in rows.items():
        assert again["kl_mean"] < row["kl_mean"] < 0.05, row
        assert 0.6 < row["top1"] <= 1.0, row
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{name:42} KL"))
        assert f"KL {row['kl_mean']:.5f}" in line
        assert f"top-1 {row['top1']:.1%}" in line
    assert rows["fp8, weights only"]["weights_ratio"] < 0.7
    assert rows["cache e4m3"]["cache_ratio"] == 0.5
