"""Fit the cost model's ratios and overheads to measured decode steps: coordinate search on the mean squared log ratio.

    python benchmarks/planner/fit_calibration.py --results benchmarks/results/engine_h200.jsonl \
        --write placement/calibrations/nvidia_h200.json

Rows are those of `benchmarks/gpu/bench_gpu.py`; of each (model, layout, workload) the newest counts. Prints what the
fitted model says beside each measured row.
"""

import argparse
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from argosy.placement.calibration import Calibration, read_calibration
from argosy.placement.cost_model import ReplicaCost, StageCost, StepLoad
from argosy.placement.data_sheets import DATA_SHEETS
from argosy.placement.model_sources import read_model_shape
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.weight_format import format_by_name

MODELS = {"06b": "qwen3-0.6b", "8b": "llama-3.1-8b", "70b": "llama-3.1-70b"}
FITTED = ("weight_efficiency", "kv_efficiency", "step_us", "layer_us", "group_layer_us", "row_us")
LIMITS = {"weight_efficiency": (0.5, 0.925), "kv_efficiency": (0.3, 0.925), "step_us": (20.0, 800.0),
          "layer_us": (2.0, 60.0), "group_layer_us": (0.0, 80.0), "row_us": (0.0, 5.0)}  # fmt: skip
FLOPS_POINTS = (64.0, 256.0, 512.0)
PREFILL_POINT = (8192.0, 0.70)  # 660 to 728 TFLOP/s of 989 in steps of 8192 prompt tokens (benchmarks/notes.md)


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


def predict_ms(row: Row, calibration: Calibration) -> float:
    """Milliseconds of the step that the row measured: 128 tokens in, 256 out, so 256 in view on average."""
    shape = read_shape(row.model)
    serving = Serving(dtype_bytes=2, kv_dtype_bytes=2, weight_format=format_by_name(row.quantization), max_num_seqs=512)
    sizes, sheet = StageBytes(shape, serving), DATA_SHEETS["H200"]
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


def loss(rows: Sequence[Row], calibration: Calibration) -> float:
    """Mean squared log ratio; pipelines are only checked, not fitted."""
    fitted = [row for row in rows if row.pp_size == 1]
    return sum(math.log(predict_ms(row, calibration) / row.milliseconds) ** 2 for row in fitted) / len(fitted)


def fit(rows: Sequence[Row], start: Calibration) -> Calibration:
    """The best values by turns, with steps that get smaller."""
    best, least, step = start, loss(rows, start), 0.3
    while step > 0.003:
        improved = False
        for candidate in _neighbours(best, step):
            value = loss(rows, candidate)
            if value < least - 1e-9:
                best, least, improved = candidate, value, True
        if not improved:
            step /= 2
    return best


def _neighbours(at: Calibration, step: float) -> list[Calibration]:
    found = []
    for sign in (1 + step, 1 / (1 + step)):
        for name in FITTED:
            low, high = LIMITS[name]
            value = max(low, min(high, max(getattr(at, name), 0.01) * sign))
            found.append(msgspec.structs.replace(at, **{name: value}))
        for place, (tokens, share) in enumerate(at.flops_efficiency):
            if tokens in FLOPS_POINTS:
                table = list(at.flops_efficiency)
                table[place] = (tokens, max(0.05, min(0.8, share * sign)))
                found.append(msgspec.structs.replace(at, flops_efficiency=tuple(table)))
    return found


def main() -> int:
    """Fit, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="+", default=["benchmarks/results/engine_h200.jsonl"])
    parser.add_argument("--start", default="placement/calibrations/nvidia_h200.json", help="what isn't fitted stays")
    parser.add_argument("--write", help="store the calibration here")
    args = parser.parse_args()
    rows = read_rows(args.results)
    start = msgspec.structs.replace(
        read_calibration(args.start),
        flops_efficiency=(*((point, 0.6) for point in FLOPS_POINTS), PREFILL_POINT),
        source=f"fitted to {len(rows)} decode rows of {', '.join(Path(path).name for path in args.results)}",
    )
    best = fit(rows, start)
    for row in rows:
        found = predict_ms(row, best)
        kind = f"{row.model:4} {row.quantization:5} TP{row.tp_size}xPP{row.pp_size} batch {row.batch:4}"
        print(f"{kind} measured {row.milliseconds:8.3f} ms, model {found:8.3f} {found / row.milliseconds - 1:+7.1%}")
    text = msgspec.json.format(msgspec.json.encode(best), indent=1).decode()
    print(text)
    if args.write:
        Path(args.write).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
