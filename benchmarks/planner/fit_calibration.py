"""Fit the cost model's ratios and overheads to measured decode steps: coordinate search on the mean squared log ratio.

    python benchmarks/planner/fit_calibration.py --results benchmarks/results/planner_h200.jsonl --workloads \
        --write placement/calibrations/nvidia_h200.json

Rows are those of `argosy bench --output` and `benchmarks/gpu/bench_gpu.py` for the shapes 06b, 8b and 70b; of each
(model, layout, workload) the newest counts. Prints what the fitted model says beside each measured row.
"""

import argparse
import json
import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
from compare_layouts import Case, predict, read_cases

from argosy.placement.calibration import Calibration, read_calibration
from argosy.placement.cost_model import ReplicaCost, StageCost, StepLoad
from argosy.placement.data_sheets import DATA_SHEETS
from argosy.placement.model_sources import read_model_shape
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.weight_format import format_by_name

MODELS = {"06b": "qwen3-0.6b", "8b": "llama-3.1-8b", "70b": "llama-3.1-70b"}
# fitted, within what is plausible. How fast keys and values are read was measured alone (kernels_h200.jsonl: 4.2 TB/s)
LIMITS = {
    "weight_efficiency": (0.5, 0.925), "step_us": (20.0, 800.0), "layer_us": (2.0, 60.0), "row_us": (0.0, 5.0),
    "group_layer_us": (0.0, 80.0), "fp8_layer_us": (0.0, 80.0), "fp8_flops_ratio": (0.3, 1.2),
    "reduce_efficiency": (0.1, 0.9), "reduce_latency": (1.5, 4.0), "reduce_rank_latency": (0.0, 1.0),
    "request_us": (500.0, 20_000.0),
}  # fmt: skip
FLOPS_POINTS = (64.0, 256.0, 512.0, 8192.0)
WORKLOADS = ("fixed512x256", "decode1")  # simulated when --workloads is given, for the next two:
WORKLOAD_NAMES = ("request_us", "reduce_efficiency")
WORKLOAD_POINTS = (512.0, 8192.0)


class Row(msgspec.Struct, frozen=True):
    """One measured decode step."""

    model: str
    tp_size: int
    pp_size: int
    batch: int
    milliseconds: float
    quantization: str = "none"


def read_rows(paths: Sequence[str]) -> list[Row]:
    """Decode rows, the newest of each kind."""
    newest: dict[tuple[str, int, int, int, str], Row] = {}
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            raw = json.loads(line)
            name = str(raw.get("workload", ""))
            if raw.get("unit") != "ms/step" or raw.get("model") not in MODELS or raw.get("note"):
                continue
            tp, _, pp = str(raw["layout"]).partition("x")
            quantization = str(raw.get("quantization") or "none")
            row = Row(
                raw["model"], int(tp.removeprefix("TP")), int(pp.removeprefix("PP") or 1),
                int(name.removeprefix("decode")), float(raw["figure"]), quantization,
            )  # fmt: skip
            newest[row.model, row.tp_size, row.pp_size, row.batch, quantization] = row
    return list(newest.values())


def predict_ms(row: Row, calibration: Calibration, gpu: str) -> float:
    """Milliseconds of the step that the row measured: 128 tokens in, 256 out, so 256 in view on average."""
    shape = read_shape(row.model)
    serving = Serving(dtype_bytes=2, kv_dtype_bytes=2, weight_format=format_by_name(row.quantization), max_num_seqs=512)
    sizes, sheet = StageBytes(shape, serving), DATA_SHEETS[gpu]
    cuts = [shape.num_layers * stage // row.pp_size for stage in range(row.pp_size + 1)]
    stages = [
        StageCost(sizes, sheet, calibration, tp_size=row.tp_size, first_layer=first, last_layer=last,
                  group_link=sheet.link)
        for first, last in pairwise(cuts)
    ]  # fmt: skip
    cost = ReplicaCost(stages, [sheet.link] * (row.pp_size - 1))
    rows = -(-row.batch // row.pp_size)
    load = StepLoad(num_decodes=rows, context_tokens=rows * 256, num_sampled=rows)
    return 1e3 * cost.step_seconds(load)


def read_shape(model: str):  # type: ignore[no-untyped-def]  # cached here only
    """The published shape of a benchmark's model."""
    if model not in _SHAPES:
        _SHAPES[model] = read_model_shape(MODELS[model])
    return _SHAPES[model]


_SHAPES: dict[str, object] = {}


def loss(rows: Sequence[Row], cases: Sequence[Case], calibration: Calibration, gpu: str) -> float:
    """Mean squared log ratio of steps, throughputs and, at half the weight, first tokens."""
    terms = [math.log(predict_ms(row, calibration, gpu) / row.milliseconds) ** 2 for row in rows if row.pp_size == 1]
    for case in cases:
        figure, ttft = predict(case, calibration, gpu)
        terms.append(math.log(figure / case.figure) ** 2 if not case.workload.startswith("decode") else 0.0)
        terms.append(0.5 * math.log(ttft / case.ttft) ** 2)
    return sum(terms) / len(terms)


def fit(rows: Sequence[Row], cases: Sequence[Case], start: Calibration, gpu: str) -> Calibration:
    """The best values by turns, with steps that get smaller."""
    names, points = (WORKLOAD_NAMES, WORKLOAD_POINTS) if cases else (LIMITS, FLOPS_POINTS)
    best, least, step = start, loss(rows, cases, start, gpu), 0.3
    while step > (0.003 if not cases else 0.03):
        improved = False
        for candidate in _neighbours(best, step, names, points):
            value = loss(rows, cases, candidate, gpu)
            if value < least - 1e-9:
                best, least, improved = candidate, value, True
        if not improved:
            step /= 2
    return best


def _neighbours(at: Calibration, step: float, names: Collection[str], points: Collection[float]) -> list[Calibration]:
    found = []
    for sign in (1 + step, 1 / (1 + step)):
        for name in names:
            low, high = LIMITS[name]
            value = max(low, min(high, max(getattr(at, name), 0.01) * sign))
            found.append(msgspec.structs.replace(at, **{name: value}))
        for place, (tokens, share) in enumerate(at.flops_efficiency):
            if tokens in points:
                table = list(at.flops_efficiency)
                table[place] = (tokens, max(0.05, min(0.8, share * sign)))
                found.append(msgspec.structs.replace(at, flops_efficiency=tuple(table)))
    return found


def main() -> int:
    """Fit, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="+", default=["benchmarks/results/engine_h200.jsonl"])
    parser.add_argument("--start", default="placement/calibrations/nvidia_h200.json", help="what isn't fitted stays")
    parser.add_argument("--gpu", choices=tuple(DATA_SHEETS), default="H200", help="that the rows were measured on")
    parser.add_argument("--workloads", action="store_true", help="fit simulated throughput and first tokens, too")
    parser.add_argument("--write", help="store the calibration here")
    args = parser.parse_args()
    rows = read_rows(args.results)
    start = read_calibration(args.start)
    cases = [case for case in read_cases(args.results) if case.pp_size == 1 and case.model != "06b"]
    cases = [case for case in cases if case.workload in WORKLOADS] if args.workloads else []
    names = ", ".join(Path(path).name for path in args.results)
    start = msgspec.structs.replace(
        start,
        device=args.gpu,
        flops_efficiency=tuple((point, start.flops_share(point)) for point in FLOPS_POINTS),
        source=f"fitted to {len(rows)} decode steps and {len(cases)} workloads of {names}",
    )
    best = fit(rows, [], start, args.gpu)
    if cases:
        best = fit(rows, cases, best, args.gpu)
    for row in rows:
        found = predict_ms(row, best, args.gpu)
        kind = f"{row.model:4} {row.quantization:5} TP{row.tp_size}xPP{row.pp_size} batch {row.batch:4}"
        print(f"{kind} measured {row.milliseconds:8.3f} ms, model {found:8.3f} {found / row.milliseconds - 1:+7.1%}")
    text = msgspec.json.format(msgspec.json.encode(best), indent=1).decode()
    print(text)
    if args.write:
        Path(args.write).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
