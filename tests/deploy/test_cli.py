"""Where a server's keys come from."""

import os

import pytest

from argosy.deploy.cli import serve_keys


def test_keys_come_from_the_environment_and_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both names count, each key once; what the server starts afterwards inherits none."""
    monkeypatch.setenv("ARGOSY_API_KEY", "one")
    monkeypatch.setenv("VLLM_API_KEY", "two")
    assert serve_keys(None, None) == ("one", "two")
    assert "ARGOSY_API_KEY" not in os.environ
    assert "VLLM_API_KEY" not in os.environ
    assert serve_keys(None, None) == ()


def test_a_flag_wins_and_is_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The warning does not repeat the key."""
    monkeypatch.setenv("ARGOSY_API_KEY", "hidden")
    assert serve_keys(["shown"], None) == ("shown",)
    told = capsys.readouterr().err
    assert "list processes" in told
    assert "shown to all" in told
    assert "hidden" not in told


def test_a_file_of_keys_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's key is for clients then."""
    monkeypatch.setenv("ARGOSY_API_KEY", "for-clients")
    assert serve_keys(None, "keys.txt") == ()
