"""The sampling kernels against the sorted reference: the same thresholds, the same noise, the same tokens."""

import pytest
import torch
from torch import Tensor

from argosy.kernels import sampling, sampling_reference, tuning

VOCABULARIES = [50, 5000, pytest.param(151_936, marks=pytest.mark.gpu)]


def parameters(num_rows: int, device: torch.device) -> list[Tensor]:
    """Rows of every kind: plain, greedy, one filter, two, all three; then the same again."""
    temperature = [1.0, 0.0, 0.7, 1.3, 1.0, 1.0, 0.5, 2.0]
    top_k = [0, 0, 5, 0, 40, 1_000_000, 3, 0]
    top_p = [1.0, 1.0, 1.0, 0.9, 0.8, 1.0, 0.5, 0.99]
    min_p = [0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.05, 0.02]
    columns = [torch.tensor((x * num_rows)[:num_rows]) for x in (temperature, top_k, top_p, min_p)]
    columns += [torch.randint(-(1 << 62), 1 << 62, (num_rows,)), torch.randint(0, 1 << 20, (num_rows,))]
    return [x.to(device) for x in columns]


@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_rows_draw_what_the_reference_draws(
    vocabulary: int, spread: float, dtype: torch.dtype, device: torch.device
) -> None:
    """A filter's last token may hang on the last digit of a sum, and a draw on the last digit of a logarithm."""
    rows = 8 if device.type == "cpu" else 64
    logits = (torch.randn(rows, vocabulary, device=device) * spread).to(dtype)
    columns = parameters(rows, device)
    for flags in ({}, {"any_filter": False}, {"any_random": False}):
        want = sampling_reference.sample_rows(logits, *columns, **flags)
        got = sampling.sample_rows(logits, *columns, **flags)
        assert got.dtype == torch.int64
        assert int((got != want).sum()) <= rows // 32
    assert not tuning.counters(device).any()


@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("vocabulary", [50, 5000, 9000])
def test_the_threshold_keeps_what_the_reference_keeps(spread: float, vocabulary: int, device: torch.device) -> None:
    """With a spread of 0.5 top_p keeps more tokens of 9000 than are gathered, so the whole row is searched."""
    logits = torch.randn(8, vocabulary, device=device) * spread
    temperature, top_k, top_p, min_p, seed, position = parameters(8, device)
    out = torch.zeros(8, dtype=torch.int64, device=device)
    state = sampling.search(logits, temperature, top_k, top_p, min_p, seed, position, out)
    scaled = logits * temperature.masked_fill(temperature == 0, 1).reciprocal()[:, None]
    want = sampling_reference.keep_threshold(scaled, top_k, top_p, min_p)
    want[temperature == 0] = float("-inf")
    counts, wants = ((scaled >= x[:, None]).sum(1) for x in (state[:, 0], want))
    filtered = (temperature > 0) & ((top_k > 0) & (top_k < vocabulary) | (top_p < 1) | (min_p > 0))
    drawn = state[:, 1] > 0
    found = drawn | (top_p == 1)  # where top_p keeps too many, the drawn token is judged, and no threshold sought
    assert ((counts - wants).abs() <= 1)[found].tolist() == [True] * int(found.sum())
    assert (counts >= wants - 1).all()
    assert not (drawn & ~filtered).any()
    assert not (drawn & (wants > sampling.CANDIDATES)).any()


@pytest.mark.parametrize("vocabulary", [2500, 9000])
def test_flat_rows_draw_what_the_reference_draws(vocabulary: int, device: torch.device) -> None:
    """More tokens stay than are gathered: by top_p of nearly even logits, by a k of thousands, by both, by min_p."""
    rows = 12
    logits = torch.randn(rows, vocabulary, device=device) * 0.3
    temperature = torch.ones(rows, device=device)
    top_k = torch.tensor([0, 2300, 2300, 0] * 3, device=device, dtype=torch.int32)
    top_p = torch.tensor([0.95, 1.0, 0.5, 0.3, 0.05, 1e-6] * 2, device=device)
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.01] * 2, device=device)
    seed, position = torch.arange(rows, device=device) * 7919, torch.arange(rows, device=device)
    columns = (temperature, top_k, top_p, min_p, seed, position)
    want = sampling_reference.sample_rows(logits, *columns)
    got = sampling.sample_rows(logits, *columns)
    assert int((got != want).sum()) <= 1
    assert not tuning.counters(device).any()


def test_equal_best_logits_give_the_lowest_id_across_chunks(device: torch.device) -> None:
    logits = torch.zeros(2, 10_000, device=device)
    logits[0, [9000, 4097]] = 1.0
    logits[1, [5000, 17]] = 1.0
    columns = parameters(2, device)
    assert sampling.sample_rows(logits, *columns, any_random=False).tolist() == [4097, 17]


@pytest.mark.parametrize("sick", [float("nan"), float("inf")])
def test_a_row_with_a_logit_that_is_no_number_gives_that_token(sick: float, device: torch.device) -> None:
    """So that whoever looks at the drawn token's logit sees what the model did. Row 1 is greedy, row 2 filtered."""
    logits = torch.randn(3, 6000, device=device)
    logits[torch.arange(3), torch.tensor([4500, 7, 11])] = sick
    columns = parameters(3, device)
    for flags in ({}, {"any_filter": False}, {"any_random": False}):
        assert sampling.sample_rows(logits, *columns, **flags).tolist() == [4500, 7, 11]
    logits[:] = float("-inf")
    assert all(0 <= token < 6000 for token in sampling.sample_rows(logits, *columns).tolist())
