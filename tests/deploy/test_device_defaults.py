"""What a step holds where nobody said so: by the card, and never against what was said."""

from pathlib import Path

import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import device_defaults, settings
from argosy.deploy.device_defaults import LARGE, MIDDLE, PLAIN, fill, step_size


@pytest.mark.parametrize(
    ("card", "size"),
    [
        ("NVIDIA H200", LARGE),
        ("NVIDIA H100 80GB HBM3", LARGE),
        ("NVIDIA A100-SXM4-80GB", LARGE),
        ("NVIDIA L40S", MIDDLE),
        ("NVIDIA RTX 6000 Ada Generation", MIDDLE),
        ("NVIDIA RTX A4000", PLAIN),  # not an A40
        ("Tesla V100-SXM2-16GB", PLAIN),
        ("a card of next year", PLAIN),
        ("", PLAIN),
    ],
)
def test_a_card_is_known_by_its_name(card: str, size: device_defaults.StepSize) -> None:
    """As the driver writes it."""
    assert step_size(card) == size


def test_what_was_given_stays_and_the_other_follows() -> None:
    """A step must have a token for each request, whichever of the two was named."""
    assert fill({"max_num_seqs": 7, "max_num_batched_tokens": 9}, "NVIDIA H200")["max_num_seqs"] == 7
    assert fill({}, "NVIDIA H200") == {"max_num_seqs": 1024, "max_num_batched_tokens": 8192}
    assert fill({"max_num_seqs": 10_000}, "NVIDIA H200")["max_num_batched_tokens"] == 10_000
    assert fill({"max_num_batched_tokens": 64}, "")["max_num_seqs"] == 64
    assert fill({"device": "cpu"}, "NVIDIA H200")["max_num_seqs"] == PLAIN.max_num_seqs


def test_both_given_and_at_odds_is_still_refused() -> None:
    """A mistake is told, not repaired."""
    with pytest.raises(ConfigError, match="max_num_batched_tokens=8"):
        settings.make_config({"model": "m", "max_num_seqs": 16, "max_num_batched_tokens": 8})


def test_the_settings_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line as from Python."""
    monkeypatch.setattr(device_defaults, "first_card", lambda: "NVIDIA H200")
    config, _ = settings.make_config({"model": "m"})
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == LARGE


def test_the_card_is_read_from_the_driver_s_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asking a program; and not at all where the cards are hidden."""
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    monkeypatch.setattr(device_defaults, "_CARDS", tmp_path)
    for hidden, found in (("0", "NVIDIA H200"), ("", ""), ("-1", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        device_defaults.first_card.cache_clear()
        assert device_defaults.first_card() == found
    device_defaults.first_card.cache_clear()
