"""When a step over a group is computed in halves: only where the cards have work for as long as the host takes."""

import pytest

from argosy.workers.models.group_forward import LEAST_OVERLAP_TOKENS, least_overlapped

LLAMA_8B = 436_207_616  # bytes of a layer's weights, over all ranks
LLAMA_70B = 1_711_276_032


def test_small_steps_stay_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer of 8B keeps two H200 for 1.15 ms; four do it in half the time, and 70B has more to do a layer."""
    monkeypatch.delenv("ARGOSY_OVERLAP_TOKENS", raising=False)
    over_two = least_overlapped(LLAMA_8B // 2, 8192, 2)
    over_four = least_overlapped(LLAMA_8B // 4, 8192, 4)
    assert 2500 < over_two < 3500
    assert over_two < over_four < 8192
    assert LEAST_OVERLAP_TOKENS <= least_overlapped(LLAMA_70B // 4, 16384, 4) < over_two


def test_the_bound_can_be_set_to_measure_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment, which ranks inherit."""
    monkeypatch.setenv("ARGOSY_OVERLAP_TOKENS", "1500")
    assert least_overlapped(1, 1, 2) == 1500
