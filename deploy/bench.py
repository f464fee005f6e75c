"""`argosy bench`: one JSON line a figure, a table last; what it ran on, with which versions, on which requests.

In process it measures an engine of its own (`LLM`), over HTTP a server that runs. With `--peer transformers` the same
prompts go through transformers in the same run, and the table shows the ratio: on a shared or slow machine the ratios
count, not the figures.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import argosy
from argosy.cluster.protocol.sampling import SamplingParams
from argosy.deploy import bench_http, bench_models, bench_peers, settings, workload
from argosy.deploy.device_defaults import read_gpus
from argosy.deploy.offline import LLM
from argosy.deploy.workload import Workload

Row = dict[str, Any]

_PACKAGES: Final = ("torch", "ray", "transformers", "triton")
_COLD_START: Final = """
import sys, json
from argosy import LLM, SamplingParams
settings = json.loads(sys.argv[1])
with LLM(**settings) as llm:
    llm.generate([[1001, 1002, 1003]], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    print("first token", flush=True)
"""


def main(args: argparse.Namespace) -> int:
    """Measure, print and perhaps store; the exit code."""
    about = describe_machine()
    rows = []
    measure = _over_http(args) if args.url else _in_process(args)
    for row in measure:
        row = {**row, **about}
        rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(line + "\n")
    print(table(rows))
    return 0


def describe_machine() -> Row:
    """What a figure is worthless without."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": machine_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": read_gpus(),
        "python": platform.python_version(),
        "argosy": argosy.__version__,
        "commit": commit(),
        "versions": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Of the tree that this package runs from; a mark when it was changed since."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        here = Path(__file__).resolve().parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def table(rows: list[Row]) -> str:
    """The figures for people, with the ratio to the best peer of the same workload."""
    head = ("model", "dtype", "workload", "engine", "output tok/s", "TTFT ms", "ms/token", "ratio")
    lines = [head]
    for row in rows:
        peers = [
            other["output_tokens_per_second"]
            for other in rows
            if other["workload"] == row["workload"] and other["engine"].startswith("transformers")
        ]
        rate = row.get("output_tokens_per_second")
        ratio = f"{rate / max(peers):.2f}" if peers and rate and row["engine"].startswith("argosy") else ""
        lines.append(
            (
                row["model"],
                row["dtype"],
                row["workload"],
                row["engine"],
                _figure(rate),
                _figure(row.get("ttft_ms_p50")),
                _figure(row.get("ms_per_token")),
                ratio,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    if rows:
        text.append(f"\n{rows[0]['machine']}, {rows[0]['cores']} cores; medians; ratio to transformers' best mode")
    return "\n" + "\n".join(text)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------------ in process


def _in_process(args: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="argosy-bench-") as parent:
        folder, options = bench_models.make_folder(args.model, Path(parent))
        given = {
            "model": str(folder),
            "dtype": args.dtype,
            "max_num_seqs": args.max_num_seqs,
            "max_num_batched_tokens": max(2048, args.max_num_seqs),
            "tensor_parallel_size": args.tensor_parallel_size,
            "pipeline_parallel_size": args.pipeline_parallel_size,
            **({"cpu_threads": args.cpu_threads} if args.cpu_threads else {}),
            **options,
        }
        vocab = bench_models.vocab_size(folder)
        base = {"model": args.model, "dtype": args.dtype, "backend": args.backend, "cpu_threads": args.cpu_threads}
        answers: dict[str, list[list[int]]] = {}
        config, _ = settings.make_config(given)
        with LLM.from_config(config, backend=args.backend) as llm:
            layout = {"engine": "argosy", "layout": llm._engine.info.layout}
            for name in args.workload:
                yield {**base, **layout, **_measure_engine(llm, name, vocab, args.repeats, answers)}
        for name in args.workload if args.peer else ():
            yield from ({**base, **row} for row in _measure_peer(args, folder, options, name, vocab, answers[name]))
        if args.cold_start:
            yield {**base, "engine": "argosy", "workload": "cold start", **_cold_start(given, args)}


def _measure_engine(llm: LLM, name: str, vocab: int, repeats: int, answers: dict[str, list[list[int]]]) -> Row:
    """The medians of some runs of one workload, after a warm-up of another salt (no run finds another's prefixes)."""
    _run_engine(llm, workload.make("cpu8", vocab=vocab))
    runs = []
    requests = workload.make(name, vocab=vocab)
    for repeat in range(repeats):
        salted = workload.make(name, vocab=vocab, salt=repeat)
        llm.reset_prefix_cache()
        seconds, outputs = _run_engine(llm, salted)
        if repeat == 0:
            answers[name] = [list(output.outputs[0].token_ids) for output in outputs]
        timings = [output.metrics for output in outputs if output.metrics is not None]
        ttft = [timing.first_token_latency for timing in timings]
        gaps = [
            (t.last_token_ts - t.first_token_ts) / (t.num_generation_tokens - 1)
            for t in timings
            if t.num_generation_tokens > 1
        ]
        runs.append((sum(r.max_tokens for r in salted) / seconds, seconds, ttft, gaps))
    return {"workload": name, "digest": workload.digest(requests), "requests": len(requests), **_summary(runs)}


def _run_engine(llm: LLM, requests: Workload) -> tuple[float, list[argosy.RequestOutput]]:
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=r.max_tokens, detokenize=False) for r in requests
    ]
    started = time.perf_counter()
    outputs = llm.generate([r.prompt for r in requests], params, use_tqdm=False)
    return time.perf_counter() - started, outputs


def _summary(runs: list[tuple[float, float, list[float], list[float]]]) -> Row:
    rates = [rate for rate, *_ in runs]
    ttft = [value for run in runs for value in run[2]]
    gaps = [value for run in runs for value in run[3]]
    return {
        "repeats": len(runs),
        "output_tokens_per_second": round(statistics.median(rates), 2),
        "spread": [round(min(rates), 2), round(max(rates), 2)],
        "seconds": round(statistics.median([run[1] for run in runs]), 4),
        "ttft_ms_p50": round(1e3 * statistics.median(ttft), 3) if ttft else None,
        "ms_per_token": round(1e3 * statistics.median(gaps), 3) if gaps else None,
    }


def _measure_peer(
    args: argparse.Namespace, folder: Path, options: Row, name: str, vocab: int, ours: list[list[int]]
) -> Iterator[Row]:
    requests = workload.make(name, vocab=vocab)
    is_random = options.get("load_format") == "dummy"
    num_tokens = sum(request.max_tokens for request in requests)
    for found in bench_peers.run_transformers(
        str(folder),
        requests,
        dtype=args.dtype,
        random_weights=is_random,
        batch=args.max_num_seqs,
        cpu_threads=args.cpu_threads,
    ):
        same = [mine == theirs for mine, theirs in zip(ours, found["token_ids"], strict=True)]
        yield {
            "engine": f"transformers {found['mode']}",
            "workload": name,
            "digest": workload.digest(requests),
            "requests": len(requests),
            "repeats": 1,
            "output_tokens_per_second": round(num_tokens / found["seconds"], 2),
            "seconds": round(found["seconds"], 4),
            "ttft_ms_p50": round(1e3 * found["first_seconds"], 3) if num_tokens == len(requests) else None,
            # with random weights each side has its own: nothing to compare
            "equal_answers": None if is_random else round(sum(same) / len(same), 4),
        }


def _cold_start(given: Row, args: argparse.Namespace) -> Row:
    """Seconds from the start of a Python process to its first token, engine and all."""
    words = {**given, "distributed_executor_backend": args.backend}
    seconds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        command = [sys.executable, "-P", "-c", _COLD_START, json.dumps(words)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            seconds.append(time.perf_counter() - started)
    return {
        "repeats": len(seconds),
        "ttft_ms_p50": round(1e3 * statistics.median(seconds), 1),
        "spread": [round(min(seconds), 2), round(max(seconds), 2)],
    }


# -------------------------------------------------------------------------------------------------------- over HTTP


def _over_http(args: argparse.Namespace) -> Iterator[Row]:
    folder, _ = bench_models.make_folder("default", Path())
    vocab = bench_models.vocab_size(folder) if args.model in ("default", "tiny") else 32000

    def run(requests: Workload) -> tuple[float, list[bench_http.Timing]]:
        load = bench_http.run_load(args.url, requests, concurrency=args.concurrency, api_key=args.api_key)
        return asyncio.run(load)

    run(workload.make("cpu8", vocab=vocab, salt=-1))
    for name in args.workload:
        runs = []
        for repeat in range(args.repeats):
            # a salt of its own in each process: a server keeps the prefixes of earlier measurements
            seconds, timings = run(workload.make(name, vocab=vocab, salt=os.getpid() * 100 + repeat))
            gaps = [(t.last_seconds - t.first_seconds) / (t.num_tokens - 1) for t in timings if t.num_tokens > 1]
            rate = sum(t.num_tokens for t in timings) / seconds
            runs.append((rate, seconds, [t.first_seconds for t in timings], gaps))
        yield {
            "model": args.model,
            "dtype": args.dtype,
            "engine": f"argosy HTTP x{args.concurrency}",
            "url": args.url,
            "workload": name,
            "digest": workload.digest(workload.make(name, vocab=vocab)),
            "requests": len(workload.make(name, vocab=vocab)),
            **_summary(runs),
        }
