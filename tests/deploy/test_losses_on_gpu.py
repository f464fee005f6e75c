"""Ranks that are killed or hang while GPUs compute for them: recorded steps, sums in peers' memory, NCCL."""

import asyncio
import itertools
import random
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from engine_rig import rank_processes
from test_on_gpu import DEVICE, NUM_CARDS, engine, folders, regret_of, score

from argosy.cluster.driver_client import DriverClient, TokenStream
from argosy.cluster.protocol.sampling import FinishReason, TokenParams

__all__ = ["folders"]  # a fixture
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(DEVICE == "cuda" and not NUM_CARDS, reason="needs an NVIDIA GPU"),
]
NUM_NEW = 400
LOSSES = [
    pytest.param(tp, pp, how, marks=pytest.mark.skipif(tp * pp > NUM_CARDS, reason=f"needs {tp * pp} cards"))
    for (tp, pp), how in itertools.product(((2, 1), (1, 2), (2, 2)), ("killed", "hangs"))
]


async def answer_of(stream: TokenStream, begun: asyncio.Barrier) -> tuple[list[int], FinishReason | None]:
    """Its tokens; the barrier falls when all streams have the first of them."""
    token_ids: list[int] = []
    reason = None
    async for deltas in stream:
        if not token_ids:
            await begun.wait()
        for delta in deltas:
            token_ids += delta.token_ids
            reason = delta.finish_reason or reason
    return token_ids, reason


@pytest.mark.parametrize(("tp", "pp", "how"), LOSSES)
def test_a_rank_that_is_lost_costs_a_pause_and_no_token(tp: int, pp: int, how: str, folders: dict[str, Path]) -> None:
    """Every answer has all of its tokens, and each is one that transformers finds as likely as any."""
    rng = random.Random(tp + 8 * pp)
    prompts = [[rng.randrange(3, 1000) for _ in range(length)] for length in (1, 5, 16, 33, 64, 100, 60, 90)]
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "step_deadline_seconds": 4.0}
    found: list[tuple[list[int], FinishReason | None]] = []
    with engine(folders["llama"], dtype="float32", max_model_len=512, **sizes) as llm:
        running = llm._engine
        before = rank_processes(running)
        assert len(before) == tp * pp

        async def ask() -> None:
            client = await DriverClient.connect(running.address, running.secret)
            begun = asyncio.Barrier(len(prompts) + 1)
            params = TokenParams(max_tokens=NUM_NEW, temperature=0.0)
            async with asyncio.timeout(200.0), asyncio.TaskGroup() as tasks:
                answers = [tasks.create_task(answer_of(client.submit(one, params), begun)) for one in prompts]
                await begun.wait()
                if how == "killed":
                    before[-1].kill()
                else:
                    before[-1].suspend()
            await client.close()
            found.extend(answer.result() for answer in answers)

        asyncio.run(ask())
        deadline = time.monotonic() + 60.0
        while (status := running.status()).state != "ready":
            assert time.monotonic() < deadline, status
            time.sleep(0.05)
        assert status.epoch == 1
        assert not any(process.is_running() for process in before)
    assert [(len(token_ids), reason) for token_ids, reason in found] == [(NUM_NEW, FinishReason.LENGTH)] * len(prompts)
    sequences = [[*prompt, *token_ids] for prompt, (token_ids, _) in zip(prompts, found, strict=True)]
    assert regret_of(*score(folders["llama"], sequences, torch.float32), NUM_NEW) < 1e-3
