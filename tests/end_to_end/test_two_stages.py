"""The whole path on Ray, TP2 x PP2, with the model that notices every wrong block; also with a rank killed."""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))
from engine_rig import tokens_of

from argosy.cluster.driver_client import DriverClient
from argosy.cluster.oracle import oracle_continuation
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.sampling import FinishReason, TokenParams
from argosy.deploy.launch import Engine, launch_engine
from argosy.deploy.ray_session import RaySession

VOCAB = 997
PROMPTS = [[(7 * i + j) % VOCAB for j in range(3 + 29 * i)] for i in range(6)]  # up to 148 tokens: several chunks


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return {}


@pytest.fixture
def engine(
    ray_session: RaySession, oracle_settings: Callable[..., ServingConfig], private_tmp: str, seen: dict[str, Any]
) -> Iterator[Engine]:
    """Four ranks in two stages, with steps so small that prompts come in chunks."""
    config = oracle_settings(tensor_parallel_size=2, pipeline_parallel_size=2, max_num_batched_tokens=64)
    phases: list[str] = []
    with launch_engine(config, on_progress=lambda phase, fraction: phases.append(phase)) as made:
        assert {"starting workers", "ready"} <= set(phases)
        seen["processes"] = rank_processes()
        yield made
    # What a clean exit is: no process, no bundle, no name, no folder (`private_tmp`); and the session goes on.
    assert psutil.wait_procs(seen["processes"], timeout=10.0)[1] == []
    assert [row["state"] for row in placement_group_table().values() if row["state"] != "REMOVED"] == []
    assert ray.util.list_named_actors(all_namespaces=True) == []


def rank_processes() -> list[psutil.Process]:
    """The worker actors' processes of this session."""
    found = [p for p in psutil.process_iter(["cmdline"]) if "ray::WorkerActor" in " ".join(p.info["cmdline"] or ())]
    mine = {p.pid for p in psutil.Process().children(recursive=True)}
    return [p for p in found if p.pid in mine]


async def ask(engine: Engine, num_tokens: int, disturb: Callable[[], None] = lambda: None) -> list[list[int]]:
    """All prompts at once; `disturb` is called when every one has its first token."""
    client = await DriverClient.connect(engine.address, engine.secret)
    async with asyncio.timeout(90.0):
        streams = [client.submit(prompt, TokenParams(max_tokens=num_tokens, temperature=0.0)) for prompt in PROMPTS]
        starts = [[token for delta in await anext(stream) for token in delta.token_ids] for stream in streams]
        disturb()
        rests = [await tokens_of(stream) for stream in streams]
    assert {reason for _, reason in rests} == {FinishReason.LENGTH}
    await client.close()
    return [start + rest for start, (rest, _) in zip(starts, rests, strict=True)]


def test_two_stages_of_two_ranks_answer_exactly_also_when_one_is_killed(engine: Engine, seen: dict[str, Any]) -> None:
    """kill -9 of a rank of the second stage in mid-answer: the group is rebuilt and nobody's tokens differ."""
    assert "TP2 x PP2" in engine.info.layout
    assert asyncio.run(ask(engine, 40)) == [oracle_continuation(prompt, 40, VOCAB) for prompt in PROMPTS]
    before = rank_processes()
    assert len(before) == 4
    answers = asyncio.run(ask(engine, 250, before[-1].kill))
    assert answers == [oracle_continuation(prompt, 250, VOCAB) for prompt in PROMPTS]
    deadline = time.monotonic() + 30.0
    while (status := engine.status()).epoch < 1 or status.state != "ready":
        assert time.monotonic() < deadline, status
        time.sleep(0.02)
    assert psutil.wait_procs(before, timeout=10.0)[1] == []
    seen["processes"] += rank_processes()
