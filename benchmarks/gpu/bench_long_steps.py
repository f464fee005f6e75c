"""One long prompt, three ways: in chunks (steps of 8192 tokens), in one step, and in one step that is cut into slices
with the hidden states on the host. Seconds, and the most bytes on the card beside weights and cache.

    python benchmarks/gpu/bench_long_steps.py --model 8b --tokens 32768 131072
    python benchmarks/gpu/bench_long_steps.py --model 8b --tokens 65536 --offload-gib 14      weights on the host, too
    python benchmarks/gpu/bench_long_steps.py --model tiny --device cpu --tokens 256 --chunk 64 --slice 16

Chunks are the honest competitor: they need as little. A slice's peak is the same at any length; what is gained by long
steps is that weights pass by once, which counts where they come from the host (`--offload-gib`).
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_offload import BLOCK

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


def make_runner(args: argparse.Namespace, num_tokens: int, way: str) -> ModelRunner:
    """A rank with random weights and room for the prompt; its longest step is what `way` needs."""
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    set_up_device(device, args.threads)
    longest = num_tokens + 2 * BLOCK
    settings: dict[str, Any] = {
        "load_format": "dummy", "max_num_seqs": 4, "max_model_len": longest, "device": args.device,
        "max_num_batched_tokens": args.chunk if way == "chunks" else longest, "cpu_offload_gb": args.offload_gib,
        "hf_overrides": {"max_position_embeddings": longest},
    }  # fmt: skip
    if way == "slices":
        settings |= {"activation_offload_gb": "auto", "activation_slice_tokens": args.slice}
    with tempfile.TemporaryDirectory() as parent:
        folder, _ = bench_models.make_folder(args.model, Path(parent))
        config = ServingConfig.from_mapping({"model": str(folder), **settings})
        spec = read_model_spec(folder, config.model.hf_overrides)
        parallel = init_parallel(make_plan(spec.num_layers, 1, 1).ranks[0], "127.0.0.1:0", device, 60.0)
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        runner = ModelRunner(config, spec, parallel, device=device, dtype=dtype, cache_dtype=dtype)
        runner.load(folder, None, num_offloaded=choose_num_offloaded(runner, MemoryLedger()))
    runner.allocate(longest // BLOCK + 2)
    return runner


def answer(runner: ModelRunner, num_tokens: int) -> int:
    """The first token after a prompt of so many, in as many steps as the budget makes of it."""
    prompt = [(place * 104729) % 3001 for place in range(num_tokens)]
    request = NewRequest(0, prompt, num_tokens, 0, list(range(-(-num_tokens // BLOCK) + 1)),
                         TokenParams(max_tokens=4, temperature=0.0))  # fmt: skip
    budget = runner.config.scheduler.max_num_batched_tokens
    finished = sorted(runner.batch.active)
    outcome = None
    for step, first in enumerate(range(0, num_tokens, budget)):
        count = min(budget, num_tokens - first)
        outcome = runner.execute(
            SchedulerOutput(
                step_id=step, epoch=0, rows=[0], num_tokens=[count], new_requests=[request] if first == 0 else [],
                partial=[0] if first + count < num_tokens else [], finished=finished if first == 0 else [],
            )
        )  # fmt: skip
    assert outcome is not None
    return outcome.result().token_ids[0]


def measure(args: argparse.Namespace, num_tokens: int, way: str) -> dict[str, Any]:
    """One way with one length."""
    runner = make_runner(args, num_tokens, way)
    device, on_card = runner.device, args.device == "cuda"
    warm = min(num_tokens, 4 * args.slice + 1, 2 * args.chunk + 1)
    answer(runner, warm)
    base = peak = 0
    if on_card:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    token = answer(runner, num_tokens)
    if on_card:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    long_steps, offload = runner.long_steps, runner.offload
    buffers = 0 if long_steps is None else long_steps.buffer_bytes
    if on_card:
        peak = torch.cuda.max_memory_allocated(device) - base + buffers
    return {
        "model": args.model, "device": describe_device(device), "tokens": num_tokens, "way": way,
        "chunk": args.chunk if way == "chunks" else None, "slice": args.slice if way == "slices" else None,
        "weights_on_host_gb": 0.0 if offload is None else round(offload.host_bytes / 1e9, 2),
        "seconds": round(seconds, 4), "tokens_per_second": round(num_tokens / seconds), "peak_gb": round(peak / 1e9, 3),
        "host_gb": 0.0 if long_steps is None else round(long_steps.host_bytes / 1e9, 3), "token": token,
    }  # fmt: skip


def main() -> int:
    """Measure, print a JSON line each, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--ways", nargs="+", default=["chunks", "slices", "whole"])
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--slice", type=int, default=4096)
    parser.add_argument("--offload-gib", type=float, default=0.0, help="of the weights, on the host")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    rows = []
    for num_tokens in args.tokens:
        for way in args.ways:
            row = measure(args, num_tokens, way)
            rows.append(row)
            bench_table.tell(row, args.output)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print("\n  tokens  way       seconds   tokens/s   peak GB   host GB   token")
    for row in rows:
        print(
            f"{row['tokens']:8}  {row['way']:8} {row['seconds']:8.3f} {row['tokens_per_second']:10} "
            f"{row['peak_gb']:9.3f} {row['host_gb']:9.3f} {row['token']:7}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
