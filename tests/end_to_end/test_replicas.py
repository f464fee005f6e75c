"""Two replicas behind one address: both work, conversations return to their own, a lost rank or driver loses none."""

import asyncio
import os
import signal
from collections.abc import Callable

import psutil
import ray
from ray.util.placement_group import placement_group_table

from argosy.cluster.driver_actor import NAMESPACE, DriverHandle
from argosy.cluster.oracle import oracle_continuation
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.replica_client import ReplicaClient, connect_engine
from argosy.deploy.launch import Engine, launch_engine
from argosy.deploy.ray_session import RaySession

PROMPTS = [[(31 * i + j) % 997 for j in range(20 + i)] for i in range(6)]


async def answer(client: ReplicaClient, prompt: list[int], count: int = 12) -> tuple[list[int], int]:
    """(tokens, prompt tokens that were found in a cache)."""
    token_ids, num_cached = list[int](), 0
    async for deltas in client.submit(prompt, TokenParams(max_tokens=count, temperature=0.0)):
        for delta in deltas:
            token_ids += delta.token_ids
            num_cached = max(num_cached, delta.num_cached_tokens or 0)
    return token_ids, num_cached


async def begin_long_answers(client: ReplicaClient) -> list[asyncio.Task[tuple[list[int], int]]]:
    """Both replicas work on some when this returns."""
    long = [asyncio.create_task(answer(client, prompt, 400)) for prompt in PROMPTS]
    async with asyncio.timeout(30.0):
        while not all(replica.client.num_streams for replica in client._replicas):
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in long)
    return long


async def converse(engine: Engine) -> None:
    client = await connect_engine(engine.address, engine.secret)
    assert isinstance(client, ReplicaClient)
    first = await asyncio.gather(*(answer(client, prompt) for prompt in PROMPTS))
    assert [tokens for tokens, _ in first] == [oracle_continuation(prompt, 12, 997) for prompt in PROMPTS]
    longer = [prompt + tokens for prompt, (tokens, _) in zip(PROMPTS, first, strict=True)]
    again = await asyncio.gather(*(answer(client, prompt) for prompt in longer))
    assert all(num_cached >= 16 for _, num_cached in again)  # each came back to where its blocks are
    steps = [(await replica.client.stats()).values["argosy_generation_tokens_total"] for replica in client._replicas]
    assert min(steps) > 0

    long = await begin_long_answers(client)
    ranks = [one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::WorkerActor")]
    assert len(ranks) == 2
    ranks[0].kill()
    every = await asyncio.gather(*long)  # those of the replica that lost it went on elsewhere
    assert [tokens for tokens, _ in every] == [oracle_continuation(prompt, 400, 997) for prompt in PROMPTS]
    async with asyncio.timeout(60.0):
        while (values := (await client.stats()).values)["argosy_epoch"] == 0:
            await asyncio.sleep(0.05)
    assert values["argosy_recoveries_total"] > 0
    async with asyncio.timeout(60.0):
        while not all(replica.is_healthy and not replica.is_rebuilding for replica in client._replicas):
            await asyncio.sleep(0.05)

    long = await begin_long_answers(client)
    names = [row["name"] for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == NAMESPACE]
    os.kill(DriverHandle.find(min(names)).door()[2], signal.SIGKILL)
    async with asyncio.timeout(30.0):
        while not any(replica.client.closed for replica in client._replicas):
            await asyncio.sleep(0.01)
    every = await asyncio.gather(*long)  # those of the lost replica went on at the other one
    assert [tokens for tokens, _ in every] == [oracle_continuation(prompt, 400, 997) for prompt in PROMPTS]
    rest = await asyncio.gather(*(answer(client, prompt) for prompt in PROMPTS))
    assert [tokens for tokens, _ in rest] == [oracle_continuation(prompt, 12, 997) for prompt in PROMPTS]
    async with asyncio.timeout(60.0):
        while any(replica.client.closed for replica in client._replicas):  # its driver comes back at the same door
            await asyncio.sleep(0.05)
    await client.close()


def test_two_replicas_share_the_work(
    ray_session: RaySession, oracle_settings: Callable[..., ServingConfig], private_tmp: str
) -> None:
    """Each has its own driver, ranks and blocks; nothing of either is left."""
    with launch_engine(oracle_settings(data_parallel_size=2)) as engine:
        assert engine.info.layout.startswith("2 replicas of TP1 x PP1")
        asyncio.run(converse(engine))
    assert [row["state"] for row in placement_group_table().values() if row["state"] != "REMOVED"] == []
    assert ray.util.list_named_actors(all_namespaces=True) == []
