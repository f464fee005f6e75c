"""Why a card computes nothing, from the trace of its own clock and the host's calls: for `stage_profile`.

A gap is a time in which the card runs neither a kernel nor a copy. What ends it says why it was there:

    word     the host had no step to queue yet: it waited for the driver's message
    queue    the host had the step and had not told the card yet
    stage    all was queued, and the card waited for what another stage sends (a copy out of the wire's slot follows)
    between  shorter than `SHORT_US`: from one kernel to the next
    other    the rest, such as a group's other rank that is behind

Times in microseconds, as in a trace of `torch.profiler`.
"""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

EDGE = 0.2  # of a window, left out at either end: starting and stopping the profiler empties the pipeline there
SHORT_US = 6.0
WAITING = "SendRecv"  # in the names of NCCL's kernels between stages
RECEIVED = "DtoD"  # in the name of a copy out of a wire's slot
REASONS = ("stage", "word", "queue", "between", "other")


class Gap(NamedTuple):
    """The card had nothing to do from `start` for `length`; `parts` of it by reason, and what ran next."""

    start: float
    length: float
    parts: dict[str, float]
    following: str


def device_events(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ran on the card, in the order in which it began."""
    found = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return sorted(found, key=lambda e: e["ts"])


def asked_at(events: Sequence[dict[str, Any]], work: Sequence[dict[str, Any]]) -> list[float]:
    """When the host asked for each event of `work`; where that isn't known (copies of the driver's own functions), when
    it asked for the next one."""
    calls = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    times, following = list[float](), float("-inf")
    for event in reversed(work):
        following = calls.get(event.get("args", {}).get("correlation"), following)
        times.append(following)
    return times[::-1]


def find_gaps(
    work: Sequence[dict[str, Any]], asked: Sequence[float], steps: Sequence[tuple[float, float]]
) -> list[Gap]:
    """All gaps. `steps`: when the host got each step's message and when it had queued the step, in order."""
    begins = [began for began, _ in steps]
    gaps, ended = list[Gap](), work[0]["ts"]
    for event, at in zip(work, asked, strict=True):
        length = event["ts"] - ended
        is_wait = WAITING in event["name"]  # NCCL waits in a kernel: all of it is the other stage's
        if length > 0.0:
            late = min(max(at - ended, 0.0), length)
            step = bisect.bisect_right(begins, at) - 1
            word = min(max(begins[step] - ended, 0.0), late) if step >= 0 else 0.0
            parts = {"word": word, "queue": late - word}
            rest = length - late
            if RECEIVED in event["name"] or is_wait:
                parts["stage"] = rest
            else:
                parts["between" if rest < SHORT_US else "other"] = rest
            gaps.append(Gap(ended, length, parts, event["name"]))
        end = event["ts"] + event["dur"]
        if is_wait and end > max(ended, event["ts"]):
            start = max(ended, event["ts"])
            gaps.append(Gap(start, end - start, {"stage": end - start}, event["name"]))
        ended = max(ended, end)
    return gaps


def shares(events: Sequence[dict[str, Any]], steps: Sequence[tuple[float, float]], num_steps: int) -> dict[str, Any]:
    """How a window of `num_steps` steps was spent, without its edges."""
    work = device_events(events)
    if not work:
        return {"kernels": 0}
    gaps = find_gaps(work, asked_at(events, work), steps)
    whole_first, whole_last = work[0]["ts"], max(e["ts"] + e["dur"] for e in work)
    edge = EDGE * (whole_last - whole_first)
    first, last = whole_first + edge, whole_last - edge
    span = last - first
    idle = dict.fromkeys(REASONS, 0.0)
    for gap in gaps:
        inside = max(0.0, min(gap.start + gap.length, last) - max(gap.start, first)) / gap.length
        for reason, length in gap.parts.items():
            idle[reason] += inside * length
    by_name: dict[str, float] = {}
    num_kernels = 0
    for event in work:
        inside = min(event["ts"] + event["dur"], last) - max(event["ts"], first)
        if inside > 0.0:
            num_kernels += 1
            by_name[event["name"][:60]] = by_name.get(event["name"][:60], 0.0) + inside
    steps_inside = num_steps * num_kernels / len(work)  # steps of a window are alike
    busy = span - sum(idle.values())
    longest = sorted((g for g in gaps if first <= g.start < last), key=lambda g: -g.length)[:6]
    return {
        "span_ms": round(span / 1e3, 2),
        "busy": round(busy / span, 4),
        "idle": round(1 - busy / span, 4),
        "idle_for": {reason: round(length / span, 4) for reason, length in idle.items()},
        "step_ms": round(span / 1e3 / steps_inside, 4),
        "busy_ms_a_step": round(busy / 1e3 / steps_inside, 4),
        "kernels": num_kernels,
        "share": {name: round(us / span, 4) for name, us in sorted(by_name.items(), key=lambda i: -i[1])[:8]},
        "longest": [
            (round(g.length), max(g.parts, key=lambda reason: g.parts[reason]), g.following[:40]) for g in longest
        ],
    }
