"""The requests behind the figures are the same everywhere, or the figures can't be compared."""

import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import workload


@pytest.mark.parametrize(
    ("name", "vocab", "digest"),
    [
        ("fixed512x256", 128256, "ce8e18ca5b4b33bf"),
        ("fixed512x256", 151936, "6840a03f27e7f767"),
        ("chat1000", 128256, "c8b0f5256076dd60"),
        ("chat1000", 151936, "40938424ab436d62"),
        ("prefix256", 128256, "3fd3168049067113"),
        ("fixed256x128", 128256, "675e12bd1d74200a"),
        ("decode8", 128256, "99e01f5718fafdd8"),
        ("cpu64", 4096, "ac51ebec136573c5"),
        ("ttft512", 4096, "855dc9272408f532"),
    ],
)
def test_a_named_workload_is_the_one_the_peers_were_measured_with(name: str, vocab: int, digest: str) -> None:
    """A change of one token makes another workload, and old figures worthless."""
    assert workload.digest(workload.make(name, vocab=vocab)) == digest


def test_a_salt_changes_tokens_and_not_lengths() -> None:
    """A warm-up must have the same shape, and leave nothing in the prefix cache for the run that counts."""
    first, second = (workload.make("cpu64", vocab=4096, salt=salt) for salt in (0, 1))
    assert [(len(r.prompt), r.max_tokens) for r in first] == [(len(r.prompt), r.max_tokens) for r in second]
    assert all(a.prompt[:16] != b.prompt[:16] for a, b in zip(first, second, strict=True))


def test_the_mixed_cpu_workload_has_the_lengths_it_is_named_for() -> None:
    """Input 32 to 256, output 16 to 128, 64 of them."""
    requests = workload.make("cpu64", vocab=4096)
    assert len(requests) == 64
    assert min(len(r.prompt) for r in requests) >= 32
    assert max(len(r.prompt) for r in requests) <= 256
    assert min(r.max_tokens for r in requests) >= 16
    assert max(r.max_tokens for r in requests) <= 128


def test_arrivals_have_the_rate_they_were_asked_for() -> None:
    """Ten a second for a thousand requests is about a hundred seconds, always the same ones."""
    arrivals = workload.poisson_arrivals(1000, 10.0)
    assert arrivals == workload.poisson_arrivals(1000, 10.0) == sorted(arrivals)
    assert 90 < arrivals[-1] < 110


def test_an_unknown_workload_or_too_small_a_vocabulary_is_refused() -> None:
    """Both come from the command line."""
    with pytest.raises(ConfigError, match="cpu64"):
        workload.make("cpu46", vocab=4096)
    with pytest.raises(ConfigError, match="too small"):
        workload.make("cpu64", vocab=2000)
