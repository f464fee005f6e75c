"""How busy the stages of a pipeline are kept: the real driver and scheduler on stages whose times are reckoned.

    python benchmarks/scheduler/bench_pipeline.py [--out benchmarks/results/scheduler.jsonl]

A stage's time is reckoned for Llama-3.1-8B in bf16 on H200, TP2 in each stage: weights read once, arithmetic of the
tokens, keys and values read, a fixed cost for launches and sums, the head on the last stage. A message between stages
takes 14 us, and 0.4 ms pass until the driver has heard of a step and sent another. Printed: the share of the time each
stage has nothing to do while at least half of the requests run (`idle`), and what the whole workload comes to.
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

TP, NUM_LAYERS, LAYER_BYTES, HEAD_BYTES, KV_BYTES_A_TOKEN = 2, 32, 436e6, 1.05e9, 4096.0
READ, FLOPS, HOP_SECONDS, DRIVER_SECONDS = 4.2e12, 650e12, 14e-6, 0.4e-3
LAYER_SECONDS = 16e-6  # launches and the two sums, of each layer
MAX_NUM_SEQS, NUM_BLOCKS = 1024, 60_000


def stage_seconds(layers: list[int], stage: int, size: StepSize) -> float:
    """Reckoned from bytes and flops."""
    num = layers[stage]
    weights, flops = num * LAYER_BYTES / TP / READ, size.num_tokens * num * LAYER_BYTES / TP / FLOPS
    seconds = num * LAYER_SECONDS + max(weights, flops)
    seconds += size.context_tokens * num * KV_BYTES_A_TOKEN / TP / READ if size.num_tokens == size.num_rows else 0.0
    if stage == len(layers) - 1:
        seconds += max(HEAD_BYTES / TP / READ, size.num_sampled * HEAD_BYTES / TP / FLOPS)
    return seconds


def measure(name: str, layers: list[int], rate: float) -> dict[str, object]:
    """One workload, all requests at once or `rate` a second."""
    config = ServingConfig.from_mapping(
        {"model": "none", "max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": 8192, "block_size": 16,
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
        if arrivals or run.driver.scheduler.num_running * 2 >= len(requests):
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
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name in args.workload:
        line = json.dumps({"benchmark": "pipeline", "note": args.note, **measure(name, args.layers, args.rate)})
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
