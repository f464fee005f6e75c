"""Measured rows beside forecasts: the newest count, what is too far off is said, the calibration keeps the worst."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import BENCHMARKS, load_script

from argosy.placement.calibration import Judged, default_calibration


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which imports those beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "planner"))
    for name in ("compare_layouts", "compare_memory"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module: ModuleType = load_script("planner/forecast_rows.py")
    return module


def line(time: str, figure: float, workload: str = "decode1", **more: Any) -> str:
    """As `argosy bench` writes it."""
    unit = {"decode1": "ms/step", "start": "s"}.get(workload, "output tokens/s")
    return json.dumps(
        {"model": "8b", "layout": "TP2", "workload": workload, "unit": unit, "figure": figure, "time": time,
         "ttft_ms_p50": 6.0, "max_num_seqs": 1024, "max_num_batched_tokens": 8192, "num_blocks": 120_000,
         "group": "8b-bf16-TP2", "quantization": None, **more}
    )  # fmt: skip


def test_the_newest_row_of_each_kind_counts_wherever_it_stands(rows: ModuleType, tmp_path: Path) -> None:
    """Two files, in any order; experiments carry a note and are left out, other machines' settings are no defaults."""
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(line("2026-11-21T20:00:00Z", 2.4) + "\n" + line("2026-11-21T23:00:00Z", 1.0, note="tried") + "\n")
    new.write_text(line("2026-11-21T05:00:00Z", 2.9) + "\n" + line("2026-11-21T21:00:00Z", 16.0, "start") + "\n")
    found = rows.forecast_rows(
        rows.read_rows([new, old]), list(rows.read_cases([new, old])), default_calibration("H200")
    )
    measured = {one.kind: one.measured for one in found}
    assert measured == {"decode step": 2.4e-3, "first token": 6e-3, "KV blocks": 120_000.0, "start": 16.0}
    (step,) = (one for one in found if one.kind == "decode step")
    assert step.name == "8b TP2xPP1 decode1"
    assert 2.1e-3 < step.foretold < 2.5e-3
    (blocks,) = (one for one in found if one.kind == "KV blocks")
    assert blocks.foretold == pytest.approx(120_000, rel=0.02)


def test_what_is_too_far_off_stands_in_bold_and_the_worst_is_kept(rows: ModuleType) -> None:
    """5 % is too far for a step and not for a throughput; first tokens stand beside their row, without a bound."""
    forecast = rows.Forecast
    found = [
        forecast("decode step", "8b", "TP1xPP1", "decode1", 4e-3, 4.24e-3),
        forecast("first token", "8b", "TP1xPP1", "decode1", 7e-3, 14e-3),
        forecast("decode step", "8b", "TP1xPP1", "decode8", 4e-3, 3.9e-3),
        forecast("throughput", "8b", "TP1xPP1", "chat1000", 12_000.0, 12_720.0),
        forecast("start", "8b", "TP1xPP1", "", 7.0, 5.6),
    ]
    lines = rows.table(found).splitlines()[2:]
    assert lines[0] == "| 8b | TP1xPP1 | decode1 | 4.000 ms | 4.240 ms | **+6.0%** | 7 ms | 14 ms | +100.0% |"
    assert "-2.5%" in lines[1]
    assert "+6.0%" in lines[2]
    assert "**" not in lines[1] + lines[2]
    assert lines[3].startswith("| 8b | TP1xPP1 | start | 7.00 s | 5.60 s | **-20.0%** |")
    assert rows.judge(found) == (
        Judged("decode step", 2, 0.042, 0.06, "8b TP1xPP1 decode1"),
        Judged("throughput", 1, 0.06, 0.06, "8b TP1xPP1 chat1000"),
        Judged("start", 1, 0.2, -0.2, "8b TP1xPP1"),
        Judged("first token", 1, 1.0, 1.0, "8b TP1xPP1 decode1"),
    )


def test_the_ledger_of_a_start_stands_beside_the_plan(rows: ModuleType) -> None:
    """70B over two cards as it started: context, libraries and group within 2 %, weights and blocks within 0.3."""
    del rows  # it prepared the path of scripts
    path = BENCHMARKS / "results" / "engine_h200.jsonl"
    table = load_script("planner/compare_memory.py").ledgers_table(path, default_calibration("H200"))
    (first, *_) = (cells for cells in table.splitlines() if cells.startswith("| 70b TP2"))
    pairs = [
        tuple(float(mb.replace(",", "")) for mb in cell.split(" / ")) for cell in first.strip("| ").split(" | ")[2:]
    ]
    for (measured, planned), bound in zip(pairs, (0.02, 0.002, 0.003), strict=False):
        assert planned == pytest.approx(measured, rel=bound)
    held, most = pairs[3]
    assert held < most, "steps never hold more than was planned"
    free, left = pairs[4]
    assert free > left
