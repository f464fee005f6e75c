"""Where the time of a step goes on a CPU: a rank of its own in this process, no driver.

    python benchmarks/cpu/profile_step.py --model tiny --dtype float32 --threads 1

One JSON line a step shape: CPU microseconds (this process's, so that neighbours on the machine matter little), split in
taking up the message and building the batch, forward, logits and draw, and the answer; with `--ops N` the operations of
the forward pass that cost most. The least of `--steps` steps: on a shared machine that is the step without neighbours.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import NewRequest, SchedulerOutput
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.cluster.protocol.sampling import TokenParams
from argosy.deploy.bench_models import make_folder
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import init_parallel
from argosy.workers.device import TORCH_DTYPES, set_up_device
from argosy.workers.model_runner import ModelRunner

BLOCK_SIZE = 16
PARTS = ("build", "forward", "draw", "answer")


def make_runner(model: str, dtype: str, num_threads: int | None) -> ModelRunner:
    """A rank with room for 32 requests."""
    with tempfile.TemporaryDirectory() as parent:
        folder, options = make_folder(model, Path(parent))
        config = ServingConfig.from_mapping(
            {"model": str(folder), "load_format": options.get("load_format", "auto"), "max_num_seqs": 32,
             "max_num_batched_tokens": 2048, "block_size": BLOCK_SIZE}
        )  # fmt: skip
        spec = read_model_spec(str(folder))
        device = torch.device("cpu")
        set_up_device(device, num_threads)
        parallel = init_parallel(make_plan(spec.num_layers, 1, 1).ranks[0], "127.0.0.1:0", device, 60.0)
        kind = TORCH_DTYPES[dtype]
        runner = ModelRunner(config, spec, parallel, device=device, dtype=kind, cache_dtype=kind)
        runner.load(Path(folder), None)
    runner.allocate(32 * 40)
    runner.warm_up([(1, 16), (8, 1), (1, 1)])
    return runner


def take_up(runner: ModelRunner, contexts: list[int], num_new: int = 0) -> SchedulerOutput:
    """The step in which requests with so many computed tokens come; `num_new` tokens of a prompt, or one each."""
    requests, at = [], 0
    for handle, context in enumerate(contexts):
        blocks = -(-(context + max(num_new, 1) + 64) // BLOCK_SIZE)
        length = context + max(num_new, 1)
        params = TokenParams(max_tokens=1000, temperature=0.0)
        requests.append(NewRequest(handle, [5] * length, length, context, list(range(at, at + blocks)), params))
        at += blocks
    return SchedulerOutput(
        step_id=0, epoch=0, rows=list(range(len(contexts))), num_tokens=[max(num_new, 1)] * len(contexts),
        new_requests=requests, finished=sorted(runner.batch.active),
    )  # fmt: skip


def measure(runner: ModelRunner, next_step: Callable[[int], SchedulerOutput], count: int) -> dict[str, float]:
    """The least CPU microseconds a step, whole and by part; page faults a step (memory that malloc gave back)."""
    marks: list[float] = []

    def marked(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            result = function(*args, **options)
            marks.append(time.process_time())
            return result

        return call

    runner.batch.build, kept_build = marked(runner.batch.build), runner.batch.build  # type: ignore[assignment]  # the same call, watched
    runner._forward, kept_forward = marked(runner._forward), runner._forward  # type: ignore[assignment]  # the same call, watched
    rows, wall = [], []
    faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    try:
        for step in range(count):
            output = next_step(step)
            marks.clear()
            began, started = time.perf_counter(), time.process_time()
            outcome = runner.execute(output)
            drawn = time.process_time()
            assert outcome is not None
            outcome.result()
            ended = time.process_time()
            wall.append(time.perf_counter() - began)
            rows.append((marks[0] - started, marks[1] - marks[0], drawn - marks[1], ended - drawn, ended - started))
    finally:
        runner.batch.build, runner._forward = kept_build, kept_forward  # type: ignore[method-assign]  # put back
    columns = zip(*rows, strict=True)
    found = {name: round(1e6 * min(column), 1) for name, column in zip((*PARTS, "cpu"), columns, strict=True)}
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before
    return {
        **found,
        "median_cpu": round(1e6 * statistics.median(row[-1] for row in rows), 1),
        "least_wall": round(1e6 * min(wall), 1),
        "faults": round(faults / count, 1),
    }


def show_operations(runner: ModelRunner, next_step: Callable[[int], SchedulerOutput], count: int, top: int) -> None:
    """The operations of a step by their own CPU time."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for step in range(count):
            runner.execute(next_step(step))
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    for event in events[:top]:
        print(
            f"   {event.self_cpu_time_total / total:6.1%} {event.self_cpu_time_total / count:9.1f} us "
            f"{event.count / count:6.1f} x {event.self_cpu_time_total / event.count:8.2f}  {event.key[:70]}"
        )


def main() -> None:
    """Each shape of step in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, small, default, or a folder")
    parser.add_argument("--dtype", choices=sorted(TORCH_DTYPES), default="float32")
    parser.add_argument("--threads", type=int, help="torch's threads; without it torch's own choice")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512])
    parser.add_argument("--steps", type=int, default=40, help="at most 60: so many blocks are reserved")
    parser.add_argument("--ops", type=int, default=0, metavar="N", help="also the N costliest operations")
    args = parser.parse_args()
    runner = make_runner(args.model, args.dtype, args.threads)
    about = {"model": args.model, "dtype": args.dtype, "threads": torch.get_num_threads()}
    for batch in args.batch:
        contexts = [32 + (37 * row) % 256 for row in range(batch)]  # ragged, as requests are
        rows = list(range(batch))

        def decode(step: int, rows: list[int] = rows) -> SchedulerOutput:
            return SchedulerOutput(step_id=step + 1, epoch=0, rows=rows)

        runner.execute(take_up(runner, contexts))
        row = {**about, "step": f"decode {batch}", **measure(runner, decode, args.steps)}
        print(json.dumps(row), flush=True)
        if args.ops:
            runner.execute(take_up(runner, contexts))
            show_operations(runner, decode, args.steps, args.ops)
    for length in args.prefill:

        def prefill(step: int, length: int = length) -> SchedulerOutput:
            return take_up(runner, [0], length)

        row = {**about, "step": f"prefill {length}", **measure(runner, prefill, max(3, args.steps // 8))}
        print(json.dumps(row), flush=True)
        if args.ops:
            show_operations(runner, prefill, 3, args.ops)


if __name__ == "__main__":
    main()
