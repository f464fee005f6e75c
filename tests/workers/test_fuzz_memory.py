"""A few of the random configs that `benchmarks/planner/fuzz_memory.py` draws by the hundred thousand."""

import random
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script


@pytest.fixture(scope="module")
def fuzz() -> Any:
    """The script as a module."""
    return load_script("planner/fuzz_memory.py")


def test_what_the_plan_says_fits_does_fit(fuzz: Any, tmp_path: Path) -> None:
    """Weights and blocks of real ranks, rounded as the allocator rounds, on cards of all sizes."""
    proved = 0
    for number in range(120):
        rng = random.Random(f"test/{number}")
        proved += fuzz.check(fuzz.draw_model(rng), fuzz.draw_cluster(rng), fuzz.draw_settings(rng), tmp_path)
    assert proved > 100


def test_the_allocator_rounds_up() -> None:
    """Not one byte less than was asked for, and whole segments."""
    allocator = load_script("planner/fuzz_memory.py").Allocator()
    for size in (1, 700, 2**20, 2**20):
        allocator.take(size)
    assert allocator.reserved == 4 * 2**20  # the fourth finds too little left in the first segment
    allocator.take(50 * 2**20 + 1)
    assert allocator.reserved == 56 * 2**20
