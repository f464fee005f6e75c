"""Microseconds of a decode step that are not the model's: the real driver and wire, ranks that answer at once.

    python benchmarks/control_path/bench_control_path.py [--workers 1 2 4] [--requests 1 64 256 1000] [--steps 400]

One step is in flight at a time, so that the parts add up to a step (in serving they hide behind the forward pass of the
step before). Prints one JSON line a case, medians in microseconds:

    schedule   what the next step computes            receive    from sent to answered and decoded: the kernel, the
    encode     the step as bytes, once                           ranks' decoding and encoding, ours of the answer
    send       to all ranks                           update     tokens to requests, and the messages to edges built
    transport  encode + send + receive                edge       those messages as bytes
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from argosy.cluster import channel_executor
from argosy.cluster.channel_executor import ChannelExecutor
from argosy.cluster.clock import MonotonicClock
from argosy.cluster.driver import Driver
from argosy.cluster.metrics import Metrics
from argosy.cluster.poller import Poller
from argosy.cluster.protocol.channel import encode_frame
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import GenerateRequest, ModelRunnerOutput
from argosy.cluster.protocol.sampling import TokenParams
from argosy.deploy.local_launch import LocalRanks
from argosy.placement.plan import make_plan
from argosy.workers.zero_cost_rank import FIXED_TOKENS

PROMPT_TOKENS = 16
RESULTS = Path(__file__).parents[1] / "results" / "control_path_cpu.jsonl"


class Stopwatch:
    """Microseconds by name, for the step that is under way."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, measured."""

        def wrapper(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + (time.perf_counter() - began) * 1e6

        return wrapper


def settings(num_workers: int, num_requests: int, max_tokens: int) -> ServingConfig:
    """One step in flight, room for everybody."""
    length = PROMPT_TOKENS + max_tokens + 16
    return ServingConfig.from_mapping(
        {
            "model": "zero-cost",
            "max_model_len": length,
            "tensor_parallel_size": num_workers,
            "max_num_seqs": max(num_requests, 1),
            "max_num_batched_tokens": max(num_requests * PROMPT_TOKENS, 2048),
            "async_scheduling": False,
            "enable_prefix_caching": False,
            "num_gpu_blocks_override": (length // 16 + 2) * num_requests + 64,
        }
    )


@contextmanager
def running(config: ServingConfig, num_workers: int) -> Iterator[tuple[Driver, ChannelExecutor]]:
    """A driver whose ranks are ready."""
    with tempfile.TemporaryDirectory(prefix="argosy-bench-") as folder:
        poller = Poller()
        plan = make_plan(max(num_workers, 1), num_workers, 1)
        ranks = LocalRanks(config, plan, log_folder=folder, rank_module="argosy.workers.zero_cost_rank")
        clock = MonotonicClock()
        executor = ChannelExecutor(config=config, start_ranks=ranks, poller=poller, clock=clock, folder=folder)
        driver = Driver(config, executor, clock, Metrics())
        driver.start()
        while driver.status != "ready":
            for event in executor.poll(1.0):
                driver.on_executor_event(event)
            if driver.fatal is not None:
                raise driver.fatal
        try:
            yield driver, executor
        finally:
            executor.stop()
            poller.close()


def measure(num_workers: int, num_requests: int, num_steps: int) -> dict[str, float]:
    """Medians over decode steps with all requests running."""
    num_warm = 50
    config = settings(num_workers, num_requests, num_steps + num_warm + 8)
    watch = Stopwatch()
    with running(config, num_workers) as (driver, executor):
        params = TokenParams(max_tokens=num_steps + num_warm + 4)
        for number in range(num_requests):
            prompt = [number % 997] * PROMPT_TOKENS
            request = GenerateRequest(
                stream_id=number, request_id=f"{number:x}", prompt_token_ids=prompt, params=params
            )
            driver.on_edge_message(0, request)
        channel_executor.encode_frame = watch.timed("encode", encode_frame)  # type: ignore[assignment]  # the same call, watched
        driver.scheduler.schedule = watch.timed("schedule", driver.scheduler.schedule)  # type: ignore[method-assign]  # the same call, watched
        executor.submit = watch.timed("submit", executor.submit)  # type: ignore[method-assign]  # the same call, watched
        steps = [one_step(driver, executor, watch, num_requests) for _ in range(num_steps + num_warm)]
    channel_executor.encode_frame = encode_frame
    names = ("schedule", "encode", "send", "receive", "update", "edge", "transport", "whole")
    medians = {name: statistics.median(step[name] for step in steps[num_warm:]) for name in names}
    medians["transport_p10"] = statistics.quantiles([step["transport"] for step in steps[num_warm:]], n=10)[0]
    return medians


def one_step(driver: Driver, executor: ChannelExecutor, watch: Stopwatch, num_requests: int) -> dict[str, float]:
    """Send a step, wait for its answer, take it in, write to the edge."""
    spent = watch.spent = {}
    began = time.perf_counter()
    driver.advance()
    sent = time.perf_counter()
    while not (events := executor.poll(10.0)):
        pass
    received = time.perf_counter()
    for event in events:
        assert isinstance(event, ModelRunnerOutput), getattr(event, "error", event)
        assert len(event.token_ids) == num_requests
        driver.on_executor_event(event)
    updated = time.perf_counter()
    for _, message in driver.take_outbox():
        encode_frame(message)
    ended = time.perf_counter()
    spent["send"] = spent["submit"] - spent["encode"]
    spent["receive"] = (received - sent) * 1e6
    spent["update"] = (updated - received) * 1e6
    spent["edge"] = (ended - updated) * 1e6
    spent["transport"] = spent["submit"] + spent["receive"]
    spent["whole"] = (ended - began) * 1e6
    return spent


def main() -> None:
    """All cases, to the screen and to the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64, 256, 1000])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ[FIXED_TOKENS] = "1"
    lines = []
    for num_workers in arguments.workers:
        for num_requests in arguments.requests:
            microseconds = measure(num_workers, num_requests, arguments.steps)
            row = {
                "benchmark": "control_path",
                "workers": num_workers,
                "requests": num_requests,
                "microseconds": {name: round(value, 1) for name, value in microseconds.items()},
                "steps": arguments.steps,
                "cores": os.cpu_count(),
                "load_average": round(os.getloadavg()[0], 1),
                "python": platform.python_version(),
            }
            lines.append(json.dumps(row))
            print(lines[-1], flush=True)
    arguments.results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
