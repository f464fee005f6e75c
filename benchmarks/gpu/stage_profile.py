"""How much of the time the stages of a pipeline compute, and why they don't, while many requests are served.

    python benchmarks/gpu/stage_profile.py --model 8b -tp 2 -pp 2 --windows fixed512x256:6+20,200+80 prompts512:6+20

Each workload is run for warm-up, with `--timed` again for its figure, and once profiled: each rank profiles the steps
of some windows (first step and number of steps), from its card's own clock. `fixed512x256` computes prompts beside
rows that decode first, and then decodes 256 rows a step; `prompts512` is 512 prompts of 512 tokens and nothing else;
`chat800` is 800 requests with the lengths of `chat1000`: over 256 places a prompt comes whenever an answer has ended.
Starting and stopping the profiler holds ranks up, so a pipeline fills anew and drains there: the edges of a window are
left out (`stage_gaps`, which says what idle time is for). The profiler itself costs some microseconds a kernel.

One JSON line a rank and window; with `--host` also what the host did: for each step when it got the message and when it
had told the card everything, in milliseconds from the window's first message, and the CUDA calls that took it longest.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_gpu import COMMON, SHAPES
from stage_gaps import shares
from torch.profiler import ProfilerActivity, profile

from argosy.cluster.protocol.messages import SchedulerOutput
from argosy.deploy import bench_engine, launch, workload
from argosy.deploy.offline import LLM
from argosy.workers import worker, worker_main

PROMPTS, CHAT = "prompts512", "chat"


def slowest_calls(events: list[dict[str, Any]]) -> dict[str, list[float]]:
    """CUDA calls of the host: how many, milliseconds together, the longest one."""
    calls: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            found = calls.setdefault(event["name"], [0, 0.0, 0.0])
            found[0] += 1
            found[1] = round(found[1] + event["dur"] / 1e3, 2)
            found[2] = max(found[2], round(event["dur"] / 1e3, 2))
    return dict(sorted(calls.items(), key=lambda item: -item[1][1])[:10])


class StageWorker(worker.Worker):
    """Profiles the windows that ARGOSY_STAGES names: {"file", "marker", "windows": {workload: [[first, steps], ...]}}.

    While the marker is there it names the workload whose steps are to be counted, from its first new request on.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        job = json.loads(os.environ["ARGOSY_STAGES"])
        self._file, self._windows = f"{job['file']}.{self.rank.global_rank}", job["windows"]
        self._marker, self._workload, self._count = Path(job["marker"]), "", -1
        self._profile: profile | None = None
        self._tokens = self._rows = 0
        self._is_warm, self._steps = False, list[tuple[int, int]]()  # of the window: nanoseconds since 1970

    def _step(self, output: SchedulerOutput) -> None:
        if not self._is_warm:  # the first start of the profiler takes a second
            self._is_warm = True
            with profile(activities=[ProfilerActivity.CUDA]):
                torch.cuda.synchronize()
        if output.new_requests and self._marker.exists() and self._marker.read_text() != self._workload:
            self._workload, self._count = self._marker.read_text(), 0
        elif self._count >= 0:
            self._count += 1
        for first, steps in self._windows.get(self._workload, ()):
            if self._count == first:
                torch.cuda.synchronize()  # what runs in the window is of its steps
                self._profile = profile(activities=[ProfilerActivity.CUDA])
                self._profile.__enter__()
                self._tokens = self._rows = 0
                self._steps.clear()
            if self._count == first + steps and self._profile is not None:
                torch.cuda.synchronize()
                self._profile.__exit__(None, None, None)
                self._write(self._profile, first, steps)
                self._profile = None
        self._tokens += output.num_scheduled_tokens
        self._rows += len(output.rows)
        began = time.time_ns()
        super()._step(output)
        self._steps.append((began, time.time_ns()))

    def _write(self, found: profile, first: int, steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            found.export_chrome_trace(str(path))
            trace = json.loads(path.read_text())
        events, base = trace["traceEvents"], trace.get("baseTimeNanoseconds", 0)
        row = {"workload": self._workload, "rank": self.rank.global_rank, "stage": self.rank.pp_rank}
        row["layers"] = self.rank.last_layer - self.rank.first_layer
        row |= {"first": first, "steps": steps}
        row |= {"tokens_a_step": self._tokens // steps, "rows_a_step": self._rows // steps}
        host = [((began - base) / 1e3, (queued - base) / 1e3) for began, queued in self._steps]
        row |= shares(events, host, steps)
        row["host_ms_a_step"] = round(statistics.median(queued - began for began, queued in host) / 1e3, 3)
        if os.environ.get("ARGOSY_STAGES_HOST"):
            row["host_ms"] = [tuple(round((t - host[0][0]) / 1e3, 1) for t in step) for step in host]
            row["calls"] = slowest_calls(events)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def make(name: str, vocab: int, salt: int) -> workload.Workload:
    """One of the named workloads, as many of a chat's requests, or 512 prompts of which one token each is asked."""
    if name.startswith(CHAT) and name not in workload.WORKLOADS:
        return workload.lognormal(int(name.removeprefix(CHAT)), vocab=vocab, seed=2, salt=salt)
    if name == PROMPTS:
        return workload.fixed(512, 512, 1, vocab=vocab, seed=9, salt=salt)
    return workload.make(name, vocab=vocab, salt=salt)


def parse_windows(text: str) -> tuple[str, list[tuple[int, int]]]:
    """WORKLOAD:FIRST+STEPS,FIRST+STEPS, or WORKLOAD alone: not profiled."""
    name, _, windows = text.partition(":")
    pairs = [tuple(map(int, window.split("+"))) for window in windows.split(",") if window]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not WORKLOAD:FIRST+STEPS,FIRST+STEPS")
    return name, [(first, steps) for first, steps in pairs]


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="8b")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=2)
    parser.add_argument("--pipeline-layers", type=int, nargs="+", default=[])
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--windows", nargs="+", type=parse_windows, metavar="WORKLOAD:FIRST+STEPS,...",
                        default=[("fixed512x256", [(6, 20), (200, 80)]), (PROMPTS, [(6, 20)])])  # fmt: skip
    parser.add_argument(
        "--timed", type=int, default=0, help="runs of each workload without the profiler, for its figure"
    )
    parser.add_argument("--warm", action="store_true", help="kernels were compiled before: no run for warm-up")
    parser.add_argument("--host", action="store_true", help="also what the hosts did")
    args = parser.parse_args()
    if args.host:
        os.environ["ARGOSY_STAGES_HOST"] = "1"
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    launch.launch_engine.__kwdefaults__["rank_module"] = "stage_profile"
    vocab = SHAPES[args.model]["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="argosy-stages-") as parent:
        folder = Path(parent, "model")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**COMMON, **SHAPES[args.model]}))
        marker = Path(parent, "counted")
        job = {"file": f"{parent}/profile", "marker": str(marker), "windows": dict(args.windows)}
        os.environ["ARGOSY_STAGES"] = json.dumps(job)
        with LLM(
            str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            distributed_executor_backend="local", tensor_parallel_size=args.tensor_parallel_size,
            pipeline_parallel_size=args.pipeline_parallel_size, pipeline_layers=tuple(args.pipeline_layers),
            max_num_seqs=args.max_num_seqs, max_num_batched_tokens=8192, max_model_len=4096,
            max_cuda_graph_batch=args.max_num_seqs,
        ) as llm:  # fmt: skip
            about = {"model": args.model, "asked_layers": args.pipeline_layers}
            about["layout"] = f"TP{args.tensor_parallel_size}xPP{args.pipeline_parallel_size}"
            if torch.cuda.is_available():
                about["device"] = torch.cuda.get_device_name()
            for name, windows in args.windows:
                if not args.warm or not windows:
                    bench_engine.run(llm, make(name, vocab, 1))
                for repeat in range(args.timed):
                    print(
                        json.dumps({**about, "workload": name, **timed(llm, make(name, vocab, 10 + repeat))}),
                        flush=True,
                    )
                if not windows:
                    continue
                marker.write_text(name)
                bench_engine.run(llm, make(name, vocab, 2))
                marker.unlink()
                for file in sorted(Path(parent).glob("profile.*")):
                    for line in file.read_text().splitlines():
                        print(json.dumps({**about, **json.loads(line)}), flush=True)
                    file.unlink()
    return 0


def timed(llm: LLM, requests: workload.Workload) -> dict[str, float]:
    """Output tokens a second of all together, and milliseconds from token to token of the median request."""
    seconds, outputs = bench_engine.run(llm, requests)
    times = [o.metrics for o in outputs if o.metrics is not None and o.metrics.num_generation_tokens > 1]
    gaps = [(t.last_token_ts - t.first_token_ts) / (t.num_generation_tokens - 1) for t in times]
    return {
        "tokens_per_second": round(sum(r.max_tokens for r in requests) / seconds, 1),
        "prompt_tokens_per_second": round(sum(len(r.prompt) for r in requests) / seconds, 1),
        "ms_per_token": round(1e3 * statistics.median(gaps), 4) if gaps else 0.0,
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(main())
    worker.Worker = StageWorker  # type: ignore[misc]  # as a rank, which gets its boot on the input
    raise SystemExit(worker_main.main())
