"""How much of the KV memory that requests hold is empty: the real scheduler against reserving the maximum.

    python benchmarks/scheduler/bench_waste.py [--block-sizes 16 8 4] [--out benchmarks/results/scheduler.jsonl]

A ShareGPT-like mix (log-normal prompts and answers, seeded) meets a pool of a given size, all at once, until all have
ended. `reserve` is the allocation of systems without paging on the same trace and the same memory: each request gets
room for the model's whole length when it starts. Waste is 1 - tokens held / slots held, over all steps, and over
those in which at least 95 % of the pool was held ("at load"). `--windows 0 128` is a model of two groups of layers,
half of which see 128 tokens: slots of a window that nobody looks back on are waste.
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
from argosy.cluster.protocol.kv_groups import KVGroups
from argosy.cluster.protocol.messages import GenerateRequest, ModelRunnerOutput, TokenDelta
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.request import make_requests
from argosy.cluster.scheduler import Scheduler

MAX_MODEL_LEN = 2048
BLOCK_SIZE = 16  # of what is reserved
MAX_NUM_SEQS = 256
LOAD = 0.95


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


def run_paged(
    lengths: list[tuple[int, int]], num_blocks: int, block_size: int, windows: tuple[int, ...]
) -> dict[str, float]:
    """The real scheduler until all have ended."""
    config = ServingConfig.from_mapping(
        {"model": "none", "max_num_seqs": MAX_NUM_SEQS, "max_num_waiting": len(lengths), "block_size": block_size}
    )
    clock, metrics = ManualClock(), Metrics()
    scheduler = Scheduler(config, clock, metrics)
    scheduler.begin_epoch(0, num_blocks, KVGroups(windows))
    deltas: list[TokenDelta] = []
    for stream_id, (prompt, answer) in enumerate(lengths):
        message = GenerateRequest(
            stream_id=stream_id,
            request_id=f"{stream_id:032x}",
            prompt_token_ids=[stream_id + 1] * prompt,
            params=TokenParams(max_tokens=answer),
        )
        scheduler.add(make_requests(message, arrival=stream_id, now=0.0, max_len=MAX_MODEL_LEN, deltas=deltas))
    unused = held = unused_at_load = held_at_load = running = steps = steps_at_load = 0
    while (output := scheduler.schedule()) is not None:
        gauges = scheduler.gauges()
        slots = gauges["argosy_kv_blocks_used"] * block_size
        wasted = round(gauges["argosy_kv_waste_ratio"] * slots)
        unused += wasted
        held += round(slots)
        if gauges["argosy_kv_usage_ratio"] >= LOAD:
            unused_at_load += wasted
            held_at_load += round(slots)
            steps_at_load += 1
        running += scheduler.num_running
        steps += 1
        num_sampled = len(output.rows) - len(output.partial)
        scheduler.update(ModelRunnerOutput(step_id=output.step_id, epoch=0, token_ids=[17] * num_sampled))
        scheduler.ended.clear()
        deltas.clear()
    assert metrics.generation_tokens == sum(answer for _, answer in lengths)
    return {
        "kv_waste_ratio": round(unused / held, 4),
        "kv_waste_ratio_at_load": round(unused_at_load / held_at_load, 4) if held_at_load else -1.0,
        "steps_at_load": steps_at_load,
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
    parser.add_argument("--blocks", type=int, default=4096, help="of 16 tokens: the memory is the same for all sizes")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--windows", type=int, nargs="+", default=[0], help="of groups of layers; 0 sees everything")
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
        "windows": arguments.windows,
        "max_model_len": MAX_MODEL_LEN,
    }
    lines = []
    windows = tuple(arguments.windows)
    for size in (*arguments.block_sizes, 0):
        began = time.perf_counter()
        num_blocks = arguments.blocks * BLOCK_SIZE // (size or BLOCK_SIZE)
        figures = run_paged(lengths, num_blocks, size, windows) if size else run_reserved(lengths, num_blocks)
        how = {"allocation": "paged" if size else "reserve", "block_size": size or BLOCK_SIZE}
        lines.append(json.dumps({**about, **how, **figures, "seconds": round(time.perf_counter() - began, 2)}))
        print(lines[-1], flush=True)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
