"""Engines that take turns at the same requests, for machines that others use: only pairs of neighbouring runs compare.

    python benchmarks/cpu/pairs.py --model tiny --dtype float32 --engines torch compiled
    python benchmarks/cpu/pairs.py --dtype bfloat16 --engines compiled vllm --vllm-python /opt/vllm/bin/python

`torch` is this engine with `enforce_eager` (torch's own operations), `compiled` as it comes, `vllm` a process of an
environment of its own, stopped while it is not its turn: its idle threads would keep the cores. One JSON line for each
workload and engine: tokens a second of each turn, and for ours the least CPU microseconds a token, over all processes.
"""

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import argosy.workers.openmp  # noqa: F401  # before torch, as our ranks do

# isort: split
import psutil

from argosy import LLM
from argosy.deploy import bench_engine, bench_models, workload
from argosy.deploy.workload import Workload

SETTLE_SECONDS = 0.3
PEER = """
import json, sys, time

def main():
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[1], load_format="dummy", dtype=sys.argv[2], max_num_seqs=32, max_num_batched_tokens=2048,
              max_model_len=2048, skip_tokenizer_init=True)
    print(json.dumps({"seconds": 0.0}), flush=True)
    for line in sys.stdin:
        requests = json.loads(line)
        params = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count, detokenize=False)
                  for _, count in requests]
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)

if __name__ == "__main__":
    main()
"""


class Engine(Protocol):
    """Whose turn it may be."""

    def turn(self, requests: Workload) -> tuple[float, float | None]:
        """Wall seconds, and CPU seconds where they are known."""

    def close(self) -> None:
        """The end."""


class Ours:
    """Edge, driver and rank as processes of this machine."""

    def __init__(self, folder: Path, dtype: str, options: dict[str, Any], *, eager: bool):
        before = set(psutil.Process().children(recursive=True))
        self.llm = LLM(
            str(folder), dtype=dtype, distributed_executor_backend="mp", max_num_seqs=32, max_num_batched_tokens=2048,
            enforce_eager=eager, **options,
        )  # fmt: skip
        own = psutil.Process()
        self.processes = [own, *(child for child in own.children(recursive=True) if child not in before)]

    def turn(self, requests: Workload) -> tuple[float, float | None]:
        before = self._spent()
        seconds, _ = bench_engine.run(self.llm, requests)
        return seconds, self._spent() - before

    def _spent(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)

    def close(self) -> None:
        self.llm.close()


class Peer:
    """vLLM in a process group of its own, asleep between its turns."""

    def __init__(self, python: str, folder: Path, dtype: str):
        script = folder / "peer.py"
        script.write_text(PEER)
        self.process = subprocess.Popen(
            [python, str(script), str(folder), dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL, start_new_session=True,
            env={"PATH": os.defpath, "HOME": os.path.expanduser("~"), "VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
        self._answer()
        os.killpg(self.process.pid, signal.SIGSTOP)

    def turn(self, requests: Workload) -> tuple[float, float | None]:
        assert self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        time.sleep(SETTLE_SECONDS)
        self.process.stdin.write(json.dumps([(request.prompt, request.max_tokens) for request in requests]) + "\n")
        self.process.stdin.flush()
        seconds = self._answer()
        os.killpg(self.process.pid, signal.SIGSTOP)
        time.sleep(SETTLE_SECONDS)
        return seconds, None

    def _answer(self) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                seconds: float = json.loads(line)["seconds"]
                return seconds
        raise SystemExit("vllm ended before it answered")

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)


def main() -> None:
    """Every workload, engine after engine, repeat after repeat; the first round is a warm-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, small, or a folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--engines", nargs="+", default=["torch", "compiled"], choices=["torch", "compiled", "vllm"])
    parser.add_argument("--vllm-python", default="python", help="of an environment that has vllm")
    parser.add_argument("--workload", nargs="+", default=["cpu64", "decode1", "ttft512"])
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        folder, options = bench_models.make_folder(args.model, Path(parent))
        vocab = bench_models.vocab_size(folder)
        engines: dict[str, Engine] = {}
        for name in args.engines:
            if name == "vllm":
                engines[name] = Peer(args.vllm_python, folder, args.dtype)
            else:
                engines[name] = Ours(folder, args.dtype, options, eager=name == "torch")
        found: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
        for repeat in range(args.repeats + 1):
            for load in args.workload:
                requests = workload.make(load, vocab=vocab, salt=repeat)
                count = sum(request.max_tokens for request in requests)
                for name, engine in engines.items():
                    seconds, spent = engine.turn(requests)
                    if repeat:
                        each = None if spent is None else 1e6 * spent / count
                        found.setdefault((load, name), []).append((count / seconds, each))
        for engine in engines.values():
            engine.close()
    about = {"model": args.model, "dtype": args.dtype, "load": round(os.getloadavg()[0], 1)}
    for (load, name), turns in found.items():
        spent = [each for _, each in turns if each is not None]
        row = {**about, "workload": load, "engine": name, "tokens_per_second": [round(rate, 1) for rate, _ in turns]}
        print(json.dumps({**row, "cpu_us_per_token": round(min(spent)) if spent else None}), flush=True)


if __name__ == "__main__":
    main()
