"""What a card waits for between kernels, found in a trace (`benchmarks/gpu/stage_gaps.py`)."""

from typing import Any

import pytest
from scripts import load_script


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
