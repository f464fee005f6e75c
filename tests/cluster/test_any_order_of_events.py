"""Random arrivals, aborts, losses and small pools: every answer is that of an undisturbed run, and nothing leaks."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from argosy.cluster.protocol.messages import AbortRequest, Burst
from argosy.cluster.protocol.sampling import FinishReason
from argosy.cluster.protocol.swap import SwapCosts

SHAPES = [
    {"async_scheduling": False},
    {"async_scheduling": True},
    {"async_scheduling": True, "enable_prefix_caching": False},
    {"async_scheduling": False, "pipeline_parallel_size": 2},
    {"async_scheduling": True, "pipeline_parallel_size": 2},
    {"async_scheduling": True, "enable_chunked_prefill": False},
    {"async_scheduling": True, "policy": "priority"},
    {"async_scheduling": True, "policy": "priority", "pipeline_parallel_size": 3},
    {"windows": (7,)},
    {"windows": (1,), "enable_chunked_prefill": False},
    {"windows": (0, 6), "policy": "priority"},
    {"windows": (0, 9, 9), "pipeline_parallel_size": 2},
    {"windows": (0, 0, 5), "enable_prefix_caching": False},
]


def _random_request(rng: random.Random, prefixes: list[list[int]]) -> dict[str, Any]:
    prompt = rng.choice(prefixes)[: rng.randrange(1, 30)] + [rng.randrange(101) for _ in range(rng.randrange(0, 12))]
    fields: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.randrange(1, 40), "priority": rng.randrange(3)}
    if rng.random() < 0.3:
        fields["n"] = rng.randrange(2, 5)
    if rng.random() < 0.4:
        fields["eos_token_ids"] = (rng.randrange(101), 7)
        fields["stop_token_ids"] = (rng.randrange(101),)
        fields["min_tokens"] = rng.randrange(0, min(10, fields["max_tokens"] + 1))
    if rng.random() < 0.2:
        fields["logprobs"] = 2
    if rng.random() < 0.1:
        fields["prompt_logprobs"] = 1
    if rng.random() < 0.2:
        fields["cache_salt"] = rng.choice("ab")
    if rng.random() < 0.2:
        fields["temperature"] = 0.0
        fields.pop("n", None)
    return fields


def assert_figures_are_complete(here: Any, stream_id: int, index: int) -> None:
    """Each token has its figures if they were asked for, and so has each prompt token with the first answer."""
    message, deltas = here.sent[stream_id], here.deltas[stream_id, index]
    if message.params.logprobs is not None:
        assert all(delta.logprobs[0].top_ids[0] == delta.token_ids[0] for delta in deltas)
    if message.params.prompt_logprobs is not None and index == 0:
        first, *others = deltas[0].prompt_logprobs
        assert first is None
        assert [figure.top_ids[0] for figure in others] == list(message.prompt_token_ids[1:])


def _host_tier(rng: random.Random) -> dict[str, Any]:
    """Host memory for few or many blocks, whose copies are late, and worth it always or for long requests."""
    costs = SwapCosts(num_host_blocks=rng.choice([5, 30, 400]), out_seconds=rng.choice([0.0, 1.0, 2.0]),
                      in_seconds=1.0, token_seconds=1.0)  # fmt: skip
    return {"swap": costs, "swap_lag": rng.randrange(5)}


@pytest.mark.parametrize("swaps", [False, True], ids=["recomputes", "swaps"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{value}" for value in shape.values()))
@pytest.mark.parametrize("seed", range(6))
def test_every_answer_is_that_of_an_undisturbed_run(
    world: Callable[..., Any], shape: dict[str, Any], seed: int, swaps: bool
) -> None:
    """Blocks run out, owners leave, rows fail, ranks die, and prompts share prefixes; `check` after each round."""
    rng, bursts = random.Random(seed), random.Random(seed)
    num_blocks = rng.choice([18, 24, 40, 200]) * len(shape.get("windows", (0,)))
    tier = _host_tier(random.Random(seed)) if swaps else {}
    here = world(num_blocks=num_blocks, max_recoveries=1000, watermark=rng.choice([0.0, 0.05]),
                 late_answers=bool(seed % 2), fails=lambda: rng.random() < 0.001, **shape, **tier)  # fmt: skip
    prefixes = [[rng.randrange(101) for _ in range(30)] for _ in range(3)]
    aborted: set[tuple[int, int]] = set()
    for _ in range(400):
        if len(here.sent) < 60 and rng.random() < 0.3:
            here.ask(**_random_request(rng, prefixes))
        if here.sent and rng.random() < 0.05:
            stream_id = rng.choice(list(here.sent))
            indexes = () if rng.random() < 0.5 else (rng.randrange(here.sent[stream_id].n),)
            here.send(AbortRequest(stream_id=stream_id, indexes=indexes))
            aborted |= {(stream_id, index) for index in indexes or range(here.sent[stream_id].n)}
        if rng.random() < 0.02:
            here.executor.lose()
        if (chance := bursts.random()) < 0.2:  # of several edges, some of which never end theirs
            here.driver.on_edge_message(bursts.randrange(3), Burst(begins=chance < 0.12))
        here.round()
        here.driver.check()
    here.run()
    here.driver.check()
    for stream_id, message in here.sent.items():
        for index in range(message.n):
            ends = here.ends(stream_id, index)
            assert len(ends) == 1, (stream_id, index, ends)
            if ends[0].error_code == "row_failed":
                answer = here.tokens(stream_id, index)
                assert answer == here.expected(stream_id, index)[0][: len(answer)]
            elif ends[0].finish_reason is not FinishReason.ABORT:
                here.assert_exact(stream_id, index)
                assert_figures_are_complete(here, stream_id, index)
            else:
                assert (stream_id, index) in aborted
                answer = here.tokens(stream_id, index)
                assert answer == here.expected(stream_id, index)[0][: len(answer)]
    assert here.driver.scheduler.blocks.pool.num_held == here.driver.scheduler.host.pool.num_held == 0
    assert swaps or not here.metrics.swap_blocks["out"]
    assert here.metrics.generation_tokens == sum(len(here.tokens(*key)) for key in here.deltas)
