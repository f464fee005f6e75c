"""CPU time a token, ours over all processes beside transformers: what can be compared on a machine that others use.

    python benchmarks/cpu/cpu_time.py --model tiny --dtype float32 --threads 1

One JSON line a workload and engine. Both sides have the same number of threads and OpenMP's idle threads sleep.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import argosy.workers.openmp  # noqa: F401  # before torch, for transformers in this process as for our ranks

# isort: split
import psutil
import torch

from argosy import LLM, SamplingParams
from argosy.deploy import bench_models, bench_peers, workload
from argosy.deploy.workload import Workload


def ours(folder: Path, options: dict[str, Any], dtype: str, loads: dict[str, Workload]) -> Iterator[tuple[str, float]]:
    """Seconds of CPU of edge, driver and rank together."""
    with LLM(
        str(folder), dtype=dtype, distributed_executor_backend="mp", max_num_seqs=32, max_num_batched_tokens=2048,
        **options,
    ) as llm:  # fmt: skip
        own = psutil.Process()
        processes = [own, *own.children(recursive=True)]

        def spent() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in processes)

        for name, requests in {"warm-up": workload.make("cpu8", vocab=4096), **loads}.items():
            params = [
                SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=r.max_tokens, detokenize=False)
                for r in requests
            ]
            before = spent()
            llm.generate([r.prompt for r in requests], params, use_tqdm=False)
            if name != "warm-up":
                yield name, spent() - before


def theirs(folder: Path, is_random: bool, dtype: str, loads: dict[str, Workload]) -> Iterator[tuple[str, float]]:
    """Seconds of CPU of transformers in this process, in static batches of 32."""
    # Heavy, and ours is measured before it.
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = getattr(torch, dtype)
    make: Any = AutoModelForCausalLM
    if is_random:
        model = make.from_config(AutoConfig.from_pretrained(folder), dtype=kind)
    else:
        model = make.from_pretrained(folder, dtype=kind)
    model.eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    bench_peers._generate(torch, model, [[r.prompt, r.max_tokens] for r in workload.make("cpu8", vocab=4096)], limit=4)
    for name, requests in loads.items():
        rows = [[r.prompt, r.max_tokens] for r in requests]
        before = time.process_time()
        for place in range(0, len(rows), 32):
            bench_peers._generate(torch, model, rows[place : place + 32])
        yield name, time.process_time() - before


def main() -> None:
    """Ours, then transformers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workload", nargs="+", default=["cpu64", "decode1", "ttft512"])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as parent:
        folder, options = bench_models.make_folder(args.model, Path(parent))
        loads = {name: workload.make(name, vocab=bench_models.vocab_size(folder), salt=1) for name in args.workload}
        spent = dict(ours(folder, options, args.dtype, loads))
        for name, seconds in theirs(folder, bool(options), args.dtype, loads):
            num_tokens = sum(request.max_tokens for request in loads[name])
            row = {
                "model": args.model, "dtype": args.dtype, "threads": args.threads, "workload": name,
                "argosy_cpu_us_a_token": round(1e6 * spent[name] / num_tokens, 1),
                "transformers_cpu_us_a_token": round(1e6 * seconds / num_tokens, 1),
                "ratio": round(seconds / spent[name], 2),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
