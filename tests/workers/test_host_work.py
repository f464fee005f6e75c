"""What the host does for a recorded decode step does not grow with the rows: the card must never wait for it."""

from typing import Any

import pytest
from scripts import load_script

ROWS = (1, 8, 64)


@pytest.fixture(scope="module")
def bench() -> Any:
    return load_script("cpu/host_work.py")


@pytest.fixture(scope="module")
def runner(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, options = bench.make_folder("tiny", tmp_path_factory.mktemp("model"))
    return bench.make_runner(str(folder), options, max(ROWS))


def test_a_step_makes_as_many_calls_for_many_rows_as_for_one(bench: Any, runner: Any) -> None:
    """Calls of functions are counted, not seconds: a loop over rows would show whatever else the machine does."""
    counts = [bench.measure(runner, num_rows, 2)["calls"] for num_rows in ROWS]
    assert counts[0] < 200
    assert max(counts) - min(counts) <= 2, counts


def test_a_row_that_opens_a_block_costs_a_few_calls(bench: Any, runner: Any) -> None:
    """One row in sixteen does, on an average step."""
    steps = bench.Steps(runner, 64)
    counts = {}
    for opens in (True, False):
        for _ in range(16):
            before = list(steps.lengths)
            message = steps.message(opens=opens)
            counts[opens] = bench.calls_of(lambda message=message: steps.run(message))
            if sum(length % bench.BLOCK_SIZE == 0 for length in before) == 4 and opens:
                break
    steps.finish()
    assert counts[True] - counts[False] <= 4 * 10, counts
