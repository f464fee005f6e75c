"""An engine of real ranks with `swap_space`, and four times the load that its blocks hold. No Ray in it."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))
from engine_rig import rank_processes

from argosy.cluster.driver_client import DriverClient
from argosy.cluster.oracle import oracle_continuation
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.cluster.protocol.sampling import TokenParams
from argosy.deploy.launch import Engine, launch_engine

NUM_REQUESTS, NUM_TOKENS = 16, 60
TIGHT: dict[str, Any] = {"num_gpu_blocks_override": 20, "max_model_len": 256, "max_num_batched_tokens": 64}


async def answers_under_pressure(engine: Engine, disturb: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """All at once; each answer is the oracle's. `disturb` sees the figures until it has done what it wants to."""
    client = await DriverClient.connect(engine.address, engine.secret, timeout_seconds=60.0)
    params = TokenParams(max_tokens=NUM_TOKENS, temperature=0.0)

    async def one(number: int) -> list[int]:
        token_ids: list[int] = []
        async for deltas in client.submit([number, 5, 9], params):
            for delta in deltas:
                token_ids += delta.token_ids
        return token_ids

    async def watch() -> None:
        while not disturb((await client.stats()).values):
            await asyncio.sleep(0.002)

    async with asyncio.timeout(120.0):
        watching = asyncio.create_task(watch())
        got = await asyncio.gather(*(one(number) for number in range(NUM_REQUESTS)))
        await watching
        for number, token_ids in enumerate(got):
            assert token_ids == oracle_continuation([number, 5, 9], NUM_TOKENS, 997), number
        values = (await client.stats()).values
    await client.close()
    return values


@pytest.mark.parametrize("layout", [{}, {"pipeline_parallel_size": 2}], ids=["one", "two_stages"])
def test_requests_swap_and_none_is_computed_twice(
    oracle_settings: Callable[..., ServingConfig], private_tmp: str, layout: dict[str, int]
) -> None:
    with launch_engine(oracle_settings(swap_space="64MiB", **TIGHT, **layout), backend="local") as engine:
        assert all(rank.ledger["host: kv"] > 0 for rank in engine.ranks)
        values = asyncio.run(answers_under_pressure(engine, lambda values: True))
    assert values["argosy_preemptions_swapped_total"] == values["argosy_preemptions_total"] > 3
    assert values["argosy_tokens_recomputed_total"] == 0
    for direction in ("out", "in"):
        assert values[f'argosy_swap_blocks_total{{direction="{direction}"}}'] > 3
        assert values[f'argosy_swap_seconds_total{{direction="{direction}"}}'] > 0.0
    assert values["argosy_host_blocks_total"] > values["argosy_host_blocks_used"] == 0


def test_a_rank_that_dies_takes_host_copies_along_and_no_request(
    oracle_settings: Callable[..., ServingConfig], private_tmp: str
) -> None:
    """kill -9 of one of two while requests wait on the host: the group is built anew, and everybody ends exactly."""

    def kill_one(values: dict[str, float]) -> bool:
        if not values["argosy_host_blocks_used"]:
            return False
        rank_processes(engine)[0].kill()
        return True

    with launch_engine(oracle_settings(swap_space="64MiB", tensor_parallel_size=2, **TIGHT), backend="local") as engine:
        values = asyncio.run(answers_under_pressure(engine, kill_one))
    assert values["argosy_epoch"] == 1
    assert values["argosy_tokens_recomputed_total"] > 0


def test_host_memory_that_is_not_there_is_refused_at_the_start(
    oracle_settings: Callable[..., ServingConfig], private_tmp: str, tmp_path: Path
) -> None:
    with pytest.raises(PlacementImpossible, match=r"swap_space=900000 needs 900000.0 GiB .* are free: ask for less"):
        launch_engine(oracle_settings(swap_space="900000GiB", **TIGHT), backend="local")
