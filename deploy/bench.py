"""`argosy bench`: one JSON line a figure, a table last; what it ran on, with which versions, on which requests.

    in process         an engine of its own (`bench_engine`); with `--peer transformers` the same prompts there, too
    --url              a server that runs, from outside
    --over http        an engine of its own in process and behind its own HTTP doors (`bench_doors`)
    --suite h200       a whole table of models and layouts beside vLLM's figures and our goals (`bench_suite`)

On a shared or slow machine the ratios of one run count, not the figures.
"""

import argparse
import asyncio
import itertools
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
from typing import Final

import msgspec

import argosy
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import bench_engine, bench_http, bench_models, bench_peers, bench_table, device_defaults, workload
from argosy.deploy.bench_engine import Row
from argosy.deploy.bench_load import Timing
from argosy.deploy.client import Client
from argosy.deploy.device_defaults import read_gpus
from argosy.deploy.offline import LLM
from argosy.deploy.workload import Workload

_CALIBRATION_STEPS: Final = ("decode1", "decode8", "decode64")
_PACKAGES: Final = ("torch", "ray", "transformers", "triton")
_CLIENTS: Final = 64  # requests at once, where nothing says how many
_OTHERS_VOCAB: Final = 32000
_SALTS: Final = itertools.count(os.getpid() * 1000)
_COLD_START: Final = """
import sys, json
from argosy import LLM, SamplingParams
from argosy.cluster.protocol.config import ServingConfig
import msgspec
config = msgspec.json.decode(sys.argv[1], type=ServingConfig)
with LLM.from_config(config, backend=sys.argv[2]) as llm:
    llm.generate([[1001, 1002, 1003]], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    print("first token", flush=True)
"""


def main(args: argparse.Namespace) -> int:
    """Measure, print and perhaps store; the exit code."""
    for name, values in (("repeats", [args.repeats]), ("concurrency", args.concurrency or [])):
        if any(value < 1 for value in values):
            raise ConfigError(f"--{name} {min(values)}: must be at least 1")
    if args.suite:
        from argosy.deploy import bench_suite  # it runs this command for each of its engines

        return bench_suite.main(args)
    if args.calibration and not args.workload:
        args.workload = list(_CALIBRATION_STEPS)
    for name in workloads_of(args):
        if name not in (*workload.WORKLOADS, "start"):
            workload.make(name, vocab=2 * workload.LOW_ID)  # says which there are, before an engine starts
    about = describe_machine()
    rows = []
    for row in _measure(args):
        rows.append({**row, **about})
        bench_table.tell(rows[-1], args.output)
    if args.model in bench_models.GPU_SHAPES:
        print("\n" + bench_table.comparison(rows, bench_table.read_suite("h200")))
    else:
        print(table(rows))
    if args.calibration:
        from argosy.deploy import calibrate  # the planner's rooms: only when they are asked

        fitted = calibrate.calibrate(rows, device_defaults.first_card())
        calibrate.write(fitted, args.calibration)
        print(f"\n{calibrate.describe(rows, fitted)}\n{args.calibration}: for 'argosy plan ... --calibration'")
    return 0


def _measure(args: argparse.Namespace) -> Iterator[Row]:
    if args.url:
        return _over_http(args)
    if args.over == "http":
        from argosy.deploy import bench_doors  # Ray

        return bench_doors.measure(args)
    return _in_process(args)


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
    """Of the tree that this package runs from, with a mark when it was changed; an exported tree has it in a file."""
    exported = Path(__file__).resolve().parents[1] / ".commit"
    if exported.is_file():
        return exported.read_text(encoding="utf-8").strip()
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
    text = bench_table.text_table(lines)
    if rows:
        ratio = "; ratio to transformers' best mode" if any(line[-1] for line in lines[1:]) else ""
        text += f"\n\n{rows[0]['machine']}, {rows[0]['cores']} cores; medians{ratio}"
    return "\n" + text


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------------ in process


def _in_process(args: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="argosy-bench-") as parent:
        folder, options = bench_models.make_folder(args.model, Path(parent))
        config = bench_engine.engine_config(args, folder, options)
        vocab = bench_models.vocab_size(folder)
        base = {"cpu_threads": args.cpu_threads, **({"note": args.note} if args.note else {})}
        answers: dict[str, list[list[int]]] = {}
        names = workloads_of(args)
        with LLM.from_config(config, backend=args.backend) as llm:
            first_seconds = bench_engine.seconds_of_this_process()
            base |= bench_engine.describe_engine(llm, args)
            for name in names:
                if name != "start":
                    yield {**base, **bench_engine.measure(llm, name, vocab, args.repeats, answers)}
        if "start" in names:
            yield {**base, **bench_engine.start_row(config, args.backend, first_seconds)}
        for name in names if args.peer else ():
            peer = _measure_peer(args, config, folder, options, name, vocab, answers[name])
            yield from ({**base, **row} for row in peer)
        if args.cold_start:
            yield {**base, "workload": "cold start", **_cold_start(config, args)}


def workloads_of(args: argparse.Namespace) -> list[str]:
    """Those given, or what suits the model."""
    default = bench_engine.GPU_WORKLOADS if args.model in bench_models.GPU_SHAPES else ("cpu64",)
    return list(args.workload or default)


def _measure_peer(
    args: argparse.Namespace,
    config: ServingConfig,
    folder: Path,
    options: Row,
    name: str,
    vocab: int,
    ours: list[list[int]],
) -> Iterator[Row]:
    requests = workload.make(name, vocab=vocab)
    is_random = options.get("load_format") == "dummy"
    num_tokens = sum(request.max_tokens for request in requests)
    for found in bench_peers.run_transformers(
        str(folder),
        requests,
        dtype=bench_engine.dtype_of(args),
        random_weights=is_random,
        batch=config.scheduler.max_num_seqs,
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


def _cold_start(config: ServingConfig, args: argparse.Namespace) -> Row:
    """Seconds from the start of a Python process to its first token, engine and all."""
    words = msgspec.json.encode(config).decode()
    seconds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        command = [sys.executable, "-P", "-c", _COLD_START, words, args.backend]
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
    is_shape = args.model in bench_models.GPU_SHAPES
    vocab = _vocab_of(args.model)
    with Client(args.url, api_key=args.api_key) as client:
        served = client.models()[0]

    def run(requests: Workload, concurrency: int) -> tuple[float, list[Timing]]:
        return asyncio.run(bench_http.run_load(args.url, requests, concurrency=concurrency, api_key=args.api_key))

    base = {
        "model": served if args.model == "default" else args.model, "dtype": args.dtype or "as served", "url": args.url,
    }  # fmt: skip
    if is_shape:  # what the suite calls such an engine, if flags say how it was started
        layout = bench_table.layout_of(args.tensor_parallel_size, args.pipeline_parallel_size)
        numbers = args.quantization or args.dtype or "bfloat16"
        base |= {"group": bench_table.name_of(args.model, numbers, layout), "layout": layout}
    run(workload.make("cpu8", vocab=vocab, salt=-1), _CLIENTS)
    for name in workloads_of(args):
        plain = workload.make(name, vocab=vocab)
        # the suite's figures are those of all requests at once
        for concurrency in args.concurrency or (len(plain) if is_shape else _CLIENTS,):
            runs = []
            for _ in range(args.repeats):
                # a salt of its own in each process and run: a server keeps the prefixes of earlier measurements
                seconds, timings = run(workload.make(name, vocab=vocab, salt=next(_SALTS)), concurrency)
                gaps = [t.gap_seconds for t in timings if t.num_tokens > 1]
                rate = sum(t.num_tokens for t in timings) / seconds
                runs.append((rate, seconds, [t.first_seconds for t in timings], gaps))
            yield {
                **base,
                "engine": f"argosy HTTP x{concurrency}",
                "workload": name,
                "digest": workload.digest(plain),
                "requests": len(plain),
                **bench_engine.summary(name, runs),
            }


def _vocab_of(model: str) -> int:
    """Of the model whose server this is, by name or folder; for others a number that few vocabularies are below."""
    if model not in ("default", *bench_models.SHAPES, *bench_models.GPU_SHAPES) and not Path(model).is_dir():
        return _OTHERS_VOCAB
    with tempfile.TemporaryDirectory(prefix="argosy-bench-") as parent:
        return bench_models.vocab_size(bench_models.make_folder(model, Path(parent))[0])
