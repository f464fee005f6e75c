"""What a small step with prompts takes, launched kernel by kernel and as a recorded graph: a rank in this process.

    python benchmarks/gpu/bench_prompt_steps.py --model 8b 06b

For each kind of step the milliseconds from its message to its tokens on an idle card, the card's part of them, and the
same for both ways; then how many of thirty random requests, in steps of all kinds, get the same tokens both ways (in
16 bits other tiles round otherwise: steps of other sizes, both eager, are the measure). JSON lines.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
from bench_gpu import SHAPES
from profile_step import make_runner, show

from argosy.cluster.clock import MonotonicClock
from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.messages import GenerateRequest, NewRequest, SchedulerOutput
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.request import make_requests
from argosy.cluster.scheduler import Scheduler
from argosy.workers.model_runner import ModelRunner
from argosy.workers.prompt_graphs import PromptGraphs
from argosy.workers.step_recording import record_graphs

GREEDY = TokenParams(max_tokens=100, temperature=0.0)
BLOCK, ROOM = 16, 4160  # tokens that each request has blocks for


def blocks_of(row: int) -> list[int]:
    """Blocks of its own."""
    each = ROOM // BLOCK
    return list(range(row * each, (row + 1) * each))


def request(row: int, length: int, computed: int) -> NewRequest:
    """Of so many tokens, so many of them in the cache already."""
    ids = [(row * 7919 + place * 104729) % 30011 for place in range(length)]
    return NewRequest(row, ids, length, computed, blocks_of(row)[: -(-(length + 64) // BLOCK)], GREEDY)


def step_times(
    runner: ModelRunner, *, beside: int, context: int, tokens: int, before: int, repeats: int
) -> list[float]:
    """Milliseconds of steps of a prompt's `tokens`, `before` of it in the cache, beside rows with such a context."""
    rows = list(range(beside))
    active = sorted(runner.batch.active)
    take_up = SchedulerOutput(
        step_id=0, epoch=0, rows=rows, new_requests=[request(row, context + 1, context) for row in rows],
        finished=active,
    )  # fmt: skip
    finish(runner, take_up)
    found = []
    for step in range(repeats):
        output = SchedulerOutput(
            step_id=1 + step, epoch=0, rows=[*rows, beside], num_tokens=[1] * beside + [tokens],
            new_requests=[request(beside, before + tokens, before)], finished=[beside] if step else [],
        )  # fmt: skip
        torch.cuda.synchronize()
        began = time.perf_counter()
        finish(runner, output)
        found.append(1e3 * (time.perf_counter() - began))
    return found


def finish(runner: ModelRunner, output: SchedulerOutput) -> None:
    """Run it and wait for its tokens."""
    outcome = runner.execute(output)
    assert outcome is not None
    outcome.result()


def device_ms(run: Callable[[], None], repeats: int) -> float:
    """Of the card alone, behind a queue that is never empty."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def answers(runner: ModelRunner, max_tokens: int, seed: int) -> list[list[int]]:
    """Thirty requests of 1 to 300 tokens through the real scheduler, two steps in flight, joining as others go on."""
    rng = random.Random(seed)
    config = runner.config
    scheduler = Scheduler(config, MonotonicClock(), Metrics())
    scheduler._max_tokens = max_tokens  # chunks of other sizes, on the same rank
    scheduler.begin_epoch(0, runner.kv_cache.tensors[0].shape[0], runner.kv_groups)  # type: ignore[union-attr]  # measured before
    runner.execute(SchedulerOutput(step_id=-1, epoch=0, rows=[], finished=sorted(runner.batch.active)))
    requests, waiting, outcomes = [], [], []
    for number in range(30):
        ids = [rng.randrange(30000) for _ in range(rng.choice((1, 5, 16, 30, 64, 100, 129, 300)))]
        params = TokenParams(max_tokens=rng.randrange(4, 24), temperature=0.0)
        waiting.append(GenerateRequest(stream_id=number, request_id=str(number), prompt_token_ids=ids, params=params))
    steps = 0
    while waiting or any(not one.is_finished for one in requests):
        if waiting and steps % 2 == 0:
            made = make_requests(waiting.pop(0), arrival=len(requests), now=steps, max_len=4000, deltas=[])
            requests += made
            scheduler.add(made)
        while scheduler.num_steps_in_flight < scheduler.max_steps_in_flight:
            output = scheduler.schedule()
            if output is None:
                break
            outcomes.append(runner.execute(output))
            steps += 1
        if outcomes:
            scheduler.update(outcomes.pop(0).result())
        else:
            steps += 1
    return [list(one.token_ids[one.num_prompt_tokens :]) for one in requests]


def measure(
    runner: ModelRunner, prompts: PromptGraphs, shape: tuple[int, int, int, int], repeats: int
) -> dict[str, object]:
    """One kind of step both ways, twice in turn; the less of two medians."""
    beside, context, tokens, before = shape
    graphs = runner.graphs
    assert graphs is not None
    row: dict[str, object] = {"beside": beside, "context": context, "tokens": tokens, "before": before}
    found: dict[str, float] = {}
    for way in ("eager", "recorded", "eager", "recorded"):
        graphs.prompts = prompts if way == "recorded" else None
        times = step_times(runner, beside=beside, context=context, tokens=tokens, before=before, repeats=repeats)[2:]
        found[way] = min(statistics.median(times), found.get(way, float("inf")))
    row.update({f"{way}_ms": round(ms, 3) for way, ms in found.items()})
    kind = prompts.kind_of(beside + tokens, beside, 1)
    if kind is not None:
        row["replay_ms"] = round(device_ms(prompts._recorded[kind].graph.replay, 5), 3)
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted(SHAPES), default=["8b", "06b"])
    parser.add_argument("--quantization", help="round the weights, such as fp8")
    parser.add_argument(
        "--rows", type=int, default=16, help="the most rows; 9 to 16 places for decode rows are as many"
    )
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--profile", action="store_true", help="also the kernels of a recorded step")
    args = parser.parse_args()
    for model in args.model:
        began = time.perf_counter()
        runner = make_runner(model, args.rows, ROOM - 64, quantization=args.quantization)
        runner.warm_up([(1, 32), (1, 512), (1, 64, 7), (1, 64, 7, 2048), (8, 1), (1, 1)])
        ready = time.perf_counter()
        runner.graphs = graphs = record_graphs(runner, None)
        assert graphs is not None
        prompts = graphs.prompts
        assert prompts is not None
        print(json.dumps({"model": model, "sizes": len(graphs.sizes), "prompt_kinds": prompts.kinds,
                          "ready_seconds": round(ready - began, 1),
                          "record_seconds": round(time.perf_counter() - ready, 2)}), flush=True)  # fmt: skip
        shapes = [(0, 0, 128, 0), (7, 256, 64, 0), (7, 3900, 64, 3900), (0, 0, 32, 0), (0, 0, 256, 0), (0, 0, 512, 0)]
        for place, shape in enumerate([*shapes, (0, 0, 64, 3900)]):
            row = {"model": model, **measure(runner, prompts, shape, args.repeats)}
            print(json.dumps(row), flush=True)
            if place == 1:
                compare(runner, prompts, model)
            if args.profile and place == 2:
                kind = prompts.kind_of(71, 7, 1)
                assert kind is not None
                show(prompts._recorded[kind].graph.replay, 16)
        del runner, graphs, prompts
        torch.cuda.empty_cache()


def compare(runner: ModelRunner, prompts: PromptGraphs, model: str) -> None:
    """How many requests get the same tokens: both ways, and eagerly in chunks of another size."""
    graphs = runner.graphs
    assert graphs is not None
    said = {}
    for way, budget in (("eager", 512), ("recorded", 512), ("eager", 96)):
        graphs.prompts = prompts if way == "recorded" else None
        said[way, budget] = answers(runner, budget, 3)
    for one, other in itertools.combinations(said, 2):
        pairs = list(zip(said[one], said[other], strict=True))
        same, first = (sum(x == y for x, y in pairs), sum(x[0] == y[0] for x, y in pairs))
        row = {"model": model, "ways": [one, other], "same_answers": same, "same_first": first, "of": len(pairs)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
