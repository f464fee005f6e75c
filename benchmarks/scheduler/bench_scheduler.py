"""What a decode step costs on the driver side, without ranks: `schedule` and `update` for 1 to 5000 running requests.

    python benchmarks/scheduler/bench_scheduler.py [--out benchmarks/results/scheduler.jsonl] [--windows 0 1024 1024]

A zero-cost executor answers each step with a fixed token. Steady decode: no arrivals, no ends; block boundaries,
hashing of full blocks and the making of `TokenDelta`s are included. One line of JSON for each number of requests. Times
are of the processor (`time.thread_time`), so that a busy machine doesn't count; `wall_median_us` is the clock's.
`--windows` is a model of several groups of layers, 0 for one that sees everything: each has a table of its own.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from pathlib import Path

from argosy.cluster.clock import MonotonicClock
from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.kv_groups import KVGroups
from argosy.cluster.protocol.messages import GenerateRequest, ModelRunnerOutput, SchedulerOutput, TokenDelta
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.request import make_requests
from argosy.cluster.scheduler import Scheduler

NUM_REQUESTS = (1, 64, 256, 1000, 5000)
PROMPT_TOKENS = 33  # and up to 15 more


def cpu_name() -> str:
    """The processor as the system names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def answer(output: SchedulerOutput) -> ModelRunnerOutput:
    """A token for each row, at no cost."""
    return ModelRunnerOutput(step_id=output.step_id, epoch=output.epoch, token_ids=[17] * len(output.rows))


def measure(num_requests: int, num_steps: int, windows: tuple[int, ...] = (0,)) -> dict[str, float]:
    """Microseconds of a steady decode step with one step in flight ahead, as the driver runs it."""
    config = ServingConfig.from_mapping(
        {
            "model": "none",
            "max_num_seqs": num_requests,
            "max_num_batched_tokens": max(num_requests * (PROMPT_TOKENS + 16), 2048),
            "block_size": 16,
        }
    )
    clock, metrics = MonotonicClock(), Metrics()
    scheduler = Scheduler(config, clock, metrics)
    num_tokens = PROMPT_TOKENS + num_steps + 216
    scheduler.begin_epoch(0, num_requests * (num_tokens // 16 + 2) * 2 * len(windows), KVGroups(windows))
    deltas: list[TokenDelta] = []
    for stream_id in range(num_requests):
        prompt = [stream_id + 1] * (PROMPT_TOKENS + stream_id % 16)  # block boundaries fall on all steps alike
        message = GenerateRequest(
            stream_id=stream_id,
            request_id=f"{stream_id:032x}",
            prompt_token_ids=prompt,
            params=TokenParams(max_tokens=num_steps + 100, eos_token_ids=(2,)),
        )
        scheduler.add(make_requests(message, arrival=stream_id, now=clock.now(), max_len=10**6, deltas=deltas))
    pending = [scheduler.schedule()]
    for _ in range(40):  # prefill, then the first decodes
        pending.append(scheduler.schedule())
        first = pending.pop(0)
        assert first is not None
        scheduler.update(answer(first))
    assert scheduler.num_running == num_requests
    deltas.clear()
    gc.collect()
    gc.freeze()
    schedule_us, update_us, wall_us = [], [], []
    now = time.thread_time
    for _ in range(num_steps):
        wall_began, began = time.perf_counter(), now()
        output = scheduler.schedule()
        middle, wall_middle = now(), time.perf_counter()
        assert output is not None
        pending.append(output)
        first = pending.pop(0)
        assert first is not None
        told = answer(first)
        wall_resumed, resumed = time.perf_counter(), now()
        scheduler.update(told)
        ended, wall_ended = now(), time.perf_counter()
        schedule_us.append((middle - began) * 1e6)
        update_us.append((ended - resumed) * 1e6)
        wall_us.append((wall_middle - wall_began + wall_ended - wall_resumed) * 1e6)
        deltas.clear()
    total = [a + b for a, b in zip(schedule_us, update_us, strict=True)]
    return {
        "num_running": num_requests,
        "schedule_us": round(statistics.mean(schedule_us), 1),
        "update_us": round(statistics.mean(update_us), 1),
        "total_us": round(statistics.mean(total), 1),
        "total_median_us": round(statistics.median(total), 1),
        "total_p99_us": round(sorted(total)[int(len(total) * 0.99)], 1),
        "wall_median_us": round(statistics.median(wall_us), 1),
        "per_request_us": round(statistics.mean(total) / num_requests, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--requests", type=int, nargs="+", default=NUM_REQUESTS)
    parser.add_argument("--windows", type=int, nargs="+", default=[0], help="of groups of layers; 0 sees everything")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    about = {"benchmark": "scheduler", "cpu": cpu_name(), "python": sys.version.split()[0]}
    windows = tuple(arguments.windows)
    lines = [
        json.dumps({**about, "windows": windows, **measure(number, arguments.steps, windows)})
        for number in arguments.requests
    ]
    print("\n".join(lines))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
