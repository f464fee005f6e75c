"""One engine in process, measured: decode steps, throughput, the time of a start."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.sampling import SamplingParams
from argosy.deploy import bench_models, bench_table, device_defaults, settings, workload
from argosy.deploy.offline import LLM
from argosy.deploy.outputs import RequestOutput
from argosy.deploy.workload import Workload

Row = dict[str, Any]
_START_SECONDS: Final = 600.0
_LONG_START_SECONDS: Final = 12.0
_START: Final = """
import json, sys, time
import msgspec
from argosy import LLM
from argosy.cluster.protocol.config import ServingConfig
with LLM.from_config(msgspec.json.decode(sys.argv[1], type=ServingConfig), backend=sys.argv[2]) as llm:
    ranks = [{"ledger": rank.ledger, "seconds": rank.phases} for rank in llm._engine.ranks]
    print(json.dumps({"ready": time.time(), "ranks": ranks}), flush=True)
"""
GPU_WORKLOADS: Final = ("decode1", "decode8", "decode64", "decode256", "fixed512x256")
_GPU_MODEL_LEN: Final = 4096
_LEAST_WARM_UP: Final = 64  # requests


def engine_config(args: argparse.Namespace, folder: Path, options: Mapping[str, object]) -> ServingConfig:
    """From the flags of `argosy bench`; what a flag does not say is what `argosy serve` would take."""
    is_gpu_shape = args.model in bench_models.GPU_SHAPES
    num_seqs = args.max_num_seqs or (None if is_gpu_shape else 32)
    tokens = args.max_num_batched_tokens or (None if is_gpu_shape else max(2048, num_seqs or 0))
    wanted: dict[str, object] = {
        "model": str(folder),
        "dtype": dtype_of(args),
        "quantization": args.quantization,
        "max_num_seqs": num_seqs,
        "max_num_batched_tokens": tokens,
        "max_model_len": args.max_model_len or (_GPU_MODEL_LEN if is_gpu_shape else None),
        "tensor_parallel_size": args.tensor_parallel_size,
        "pipeline_parallel_size": args.pipeline_parallel_size,
        "cpu_threads": args.cpu_threads,
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "enforce_eager": args.enforce_eager or None,
        **options,
    }
    if args.usable_memory:
        wanted["gpu_memory_utilization"] = share_of_card(args.usable_memory)
    config, _ = settings.make_config({name: value for name, value in wanted.items() if value is not None})
    return config


def dtype_of(args: argparse.Namespace) -> str:
    """Given, or float32 for what runs on CPUs and the model's own for the rest."""
    return args.dtype or ("float32" if args.model in ("default", *bench_models.SHAPES) else "auto")


def share_of_card(usable_bytes: int) -> float:
    """The `gpu_memory_utilization` that lets a rank use so many bytes in all. Raises `ConfigError` without a card."""
    if not device_defaults.read_gpus():
        raise ConfigError("--usable-memory: there is no NVIDIA GPU here")
    # what programs are given is less than the card's memory, and only the driver says how much less
    ask = "import torch; print(torch.cuda.mem_get_info()[1])"
    done = subprocess.run([sys.executable, "-P", "-c", ask], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise ConfigError(f"--usable-memory: torch can't use the GPU: {done.stderr.strip().splitlines()[-1:]}")
    return round(usable_bytes / int(done.stdout), 6)


def describe_engine(llm: LLM, args: argparse.Namespace) -> Row:
    """What every row of this engine says."""
    layout = bench_table.layout_of(args.tensor_parallel_size, args.pipeline_parallel_size)
    config = llm.config
    dtype = llm._engine.info.dtype
    return {
        "group": bench_table.name_of(args.model, args.quantization or dtype, layout),
        "model": args.model,
        "dtype": dtype,
        "quantization": args.quantization,
        "backend": args.backend,
        "engine": "argosy",
        "layout": layout,
        "num_blocks": llm._engine.info.num_blocks,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
    }


def start_row(config: ServingConfig, backend: str, first_seconds: float) -> Row:
    """Seconds from the birth of a process until its engine was ready: the least of two unless one is long enough to
    tell, with kernels compiled before.

    `first_seconds` is what this process needed; on a fresh machine it had to compile them.
    """
    found = []
    for _ in range(2):
        began = time.time()
        done = subprocess.run(
            [sys.executable, "-P", "-c", _START, msgspec.json.encode(config).decode(), backend],
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
            check=False,
        )
        if done.returncode:
            raise ConfigError(f"an engine did not start: {(done.stderr.strip().splitlines() or [''])[-1][:500]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        found.append((answer["ready"] - began, answer["ranks"]))
        if found[-1][0] > _LONG_START_SECONDS:
            break
    seconds, ranks = min(found, key=lambda one: one[0])
    both = [round(one, 2) for one, _ in found]
    return {
        "workload": "start",
        "figure": round(seconds, 2),
        "unit": "s",
        "repeats": len(found),
        "spread": [min(both), max(both)],
        "first_start_seconds": round(first_seconds, 2),
        "ranks": ranks,
    }


def seconds_of_this_process() -> float:
    """Since its birth."""
    return time.time() - psutil.Process().create_time()


def measure(llm: LLM, name: str, vocab: int, repeats: int, answers: dict[str, list[list[int]]] | None = None) -> Row:
    """The medians of some runs of one workload, after a warm-up; no run finds the prefixes of another.

    The figure is milliseconds a step for decode<batch>, and output tokens a second for all others.
    """
    run(llm, warm_up(name, vocab))
    runs = []
    for repeat in range(repeats):
        requests = workload.make(name, vocab=vocab, salt=repeat)
        llm.reset_prefix_cache()
        seconds, outputs = run(llm, requests)
        if repeat == 0 and answers is not None:
            answers[name] = [list(output.outputs[0].token_ids) for output in outputs]
        timings = [output.metrics for output in outputs if output.metrics is not None]
        gaps = [
            (t.last_token_ts - t.first_token_ts) / (t.num_generation_tokens - 1)
            for t in timings
            if t.num_generation_tokens > 1
        ]
        rate = sum(r.max_tokens for r in requests) / seconds
        runs.append((rate, seconds, [timing.first_token_latency for timing in timings], gaps))
    plain = workload.make(name, vocab=vocab)
    return {"workload": name, "digest": workload.digest(plain), "requests": len(plain), **summary(name, runs)}


def warm_up(name: str, vocab: int) -> Workload:
    """Of the same shape as that workload, and shorter: as many rows for a decode step, a part of the requests else."""
    requests = workload.make(name, vocab=vocab, salt=-1)
    if name.startswith("decode"):
        return [msgspec.structs.replace(request, max_tokens=min(request.max_tokens, 32)) for request in requests]
    return requests[: max(_LEAST_WARM_UP, len(requests) // 8)]


def run(llm: LLM, requests: Workload) -> tuple[float, list[RequestOutput]]:
    """All of them at once: seconds until the last one ended, and what came."""
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=r.max_tokens, detokenize=False) for r in requests
    ]
    started = time.perf_counter()
    outputs = llm.generate([r.prompt for r in requests], params, use_tqdm=False)
    return time.perf_counter() - started, outputs


def summary(name: str, runs: Sequence[tuple[float, float, list[float], list[float]]]) -> Row:
    """Medians over runs of (output tokens a second, seconds, first-token seconds, seconds between tokens)."""
    rates = [rate for rate, *_ in runs]
    ttft = [value for _, _, values, _ in runs for value in values]
    gaps = [value for *_, values in runs for value in values]
    is_decode = name.startswith("decode") and bool(gaps)
    # all rows decode together between the last first token and the first last one
    figures = [1e3 * statistics.median(values) for *_, values in runs] if is_decode else rates
    digits = 4 if is_decode else 2
    return {
        "figure": round(statistics.median(figures), digits),
        "unit": "ms/step" if is_decode else "output tokens/s",
        "spread": [round(min(figures), digits), round(max(figures), digits)],
        "repeats": len(runs),
        "output_tokens_per_second": round(statistics.median(rates), 2),
        "seconds": round(statistics.median([seconds for _, seconds, *_ in runs]), 4),
        "ttft_ms_p50": round(1e3 * statistics.median(ttft), 3) if ttft else None,
        "ms_per_token": round(1e3 * statistics.median(gaps), 3) if gaps else None,
    }
