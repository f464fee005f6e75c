"""How a kernel is timed: inside a CUDA graph, over enough input sets that none is found in a cache."""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import triton

L2_BYTES = 60 << 20


def copies_for(bytes_each: int, at_most: int = 64) -> int:
    """Input sets to rotate among so that together they are four times the second-level cache."""
    return max(2, min(at_most, -(-4 * L2_BYTES // max(1, bytes_each))))


def microseconds(calls: Sequence[Callable[[], object]], *, launches: int = 0, replays: int = 7) -> tuple[float, float]:
    """Time of one call in microseconds (median of replays) and the spread (max - min) / median.

    The calls are captured one after the other, repeated until there are `launches` of them (default: about 2 ms by a
    first look), and the graph is replayed.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if not launches:
        start.record()
        for call in calls[:4]:
            call()
        end.record()
        torch.cuda.synchronize()
        each = max(2.0, start.elapsed_time(end) * 1000 / len(calls[:4]))
        launches = max(len(calls), min(200, round(2000 / each)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    graph.replay()
    times = []
    for _ in range(replays):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / launches)
    del graph
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


@contextmanager
def recorded(
    run: Callable[[], object], device: torch.device
) -> Iterator[tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]]:
    """`run` as a graph, and a stream of its own, which is the current one meanwhile. Ranks of a group record so: other
    threads of theirs, NCCL's own among them, may ask the driver for something at that time."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
        yield graph, stream
        graph.reset()


class Report:
    """Prints one JSON line a measurement as it comes, and the table at the end."""

    def __init__(self, path: str | None = None, *, profiles: bool = False):
        self.profiles = profiles
        self._rows: list[dict[str, object]] = []
        self._file = open(path, "a") if path else None  # noqa: SIM115 - lives as long as the report
        self._facts = {
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        }  # fmt: skip

    def add(self, kernel: str, case: str, us: float, spread: float, **more: object) -> None:
        row = {"kernel": kernel, "case": case, "us": round(us, 2), "spread": round(spread, 3), **more}
        self._rows.append(row)
        line = json.dumps(row | self._facts)
        print(line, flush=True)
        if self._file:
            print(line, file=self._file, flush=True)

    def profile(self, title: str, run: Callable[[], object]) -> None:
        """Print the kernels of one replay of `run` as a graph: count, total and mean time of each."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            graph.replay()
            torch.cuda.synchronize()
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        begin, end = min(e.time_range.start for e in kernels), max(e.time_range.end for e in kernels)
        print(f"\n{title}: {end - begin:.0f} us from the first kernel to the last, {len(kernels)} kernels")
        by_name: dict[str, list[float]] = {}
        for event in kernels:
            by_name.setdefault(event.name[:70], []).append(event.time_range.elapsed_us())
        for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:12]:
            print(f"    {sum(times):9.1f} us  {len(times):5} x {sum(times) / len(times):7.2f}  {name}")
        one_layer = sorted(kernels, key=lambda e: e.time_range.start)[len(kernels) // 2 :][:14]
        for event in one_layer:
            since = event.time_range.start - one_layer[0].time_range.start
            print(f"    {since:9.2f} +{event.time_range.elapsed_us():7.2f}  {event.name[:60]}")

    def table(self) -> None:
        print()
        for row in self._rows:
            rest = "  ".join(f"{k}={v}" for k, v in row.items() if k not in ("kernel", "case", "us", "spread"))
            print(f"{row['kernel']:<18}{row['case']:<44}{row['us']:>10} us  {rest}")


def run_parts(about: str, parts: Mapping[str, Callable[[Report], None]], *, profiles: bool = False) -> None:
    """The command line of a script whose parts each add to a report; `profiles`: some can show where time goes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="which parts; all without")
    parser.add_argument("--out", help="append the JSON lines to this file")
    if profiles:
        parser.add_argument("--profile", action="store_true", help="of a step: where its time goes, kernel by kernel")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report(arguments.out, profiles=profiles and arguments.profile)
    for part in arguments.parts or parts:
        parts[part](report)
        torch.cuda.empty_cache()
    report.table()
