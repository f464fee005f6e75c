"""Write the table of weight formats into docs/quantization.md, from what was measured.

    python benchmarks/quality/method_table.py            rewrite the table
    python benchmarks/quality/method_table.py --check    only say whether it is that of the results

Speed and memory: `benchmarks/gpu/compare_methods.py` (results/methods_h200.jsonl); FP8 up to 64 rows, whose kernels
are newer than these rows, as `argosy bench` measured whole engines (results/engine_h200.jsonl). Quality:
`compare_precision.py` on the default model, for GPTQ and AWQ with the checkpoints of `write_quantized.py`
(results/precision.jsonl). The latest row of each counts; what was not measured is left empty.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS, RESULTS = ROOT / "docs" / "quantization.md", ROOT / "benchmarks" / "results"
START, END = "<!-- methods: written by benchmarks/quality/method_table.py -->", "<!-- methods end -->"
BATCHES = (1, 8, 64, 256)
FORMATS = {  # (as compare_methods calls it, as compare_precision does) -> how the table says it
    ("bf16", ""): "bf16",
    ("fp8", "fp8, weights and inputs"): "`fp8`",
    ("int8", "int8, weights only"): "`int8` (groups of 128)",
    ("int4", "int4, weights only"): "`int4` (groups of 128)",
    ("gptq, act-order", "gptq"): "GPTQ, act-order",
    ("awq", "awq"): "AWQ",
}
Row = dict[str, Any]


def read(name: str) -> list[Row]:
    """The rows of a results file; none where it does not exist."""
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def engine_rows(rows: list[Row]) -> list[Row]:
    """Decode steps of 8b in FP8 beside those in 16 bits, of engines whose rows all had their prompts before."""
    newest: dict[tuple[str, int], float] = {}
    for row in sorted(rows, key=lambda row: str(row.get("time", ""))):
        is_ours = (row.get("model"), row.get("layout"), row.get("unit")) == ("8b", "TP1", "ms/step")
        if is_ours and not row.get("note"):
            newest[str(row.get("quantization")), int(row["workload"].removeprefix("decode"))] = row["figure"]
    return [
        {"format": "fp8", "batch": batch, "step_ms": step, "times_faster": newest["None", batch] / step}
        for (quantization, batch), step in newest.items()
        if quantization == "fp8" and batch <= 64 and ("None", batch) in newest
    ]


def table(speeds: list[Row], qualities: list[Row]) -> str:
    """The lines of the table."""
    speed = {(row["format"], row["batch"]): row for row in speeds}
    quality = {row["variant"]: row for row in qualities if row["model"] == "default_model"}
    lines = [
        "| | weights | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " | KL (nats) | top-1 the same |",
        "|---|" + "---|" * (len(BATCHES) + 3),
    ]
    for (fast, fine), title in FORMATS.items():
        rows = [speed.get((fast, batch)) for batch in BATCHES]
        known = next((row for row in rows if row and "memory" in row), None)
        cells = [f"{known['memory']:.2f}" if known else ""]
        cells += [f"{row['times_faster']:.2f} ({row['step_ms']:.2f} ms)" if row else "" for row in rows]
        seen = quality.get(fine)
        cells += [f"{seen['kl_mean']:.4f}", f"{seen['top1']:.1%}"] if seen else ["", ""]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is an old one")
    args = parser.parse_args()
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    assert after, f"{DOCS} lacks its marks"
    speeds = [*read("methods_h200.jsonl"), *engine_rows(read("engine_h200.jsonl"))]
    lines = table(speeds, read("precision.jsonl"))
    made = f"{before}{START}\n{lines}\n{END}{after}"
    if args.check:
        print("the table is that of the results" if made == text else "the table is an old one")
        return int(made != text)
    DOCS.write_text(made, encoding="utf-8")
    print(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
