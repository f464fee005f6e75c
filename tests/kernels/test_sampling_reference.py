"""Which tokens are kept, against a loop over sorted logits; the draw, against the distribution it must have."""

import math

import pytest
import torch
from torch import Tensor

from argosy.kernels import sampling_reference, step_ops


def keep_by_hand(logits: Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Sort, then drop: min_p against the best, top_k by count, top_p by the mass before each token. float64."""
    order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
    probability = logits.double().softmax(0)
    order = [i for i in order if probability[i] >= min_p * probability[order[0]]]
    if top_k > 0:
        order = order[:top_k]
    total, before, kept = float(probability[order].sum()), 0.0, set()
    for i in order:
        if before < top_p * total or not kept:
            kept.add(i)
        before += float(probability[i])
    return kept


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.6, 0.0), (0, 0.97, 0.0), (0, 1.0, 0.2), (40, 0.8, 0.05),
    (5, 0.3, 0.0), (10_000, 0.5, 0.0), (0, 1e-6, 0.0), (0, 0.9, 0.5),
])  # fmt: skip
def test_filters_keep_what_sorting_keeps(top_k: int, top_p: float, min_p: float, spread: float) -> None:
    logits = torch.randn(4, 3000) * spread
    full = [torch.full((4,), x) for x in (top_k, top_p, min_p)]
    threshold = sampling_reference.keep_threshold(logits, full[0].int(), full[1], full[2])
    for row, at_least in zip(logits, threshold, strict=True):
        kept = set(torch.where(row >= at_least)[0].tolist())
        assert len(kept ^ keep_by_hand(row, top_k, top_p, min_p)) <= 1  # the last token hangs on the last digit


def test_equal_logits_are_kept_together() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    zero, one = torch.zeros(1), torch.ones(1)
    kept = logits >= sampling_reference.keep_threshold(logits, torch.tensor([2]), one, zero)
    assert kept.tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("sick", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_row_without_a_finite_best_is_drawn_from_all_the_same(sick: float, top_p: float) -> None:
    """Its neighbours' thresholds are as ever; its own draw shows that no number was there."""
    logits = torch.randn(3, 50)
    logits[1] = sick
    find = sampling_reference.keep_threshold
    alone = find(logits[[0, 2]], torch.zeros(2).int(), torch.full((2,), top_p), torch.zeros(2))
    beside = find(logits, torch.zeros(3).int(), torch.full((3,), top_p), torch.zeros(3))
    assert torch.equal(beside[[0, 2]], alone)
    (token,) = draw(logits[1:2], top_p=top_p, top_k=5).tolist()
    assert 0 <= token < 50


def draw(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 1) -> Tensor:
    """The same row at positions 0, 1, 2, ..."""
    rows = logits.shape[0]
    return step_ops.sample_rows(
        logits, torch.full((rows,), temperature), torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p), torch.zeros(rows), torch.full((rows,), seed), torch.arange(rows),
    )  # fmt: skip


@pytest.mark.parametrize(("top_k", "kept"), [(0, 6), (3, 3)])
def test_draws_follow_the_softmax(top_k: int, kept: int) -> None:
    """20 000 draws; each count within five standard deviations of what the probabilities say."""
    logits, draws = torch.tensor([0.5, 2.0, -1.0, 1.5, 1.0, -3.0]), 20_000
    counts = torch.bincount(draw(logits.expand(draws, 6), temperature=0.7, top_k=top_k), minlength=6)
    masked = logits.masked_fill(logits < logits.sort(descending=True).values[kept - 1], float("-inf"))
    probability = (masked / 0.7).softmax(0)
    bound = 5 * (draws * probability * (1 - probability)).sqrt()
    assert ((counts - draws * probability).abs() <= bound).all(), counts


def test_noise_is_gumbel_and_independent_of_its_neighbours() -> None:
    """Mean γ, variance π²/6, and no correlation between seeds, positions or tokens that differ by one."""
    seeds, positions = torch.tensor([5, 6, 5, 5 + (1 << 32)]), torch.tensor([3, 3, 4, 3])
    noise = sampling_reference.gumbel_noise(seeds, positions, 100_000).double()
    torch.testing.assert_close(noise.mean(1), torch.full((4,), 0.5772).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(noise.var(1), torch.full((4,), math.pi**2 / 6).double(), atol=0.05, rtol=0)
    neighbours = torch.stack([*noise[:, :-1], noise[0, 1:]])
    assert (torch.corrcoef(neighbours) - torch.eye(5)).abs().max() < 0.02


def test_the_hash_is_the_documented_arithmetic() -> None:
    """Plain Python integers, so that another language can draw the same tokens."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    for seed, position, token in ((0, 0, 0), (-2, 9, 4), (2**62 + 12345, 2**31 + 1, 151_935)):
        a = mix(seed % 2**32 ^ 0x9E3779B9)
        b = mix(((seed >> 32) % 2**32 + a) % 2**32)
        c = mix((position + b) % 2**32)
        d = mix(c ^ 0x85EBCA6B)
        bits = mix((mix(token * 0x9E3779B9 % 2**32 ^ c) + d) % 2**32)
        want = -math.log(-math.log1p(-(bits + 0.5) / 2**32))
        got = sampling_reference.gumbel_noise(torch.tensor([seed]), torch.tensor([position]), token + 1)[0, token]
        assert abs(float(got) - want) < 1e-5


def test_a_row_draws_the_same_whatever_the_batch() -> None:
    logits = torch.randn(6, 500)
    together = draw(logits, top_p=0.9, seed=11)
    for row in (0, 5):
        alone = step_ops.sample_rows(
            logits[row : row + 1], torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.tensor([0.9]),
            torch.zeros(1), torch.tensor([11]), torch.tensor([row]),
        )  # fmt: skip
        assert alone[0] == together[row]


def test_temperature_zero_is_argmax_with_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 50)
    logits[:, [20, 9]] = 4.0
    ids = step_ops.sample_rows(
        logits, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 1, 3]), torch.tensor([1.0, 1.0, 0.1]), torch.zeros(3),
        torch.arange(3), torch.arange(3),
    )  # fmt: skip
    assert ids.tolist()[::2] == [9, 9]
    assert ids[1] in (9, 20)  # top_k 1 keeps equals together
