"""Where the seconds of a start go: process start to ready, first with an empty kernel cache, then with a warm one.

    python benchmarks/gpu/start_times.py --model 8b 06b --starts 3
    python benchmarks/gpu/start_times.py --model 8b --profile      also Python's own profile of one rank's warm start

One JSON line a start: seconds of the whole process, of the engine, and of each phase of each rank.
"""

import argparse
import cProfile
import io
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from argosy.deploy import bench_models, bench_table

START = """
import json, sys, time
began = time.perf_counter()
from argosy import LLM
imported = time.perf_counter()
with LLM(**json.loads(sys.argv[1])) as llm:
    ready = time.perf_counter()
    ranks = [{"ledger": rank.ledger, "phases": rank.phases} for rank in llm._engine.ranks]
    row = {"import_seconds": imported - began, "engine_seconds": ready - imported, "ranks": ranks}
    print(json.dumps(row), flush=True)
"""


def one_start(settings: dict[str, object], cache: str) -> dict[str, object]:
    """A process that starts an engine and ends; seconds from its birth until it said that the engine is ready."""
    began = time.perf_counter()
    env = {**os.environ, "TRITON_CACHE_DIR": cache}
    command = [sys.executable, "-c", START, json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        process.stdout.read()
    if not line:
        raise SystemExit(f"the start failed with status {process.returncode}")
    found: dict[str, object] = json.loads(line)
    return {"process_to_ready_seconds": round(seconds, 2), **found}


def profile_rank(model: str, max_num_seqs: int) -> None:
    """One rank in this process, with the cache that the starts before filled: what Python spends its time on."""
    from profile_step import make_runner

    from argosy.workers.model_runner import ModelRunner
    from argosy.workers.warm_up import warm_up_shapes

    made: list[ModelRunner] = []
    for name, act in (
        ("make and load", lambda: made.append(make_runner(model, max_num_seqs, 256))),
        ("warm up", lambda: made[0].warm_up(warm_up_shapes(made[0]))),
        ("record", lambda: made[0].record_graphs()),
    ):
        profiler = cProfile.Profile()
        began = time.perf_counter()
        profiler.runcall(act)
        out = io.StringIO()
        pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(22)
        print(f"--- {name}: {time.perf_counter() - began:.2f} s under the profiler")
        lines = [line for line in out.getvalue().splitlines() if line.strip()]
        print("\n".join(line[:150] for line in lines[4:]), flush=True)


def main() -> int:
    """Start, print, perhaps store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["8b", "06b"])
    parser.add_argument("--starts", type=int, default=2, help="the first one compiles all kernels")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="argosy-start-") as parent:
        for model in args.model:
            folder, options = bench_models.make_folder(model, Path(parent))
            cache = Path(parent, f"kernels-{model}")
            settings = {
                "model": str(folder), **options, "distributed_executor_backend": "mp",
                "tensor_parallel_size": args.tensor_parallel_size,
                "pipeline_parallel_size": args.pipeline_parallel_size,
                "max_num_seqs": args.max_num_seqs, "max_num_batched_tokens": args.max_num_batched_tokens,
                "max_model_len": args.max_model_len, "max_cuda_graph_batch": args.max_num_seqs,
            }  # fmt: skip
            for start in range(args.starts):
                before = sum(1 for _ in cache.glob("*/"))
                row = {"model": model, "start": start, **one_start(settings, str(cache))}
                row["kernels_compiled"] = sum(1 for _ in cache.glob("*/")) - before
                bench_table.tell(row, args.output)
            if args.profile:
                os.environ["TRITON_CACHE_DIR"] = str(cache)
                profile_rank(model, args.max_num_seqs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
