"""An engine whose server was killed is found by its name and ended; nothing of it stays."""

from collections.abc import Callable

import pytest
from ray.util.placement_group import placement_group_table

from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy import end_engine
from argosy.deploy.launch import launch_engine
from argosy.deploy.ray_session import RaySession


def test_a_left_engine_is_listed_and_ended(
    ray_session: RaySession,
    oracle_settings: Callable[..., ServingConfig],
    private_tmp: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As from another process in the same cluster."""
    with launch_engine(oracle_settings()) as engine:
        assert end_engine.main([]) == 0
        assert capsys.readouterr().out.split() == [engine.name]
        assert end_engine.main([engine.name]) == 0
        assert end_engine.running() == []
        assert [row["state"] for row in placement_group_table().values() if row["state"] != "REMOVED"] == []
    assert end_engine.main(["argosy-none"]) == 1
    assert "no driver named 'argosy-none'" in capsys.readouterr().err
