"""What a simulation found: percentiles, goodput, bubbles, waste and load over time, as a table, JSON or a picture."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import Any, Final

import msgspec

from argosy.cluster.simulated_cluster import Sample, SimulatedCluster

PERCENTILES: Final = (50, 90, 95, 99)
_BARS: Final = " ▁▂▃▄▅▆▇█"
_WIDTH: Final = 60


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must keep to count for goodput; None: anything."""

    ttft_seconds: float | None = None
    tpot_seconds: float | None = None


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of values in order; 0 without values."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, max(0, math.ceil(len(ordered) * share / 100) - 1))]


def make_report(cluster: SimulatedCluster, *, slo: Slo, request_seconds: float, num_gpus: int) -> dict[str, Any]:
    """All figures. `request_seconds` is what a request takes beside its steps, added to its first token."""
    records = cluster.records
    ttft = sorted(value + request_seconds for value in records.ttft)
    tpot = sorted(value for value, size in zip(records.tpot, records.output_len, strict=True) if size > 1)
    e2e = sorted(end - start + request_seconds for end, start in zip(records.end, records.arrival, strict=True))
    seconds = cluster.now or 1e-9
    kept = sum(
        (slo.ttft_seconds is None or first + request_seconds <= slo.ttft_seconds)
        and (slo.tpot_seconds is None or each <= slo.tpot_seconds)
        for first, each in zip(records.ttft, records.tpot, strict=True)
    )
    total = len(records.end) + records.num_refused
    metrics = [replica.metrics for replica in cluster.replicas]
    stages: dict[int, list[float]] = {}
    busy_all = active_all = 0.0
    for _, stage, busy, active in cluster.stage_figures():
        pair = stages.setdefault(stage, [0.0, 0.0])
        pair[0], pair[1] = pair[0] + busy, pair[1] + active
        busy_all, active_all = busy_all + busy, active_all + active
    input_tokens = sum(records.input_len)
    waste = [sample.waste for sample in cluster.samples if sample.running]
    return {
        "requests": total,
        "refused": records.num_refused,
        "seconds": seconds,
        "replicas": len(cluster.replicas),
        "gpus": num_gpus,
        "output_tokens": records.output_tokens,
        "input_tokens": input_tokens,
        "output_tokens_per_second": records.output_tokens / seconds,
        "total_tokens_per_second": (records.output_tokens + input_tokens) / seconds,
        "requests_per_second": len(records.end) / seconds,
        "ttft_seconds": _summary(ttft),
        "tpot_seconds": _summary(tpot),
        "e2e_seconds": _summary(e2e),
        "slo": {"ttft_seconds": slo.ttft_seconds, "tpot_seconds": slo.tpot_seconds,
                "attainment": kept / max(total, 1), "goodput_requests_per_second": kept / seconds},
        "stages": [
            {"stage": stage, "bubble": _idle(busy, active),
             "utilisation": busy / (seconds * len(cluster.replicas))}
            for stage, (busy, active) in sorted(stages.items())
        ],
        "bubble": _idle(busy_all, active_all),
        "kv_waste": sum(waste) / len(waste) if waste else 0.0,
        "kv_usage_peak": max((sample.kv_usage for sample in cluster.samples), default=0.0),
        "prefix_hit_rate": sum(records.cached) / max(input_tokens, 1),
        "preemptions": sum(one.preemptions for one in metrics),
        "recomputed_tokens": sum(one.tokens_recomputed for one in metrics),
        "swapped_preemptions": sum(one.preemptions_swapped for one in metrics),
        "swapped_blocks": {way: sum(one.swap_blocks[way] for one in metrics) for way in ("out", "in")},
        "host_tier_tokens": sum(one.host_hits for one in metrics),
        "steps": sum(replica.num_steps for replica in cluster.replicas),
        "load": [_sample_row(sample, before) for before, sample in zip([None, *cluster.samples], cluster.samples,
                                                                        strict=False)],
    }  # fmt: skip


def _idle(busy: float, active: float) -> float:
    return max(0.0, 1.0 - busy / active) if active else 0.0


def _summary(ordered: Sequence[float]) -> dict[str, float]:
    found = {f"p{share}": percentile(ordered, share) for share in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered) if ordered else 0.0, **found, "max": ordered[-1] if ordered else 0.0}


def _sample_row(sample: Sample, before: Sample | None) -> dict[str, float]:
    passed = sample.seconds - (before.seconds if before is not None else 0.0)
    tokens = sample.output_tokens - (before.output_tokens if before is not None else 0)
    return {
        "seconds": sample.seconds,
        "running": sample.running,
        "waiting": sample.waiting,
        "kv_usage": sample.kv_usage,
        "kv_waste": sample.waste,
        "output_tokens_per_second": max(0.0, tokens / passed) if passed > 0 else 0.0,
    }


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """The table and the drawing for people."""
    refused = f", {report['refused']:,} refused" if report["refused"] else ""
    yield (f"{report['requests']:,} requests in {report['seconds']:,.1f} simulated seconds on {report['replicas']} "
           f"replica{'s' if report['replicas'] > 1 else ''}, {report['gpus']} devices{refused}")  # fmt: skip
    yield ""
    yield f"  output tokens/s        {report['output_tokens_per_second']:>12,.0f}"
    yield f"  all tokens/s           {report['total_tokens_per_second']:>12,.0f}"
    yield f"  requests/s             {report['requests_per_second']:>12,.2f}"
    yield ""
    heads = ("mean", *(f"p{share}" for share in PERCENTILES), "max")
    yield "  milliseconds         " + "".join(f"{head:>12}" for head in heads)
    for name, title in (("ttft", "first token"), ("tpot", "every further"), ("e2e", "whole answer")):
        row = report[f"{name}_seconds"]
        yield f"  {title:21}" + "".join(f"{1e3 * row[head]:>12,.1f}" for head in heads)
    yield ""
    slo = report["slo"]
    wishes = [f"{label} <= {1e3 * value:g} ms" for label, value in
              (("TTFT", slo["ttft_seconds"]), ("TPOT", slo["tpot_seconds"])) if value is not None]  # fmt: skip
    if wishes:
        yield (f"  within {' and '.join(wishes)}: {slo['attainment']:.1%} of the requests, "
               f"goodput {slo['goodput_requests_per_second']:,.2f} requests/s")  # fmt: skip
    bubbles = ", ".join(f"stage {row['stage']} {row['bubble']:.1%}" for row in report["stages"])
    yield f"  stages idle while a step was under way: {bubbles}"
    yield (f"  KV: {report['kv_usage_peak']:.1%} used at most, {report['kv_waste']:.1%} of the slots held wasted, "
           f"{report['prefix_hit_rate']:.1%} of prompt tokens found cached")  # fmt: skip
    yield f"  {report['preemptions']:,} preemptions, {report['recomputed_tokens']:,} tokens computed again"
    if any((blocks := report["swapped_blocks"]).values()):
        found = f"{report['host_tier_tokens']:,} tokens of prompts were found there"
        yield f"  {report['swapped_preemptions']:,} of them swapped"
        yield f"  {blocks['out']:,} blocks went to host memory, {blocks['in']:,} came back; {found}"
    load = report["load"]
    if len(load) > 1:
        yield ""
        yield f"load over {load[-1]['seconds']:,.1f} s"
        for name, title in (("running", "running"), ("waiting", "waiting"), ("kv_usage", "KV used"),
                            ("output_tokens_per_second", "tokens/s")):  # fmt: skip
            values = _thin([row[name] for row in load], _WIDTH)
            most = max(values)
            shown = f"{most:.0%}" if name == "kv_usage" else f"{most:,.0f}"
            yield f"  {title:9} {sparkline(values)}  at most {shown}"


def sparkline(values: Sequence[float]) -> str:
    """A bar a value, the highest for the largest."""
    most = max(values, default=0.0)
    if most <= 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[min(8, max(int(value > 0), round(8 * value / most)))] for value in values)


def _thin(values: Sequence[float], most: int) -> list[float]:
    """At most so many values: the mean of each stretch."""
    if len(values) <= most:
        return list(values)
    edges = [round(place * len(values) / most) for place in range(most + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


_LINES: Final = (
    ("running", "requests running", "#4e79a7"),
    ("waiting", "requests waiting", "#e15759"),
    ("kv_usage", "KV blocks used", "#59a14f"),
    ("output_tokens_per_second", "output tokens/s", "#f28e2b"),
)


def report_svg(report: dict[str, Any]) -> str:
    """Load over time as a picture: one panel a figure."""
    load, width, height, gap = report["load"], 640, 90, 34
    total = len(_LINES) * (height + gap) + gap
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 20}" height="{total}" font-family="sans-serif" '
             'font-size="11">']  # fmt: skip
    until = load[-1]["seconds"] if load else 1.0
    for place, (name, title, colour) in enumerate(_LINES):
        top = gap + place * (height + gap)
        values = [row[name] for row in load]
        most = max(values, default=0.0) or 1.0
        points = " ".join(
            f"{10 + width * row['seconds'] / until:.1f},{top + height - height * value / most:.1f}"
            for row, value in zip(load, values, strict=True)
        )
        label = f"{title} (at most {most:,.2f})" if name == "kv_usage" else f"{title} (at most {most:,.0f})"
        parts.append(f'<text x="10" y="{top - 6}">{escape(label)}</text>')
        parts.append(f'<rect x="10" y="{top}" width="{width}" height="{height}" fill="#f8f8f8" stroke="#bbb"/>')
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    parts.append(f'<text x="10" y="{total - 10}">0 to {until:,.1f} simulated seconds</text></svg>')
    return "\n".join(parts) + "\n"
