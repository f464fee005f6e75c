"""How much of the time the stages of a pipeline compute, from each card's own clock, while many requests are served.

    python benchmarks/gpu/stage_profile.py --model 8b -tp 2 -pp 2 --workload fixed512x256

The workload twice: the first run warms up, in the second each rank profiles the steps of some windows (first step and
number of steps; by default one while prompts are computed and one while all requests decode). Starting and stopping
the profiler holds ranks up, so a pipeline fills anew and drains there: `EDGE` of a window is left out at either end,
and shares are those of the time between. A stage that waits for its neighbour runs NCCL's receive kernel, which is
counted as waiting; sums over a tensor-parallel group count as work. The profiler itself costs some microseconds a
kernel. One JSON line a rank and window; with `--host` also what the host did: for each step when it got the message
and when it had told the card everything, in milliseconds from the window's first message, and the CUDA calls that
took it longest.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_gpu import COMMON, SHAPES
from torch.profiler import ProfilerActivity, profile

from argosy.cluster.protocol.messages import SchedulerOutput
from argosy.deploy import bench_engine, launch, workload
from argosy.deploy.offline import LLM
from argosy.workers import worker, worker_main

WAITING = "SendRecv"  # in the names of NCCL's kernels between stages
EDGE = 0.2


def shares(events: list[dict[str, Any]]) -> dict[str, Any]:
    """From a trace's device events: milliseconds from the first to the last one without the edges, and how they were
    spent."""
    first, last = min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events)
    first, last = first + EDGE * (last - first), last - EDGE * (last - first)
    cut = ((max(first, e["ts"]), min(last, e["ts"] + e["dur"]), e["name"]) for e in events)
    work = sorted(one for one in cut if one[0] < one[1])
    span, busy, waiting, ended = last - first, 0.0, 0.0, first
    for start, end, name in work:
        if WAITING in name:
            waiting += end - start
        else:
            busy += max(0.0, end - max(start, ended))
            ended = max(ended, end)
    by_name: dict[str, float] = {}
    for start, end, name in work:
        by_name[name[:60]] = by_name.get(name[:60], 0.0) + end - start
    top = sorted(by_name.items(), key=lambda item: -item[1])[:8]
    return {
        "span_ms": round(span / 1e3, 2),
        "busy": round(busy / span, 4),
        "idle": round(1 - busy / span, 4),
        "send_receive": round(waiting / span, 4),
        "kernels": len(work),
        "share": {name: round(us / span, 4) for name, us in top},
    }


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
    """Profiles the windows that ARGOSY_STAGES names: {"file", "skip": steps before the second run, "windows"}."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        job = json.loads(os.environ["ARGOSY_STAGES"])
        self._file, self._windows = f"{job['file']}.{self.rank.global_rank}", [tuple(w) for w in job["windows"]]
        self._marker, self._count = Path(job["marker"]), -1
        self._profile: profile | None = None
        self._tokens = self._rows = 0
        self._is_warm, self._steps = False, list[tuple[float, float]]()

    def _step(self, output: SchedulerOutput) -> None:
        if not self._is_warm:  # the first start of the profiler takes a second
            self._is_warm = True
            with profile(activities=[ProfilerActivity.CUDA]):
                torch.cuda.synchronize()
        if self._count < 0 and output.new_requests and self._marker.exists():
            self._count = 0
        elif self._count >= 0:
            self._count += 1
        for first, steps in self._windows:
            if self._count == first:
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
        began = time.monotonic()
        super()._step(output)
        self._steps.append((began, time.monotonic()))

    def _write(self, found: profile, first: int, steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            found.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        row = {"rank": self.rank.global_rank, "stage": self.rank.pp_rank, "first": first, "steps": steps}
        row |= {"tokens_a_step": self._tokens // steps, "rows_a_step": self._rows // steps}
        row |= shares(work)
        if os.environ.get("ARGOSY_STAGES_HOST"):
            row["clock"] = round(self._steps[0][0], 4)
            row["host_ms"] = [tuple(round(1e3 * (t - self._steps[0][0]), 1) for t in step) for step in self._steps]
            row["calls"] = slowest_calls(events)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--workload", default="fixed512x256")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=2)
    parser.add_argument("--pipeline-layers", type=int, nargs="+", default=[])
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--windows", nargs="+", default=["6+20", "200+80"], help="first step + number of steps")
    parser.add_argument("--host", action="store_true", help="also what the hosts did")
    args = parser.parse_args()
    if args.host:
        os.environ["ARGOSY_STAGES_HOST"] = "1"
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    launch.launch_engine.__kwdefaults__["rank_module"] = "stage_profile"
    windows = [tuple(map(int, window.split("+"))) for window in args.windows]
    with tempfile.TemporaryDirectory(prefix="argosy-stages-") as parent:
        folder = Path(parent, "model")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**COMMON, **SHAPES[args.model]}))
        job = {"file": f"{parent}/profile", "marker": f"{parent}/second-run", "windows": windows}
        os.environ["ARGOSY_STAGES"] = json.dumps(job)
        with LLM(
            str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            distributed_executor_backend="local", tensor_parallel_size=args.tensor_parallel_size,
            pipeline_parallel_size=args.pipeline_parallel_size, pipeline_layers=tuple(args.pipeline_layers),
            max_num_seqs=args.max_num_seqs, max_num_batched_tokens=8192, max_model_len=4096,
            max_cuda_graph_batch=args.max_num_seqs,
        ) as llm:  # fmt: skip
            for salt in (1, 2):
                vocab = SHAPES[args.model]["vocab_size"]
                bench_engine.run(llm, workload.make(args.workload, vocab=vocab, salt=salt))
                Path(job["marker"]).touch()
        for file in sorted(Path(parent).glob("profile.*")):
            print(file.read_text(), end="", flush=True)
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(main())
    worker.Worker = StageWorker  # type: ignore[misc]  # as a rank, which gets its boot on the input
    raise SystemExit(worker_main.main())
