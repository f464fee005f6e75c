"""The default model through Ray says what it says without Ray, and says it to several edges at once."""

import asyncio
from pathlib import Path

from argosy.cluster.driver_client import DriverClient
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.sampling import TokenParams
from argosy.deploy.launch import Engine, launch_engine
from argosy.deploy.ray_session import RaySession

MODEL = Path(__file__).parents[2] / "argosy" / "default_model"
PROMPTS = [[5 + i, 300, 42 * i + 7] for i in range(8)]


async def ask(engine: Engine) -> list[list[int]]:
    """Each prompt from an edge of its own; half of them drawn at random, with seeds."""

    async def one(number: int, prompt: list[int]) -> list[int]:
        client = await DriverClient.connect(engine.address, engine.secret)
        params = TokenParams(max_tokens=24, temperature=0.9 * (number % 2), seed=number)
        stream = client.submit(prompt, params)
        token_ids = [token async for deltas in stream for delta in deltas for token in delta.token_ids]
        await client.close()
        return token_ids

    async with asyncio.timeout(60.0):
        return await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(PROMPTS)))


def test_ray_changes_nothing_but_where_processes_run(ray_session: RaySession, private_tmp: str) -> None:
    """The same driver, wire and ranks: greedy and seeded answers are equal, token for token."""
    config = ServingConfig.from_mapping(
        {"model": str(MODEL), "device": "cpu", "dtype": "float32", "max_model_len": 512, "num_gpu_blocks_override": 256}
    )
    with launch_engine(config, backend="ray") as engine:
        assert engine.info.weight_bytes > 0
        through_ray = asyncio.run(ask(engine))
    with launch_engine(config, backend="local") as engine:
        assert asyncio.run(ask(engine)) == through_ray
    assert all(len(token_ids) > 0 for token_ids in through_ray)
