"""What `argosy simulate` foretells of a layout, and of whole layouts of a cluster beside what was measured.

    python benchmarks/planner/compare_layouts.py --predict 8b:2x2:fixed512x256     that nobody has measured yet
    python benchmarks/planner/compare_layouts.py --layouts benchmarks/results/layouts_h200.jsonl

The second compares replicas side by side, as `measure_topologies.py` writes them. Every measured row of one replica
stands beside its forecast in `forecast_rows.py`, which takes both from here; of each kind the newest row counts.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy.simulate_command import simulate
from argosy.deploy.simulate_report import Slo, make_report
from argosy.deploy.simulate_workload import named
from argosy.deploy.workload import WORKLOADS
from argosy.placement.calibration import Calibration, default_calibration, read_calibration
from argosy.placement.layout import Traffic
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan_report import PlanOptions, PlanReport
from argosy.placement.planner import plan_cluster
from argosy.placement.rank_memory import Serving
from argosy.placement.topology_sources import parse_topology
from argosy.placement.weight_format import format_by_name

MODELS = {"06b": "qwen3-0.6b", "8b": "llama-3.1-8b", "70b": "llama-3.1-70b"}
SETTINGS = {"max_num_batched_tokens": 8192, "max_model_len": 4096}  # of bench_gpu.py


class Case(msgspec.Struct, frozen=True):
    """One measured figure; TTFT in seconds, tokens a second or seconds a step in `figure`."""

    model: str
    tp_size: int
    pp_size: int
    workload: str
    figure: float = 0.0
    ttft: float = 0.0
    quantization: str = "none"
    max_num_seqs: int = 1024  # what the card decides
    max_num_batched_tokens: int = 8192


def read_rows(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """All lines of these files that measured a default, the oldest first: without those that carry a note."""
    rows = [json.loads(line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return sorted((row for row in rows if not row.get("note")), key=lambda row: str(row.get("time", "")))


def read_cases(paths: Sequence[str | Path]) -> Iterator[Case]:
    """The newest row of each kind, without experiments and what ran in a part of the card's memory."""
    newest: dict[tuple[str, ...], Case] = {}
    for raw in read_rows(paths):
        is_known = raw.get("model") in MODELS and raw.get("workload") in (*WORKLOADS, "decode256")
        if not is_known or str(raw.get("group", "")).startswith("super-linear"):
            continue
        tp, _, pp = str(raw["layout"]).partition("x")
        scale = 1e-3 if raw["unit"] == "ms/step" else 1.0
        case = Case(
            raw["model"], int(tp.removeprefix("TP")), int(pp.removeprefix("PP") or 1), raw["workload"],
            raw["figure"] * scale, raw["ttft_ms_p50"] / 1e3, str(raw.get("quantization") or "none"),
            int(raw.get("max_num_seqs") or 1024), int(raw.get("max_num_batched_tokens") or 8192),
        )  # fmt: skip
        key = (case.model, raw["layout"], case.workload, case.quantization)
        newest.pop(key, None)
        newest[key] = case
    yield from newest.values()


def plan_of(
    case: Case, calibration: Calibration, gpu: str = "H200", settings: Mapping[str, object] | None = None
) -> tuple[PlanReport, ServingConfig]:
    """The plan of that layout, and the settings that it was made for; `settings` instead of the row's."""
    shape = read_model_shape(MODELS[case.model])
    steps = {"max_num_seqs": case.max_num_seqs, "max_num_batched_tokens": case.max_num_batched_tokens}
    config = ServingConfig.from_mapping({**SETTINGS, "model": shape.name, **steps, **(settings or {})})
    serving = Serving.from_config(config, shape, format_by_name(case.quantization))
    topology = parse_topology({"nodes": [{"name": "node", "gpus": f"{case.tp_size * case.pp_size} x {gpu}"}]})
    options = PlanOptions(
        tp_size=case.tp_size, pp_size=case.pp_size, num_replicas=1, calibration=calibration, traffic=Traffic()
    )
    return plan_cluster(shape, topology, options, serving), config


def predict(
    case: Case, calibration: Calibration, gpu: str = "H200", settings: Mapping[str, object] | None = None
) -> tuple[float, float]:
    """(tokens a second or seconds a step, median seconds to the first token) of one replica."""
    report, config = plan_of(case, calibration, gpu, settings)
    name = case.workload
    arrivals = list(named(name)) if name in WORKLOADS else [msgspec.structs.replace(one) for one in _decode(name)]
    cluster = simulate(report, config, arrivals, 10.0)
    figures = make_report(
        cluster, slo=Slo(), request_seconds=calibration.request_us * 1e-6, num_gpus=report.chosen.num_gpus
    )
    ttft = figures["ttft_seconds"]["p50"]
    if name.startswith("decode"):
        return figures["tpot_seconds"]["p50"], ttft
    return figures["output_tokens_per_second"], ttft


def topologies_table(path: str | Path, calibration: Calibration, gpu: str) -> str:
    """What the planner took on each topology beside its rivals: measured, foretold, and the share of the best."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    taken: dict[tuple[str, ...], str] = {}  # by the planner, when it was asked last
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        layout = f"{row['replicas']} x TP{row['tp']} x PP{row['pp']}"
        place = (row["topology"], row["model"], row["workload"])
        newest[(*place, layout)] = row
        if row["asked"] == "auto":
            taken[place] = layout
    lines = ["| nodes x cards | model, workload | layout | measured | of the best | foretold | off by | TTFT p50 "
             "| foretold | off by |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for key, row in sorted(newest.items()):
        best = max(other["figure"] for place, other in newest.items() if place[:3] == key[:3])
        case = Case(row["model"], row["tp"], row["pp"], row["workload"], max_num_seqs=row["max_num_seqs"])
        figure, ttft = predict(case, calibration, gpu)
        figure, seen = figure * row["replicas"], row["ttft_ms_p50"] / 1e3
        chosen = " (planned)" if taken.get(key[:3]) == key[3] else ""
        lines.append(
            f"| {key[0]} | {key[1]} {key[2]} | {key[3]}{chosen} | {row['figure']:,.0f} tok/s | "
            f"{row['figure'] / best:.0%} | {figure:,.0f} tok/s | {figure / row['figure'] - 1:+.1%} | "
            f"{1e3 * seen:,.0f} ms | {1e3 * ttft:,.0f} ms | {ttft / seen - 1:+.1%} |"
        )
    return "\n".join(lines)


def _decode(name: str):  # type: ignore[no-untyped-def]  # arrivals
    from argosy.cluster.simulated_cluster import Arrival

    return [Arrival(0.0, 128, 256) for _ in range(int(name.removeprefix("decode")))]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H200", help="that the rows were measured on")
    parser.add_argument("--calibration", help="instead of the one that ships")
    parser.add_argument("--predict", nargs="+", metavar="MODEL:TPxPP:WORKLOAD", help="such as 8b:2x2:fixed512x256")
    parser.add_argument("--layouts", metavar="FILE", help="rows of measure_topologies.py, such as layouts_h200.jsonl")
    args = parser.parse_args()
    calibration = read_calibration(args.calibration) if args.calibration else default_calibration(args.gpu)
    if args.layouts:
        print(topologies_table(args.layouts, calibration, args.gpu))
        return 0
    if args.predict:
        for text in args.predict:
            model, layout, workload = text.split(":")
            tp, pp = map(int, layout.split("x"))
            figure, ttft = predict(Case(model, tp, pp, workload), calibration, args.gpu)
            shown = f"{1e3 * figure:.3f} ms/step" if workload.startswith("decode") else f"{figure:,.0f} tokens/s"
            print(f"{text:28} {shown:>18}   first token p50 {1e3 * ttft:,.0f} ms", flush=True)
        return 0
    parser.error("say what: --predict or --layouts; forecast_rows.py shows every row of one replica")


if __name__ == "__main__":
    raise SystemExit(main())
