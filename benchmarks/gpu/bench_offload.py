"""Weights in the host's memory: step times against the link's bound, in one run. A rank of its own in this process.

    python benchmarks/gpu/bench_offload.py --model 8b --gib 0 4 8 14 --batch 1 8 64 256
    python benchmarks/gpu/bench_offload.py --model tiny --device cpu --gib 0 0.005 --batch 1 4 --prefill 64

The bound of a step is the bytes that it copies over what the link gives to plain copies of the same size, measured
first; a step can't be shorter than that, nor than the same step with all weights on the card. `share` is the larger of
the two over the step's time. The tokens of all runs are compared: the same weights must say the same.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import NewRequest, SchedulerOutput
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.cluster.protocol.sampling import TokenParams
from argosy.deploy import bench_models, bench_table
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import init_parallel
from argosy.workers.device import describe_device, set_up_device
from argosy.workers.memory import MemoryLedger, choose_num_offloaded
from argosy.workers.model_runner import ModelRunner

BLOCK = 16
TOKENS = 24  # that are compared


def make_runner(args: argparse.Namespace, gib: float) -> ModelRunner:
    """A rank with random weights, so many GiB of them in the host's memory, and a cache for the largest batch."""
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    set_up_device(device, args.threads)
    with tempfile.TemporaryDirectory() as parent:
        folder, _ = bench_models.make_folder(args.model, Path(parent))
        seqs = max(args.batch)
        config = ServingConfig.from_mapping(
            {"model": str(folder), "load_format": "dummy", "device": args.device, "quantization": args.quantization,
             "max_num_seqs": seqs, "max_model_len": args.max_model_len, "cpu_offload_gb": gib,
             "max_num_batched_tokens": max(args.prefill, seqs), "max_cuda_graph_batch": seqs}
        )  # fmt: skip
        spec = read_model_spec(folder, None, args.quantization)
        parallel = init_parallel(make_plan(spec.num_layers, 1, 1).ranks[0], "127.0.0.1:0", device, 60.0)
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        runner = ModelRunner(config, spec, parallel, device=device, dtype=dtype, cache_dtype=dtype)
        runner.load(folder, None, num_offloaded=choose_num_offloaded(runner, MemoryLedger()))
    tokens = max(seqs * (args.context + 64), args.prefill)
    runner.allocate(tokens // BLOCK + 2 * seqs)
    return runner


def link_rate(device: torch.device, hosts: list[torch.Tensor]) -> float:
    """Bytes a second that plain copies of these blocks come with, one after the other: the best of five rounds."""
    there = torch.empty(max(host.nbytes for host in hosts), dtype=torch.uint8, device=device)

    def copy_all() -> None:
        for host in hosts:
            there[: host.nbytes].copy_(host, non_blocking=True)

    return sum(host.nbytes for host in hosts) / min(timed(device, copy_all, 1) for _ in range(5))


def timed(device: torch.device, run: Callable[[], object], count: int) -> float:
    """Seconds a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / count


def start_rows(runner: ModelRunner, batch: int, context: int) -> SchedulerOutput:
    """The step that takes up `batch` requests with `context` tokens computed."""
    each = context // BLOCK + 4
    requests = [
        NewRequest(row, [5] * (context + 1), context + 1, context, list(range(row * each, (row + 1) * each)),
                   TokenParams(max_tokens=1000, temperature=0.0))
        for row in range(batch)
    ]  # fmt: skip
    finished = sorted(runner.batch.active)
    return SchedulerOutput(step_id=0, epoch=0, rows=list(range(batch)), new_requests=requests, finished=finished)


def prompts(runner: ModelRunner, num_tokens: int) -> SchedulerOutput:
    """A step of prompts, 512 tokens each or one of fewer."""
    length = min(512, num_tokens)
    count, each = num_tokens // length, -(-length // BLOCK)
    requests = [
        NewRequest(row, [(row * 7919 + place * 104729) % 3001 for place in range(length)], length, 0,
                   list(range(row * each, (row + 1) * each)), TokenParams(max_tokens=8, temperature=0.0))
        for row in range(count)
    ]  # fmt: skip
    finished = sorted(runner.batch.active)
    return SchedulerOutput(step_id=1, epoch=0, rows=list(range(count)), num_tokens=[length] * count,
                           new_requests=requests, finished=finished)  # fmt: skip


def speak(runner: ModelRunner) -> list[int]:
    """The tokens after a fixed prompt."""
    prompt = [(7 * place) % 3001 for place in range(40)]
    request = NewRequest(0, prompt, len(prompt), 0, list(range(6)), TokenParams(max_tokens=99, temperature=0.0))
    first = SchedulerOutput(step_id=0, epoch=0, rows=[0], num_tokens=[len(prompt)], new_requests=[request],
                            finished=sorted(runner.batch.active))  # fmt: skip
    said = []
    for step in range(TOKENS):
        outcome = runner.execute(first if step == 0 else SchedulerOutput(step_id=step, epoch=0, rows=[0]))
        assert outcome is not None
        said += outcome.result().token_ids
    return said


def measure(runner: ModelRunner, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each step, by name."""
    device, found = runner.device, {}
    for batch in args.batch:
        runner.execute(start_rows(runner, batch, args.context))
        decode = SchedulerOutput(step_id=9, epoch=0, rows=list(range(batch)))
        runner.execute(decode)
        found[f"decode{batch}"] = timed(device, lambda decode=decode: runner.execute(decode), args.steps)
        if runner.graphs is not None and batch in args.eager:
            kept, runner.graphs = runner.graphs, None
            runner.execute(start_rows(runner, batch, args.context))
            runner.execute(decode)
            found[f"decode{batch}, eager"] = timed(device, lambda decode=decode: runner.execute(decode), args.steps)
            runner.graphs = kept
    output = prompts(runner, args.prefill)
    runner.execute(output)
    output = SchedulerOutput(
        step_id=2, epoch=0, rows=output.rows, num_tokens=output.num_tokens, new_requests=output.new_requests,
        finished=output.rows,
    )  # fmt: skip
    found[f"prefill{args.prefill}"] = timed(device, lambda: runner.execute(output), 4)
    return found


def main() -> int:
    """Measure, print a JSON line each, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b")
    parser.add_argument("--quantization", help="round the weights, such as fp8")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--gib", type=float, nargs="+", default=[0, 4, 8, 14], help="of the weights, on the host")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--eager", type=int, nargs="*", default=[1], help="batches to measure without graphs as well")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prefill", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    resident: dict[str, float] = {}
    said: list[int] = []
    rows: list[dict[str, Any]] = []
    for gib in args.gib:
        began = time.perf_counter()
        runner = make_runner(args, gib)
        loaded = time.perf_counter() - began
        runner.warm_up([(1, 32), (1, min(args.prefill, 512)), *((size, 1) for size in args.batch)])
        runner.record_graphs()
        tokens = speak(runner)
        said = said or tokens
        offload = runner.offload
        rate = 0.0 if offload is None else link_rate(runner.device, offload._host)
        host_bytes = 0 if offload is None else offload.host_bytes
        for name, seconds in measure(runner, args).items():
            resident.setdefault(name, seconds)
            bound = host_bytes / rate if rate else 0.0
            row = {
                "model": args.model, "quantization": args.quantization, "device": describe_device(runner.device),
                "step": name, "asked_gib": gib, "layers": 0 if offload is None else len(offload.layers),
                "host_gb": round(host_bytes / 1e9, 3),
                "buffers_gb": round((offload.buffer_bytes if offload else 0) / 1e9, 3),
                "link_gb_s": round(rate / 1e9, 2), "step_ms": round(1e3 * seconds, 3),
                "resident_ms": round(1e3 * resident[name], 3), "link_bound_ms": round(1e3 * bound, 3),
                "share_of_link": round(bound / seconds, 3), "share": round(max(bound, resident[name]) / seconds, 3),
                "load_seconds": round(loaded, 2), "tokens_equal": tokens == said,
            }  # fmt: skip
            rows.append(row)
            bench_table.tell(row, args.output)
        del runner, offload
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print("\nstep                 GiB  layers   link GB/s   step ms   bound ms   of the link   of the bound")
    for row in rows:
        print(
            f"{row['step']:18} {row['asked_gib']:5g} {row['layers']:7} {row['link_gb_s']:11.1f} {row['step_ms']:9.2f} "
            f"{row['link_bound_ms']:10.2f} {row['share_of_link']:13.1%} {row['share']:14.1%}"
        )
    return 0 if all(row["tokens_equal"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
