"""How `benchmarks/gpu/run_tests.py` shares tests out over cards, without any card."""

import time
from typing import Any

import pytest
from scripts import load_script


@pytest.fixture(scope="module")
def run_tests() -> Any:
    return load_script("gpu/run_tests.py")


LAYOUT = "tests/deploy/test_on_gpu.py::test_a_layout_says_what_one_card_says"
KERNEL = "tests/kernels/test_gemv.py::test_fused_linear"
ALONE = "tests/end_to_end/test_on_cards.py::test_ranks_have_the_blocks_that_the_plan_says"


def test_a_test_gets_as_many_cards_as_it_computes_on(run_tests: Any) -> None:
    """Read from its parameters; numbers of kernels are sizes."""
    for test, num_cards in (
        (f"{LAYOUT}[llama-2-2]", 4),
        (f"{LAYOUT}[mistral-1-3]", 3),
        ("tests/deploy/test_losses_on_gpu.py::test_a_rank_that_is_lost_costs_a_pause_and_no_token[2-1-killed]", 2),
        ("tests/workers/test_group_sum_gpu.py::test_all_ways[4096-4]", 4),
        ("tests/workers/test_layer_chain_gpu.py::test_a_layer_in_one_launch[8b:4-2]", 2),
        ("tests/deploy/test_on_gpu.py::test_one_rank_opens_one_card_and_no_group", 2),
        (f"{KERNEL}[4-2]", 1),
        ("tests/workers/test_model_families.py::test_a_card_equals_transformers[gpt2]", 1),
    ):
        assert run_tests.cards_of(test) == num_cards, test


def test_the_longest_come_first_and_those_alone_last(run_tests: Any) -> None:
    """Neighbours stay together as long as they are short; what was recorded counts more than a guess."""
    ids = [f"{ALONE}[1-1]", f"{ALONE}[2-2]", *(f"{KERNEL}[{n}]" for n in range(30)), f"{LAYOUT}[llama-2-1]"]
    parts = run_tests.cut(ids, {KERNEL: 2.0}, 20.0)
    assert [part.is_alone for part in parts] == [False] * 4 + [True] * 2
    assert parts[0].tests == [f"{LAYOUT}[llama-2-1]"]
    assert [len(part.tests) for part in parts[1:4]] == [10, 10, 10]
    assert [part.num_cards for part in parts[4:]] == [4, 1]
    assert sorted(test for part in parts for test in part.tests) == sorted(ids)


def test_parts_run_beside_each_other_but_for_those_alone(run_tests: Any) -> None:
    """All are run once, no card has more than it may, and where one is alone nobody else is."""
    ids = [f"{KERNEL}[{n}]" for n in range(40)] + [f"{LAYOUT}[llama-{tp}-1]" for tp in (2, 4, 2, 2)]
    parts = run_tests.cut([*ids, f"{ALONE}[2-2]", f"{ALONE}[1-1]"], {KERNEL: 5.0}, 10.0)
    host = run_tests.Host(["0", "1", "2", "3"], 2, 1, 64, time.monotonic() + 60.0)
    most = 0

    def run(part: Any) -> str:
        nonlocal most
        with host.changed:
            assert len(part.cards) == part.num_cards
            for card in part.cards:
                here = [one for one in host.running if card in one.cards]
                assert len(here) == 1 or not any(one.is_alone for one in here)
                assert sum(one.num_cards == 1 for one in here) <= 2
                assert sum(one.num_cards > 1 for one in here) <= 1
            most = max(most, len(host.running))
        time.sleep(0.01)
        for test in part.tests:
            assert test not in host.verdicts or "[llama-2-1]" in test
            host.verdicts[test] = "PASSED"
        return ""

    host._pytest = run
    host.run(parts)
    assert most > 4
    assert set(host.verdicts) == {*ids, f"{ALONE}[2-2]", f"{ALONE}[1-1]"}
    assert host.running == []
