"""Where the time of a step goes on a GPU: a rank of its own in this process, no driver.

    python benchmarks/gpu/profile_step.py --model 8b --batch 1 8 64 256 --context 256

Prints, for each batch, the graph's time a replay and the kernels of the eager step by their share; JSON lines first.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench_gpu import COMMON, SHAPES
from torch.profiler import ProfilerActivity, profile

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import NewRequest, SchedulerOutput
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.cluster.protocol.sampling import TokenParams
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext, init_parallel
from argosy.workers.device import set_up_device
from argosy.workers.model_runner import ModelRunner


def make_runner(
    model: str,
    max_num_seqs: int,
    context: int,
    *,
    quantization: str | None = None,
    checkpoint: dict[str, object] | None = None,
    parallel: ParallelContext | None = None,
) -> ModelRunner:
    """A rank with random weights and room for the largest batch at this context.

    `checkpoint`: what else its config.json would say, such as a `quantization_config`. `parallel`: of one of several.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**COMMON, **SHAPES[model], **(checkpoint or {})}))
        config = ServingConfig.from_mapping(
            {"model": folder, "load_format": "dummy", "max_num_seqs": max_num_seqs, "max_model_len": 4096,
             "max_num_batched_tokens": 8192, "max_cuda_graph_batch": max_num_seqs}
        )  # fmt: skip
        spec = read_model_spec(folder, None, quantization)
        if parallel is None:
            device = torch.device("cuda", 0)
            set_up_device(device, 4)
            parallel = init_parallel(make_plan(spec.num_layers, 1, 1).ranks[0], "127.0.0.1:0", device, 60.0)
        device = parallel.device
        runner = ModelRunner(config, spec, parallel, device=device, dtype=torch.bfloat16, cache_dtype=torch.bfloat16)
        runner.load(Path(folder), None)
    runner.allocate(max_num_seqs * (context // 16 + 4))
    return runner


def start_rows(runner: ModelRunner, batch: int, context: int, shared: int = 0) -> SchedulerOutput:
    """The mixed step that takes up `batch` requests with `context` tokens computed, the first `shared` in common."""
    per_row = context // 16 + 4
    common = list(range(shared // 16))
    requests = [
        NewRequest(row, [5] * (context + 1), context + 1, context,
                   [*common, *range(row * per_row + len(common), (row + 1) * per_row)],
                   TokenParams(max_tokens=1000, temperature=0.0))
        for row in range(batch)
    ]  # fmt: skip
    return SchedulerOutput(
        step_id=0,
        epoch=0,
        rows=list(range(batch)),
        new_requests=requests,
        finished=list(range(len(runner.batch.active))),
    )


def prompt(row: int) -> list[int]:
    """512 tokens that differ: products of equal rows draw less power, and the card then keeps a higher clock."""
    return [(row * 7919 + place * 104729) % 30011 for place in range(512)]


def mixed(batch: int, context: int, prompt_tokens: int) -> SchedulerOutput:
    """A step of `batch` decode rows that are known already, and new prompts of 512 tokens."""
    count, per_row = prompt_tokens // 512, context // 16 + 4
    assert per_row >= 32, "prompts borrow the blocks of rows that stay away"
    rows = list(range(batch + count))
    return SchedulerOutput(
        step_id=2, epoch=0, rows=rows, num_tokens=[1] * batch + [512] * count,
        new_requests=[
            NewRequest(row, prompt(row), 512, 0, list(range(row * per_row, row * per_row + 32)),
                       TokenParams(max_tokens=8, temperature=0.0))
            for row in rows[batch:]
        ],
    )  # fmt: skip


def decode(batch: int, step: int) -> SchedulerOutput:
    """One decode step of all rows."""
    return SchedulerOutput(step_id=step, epoch=0, rows=list(range(batch)))


def timed(run: object, count: int) -> tuple[float, float]:
    """(device milliseconds, host milliseconds) a call."""
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began = time.perf_counter()
    start.record()
    for _ in range(count):
        run()
    end.record()
    host = (time.perf_counter() - began) / count
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count, 1e3 * host


def main() -> None:
    """Profile each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--quantization", help="round the weights, such as fp8")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prefill", type=int, default=0, help="also a step of so many prompt tokens, rows of 512")
    parser.add_argument(
        "--mixed", type=int, default=0, help="also a step of the largest batch and so many prompt tokens"
    )
    parser.add_argument(
        "--shared", type=int, default=0, help="tokens at the front that all rows share, in blocks of 16"
    )
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--timeline", action="store_true", help="also a layer's kernels one after the other")
    args = parser.parse_args()
    extra = args.mixed // 512
    runner = make_runner(args.model, max(args.batch) + extra, args.context, quantization=args.quantization)
    runner.warm_up([(1, 32), *((size, 1) for size in args.batch)])
    began = time.perf_counter()
    runner.record_graphs()
    graphs = runner.graphs
    assert graphs is not None
    print(f"recorded {len(graphs.sizes)} sizes in {time.perf_counter() - began:.1f} s")
    if args.prefill:
        rows, per_row = args.prefill // 512, 512 // 16
        output = SchedulerOutput(
            step_id=1, epoch=0, rows=list(range(rows)), num_tokens=[512] * rows,
            new_requests=[
                NewRequest(row, prompt(row), 512, 0, list(range(row * per_row, (row + 1) * per_row)),
                           TokenParams(max_tokens=8, temperature=0.0))
                for row in range(rows)
            ],
        )  # fmt: skip
        runner.execute(output)
        device_ms, host_ms = timed(lambda: runner.execute(output), 5)
        print(json.dumps({"model": args.model, "prefill_tokens": args.prefill, "device_ms": round(device_ms, 3),
                          "host_ms": round(host_ms, 3)}))  # fmt: skip
        show(lambda: runner.execute(output), args.top)
    for batch in args.batch:
        runner.execute(start_rows(runner, batch, args.context, args.shared))
        for step in range(3):
            runner.execute(decode(batch, step))
        step_ms, host_ms = timed(lambda batch=batch: runner.execute(decode(batch, 9)), 20)
        replay_ms, _ = timed(lambda batch=batch: graphs.run(batch), 20)
        row = {"model": args.model, "batch": batch, "context": args.context, "step_ms": round(step_ms, 4),
               "replay_ms": round(replay_ms, 4), "host_ms": round(host_ms, 4)}  # fmt: skip
        print(json.dumps(row), flush=True)
        show(lambda batch=batch: (graphs.run(batch), graphs.run_greedy(batch)), args.top)
        if args.timeline:
            timeline(lambda batch=batch: graphs.run(batch))
    if args.mixed:
        batch = max(args.batch)
        output = mixed(batch, args.context, args.mixed)
        runner.execute(output)
        device_ms, host_ms = timed(lambda: runner.execute(output), 5)
        row = {"model": args.model, "mixed_rows": batch, "prompt_tokens": args.mixed, "context": args.context,
               "device_ms": round(device_ms, 3), "host_ms": round(host_ms, 3)}  # fmt: skip
        print(json.dumps(row), flush=True)
        show(lambda: runner.execute(output), args.top)


def show(run: object, top: int) -> None:
    """Kernels of one call by device time."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    for e in events[:top]:
        share = e.self_device_time_total / max(total, 1)
        each = e.self_device_time_total / e.count
        print(f"   {share:6.1%} {e.self_device_time_total:9.0f} us {e.count:5} x {each:8.2f}  {e.key[:90]}")
    print(f"   kernels together {total:.0f} us", flush=True)


def timeline(run: object) -> None:
    """Where the time of one call goes, kernel after kernel: begin to begin of a layer's, medians over the layers.

    Kernels overlap, so their lengths add up to more than the call; what one begins later than the one before it do not.
    """
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    kernels = sorted((e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA),
                     key=lambda e: e.time_range.start)  # fmt: skip
    names = [e.name for e in kernels]
    begins = [e.time_range.start for e in kernels]
    lengths = [e.time_range.end - e.time_range.start for e in kernels]
    middle = range(len(names) // 4, len(names) * 3 // 4)
    period = next(
        n for n in range(1, len(names)) if all(names[i] == names[i + n] for i in middle if i + n < len(names))
    )
    first = next(i for i in range(len(names) - period) if names[i : i + period] == names[i + period : i + 2 * period])
    layers = next(n for n in range(1, len(names)) if names[first + n * period :][:period] != names[first:][:period])
    each = (begins[first + (layers - 1) * period] - begins[first]) / (layers - 1)
    whole, before = max(e.time_range.end for e in kernels) - begins[0], begins[first] - begins[0]
    print(f"   first to last {whole:.1f} us, before the layers {before:.1f}, {layers} layers of {each:.2f}")
    for place in range(period):
        own = range(first + place, first + layers * period - 1, period)
        steps = statistics.median(begins[i + 1] - begins[i] for i in own)
        rest = statistics.median(begins[i + 1] - begins[i] - lengths[i] for i in own)
        length = statistics.median(lengths[i] for i in own)
        name = names[first + place][:60]
        print(f"   {steps:8.2f} us to the next, runs {length:7.2f}, idle after it {rest:7.2f}  {name}")
    for i in range(first + layers * period, len(names)):
        print(f"   {begins[i] - begins[i - 1]:8.2f} us after the one before, runs {lengths[i]:7.2f}  {names[i][:70]}")
    print(flush=True)


if __name__ == "__main__":
    main()
