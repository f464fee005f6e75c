"""How much of the KV memory that requests hold is empty: the real scheduler against reserving the maximum.

    python benchmarks/scheduler/bench_waste.py [--out benchmarks/results/scheduler.jsonl]

A ShareGPT-like mix (log-normal prompts and answers, seeded) meets a pool of a given size, all at once, until all have
ended. `reserve` is the allocation of systems without paging on the same trace and the same memory: each request gets
room for the model's whole length when it starts. Waste is 1 - tokens held / slots held, over all steps.
"""

import argparse
import json
import random
import sys
import time
from collections import deque
from pathlib import Path

from argosy.cluster.clock import ManualClock
from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import GenerateRequest, ModelRunnerOutput, TokenDelta
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.request import make_requests
from argosy.cluster.scheduler import Scheduler

MAX_MODEL_LEN = 2048
BLOCK_SIZE = 16
MAX_NUM_SEQS = 256


def cpu_name() -> str:
    """The processor as the system names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def length_mix(num_requests: int, seed: int) -> list[tuple[int, int]]:
    """Prompt and answer lengths like those of shared chats: medians of about 90 and 200 tokens, long tails."""
    rng = random.Random(seed)
    return [
        (
            min(max(int(rng.lognormvariate(4.5, 1.2)), 4), MAX_MODEL_LEN // 2),
            min(max(int(rng.lognormvariate(5.3, 0.9)), 4), MAX_MODEL_LEN // 2 - 1),
        )
        for _ in range(num_requests)
    ]


def run_paged(lengths: list[tuple[int, int]], num_blocks: int) -> dict[str, float]:
    """The real scheduler until all have ended."""
    config = ServingConfig.from_mapping(
        {"model": "none", "max_num_seqs": MAX_NUM_SEQS, "max_num_waiting": len(lengths), "block_size": BLOCK_SIZE}
    )
    clock, metrics = ManualClock(), Metrics()
    scheduler = Scheduler(config, clock, metrics)
    scheduler.begin_epoch(0, num_blocks)
    deltas: list[TokenDelta] = []
    for stream_id, (prompt, answer) in enumerate(lengths):
        message = GenerateRequest(
            stream_id=stream_id,
            request_id=f"{stream_id:032x}",
            prompt_token_ids=[stream_id + 1] * prompt,
            params=TokenParams(max_tokens=answer),
        )
        scheduler.add(make_requests(message, arrival=stream_id, now=0.0, max_len=MAX_MODEL_LEN, deltas=deltas))
    unused = held = running = steps = 0
    while (output := scheduler.schedule()) is not None:
        gauges = scheduler.gauges()
        slots = gauges["argosy_kv_blocks_used"] * BLOCK_SIZE
        unused += round(gauges["argosy_kv_waste_ratio"] * slots)
        held += round(slots)
        running += scheduler.num_running
        steps += 1
        num_sampled = len(output.rows) - len(output.partial)
        scheduler.update(ModelRunnerOutput(step_id=output.step_id, epoch=0, token_ids=[17] * num_sampled))
        scheduler.ended.clear()
        deltas.clear()
    assert metrics.generation_tokens == sum(answer for _, answer in lengths)
    return {
        "kv_waste_ratio": round(unused / held, 4),
        "mean_running": round(running / steps, 1),
        "steps": steps,
        "preemptions": metrics.preemptions,
    }


def run_reserved(lengths: list[tuple[int, int]], num_blocks: int) -> dict[str, float]:
    """Room for the whole length from the start; the same memory, the same rows, prompts computed in one step."""
    places = min(num_blocks * BLOCK_SIZE // MAX_MODEL_LEN, MAX_NUM_SEQS)
    waiting, live = deque(lengths), list[list[int]]()
    tokens = held = running = steps = 0
    while waiting or live:
        while waiting and len(live) < places:
            prompt, answer = waiting.popleft()
            live.append([prompt, answer])
        tokens += sum(request[0] for request in live)
        held += len(live) * MAX_MODEL_LEN
        running += len(live)
        steps += 1
        for request in live:
            request[0] += 1
            request[1] -= 1
        live = [request for request in live if request[1] > 0]
    return {"kv_waste_ratio": round(1 - tokens / held, 4), "mean_running": round(running / steps, 1), "steps": steps}


def main() -> None:
    """Run both and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--blocks", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lengths = length_mix(arguments.requests, arguments.seed)
    about = {
        "benchmark": "kv_waste",
        "cpu": cpu_name(),
        "python": sys.version.split()[0],
        "requests": len(lengths),
        "mean_prompt": round(sum(prompt for prompt, _ in lengths) / len(lengths), 1),
        "mean_answer": round(sum(answer for _, answer in lengths) / len(lengths), 1),
        "pool_tokens": arguments.blocks * BLOCK_SIZE,
        "block_size": BLOCK_SIZE,
        "max_model_len": MAX_MODEL_LEN,
    }
    lines = []
    for name, run in (("paged", run_paged), ("reserve", run_reserved)):
        began = time.perf_counter()
        figures = run(lengths, arguments.blocks)
        seconds = round(time.perf_counter() - began, 2)
        lines.append(json.dumps({**about, "allocation": name, **figures, "seconds": seconds}))
    print("\n".join(lines))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
