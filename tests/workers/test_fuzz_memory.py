"""A few of the random configs that `benchmarks/planner/fuzz_memory.py` draws by the hundred thousand."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "planner" / "fuzz_memory.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("fuzz_memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_memory"] = module
    spec.loader.exec_module(module)
    return module


def test_what_the_plan_says_fits_does_fit(fuzz: ModuleType, tmp_path: Path) -> None:
    """Weights and blocks of real ranks, rounded as the allocator rounds, on cards of all sizes."""
    proved = 0
    for number in range(120):
        rng = random.Random(f"test/{number}")
        proved += fuzz.check(fuzz.draw_model(rng), fuzz.draw_cluster(rng), fuzz.draw_settings(rng), tmp_path)
    assert proved > 100


def test_the_allocator_rounds_up() -> None:
    """Not one byte less than was asked for, and whole segments."""
    spec = importlib.util.spec_from_file_location("fuzz_memory_2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    allocator = module.Allocator()
    for size in (1, 700, 2**20, 2**20):
        allocator.take(size)
    assert allocator.reserved == 4 * 2**20  # the fourth finds too little left in the first segment
    allocator.take(50 * 2**20 + 1)
    assert allocator.reserved == 56 * 2**20
