"""A rank that profiles some of its decode steps on the device: how long the card computed, and how long it waited.

Started by `idle_profile.py`, which sets ARGOSY_PROFILE: {"file", "rows": [...], "first", "steps"}. For each number of
rows it waits for that many decode steps in a row, profiles the steps after `first`, and appends a JSON line.
"""

import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from argosy.cluster.protocol.messages import SchedulerOutput
from argosy.workers import worker, worker_main

FIRST_KERNEL = "_prepare_kernel"  # what a recorded step begins with
KINDS = {  # by the first pattern that a kernel's name has
    "attention": r"attention|_attend|_decode_kernel|_join_kernel|fmha|flash",
    "sums": r"_sum_kernel|_push_kernel|_staged_kernel|nccl|PtoP",
    "products": r"nvjet|splitK|gemm|gemv|cutlass|vector_kernel|_matrix_kernel|_split_kernel|_ahead_kernel|_gate_kernel"
    r"|few_kernel|many_kernel|hopper_kernel|ring_kernel|one_kernel",
    "other": "",
}


def made_of(work: list[tuple[float, float, str]], first: float, last: float, steps: int) -> dict[str, float]:
    """Microseconds a step by what is computed: each kernel has the time from the end of all before it to its own.

    Kernels begin before those ahead of them have ended, so their own durations add up to more than a step.
    `work`: (began, ended, name) in order.
    """
    took: Counter[str] = Counter()
    ended = first
    for start, end, name in work:
        if first <= start <= last:  # what begins at the end ends the last gap
            kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))
            took[kind] += max(0.0, min(end, last) - max(ended, start))
            took["idle"] += max(0.0, start - ended)
            ended = max(ended, end)
    return {kind: round(us / max(steps, 1), 1) for kind, us in took.items()}


def idle_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    """From a trace's device events: seconds between the first and the last step's begin, and how they were spent.

    Between steps: from the end of all that a step did to the first kernel of the next. Within: gaps in a step.
    """
    work = sorted((e["ts"], e["ts"] + e["dur"], e["name"], e["args"].get("stream")) for e in events)
    main_stream = Counter(stream for *_, stream in work).most_common(1)[0][0]
    work = [event for event in work if event[3] == main_stream]
    begins = [start for start, _, name, _ in work if name.startswith(FIRST_KERNEL)]
    first, last = begins[0], begins[-1]
    between = within = 0.0
    ended = first
    for start, end, name, _ in work:
        if not first <= start <= last:
            continue
        gap = max(0.0, start - ended)
        if name.startswith(FIRST_KERNEL):
            between += gap
        else:
            within += gap
        ended = max(ended, end)
    span = last - first
    steps = len(begins) - 1
    return {
        "steps": steps,
        "made_of_us": made_of([event[:3] for event in work], first, last, steps),
        "step_us": round(span / max(steps, 1), 1),
        "idle_between_steps": round(between / span, 4),
        "idle_between_steps_us": round(between / max(steps, 1), 2),
        "idle_within_steps": round(within / span, 4),
        "kernels_a_step": round(sum(first <= start < last for start, *_ in work) / max(steps, 1), 1),
    }


def in_turn(work: list[dict[str, Any]], count: int = 16) -> list[tuple[str, float, float]]:
    """Kernels from the middle of the trace's middle step: (name, when it began, how long it ran), in microseconds.

    Kernels overlap: what counts is when the next one begins.
    """
    kernels = sorted((e for e in work if e["cat"] == "kernel"), key=lambda e: e["ts"])
    begins = [place for place, e in enumerate(kernels) if e["name"].startswith(FIRST_KERNEL)]
    first = begins[len(begins) // 2 - 1]
    middle = (first + begins[len(begins) // 2]) // 2
    some = kernels[middle : middle + count]
    return [(e["name"][:40], round(e["ts"] - some[0]["ts"], 2), round(e["dur"], 2)) for e in some]


class ProfiledWorker(worker.Worker):
    """Counts decode steps of the sizes asked for and profiles a window of them."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        job = json.loads(os.environ["ARGOSY_PROFILE"])
        self._rows, self._first, self._steps = set(job["rows"]), job["first"], job["steps"]
        self._file = f"{job['file']}.{self.rank.global_rank}"
        self._count, self._last_rows = 0, 0
        self._profile: profile | None = None
        self._is_warm = False

    def _step(self, output: SchedulerOutput) -> None:
        rows = len(output.rows)
        is_decode = bool(rows) and not output.num_tokens and not output.new_requests
        if not self._is_warm and is_decode:  # the first start of the profiler takes seconds
            self._is_warm = True
            with profile(activities=[ProfilerActivity.CUDA]):
                torch.cuda.synchronize()
        self._count = self._count + 1 if is_decode and rows == self._last_rows else 0
        self._last_rows = rows
        if rows in self._rows and self._count == self._first:
            self._rows.discard(rows)
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()
        super()._step(output)
        if self._profile is not None and (self._count == self._first + self._steps or not is_decode):
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            self._write(self._profile, rows)
            self._profile = None

    def _write(self, found: profile, rows: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            found.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        kernels: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for event in work:
            name = f"{event['name'][:80]} {event['args'].get('grid', '')}"  # one kernel does products of several shapes
            kernels[name] += event["dur"]
            counts[name] += 1
        total, idle = sum(kernels.values()), idle_of(work)
        steps = idle["steps"] + 1  # the last one's begin ends the span, but its kernels are there
        top = {name: round(us / total, 4) for name, us in kernels.most_common(12)}
        each = {
            name: [round(us / counts[name], 2), round(counts[name] / steps, 1)] for name, us in kernels.most_common(20)
        }
        row = {"rows": rows, "rank": self.rank.global_rank, **idle, "share_of_kernel_time": top}
        row |= {"us_and_count_a_step": each, "in_turn": in_turn(work)}
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    worker.Worker = ProfiledWorker  # type: ignore[misc]  # the benchmark's own rank
    raise SystemExit(worker_main.main())
