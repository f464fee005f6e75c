"""Fit the cost model's ratios and overheads to many measured rows at once: decode steps, throughputs, first tokens.

    python benchmarks/planner/fit_calibration.py --steps benchmarks/results/steps_h200.jsonl --workloads \
        --write placement/calibrations/nvidia_h200.json
    python benchmarks/planner/refresh_docs.py; python benchmarks/make_tables.py             then, for what pages say

Seconds without `--workloads`, which simulates every throughput for each slope: minutes, for when prompts got faster.

Rows are those of `argosy bench --output` for the shapes 06b, 8b and 70b; of each (model, layout, workload) the newest
counts, and those with a note are left out. Prints what the fitted model says beside each measured row. For decode steps
of one run alone `argosy bench --calibration FILE` does the same.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import compare_layouts
import msgspec
from compare_layouts import Case, predict, read_cases

from argosy.deploy import calibrate
from argosy.deploy.calibrate import FLOPS_POINTS, LIMITS, PUBLISHED, DecodeStep, Residuals
from argosy.placement.calibration import Calibration, read_calibration
from argosy.placement.cost_model import StepLoad
from argosy.placement.data_sheets import DATA_SHEETS

WORKLOADS = ("fixed512x256", "chat1000", "unshared256", "fixed256x128", "decode1")  # simulated with --workloads,
WORKLOAD_NAMES = ("request_us", "hidden_sums", "fp8_flops_ratio")  # for these
WORKLOAD_POINTS = (512.0, 8192.0)
SORT_WEIGHT = 0.1  # traced runs are as old as they are
TTFT_WEIGHT = 0.3  # a busy host is seen in them first


def read_rows(paths: Sequence[str]) -> list[DecodeStep]:
    """Decode rows, the newest of each kind."""
    newest: dict[tuple[str, int, int, int, str], DecodeStep] = {}
    for raw in compare_layouts.read_rows(paths):
        if raw.get("model") in PUBLISHED and (row := calibrate.read_step(raw)) is not None:
            newest[row.model, row.tp_size, row.pp_size, row.batch, row.quantization] = row
    return list(newest.values())


class Sort(msgspec.Struct, frozen=True):
    """One sort of step of a traced run, as `compare_steps.py --output` writes it: its mean load and time."""

    model: str
    layout: str
    sort: str
    load: tuple[float, ...]
    ms: float
    seconds: float
    quantization: str = "none"


def read_sorts(path: str) -> list[Sort]:
    """Those of one stage, the newest of each kind, that take more than a hundredth of their run."""
    newest: dict[tuple[str, ...], Sort] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        one = msgspec.json.decode(line, type=Sort)
        newest[one.model, one.layout, one.quantization, one.sort] = one
    wholes = {key[:3]: one.seconds for key, one in newest.items() if key[3] == "all"}
    return [
        one
        for key, one in newest.items()
        if key[3] != "all" and one.layout.endswith("PP1") and one.seconds > 0.01 * wholes[key[:3]]
    ]


def reckon_sort(one: Sort, calibration: Calibration, gpu: str) -> float:
    """Milliseconds of such a step by the model."""
    tp_size = int(one.layout.removeprefix("TP").partition("x")[0])
    cost = calibrate.price_list(one.model, tp_size, 1, calibration, gpu, quantization=one.quantization)
    return 1e3 * cost.step_seconds(StepLoad(*map(int, one.load)))


def all_residuals(rows: Sequence[DecodeStep], sorts: Sequence[Sort], cases: Sequence[Case], gpu: str) -> Residuals:
    """Log ratios of decode steps and throughputs, with less weight those of first tokens and sorts of steps."""
    steps = calibrate.step_residuals(rows, gpu)

    def off(calibration: Calibration) -> list[float]:
        found = [*steps(calibration)]
        found += [SORT_WEIGHT * math.log(reckon_sort(one, calibration, gpu) / one.ms) for one in sorts]
        for case in cases:
            figure, ttft = predict(case, calibration, gpu)
            if not case.workload.startswith("decode"):
                found.append(math.log(figure / case.figure))
            found.append(TTFT_WEIGHT * math.log(ttft / case.ttft))
        return found

    return off


def main() -> int:
    """Fit, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="+", default=["benchmarks/results/engine_h200.jsonl"])
    parser.add_argument("--start", default="placement/calibrations/nvidia_h200.json", help="what isn't fitted stays")
    parser.add_argument("--gpu", choices=tuple(DATA_SHEETS), default="H200", help="that the rows were measured on")
    parser.add_argument("--workloads", action="store_true", help="fit simulated throughput and first tokens, too")
    parser.add_argument("--steps", help="fit the sorts of step of traced runs, too: rows of compare_steps.py --output")
    parser.add_argument("--write", help="store the calibration here")
    args = parser.parse_args()
    rows = read_rows(args.results)
    start = calibrate.for_device(read_calibration(args.start), args.gpu)
    cases = [case for case in read_cases(args.results) if case.pp_size == 1]
    cases = [case for case in cases if case.workload in WORKLOADS] if args.workloads else []
    names = ", ".join(Path(path).name for path in args.results)
    workloads = f" and {len(cases)} workloads" if cases else ""
    start = msgspec.structs.replace(
        start,
        flops_efficiency=tuple((point, start.flops_share(point)) for point in FLOPS_POINTS),
        source=f"fitted to {sum(row.pp_size == 1 for row in rows)} decode steps{workloads} of {names}",
    )
    sorts = read_sorts(args.steps) if args.steps else []
    best = calibrate.fit(all_residuals(rows, sorts, [], args.gpu), start, list(LIMITS), FLOPS_POINTS)
    if cases:
        best = calibrate.fit(all_residuals(rows, sorts, cases, args.gpu), best, WORKLOAD_NAMES, WORKLOAD_POINTS)
    for one in sorts:
        found = reckon_sort(one, best, args.gpu)
        kind = f"{one.model:4} {one.quantization:5} {one.layout} {one.sort:20}"
        print(f"{kind} measured {one.ms:8.3f} ms, model {found:8.3f} {found / one.ms - 1:+7.1%}")
    for row in rows:
        found = calibrate.reckon_ms(row, best, args.gpu)
        kind = f"{row.model:4} {row.quantization:5} TP{row.tp_size}xPP{row.pp_size} batch {row.batch:4}"
        print(f"{kind} measured {row.milliseconds:8.3f} ms, model {found:8.3f} {found / row.milliseconds - 1:+7.1%}")
    print(msgspec.json.format(msgspec.json.encode(best), indent=1).decode())
    if args.write:
        calibrate.write(best, args.write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
