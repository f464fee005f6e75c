"""What a card waits for between kernels, found in a trace (`benchmarks/gpu/stage_gaps.py`, `stage_profile.py`)."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripts import BENCHMARKS, load_script


def _ran(ts: float, dur: float, name: str, correlation: int = 0, cat: str = "kernel") -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


def _called(ts: float, correlation: int) -> dict[str, Any]:
    return {
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "ts": ts,
        "dur": 2.0,
        "args": {"correlation": correlation},
    }


def test_each_gap_is_put_down_to_what_ended_it() -> None:
    """Three steps: the second is queued late and its word came late, the third waits for the stage before it."""
    script = load_script("gpu/stage_gaps.py")
    events = [
        _called(0.0, 1), _ran(10.0, 90.0, "product", 1),
        _called(1.0, 2), _ran(102.0, 98.0, "product", 2),  # at once behind the first
        _called(290.0, 3), _ran(300.0, 100.0, "product", 3),  # word at 250, 50 after the card was free; 40 to queue it
        _ran(480.0, 5.0, "Memcpy DtoD (Device -> Device)", cat="gpu_memcpy"),  # by a function that leaves no call
        _called(320.0, 4), _ran(490.0, 60.0, "product", 4),
    ]  # fmt: skip
    work = script.device_events(events)
    gaps = script.find_gaps(work, script.asked_at(events, work), [(-5.0, 3.0), (250.0, 295.0), (310.0, 330.0)])
    assert [(gap.start, gap.length, gap.parts) for gap in gaps] == [
        (100.0, 2.0, {"word": 0.0, "queue": 0.0, "between": 2.0}),
        (200.0, 100.0, {"word": 50.0, "queue": 40.0, "other": 10.0}),
        (400.0, 80.0, {"word": 0.0, "queue": 0.0, "stage": 80.0}),
        (485.0, 5.0, {"word": 0.0, "queue": 0.0, "between": 5.0}),
    ]


def test_a_receive_that_is_a_kernel_is_time_that_the_other_stage_took() -> None:
    """NCCL waits inside of a kernel, beside which others may run."""
    script = load_script("gpu/stage_gaps.py")
    events = [
        _called(0.0, 1), _ran(0.0, 100.0, "product", 1),
        _called(1.0, 2), _ran(50.0, 150.0, "ncclDevKernel_SendRecv", 2),
        _called(2.0, 3), _ran(200.0, 100.0, "product", 3),
    ]  # fmt: skip
    work = script.device_events(events)
    gaps = script.find_gaps(work, script.asked_at(events, work), [(0.0, 3.0)])
    assert [(gap.start, gap.length, gap.parts) for gap in gaps] == [(100.0, 100.0, {"stage": 100.0})]


def test_shares_leave_out_the_edges_of_a_window() -> None:
    """Ten steps of 90 us in 100: a pipeline that fills for a long time before the first one changes nothing."""
    script = load_script("gpu/stage_gaps.py")
    events, steps = [], []
    for step in range(10):
        begin = 100.0 * step
        events += [_called(begin - 50.0, step + 1), _ran(begin, 90.0, "product", step + 1)]
        steps.append((begin - 60.0, begin - 40.0))
    found = script.shares(events, steps, 10)
    assert found["busy"] == pytest.approx(0.9, abs=0.01)
    assert found["idle_for"]["other"] == pytest.approx(0.1, abs=0.01)
    assert found["idle_for"]["queue"] == 0.0
    assert script.shares([], [], 10) == {"kernels": 0}


def test_a_copy_that_leaves_no_call_was_asked_for_before_the_next_kernel() -> None:
    """Out of a wire's slot, by a function of the driver: the host was late with it, as with the product behind. A call
    that comes when the copy runs already is no reason to say more than the gap is long."""
    script = load_script("gpu/stage_gaps.py")
    for called, parts in (
        (150.0, {"word": 20.0, "queue": 30.0, "stage": 10.0}),
        (175.0, {"word": 20.0, "queue": 40.0, "stage": 0.0}),
    ):
        events = [
            {"ph": "M", "name": "process_name"},
            _ran(170.0, 30.0, "product", 2),  # the trace isn't in the order of time
            _ran(0.0, 100.0, "product", 1), _called(-10.0, 1),
            {**_called(called, 2), "cat": "cuda_driver"},
            _ran(160.0, 10.0, "Memcpy DtoD (Device -> Device)", cat="gpu_memcpy"),
        ]  # fmt: skip
        work = script.device_events(events)
        (gap,) = script.find_gaps(work, script.asked_at(events, work), [(-20.0, -5.0), (120.0, called)])
        assert (gap.start, gap.length, gap.parts) == (100.0, 60.0, parts)
    late = script.find_gaps(work, [-10.0, 175.0, 175.0], [(-20.0, -5.0), (172.0, 173.0)])
    assert late[0].parts == {"word": 60.0, "queue": 0.0, "stage": 0.0}


def test_while_anything_runs_there_is_no_gap() -> None:
    """A short kernel beside a long one ends first, and a receive that waits for nothing is no gap of no length."""
    script = load_script("gpu/stage_gaps.py")
    events = [
        _ran(0.0, 100.0, "product"), _ran(10.0, 20.0, "beside"), _ran(90.0, 60.0, "product"),
        _ran(155.0, 0.0, "ncclDevKernel_SendRecv"), _ran(155.0, 50.0, "product"),
    ]  # fmt: skip
    work = script.device_events(events)
    gaps = script.find_gaps(work, script.asked_at(events, work), [(-10.0, -5.0)])
    assert [(gap.start, gap.length) for gap in gaps] == [(150.0, 5.0)]


def test_figures_of_a_window_add_up() -> None:
    """Ten steps of 1000 us: 600 of products, of which a copy runs beside 200, then the word comes 300 late and 90 go to
    queue it. One step's products take 500. Of 9600 us the middle three fifths count: 5 steps whole, parts of two."""
    script = load_script("gpu/stage_gaps.py")
    events, steps = [], []
    for step in range(10):
        begin = 1000.0 * step
        events += [_called(begin - 10.0, step + 1), _ran(begin, 500.0 if step == 4 else 600.0, "product", step + 1)]
        events += [_ran(begin + 100.0, 200.0, "Memcpy DtoD", step + 1, cat="gpu_memcpy")]
        steps.append((begin - 100.0, begin - 5.0))
    found = script.shares(events, steps, 10)
    span, idle = 0.6 * 9600.0, 80.0 + 5 * 400.0 + 100.0 + 80.0
    assert (found["span_ms"], found["idle"]) == (5.76, pytest.approx(idle / span, abs=1e-4))
    assert found["busy"] == pytest.approx(1 - idle / span, abs=1e-4)
    assert sum(found["idle_for"].values()) == pytest.approx(idle / span, abs=3e-4)
    of_gaps = {"word": 300.0, "queue": 90.0, "other": 10.0}  # of 400; 100 more of a word
    for reason, length in of_gaps.items():
        expected = (length * (5 + 160.0 / 400.0) + 100.0 * (reason == "word")) / span
        assert found["idle_for"][reason] == pytest.approx(expected, abs=1e-3), reason
    assert found["kernels"] == 12
    assert (found["step_ms"], found["busy_ms_a_step"]) == (0.96, pytest.approx((span - idle) / 6e3, abs=1e-4))
    assert found["share"] == {"product": pytest.approx(3500.0 / span, abs=1e-4), "Memcpy DtoD": 0.2083}
    assert list(found["share"]) == ["product", "Memcpy DtoD"]
    assert found["longest"] == [(500, "word", "product"), *[(400, "word", "product")] * 5]


@pytest.fixture
def profiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`stage_profile.py`, which lies beside what it imports."""
    monkeypatch.syspath_prepend(BENCHMARKS / "gpu")
    return load_script("gpu/stage_profile.py")


def test_windows_are_told_by_their_first_step_and_length(profiler: Any) -> None:
    """A workload alone is only timed."""
    assert profiler.parse_windows("fixed512x256:6+20,200+80") == ("fixed512x256", [(6, 20), (200, 80)])
    assert profiler.parse_windows("prompts512") == ("prompts512", [])
    for wrong in ("a:6", "a:6+20+3"):
        with pytest.raises(argparse.ArgumentTypeError, match="FIRST"):
            profiler.parse_windows(wrong)


def test_calls_that_took_the_host_longest_come_first(profiler: Any) -> None:
    """How many, milliseconds together, the longest; kernels are no calls of the host."""
    events = [{**_called(0.0, 1), "dur": 1000.0} for _ in range(3)]
    events += [
        {**_called(0.0, 2), "cat": "cuda_driver", "name": "cuMemcpyAsync", "dur": dur} for dur in (500.0, 4000.0)
    ]
    events += [_ran(0.0, 9000.0, "product")]
    events += [{**_called(0.0, 3), "name": f"cuda{i}", "dur": 10.0} for i in range(12)]
    found = profiler.slowest_calls(events)
    assert list(found.items())[:2] == [("cuMemcpyAsync", [2, 4.5, 4.0]), ("cudaLaunchKernel", [3, 3.0, 1.0])]
    assert len(found) == 10


def test_a_run_is_timed_by_all_its_tokens_and_the_median_request(
    profiler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four requests of 100 tokens in 2 s; who was asked for one token has no time from token to token."""
    given = [SimpleNamespace(prompt=[1] * 50, max_tokens=100) for _ in range(4)]
    times = [
        SimpleNamespace(num_generation_tokens=count, first_token_ts=1.0, last_token_ts=1.0 + seconds)
        for count, seconds in ((101, 1.0), (101, 2.0), (101, 3.0), (1, 0.0))
    ]
    outputs = [SimpleNamespace(metrics=metrics) for metrics in (*times, None)]
    monkeypatch.setattr(profiler.bench_engine, "run", lambda llm, requests: (2.0, outputs))
    expected = {"tokens_per_second": 200.0, "prompt_tokens_per_second": 100.0, "ms_per_token": 20.0}
    assert profiler.timed(None, given) == expected
    monkeypatch.setattr(profiler.bench_engine, "run", lambda llm, requests: (2.0, outputs[3:]))
    assert profiler.timed(None, given)["ms_per_token"] == 0.0


def test_a_window_is_of_the_steps_that_it_names(profiler: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Steps are counted from a workload's first new request on: what runs before it, or while no workload is named, is
    not. The third to fifth step are in the window; each takes the host 2 ms."""

    class Profile:
        def __init__(self, **_: object): ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text(json.dumps({"traceEvents": [], "baseTimeNanoseconds": 0}))

    clock = iter(range(0, 10**9, 2_000_000))
    monkeypatch.setattr(profiler, "profile", Profile)
    monkeypatch.setattr(profiler.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(profiler.time, "time_ns", lambda: next(clock))
    monkeypatch.setattr(profiler.worker.Worker, "__init__", lambda self, rank: setattr(self, "rank", rank))
    monkeypatch.setattr(profiler.worker.Worker, "_step", lambda self, output: None)
    marker = tmp_path / "marker"
    job = {"file": f"{tmp_path}/profile", "marker": str(marker), "windows": {"load": [[2, 3]]}}
    monkeypatch.setenv("ARGOSY_STAGES", json.dumps(job))
    monkeypatch.setenv("ARGOSY_STAGES_HOST", "1")
    rank = SimpleNamespace(global_rank=1, pp_rank=1, first_layer=10, last_layer=32)
    stage = profiler.StageWorker(rank)

    def step(tokens: int, *, new: bool = False) -> None:
        stage._step(
            SimpleNamespace(new_requests=[1] if new else [], num_scheduled_tokens=tokens, rows=[0] * (tokens // 10))
        )

    step(7, new=True)
    marker.write_text("load")
    step(7)
    for number in range(8):
        step(100 * number + 10, new=number in (0, 1))
    (row,) = map(json.loads, (tmp_path / "profile.1").read_text().splitlines())
    assert (row["workload"], row["rank"], row["stage"], row["layers"]) == ("load", 1, 1, 22)
    assert (row["first"], row["steps"], row["tokens_a_step"], row["rows_a_step"]) == (2, 3, 310, 31)
    assert (row["kernels"], row["host_ms_a_step"]) == (0, 2.0)
    assert row["host_ms"] == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]
