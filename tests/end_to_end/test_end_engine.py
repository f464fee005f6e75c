"""An engine whose server was killed is found by its name and ended; nothing of it stays."""

from collections.abc import Callable
from typing import Any

import pytest
from ray import serve
from ray.util.placement_group import placement_group_table

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ClusterError
from argosy.deploy import doors, end_engine
from argosy.deploy.launch import launch_engine
from argosy.deploy.ray_session import RaySession
from argosy.placement.ports import free_port


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


def test_doors_of_a_killed_server_are_named_and_closed(ray_session: RaySession) -> None:
    """The next server was called ready at a port where nobody listened, and took the first one's doors besides."""
    doors.check_free(8000)  # no Serve, nothing taken
    taken = free_port("127.0.0.1")
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": taken})
        app: Any = serve.deployment(_Nothing, ray_actor_options={"num_cpus": 0})
        serve.run(app.bind(), name="argosy-0a1b2c3d", route_prefix="/")
        assert end_engine.running() == ["argosy-0a1b2c3d"]
        with pytest.raises(ClusterError, match=rf"127.0.0.1:{taken}, are those of argosy-0a1b2c3d.*end_engine argosy-"):
            doors.check_free(taken)
        end_engine.end("argosy-0a1b2c3d")
        assert end_engine.running() == []
        assert not doors.serve_runs()
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's


def test_a_serve_of_others_is_not_ended(ray_session: RaySession) -> None:
    """It takes no second port, which is said; one that serves nothing is in nobody's way."""
    taken = free_port("127.0.0.1")
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": taken})
        doors.check_free(taken)
        app: Any = serve.deployment(_Nothing, ray_actor_options={"num_cpus": 0})
        serve.run(app.bind(), name="of others", route_prefix="/theirs")
        doors.check_free(taken)
        with pytest.raises(ClusterError, match="takes no second port"):
            doors.check_free(taken + 1)
        assert doors.engines_with_doors() == []
        assert not doors.end("of others")
        serve.delete("of others")
        doors.check_free(taken + 1)
        assert not doors.serve_runs()
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's


class _Nothing:
    """A deployment."""
