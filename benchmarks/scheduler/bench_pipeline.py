"""How busy the stages of a pipeline are kept: the real driver and scheduler on stages whose times are reckoned.

    python benchmarks/scheduler/bench_pipeline.py [--places 128] [--out benchmarks/results/scheduler.jsonl]

A stage's time is reckoned for Llama-3.1-8B in bf16 on H200, TP2 in each stage, from what `gpu/stage_profile` measured:
weights read once, arithmetic of the tokens, keys and values read, a fixed cost for launches and sums, the head on the
last stage, which also leaves out of its last layer what nobody asks for. A message between stages takes 33 us, and
0.6 ms pass until the driver has heard of a step and sent another. Not reckoned: what the host takes to launch a step.
Printed: the share of the time each stage has nothing to do while requests wait for a place (with fewer `--places` than
requests) or at least half of them run (`idle`), and what the whole workload comes to.
"""

import argparse
import json
import sys
from collections import deque
from pathlib import Path

from argosy.cluster.clock import ManualClock
from argosy.cluster.driver import Driver
from argosy.cluster.metrics import Metrics
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import GenerateRequest
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.simulation import SimulatedExecutor, Simulation
from argosy.cluster.stage_clock import StageClock, StepSize
from argosy.deploy import workload

TP, LAYER_BYTES, HEAD_BYTES, KV_BYTES_A_TOKEN = 2, 436e6, 1.05e9, 4096.0
READ, READ_KV, FLOPS, HOP_SECONDS, DRIVER_SECONDS = 4.2e12, 3.4e12, 626e12, 33e-6, 0.6e-3
LAYER_SECONDS, ROW_SECONDS = 16e-6, 0.1e-6  # launches and the two sums, of each layer; the sums' bytes, of each row
BEHIND_ATTENTION = 0.87  # of a layer's arithmetic
MAX_NUM_SEQS, NUM_BLOCKS = 1024, 60_000


def layer_seconds(num_tokens: int) -> float:
    """A layer's products and sums."""
    return (
        LAYER_SECONDS
        + max(LAYER_BYTES / TP / READ, num_tokens * LAYER_BYTES / TP / FLOPS)
        + num_tokens
        * (
            ROW_SECONDS if num_tokens <= 1024 else 0.0  # of more, sums are done beside products
        )
    )


def stage_seconds(layers: list[int], stage: int, size: StepSize) -> float:
    """Reckoned from bytes and flops."""
    num, tokens = layers[stage], size.num_tokens
    seconds = num * layer_seconds(tokens)
    seconds += num * size.context_tokens * KV_BYTES_A_TOKEN / TP / READ_KV if tokens == size.num_rows else 0.0
    if stage == len(layers) - 1:
        seconds -= BEHIND_ATTENTION * (layer_seconds(tokens) - layer_seconds(size.num_sampled))
        seconds += max(HEAD_BYTES / TP / READ, size.num_sampled * HEAD_BYTES / TP / FLOPS)
    return seconds


def measure(name: str, layers: list[int], rate: float, places: int = MAX_NUM_SEQS) -> dict[str, object]:
    """One workload, all requests at once or `rate` a second, of which `places` may run."""
    config = ServingConfig.from_mapping(
        {"model": "none", "max_num_seqs": places, "max_num_batched_tokens": 8192, "block_size": 16,
         "max_model_len": 4096, "pipeline_parallel_size": len(layers)}
    )  # fmt: skip
    clock = ManualClock()
    stages = StageClock(len(layers), lambda stage, size: stage_seconds(layers, stage, size), hop_seconds=HOP_SECONDS)
    executor = SimulatedExecutor(
        config, clock, num_blocks=NUM_BLOCKS, step_seconds=DRIVER_SECONDS, stage_clock=stages,
        next_token=lambda token_ids, params: 7,
    )  # fmt: skip
    run = Simulation(Driver(config, executor, clock, Metrics()), executor)
    run.driver.start()
    run.round()
    requests = workload.make(name, vocab=128256)
    began = clock.now()
    arrivals = deque(workload.poisson_arrivals(len(requests), rate) if rate else [0.0] * len(requests))
    starts, firsts, saturated_until = dict[int, float](), dict[int, float](), began
    while arrivals or next(run.driver.open_requests(), None) is not None:
        while arrivals and began + arrivals[0] <= clock.now() + 1e-9:
            starts[len(starts)] = began + arrivals.popleft()
            run.send(_message(requests[len(starts) - 1]))
        run.round(began + arrivals[0] - clock.now() if arrivals else 1.0)
        for stream, _ in run.deltas:
            firsts.setdefault(stream, clock.now())
        scheduler = run.driver.scheduler
        if arrivals or scheduler.num_waiting or scheduler.num_running * 2 >= len(requests):
            saturated_until = clock.now()
    seconds = clock.now() - began
    tokens = sum(request.max_tokens for request in requests)
    idle = stages.idle_shares(stages.spans[-1][0][0], saturated_until)
    waits = sorted(firsts[stream] - starts[stream] for stream in firsts)
    times = [delta.timing for deltas in run.deltas.values() for delta in deltas if delta.timing]
    each = [
        (last - first) / (requests[stream].max_tokens - 1)
        for (stream, _), (_, first, last) in zip(run.deltas, times, strict=True)
        if requests[stream].max_tokens > 1
    ]
    return {
        "workload": name,
        "rate": rate,
        "layers": layers,
        "places": places,
        "idle": [round(share, 4) for share in idle],
        "output_tokens_a_second": round(tokens / seconds),
        "ttft_p50_ms": round(1e3 * waits[len(waits) // 2], 1),
        "ms_a_token_p50": round(1e3 * sorted(each)[len(each) // 2], 3),
        "steps": len(stages.spans[0]),
    }


def _message(request: workload.WorkloadRequest) -> GenerateRequest:
    return GenerateRequest(
        stream_id=request.index,
        request_id=f"{request.index:032x}",
        prompt_token_ids=request.prompt,
        params=TokenParams(max_tokens=request.max_tokens, temperature=0.0),
    )


def main() -> int:
    """Print a line of JSON for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=["decode1", "decode8", "decode64", "fixed512x256", "chat1000"])
    parser.add_argument("--layers", nargs="+", type=int, default=[16, 16], help="of each stage")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: all at once")
    parser.add_argument("--places", type=int, default=MAX_NUM_SEQS, help="requests that run at once")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name in args.workload:
        line = json.dumps(
            {"benchmark": "pipeline", "note": args.note, **measure(name, args.layers, args.rate, args.places)}
        )
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
