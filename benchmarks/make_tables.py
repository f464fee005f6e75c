"""Writes the tables of both READMEs and the picture docs/h200.svg anew from the JSON lines in benchmarks/results.

    python benchmarks/make_tables.py            rewrites what stands between the marks `table: NAME` and `end`
    python benchmarks/make_tables.py --check    changes nothing; exit code 1 when a page is out of date

The newest line of each row counts; the suite leaves out lines with a note: they tried what is not the default.
Figures of a GPU are taken from lines that name that GPU.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import front_page  # beside this script, as is the next
import limits

from argosy.deploy import bench_suite, bench_table
from argosy.placement.calibration import default_calibration
from argosy.placement.model_sources import CONFIG_FOLDER as MODEL_CONFIGS

HERE = Path(__file__).resolve().parent
PAGES = (HERE / "README.md", HERE.parent / "README.md")
PICTURE = HERE.parent / "docs" / "h200.svg"
PROFILED_CONTEXT = 458  # tokens of rows that do not say it: prompts of 128, steps 300 to 360
Row = dict[str, Any]


def rows_of(device: str) -> list[Row]:
    """All lines that were measured on that GPU."""
    rows = bench_table.read_rows(sorted((HERE / "results").glob("*.jsonl")))
    return [row for row in rows if any(device in gpu for gpu in row.get("gpus") or ())]


def suite_rows(name: str) -> tuple[bench_table.Suite, list[Row]]:
    """A suite, and all lines of its device that measured the default in process."""
    suite = bench_table.read_suite(name)
    return suite, [row for row in rows_of(suite.device) if not row.get("note") and not row.get("url")]


def suite_table(name: str) -> str:
    """The suite's rows with ours, then the pair of layouts whose memory decides."""
    suite, rows = suite_rows(name)
    text = bench_table.markdown(rows, suite)
    pairs = [row for row in rows if row["workload"] == bench_suite.SUPER_LINEAR]
    if pairs and suite.super_linear is not None:
        pair = {**pairs[-1], **bench_suite.foretold_pair(MODEL_CONFIGS / "llama-3.1-8b", suite.super_linear)}
        text += "\n\n```text\n" + bench_suite.describe_super_linear(pair, suite.super_linear) + "\n```"
    return text


def limits_table() -> str:
    """How far the suite's rows and their goals are from what the card can do at most."""
    suite, rows = suite_rows("h200")
    newest = {(row["group"], row["workload"]): row for row in rows}
    lines = [
        "| model, layout | workload | the card's limit | argosy | of it | goal | of it |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in suite.groups:
        for name, (_, goal) in group.rows.items():
            best, row = limits.limit(group, name), newest.get((group.name, name))
            if best is None or row is None or goal is None:
                continue
            figures = (row["figure"], goal)
            shares = [
                best / figure if row["unit"] in bench_table.LOWER_IS_BETTER else figure / best for figure in figures
            ]
            digits = ",.3f" if row["unit"] == "ms/step" else ",.0f"
            cells = [group.name, name, f"{best:{digits}} {row['unit']}", f"{figures[0]:{digits}}", f"{shares[0]:.0%}"]
            lines.append("| " + " | ".join([*cells, f"{goal:,g}", f"{shares[1]:.0%}"]) + " |")
    return "\n".join(lines)


def doors_table() -> str:
    """What the HTTP doors cost: the newest line of each model, layout and number of clients."""
    newest = {
        (row["group"], row["workload"]): row for row in rows_of("NVIDIA") if str(row["workload"]).startswith("http x")
    }
    lines = ["| model, layout | clients | TTFT p50 in process, ms | over HTTP | more | throughput, share |"]
    lines.append("|---|---|---|---|---|---|")
    for (group, workload), row in newest.items():
        cells = [group, workload.removeprefix("http x"), f"{row['ttft_ms_p50_in_process']:.1f}"]
        cells += [f"{row['ttft_ms_p50']:.1f}", f"{row['ttft_ms_more']:+.1f}", f"{row['figure']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def profiles() -> dict[tuple[str, str, int], Row]:
    """Decode steps of a first rank from the device's clock: the newest line of each model, layout and batch."""
    newest: dict[tuple[str, str, int], Row] = {}
    path = HERE / "results" / "idle_h200.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        if row["rank"] == 0:
            newest[row["model"], row["layout"], row["batch"]] = row
    return dict(sorted(newest.items()))


def idle_table() -> str:
    """How long the card waits between decode steps."""
    newest = profiles()
    lines = ["| model, layout | rows | step, ms | idle between steps | us | idle within steps | kernels |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (model, layout, batch), row in newest.items():
        cells = [
            f"{model} {layout}",
            str(batch),
            f"{row['step_ms_unprofiled']:.3f}",
            f"{row['idle_between_steps']:.1%}",
        ]
        cells += [
            f"{row['idle_between_steps_us']:.1f}",
            f"{row['idle_within_steps']:.1%}",
            f"{row['kernels_a_step']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def made_table() -> str:
    """What decode steps are made of, beside the least that products and attention can take."""
    lines = ["| model, layout | rows | step, us | products | at least | attention | at least | sums | other | idle |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for (model, layout, batch), row in profiles().items():
        made = row.get("made_of_us")
        if made is None or not layout.endswith("PP1"):
            continue
        name, _, quantization = model.partition(" ")
        context = row.get("context", PROFILED_CONTEXT)
        seconds = limits.step_seconds(limits.costs_of(name, quantization == "fp8"), batch, context)
        products, attention = (1e6 * part / int(layout[2 : layout.index("x")]) for part in seconds)
        cells = [f"{model} {layout}", str(batch), f"{row['step_us']:,.0f}", f"{made.get('products', 0.0):,.0f}"]
        cells += [f"{products:,.0f}", f"{made.get('attention', 0.0):,.0f}", f"{attention:,.0f}"]
        cells += [f"{made.get(kind, 0.0):,.0f}" for kind in ("sums", "other", "idle")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def layouts_table() -> str:
    """Whole layouts of four cards under Ray, replicas side by side, beside what the planner foretells."""
    sys.path.insert(0, str(HERE / "planner"))
    from compare_layouts import topologies_table  # a script beside this one

    path = HERE / "results" / "layouts_h200.jsonl"
    return topologies_table(path, default_calibration("H200"), "H200") if path.exists() else ""


def forecasts_table() -> str:
    """What the planner foretells of every row that was measured."""
    sys.path.insert(0, str(HERE / "planner"))
    import forecast_rows  # a script beside this one

    return forecast_rows.table(forecast_rows.forecasts(default_calibration("H200")))


def ledgers_table() -> str:
    """Where the bytes of whole starts went, beside the plan's."""
    sys.path.insert(0, str(HERE / "planner"))
    from compare_memory import ledgers_table as table  # a script beside this one

    return table(HERE / "results" / "engine_h200.jsonl", default_calibration("H200"))


def memory_table() -> str:
    """Blocks of whole starts beside those of `argosy plan`."""
    sys.path.insert(0, str(HERE / "planner"))
    from compare_memory import blocks_table, read_cases  # a script beside this one

    path = HERE / "results" / "memory_h200.jsonl"
    return blocks_table(read_cases(path), default_calibration("H200")) if path.exists() else ""


def ratios_table() -> str:
    """The front page's."""
    suite, rows = suite_rows("h200")
    return front_page.ratios_table(rows, suite)


def picture() -> str:
    """All rows beside vLLM's."""
    suite, rows = suite_rows("h200")
    return front_page.picture(rows, suite)


def tests_table() -> str:
    """The tests with the marker gpu as `gpu/run_tests.py` found them: by folder, and files where not all went well."""
    path = HERE / "results" / "gpu_tests_h200.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    verdicts = ("passed", "failed", "skipped", "not_run")
    sums: dict[str, Counter[str]] = {}
    dates: dict[str, str] = {}
    for row in rows:
        file = row["test"].split("::")[0]
        for name in (file, file.rpartition("/")[0], "all"):
            sums.setdefault(name, Counter()).update({verdict: row[verdict] for verdict in verdicts})
            dates[name] = max(row["date"], dates.get(name, ""))
    lines = ["| tests on cards | passed | failed | skipped | not run | last run |", "|---|---|---|---|---|---|"]
    for name, found in sorted(sums.items(), key=lambda item: (item[0] == "all", item[0])):
        if not name.endswith(".py") or found["failed"] or found["not_run"]:
            cells = [
                f"`{name}`" if "/" in name else name,
                *(f"{found[verdict]:,}" for verdict in verdicts),
                dates[name],
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "ratios": ratios_table,
    "h200": lambda: suite_table("h200"),
    "limits": limits_table,
    "doors": doors_table,
    "idle": idle_table,
    "made": made_table,
    "layouts": layouts_table,
    "forecasts": forecasts_table,
    "memory": memory_table,
    "ledgers": ledgers_table,
    "tests": tests_table,
}


def fill(page: str) -> str:
    """The page with each table in its place. Raises `KeyError` for a mark that no table has."""

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{TABLES[found[2]]()}\n\n{found[3]}"

    return re.sub(r"(<!-- table: (\w+) -->).*?(<!-- end -->)", table, page, flags=re.DOTALL)


def main() -> int:
    """Fill or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    made = {path: fill(path.read_text(encoding="utf-8")) for path in PAGES} | {PICTURE: picture()}
    if args.check:
        return int(any(not path.exists() or path.read_text(encoding="utf-8") != text for path, text in made.items()))
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
