"""Switches of the environment: on, off, nothing said, or refused."""

import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.placement.switches import read_count, read_switch


@pytest.mark.parametrize(("text", "found"), [(None, None), ("", None), ("0", False), ("1", True), (" 1 ", True)])
def test_a_switch_is_on_or_off(text: str | None, found: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one is as none: that is how scripts leave it out."""
    monkeypatch.delenv("ARGOSY_LAYER_CHAIN", raising=False)
    if text is not None:
        monkeypatch.setenv("ARGOSY_LAYER_CHAIN", text)
    assert read_switch("ARGOSY_LAYER_CHAIN") is found


@pytest.mark.parametrize(("text", "found"), [("", None), ("256", 256), ("1024", 1024)])
def test_a_count_is_a_number(text: str, found: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARGOSY_OVERLAP_TOKENS", text)
    assert read_count("ARGOSY_OVERLAP_TOKENS", 256) == found


def test_anything_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`false` switched on what it was to leave out, `true` switched nothing, and a word ended with a traceback."""
    for text in ("false", "true", "2", "no"):
        monkeypatch.setenv("ARGOSY_LAYER_CHAIN", text)
        with pytest.raises(
            ConfigError, match=f"^ARGOSY_LAYER_CHAIN='{text}' in the environment of a rank: must be 0 or"
        ):
            read_switch("ARGOSY_LAYER_CHAIN")
    for text in ("many", "-1", "1e9", "٣", "255"):
        monkeypatch.setenv("ARGOSY_OVERLAP_TOKENS", text)
        with pytest.raises(
            ConfigError, match=f"^ARGOSY_OVERLAP_TOKENS='{text}' .*: must be a whole number from 256 on"
        ):
            read_count("ARGOSY_OVERLAP_TOKENS", 256)
