"""Losses that Ray has a part in: the driver's own process, and starts that can't work."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.util.placement_group import placement_group_table

from argosy.cluster.driver_actor import DriverHandle
from argosy.cluster.driver_client import DriverClient
from argosy.cluster.oracle import oracle_continuation
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ChannelClosed, PlacementImpossible, WeightError
from argosy.cluster.protocol.sampling import FinishReason, TokenParams
from argosy.cluster.replica_client import connect_engine
from argosy.deploy.launch import Engine, launch_engine
from argosy.deploy.ray_session import RaySession


async def first_answer(engine: Engine, num_tokens: int = 20) -> list[int]:
    client = await DriverClient.connect(engine.address, engine.secret, timeout_seconds=60.0)
    token_ids = []
    async for deltas in client.submit([1, 2, 3], TokenParams(max_tokens=num_tokens, temperature=0.0)):
        for delta in deltas:
            token_ids += delta.token_ids
    await client.close()
    return token_ids


def test_a_killed_driver_comes_back_at_the_same_door(
    ray_session: RaySession, oracle_settings: Callable[..., ServingConfig], private_tmp: str
) -> None:
    """kill -9 of the driver actor: Ray starts it again, it clears up and serves as before.

    Who was connected hears that its streams are lost; an edge with patience has them go on at the driver's next life.
    """

    async def lose_one(engine: Engine) -> None:
        plain = await DriverClient.connect(engine.address, engine.secret)
        patient = await connect_engine(engine.address, engine.secret, patience_seconds=60.0)
        lost, kept = (
            client.submit([1, 2], TokenParams(max_tokens=1000, temperature=0.0)) for client in (plain, patient)
        )
        await anext(lost)
        token_ids = [token for delta in await anext(kept) for token in delta.token_ids]
        os.kill(DriverHandle.find(engine.name).door()[2], signal.SIGKILL)
        reasons = [delta.finish_reason async for deltas in lost for delta in deltas]
        assert reasons[-1] is FinishReason.LOST
        token_ids += [token async for deltas in kept for delta in deltas for token in delta.token_ids]
        assert token_ids == oracle_continuation([1, 2], 1000, 997)
        await plain.close()
        await patient.close()

    with launch_engine(oracle_settings(tensor_parallel_size=2)) as engine:
        asyncio.run(lose_one(engine))
        deadline = time.monotonic() + 60.0
        while True:
            try:
                answer = asyncio.run(first_answer(engine))
                break
            except ChannelClosed:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert answer == oracle_continuation([1, 2, 3], 20, 997)
        groups = [row for row in placement_group_table().values() if row["state"] != "REMOVED"]
        assert len(groups) == 1


def test_what_does_not_fit_is_refused_at_once_with_asked_and_offered(
    ray_session: RaySession, oracle_settings: Callable[..., ServingConfig], private_tmp: str
) -> None:
    """Ray itself would wait for ever."""
    began = time.monotonic()
    said = r"4 stages of 4 CPU, each within one node; 127\.0\.0\.1 has .* of 8 CPU free"
    with pytest.raises(PlacementImpossible, match=said):
        launch_engine(oracle_settings(tensor_parallel_size=4, pipeline_parallel_size=4))
    assert time.monotonic() - began < 20.0


def test_broken_weights_come_back_as_one_line(
    ray_session: RaySession, oracle_settings: Callable[..., ServingConfig], private_tmp: str, tmp_path: Path
) -> None:
    """The rank finds out, the caller reads it; nothing stays reserved."""
    with pytest.raises(WeightError) as caught:
        launch_engine(oracle_settings(load_format="safetensors"))
    assert "\n" not in str(caught.value)
    assert [row for row in placement_group_table().values() if row["state"] != "REMOVED"] == []
