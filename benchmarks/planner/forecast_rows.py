"""Every measured row beside what the planner foretells of it: decode steps, throughputs, first tokens, blocks, starts.

    python benchmarks/planner/forecast_rows.py                  what is off by more than it should be
    python benchmarks/planner/forecast_rows.py --all            every row

Rows are the newest of each kind in `benchmarks/results/engine_h200.jsonl`. Decode steps should be within 5 %, the rest
within 10 %; first tokens, which a busy host delays first, have no bound. How far off each kind is is kept with the
calibration (`judge`), where `argosy plan` finds it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from compare_layouts import MODELS, Case, plan_of, predict, read_cases, read_rows

from argosy.deploy import bench_suite, bench_table
from argosy.placement.calibration import Calibration, Judged, default_calibration, read_calibration
from argosy.placement.data_sheets import DATA_SHEETS
from argosy.placement.model_sources import CONFIG_FOLDER
from argosy.placement.start_seconds import start_of

RESULTS = Path(__file__).resolve().parents[1] / "results" / "engine_h200.jsonl"
BOUNDS = {"decode step": 0.05, "throughput": 0.10, "KV blocks": 0.10, "start": 0.10, "first token": float("inf")}
DIGITS = {"decode step": (1e3, ",.3f", " ms"), "throughput": (1.0, ",.0f", " tok/s"), "KV blocks": (1.0, ",.0f", ""),
          "start": (1.0, ".2f", " s"), "first token": (1e3, ",.0f", " ms")}  # fmt: skip


class Forecast(msgspec.Struct, frozen=True):
    """One measured figure beside its forecast; seconds, tokens a second, or blocks."""

    kind: str
    model: str
    layout: str
    workload: str
    measured: float
    foretold: float

    @property
    def off(self) -> float:
        """By what part of the measured it was foretold too high."""
        return self.foretold / self.measured - 1

    @property
    def is_near(self) -> bool:
        """Whether it is within the bound of its kind."""
        return abs(self.off) <= BOUNDS[self.kind]

    @property
    def name(self) -> str:
        """Model, layout and workload."""
        return f"{self.model} {self.layout} {self.workload}".rstrip()

    def shown(self) -> tuple[str, str, str]:
        """Measured, foretold, and the difference, for people."""
        scale, digits, unit = DIGITS[self.kind]
        return (*(f"{scale * one:{digits}}{unit}" for one in (self.measured, self.foretold)), f"{self.off:+.1%}")


def forecast_rows(rows: Sequence[dict[str, Any]], cases: Sequence[Case], calibration: Calibration) -> list[Forecast]:
    """All of them: `cases` of steps and throughputs, the others of `rows`."""
    found = []
    for case in sorted(cases, key=_place):
        figure, ttft = predict(case, calibration)
        stored = case.model if case.quantization == "none" else f"{case.model} {case.quantization}"
        about = (stored, f"TP{case.tp_size}xPP{case.pp_size}", case.workload)
        kind = "decode step" if case.workload.startswith("decode") else "throughput"
        found += [Forecast(kind, *about, case.figure, figure), Forecast("first token", *about, case.ttft, ttft)]
    return [*found, *_plans(rows, calibration), *_super_linear(rows, calibration)]


def _place(case: Case) -> tuple[object, ...]:
    """Models by size, layouts by cards, decode steps by rows before throughputs."""
    rows = case.workload.removeprefix("decode")
    return (
        list(MODELS).index(case.model), case.quantization, case.tp_size * case.pp_size, case.pp_size,
        int(rows) if rows.isdigit() else 1 << 20, case.workload,
    )  # fmt: skip


def _plans(rows: Sequence[dict[str, Any]], calibration: Calibration) -> list[Forecast]:
    """Blocks of the newest engine of each layout, and starts with kernels compiled."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        is_default = row.get("model") in MODELS and row.get("max_num_seqs") == 1024 and row.get("num_blocks")
        if is_default and not str(row.get("group", "")).startswith("super-linear"):
            kind = "start" if row["workload"] == "start" else "KV blocks"
            newest[kind, row["model"], row["layout"], str(row.get("quantization") or "none")] = row
    found = []
    for (kind, model, layout, quantization), row in newest.items():
        tp, _, pp = layout.partition("x")
        case = Case(
            model, int(tp.removeprefix("TP")), int(pp.removeprefix("PP") or 1), "", quantization=quantization,
            max_num_batched_tokens=int(row["max_num_batched_tokens"]),
        )  # fmt: skip
        report, _ = plan_of(case, calibration)
        foretold = start_of(report) if kind == "start" else float(report.chosen.num_blocks)
        stored = model if quantization == "none" else f"{model} {quantization}"
        measured = row["figure"] if kind == "start" else float(row["num_blocks"])
        found.append(Forecast(kind, stored, f"TP{case.tp_size}xPP{case.pp_size}", "", measured, foretold))
    return sorted(found, key=lambda one: (one.kind, one.model, one.layout))


def _super_linear(rows: Sequence[dict[str, Any]], calibration: Calibration) -> list[Forecast]:
    """The pair of layouts whose memory decides: blocks, and tokens a second with the blocks that are foretold."""
    pair = bench_table.read_suite("h200").super_linear
    assert pair is not None
    measured = {row["group"]: row for row in rows if str(row.get("group", "")).startswith("super-linear-")}
    share = {"gpu_memory_utilization": pair.usable_memory / DATA_SHEETS["H200"].memory_bytes}
    found = []
    for size in pair.tensor_parallel_sizes:
        if (row := measured.get(f"super-linear-TP{size}")) is None:
            continue
        case = Case(pair.model, size, 1, pair.workload)
        settings = {**pair.settings, **share}
        blocks = bench_suite.foretell_blocks(CONFIG_FOLDER / MODELS[pair.model], pair, size)
        about = (pair.model, f"TP{size}xPP1")
        where = "18.3 GB a card"
        found.append(Forecast("KV blocks", *about, where, float(row["num_blocks"]), float(blocks)))
        figure, _ = predict(case, calibration, settings=settings)
        found.append(Forecast("throughput", *about, f"{pair.workload}, {where}", row["figure"], figure))
    return found


def judge(found: Sequence[Forecast]) -> tuple[Judged, ...]:
    """How far off each kind is: in the middle, and at most."""
    kinds = []
    for kind in BOUNDS:
        of_kind = [one for one in found if one.kind == kind]
        if of_kind:
            worst = max(of_kind, key=lambda one: abs(one.off))
            middle = median(abs(one.off) for one in of_kind)
            kinds.append(Judged(kind, len(of_kind), round(middle, 3), round(worst.off, 3), worst.name))
    return tuple(kinds)


def table(found: Sequence[Forecast]) -> str:
    """In Markdown; first tokens stand beside the row that they are of."""
    ttfts = {one.name: one for one in found if one.kind == "first token"}
    lines = ["| model | layout | workload | measured | foretold | off by | TTFT p50 measured | foretold | off by |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for one in found:
        if one.kind == "first token":
            continue
        what = one.workload if one.kind in ("decode step", "throughput") else f"{one.kind} {one.workload}".rstrip()
        more = ttfts[one.name].shown() if one.name in ttfts else ("", "", "")
        measured, foretold, off = one.shown()
        cells = [one.model, one.layout, what, measured, foretold, off if one.is_near else f"**{off}**", *more]
        lines.append("| " + " | ".join(cells).rstrip() + " |")
    return "\n".join(lines)


def forecasts(calibration: Calibration, path: str | Path = RESULTS) -> list[Forecast]:
    """Of all newest rows of a file."""
    return forecast_rows(read_rows([path]), list(read_cases([path])), calibration)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=str(RESULTS))
    parser.add_argument("--calibration", help="instead of the one that ships")
    parser.add_argument("--all", action="store_true", help="those that are within their bounds as well")
    args = parser.parse_args()
    calibration = read_calibration(args.calibration) if args.calibration else default_calibration("H200")
    found = forecasts(calibration, args.results)
    print(table([one for one in found if args.all or one.kind == "first token" or not one.is_near]))
    for one in judge(found):
        print(
            f"{one.kind}: {one.rows} rows, off by {one.middle:.1%} in the middle, {one.most:+.1%} ({one.row}) at most"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
