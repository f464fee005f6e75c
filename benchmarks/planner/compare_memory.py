"""Blocks and bytes that `argosy plan` foretells beside what ranks had, start by start.

    python benchmarks/planner/compare_memory.py benchmarks/results/memory_h200.jsonl [--parts]

Rows are those of `measure_memory.py`, and of engines that took what was planned where they could ("promised": from rows
of `argosy bench`, blocks alone); of each case the newest counts. `--parts` shows for each rank, in MB, what was
measured and foretold of its context, libraries and communication ("outside"), of the largest step, and of graphs.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argosy.cluster.protocol.config import ServingConfig
from argosy.placement.calibration import Calibration, default_calibration, read_calibration
from argosy.placement.data_sheets import find_data_sheet
from argosy.placement.model_sources import read_model_shape
from argosy.placement.rank_memory import RankMemory, Serving, StageBytes, rank_memory
from argosy.placement.topology import Gpu
from argosy.placement.weight_format import format_by_name

MODELS = {"06b": "qwen3-0.6b", "8b": "llama-3.1-8b", "70b": "llama-3.1-70b"}
Row = dict[str, Any]


def read_cases(path: str | Path) -> list[list[Row]]:
    """For each case of known models its ranks, in order."""
    newest: dict[tuple[object, ...], dict[int, Row]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["model"] in MODELS:
            names = ("model", "tp_size", "pp_size", "tokens", "max_rows", "share", "quantization", "max_model_len",
                     "promised")  # fmt: skip
            newest.setdefault(tuple(row.get(name) for name in names), {})[row["rank"]] = row
    return [[ranks[rank] for rank in sorted(ranks)] for ranks in newest.values()]


def foretell(row: Row, calibration: Calibration) -> RankMemory:
    """The plan's ledger of that rank."""
    shape = read_model_shape(MODELS[row["model"]])
    config = ServingConfig.from_mapping(
        {
            "model": shape.name, "max_num_seqs": row["max_rows"], "max_num_batched_tokens": row["tokens"],
            "max_model_len": row["max_model_len"], "gpu_memory_utilization": row["share"], "dtype": "bfloat16",
            "max_cuda_graph_batch": row["max_rows"],
        }
    )  # fmt: skip
    sizes = StageBytes(shape, Serving.from_config(config, shape, format_by_name(row["quantization"] or "none")))
    sheet = find_data_sheet(row["gpu"])
    assert sheet is not None
    first, last = row["layers"]
    gpu = Gpu(index=0, model=sheet.name, memory_bytes=sheet.memory_bytes)
    return rank_memory(
        sizes, calibration, gpu, tp_size=row["tp"], pp_size=row["pp"], first_layer=first, last_layer=last
    )


def blocks_table(cases: Sequence[Sequence[Row]], calibration: Calibration) -> str:
    """Foretold and allocated, a line a case."""
    lines = [
        "| model | layout | tokens, rows a step | share of the card | blocks foretold | allocated | off by | rank |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for ranks in cases:
        row = ranks[0]
        foretold = min(foretell(rank, calibration).num_blocks for rank in ranks)
        stored = f" {row['quantization']}" if row["quantization"] else ""
        lines.append(
            f"| {row['model']}{stored} | TP{row['tp_size']}xPP{row['pp_size']} | {row['tokens']}, {row['max_rows']} | "
            f"{row['share']:.4g} | {foretold:,} | {row['blocks']:,} | {foretold / row['blocks'] - 1:+.3%} | "
            f"{'takes the plan' if row.get('promised') else 'measures'} |"
        )
    return "\n".join(lines)


def parts_table(cases: Sequence[Sequence[Row]], calibration: Calibration) -> str:
    """Megabytes of each part, measured / foretold."""
    lines = ["| case | rank | outside | buffers | weights | steps | of which | graphs | room |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for ranks in cases:
        for row in (row for row in ranks if "measured" in row):
            planned = foretell(row, calibration)
            ledger = row["measured"]
            outside = sum(ledger.get(name, 0) for name in ("context", "groups", "workspace"))
            case = (
                f"{row['model']} {row['quantization'] or ''} {row['tp']}x{row['pp']} {row['tokens']}:{row['max_rows']}"
            )
            taken = (ledger["weights"], planned.weight_bytes)
            steps = (row["activation_bytes"] + row["graph_bytes"], planned.activation_bytes)
            room = (row["room_bytes"], planned.kv_budget_bytes)
            around = (outside, planned.workspace_bytes)
            pairs = [f"{_mb(first)} / {_mb(second)}" for first, second in (around, taken, steps, room)]
            peaks = " ".join(_mb(peak) for peak in row["peaks"])
            sort = f"{case} {row['tokens']}:{row['max_rows']} {row['share']:.3g}"
            buffers, graphs = _mb(ledger.get("buffers", 0)), _mb(row["graph_bytes"])
            cells = [sort, str(row["rank"]), pairs[0], buffers, pairs[1], pairs[2], peaks, graphs, pairs[3]]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ledgers_table(path: str | Path, calibration: Calibration) -> str:
    """Megabytes on each rank of whole starts (rows of `argosy bench --workload start`), measured / foretold.

    Of a step's the plan counts the most that it may need, the ledger what is held when the engine is ready.
    """
    newest: dict[tuple[str, ...], Row] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["workload"] == "start" and row["model"] in MODELS and not row.get("note"):
            newest[row["model"], row["layout"], str(row["quantization"])] = row
    lines = ["| start | rank | context, libraries, group | weights | blocks | steps: held / at most | free / left |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in newest.values():
        tp, _, pp = str(row["layout"]).partition("x")
        if pp:
            continue
        shape = read_model_shape(MODELS[row["model"]])
        for rank, one in enumerate(row["ranks"]):
            about = {"max_rows": row["max_num_seqs"], "tokens": row["max_num_batched_tokens"], "max_model_len": 4096,
                     "share": 0.92, "layers": (0, shape.num_layers), "tp": int(tp.removeprefix("TP")), "pp": 1,
                     "gpu": row["gpus"][0]}  # fmt: skip
            planned, ledger = foretell({**row, **about}, calibration), one["ledger"]
            outside = sum(ledger[name] for name in ("context", "groups", "workspace"))
            steps = sum(ledger[name] for name in ("graphs", "activations", "buffers"))
            pairs = [
                (outside, planned.workspace_bytes), (ledger["weights"], planned.weight_bytes),
                (ledger["kv"], planned.kv_bytes), (steps, planned.activation_bytes),
                (ledger["free"], ledger["total"] - planned.limit_bytes),
            ]  # fmt: skip
            cells = [f"{row['model']} {row['layout']}, {row['time'][:10]}", str(rank)]
            lines.append("| " + " | ".join([*cells, *(f"{_mb(a)} / {_mb(b)}" for a, b in pairs)]) + " |")
    return "\n".join(lines)


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f}"


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--calibration", help="instead of the one that ships")
    parser.add_argument("--parts", action="store_true")
    args = parser.parse_args()
    calibration = read_calibration(args.calibration) if args.calibration else default_calibration(args.gpu)
    cases = read_cases(args.results)
    print(blocks_table(cases, calibration))
    if args.parts:
        print("\n" + parts_table(cases, calibration))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
