"""What a node's Ray finds in its environment: a token, early notice of lost hosts, and doors with closed ends."""

from pathlib import Path

import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy.ray_node import main, node_environment


def test_a_node_without_a_token_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray would start it open to all who reach it, with a warning in a log."""
    with pytest.raises(ConfigError, match="has no Ray token: run 'ray get-auth-token --generate'"):
        node_environment({}, tmp_path)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["start", "--head"]) == 2
    assert capsys.readouterr().err.startswith("argosy: this node has no Ray token")


def test_a_token_turns_the_token_mode_on(tmp_path: Path) -> None:
    """With the file alone Ray may or may not ask for it, depending on what ran before."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    found = node_environment({}, tmp_path)
    assert found["RAY_AUTH_MODE"] == "token"
    assert "secret" not in str(found)
    assert found["RAY_health_check_period_ms"] == "1000"


def test_what_the_operator_set_stands(tmp_path: Path) -> None:
    """A network of one's own needs no token, and Serve's own proxy no HAProxy."""
    found = node_environment({"RAY_AUTH_MODE": "disabled", "RAY_SERVE_ENABLE_HA_PROXY": "0"}, tmp_path)
    assert "RAY_AUTH_MODE" not in found
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in found
