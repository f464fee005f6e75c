"""What is written for people leads somewhere, and says what the results say."""

import importlib
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from argosy.deploy import bench_table

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
)


@pytest.fixture
def front_page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("front_page")


def test_tables_of_figures_are_those_of_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python benchmarks/make_tables.py` writes them. Forecasts are left out: each change of the planner moves some."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    make_tables = importlib.import_module("make_tables")
    told = "".join(page.read_text(encoding="utf-8") for page in make_tables.PAGES)
    old = [
        name
        for name in ("ratios", "h200", "limits", "doors", "idle", "made", "tests")
        if f"<!-- table: {name} -->\n\n{make_tables.TABLES[name]()}\n\n<!-- end -->" not in told
    ]
    assert old == []
    assert make_tables.PICTURE.read_text(encoding="utf-8") == make_tables.picture()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_what_the_environment_switches_is_on_a_page() -> None:
    """A switch that only its maker knows helps nobody; the rank that costs nothing is for tests."""
    rooms = [
        path
        for room in ("cluster", "placement", "kernels", "workers", "deploy")
        for path in ROOT.glob(f"{room}/**/*.py")
    ]
    found = {
        name
        for path in rooms
        if path.name != "zero_cost_rank.py"
        for name in re.findall(r"\bARGOSY_[A-Z_]+\b", path.read_text(encoding="utf-8"))
    }
    told = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    assert len(found) > 3
    assert sorted(name for name in found if name not in told) == []


def test_what_is_slower_is_said_on_the_front_page(front_page: ModuleType) -> None:
    """Two rows slower, one of which was faster before; one faster, that reaches its goal; a start, counted apart."""
    suite = bench_table.read_suite("h200")
    units = {"decode1": "ms/step", "decode64": "ms/step", "chat1000": "output tokens/s", "start": "s"}
    figures = [("decode1", 0.5), ("decode1", 2.0), ("decode64", 1.0), ("chat1000", 100.0), ("start", 6.7)]
    rows = [
        {"group": "06b-bf16-TP1", "workload": name, "figure": figure, "unit": units[name]} for name, figure in figures
    ]
    table = front_page.ratios_table(rows, suite)
    assert "| Qwen3 0.6B, 1 card | 0.81 |  | 2.36 |  |  | 0.00 |" in table
    assert (
        "Of 4 rows measured 2 are slower than vLLM's: 0.00 to 2.36 times as fast (starts 10.0 times and more)" in table
    )
    assert "2 reach the goals" in table
    assert front_page.picture(rows, suite).count("times</text>") == 3  # nothing bounds a start


def test_a_decision_has_a_number_of_its_own() -> None:
    """Two people append at the same time, and "see 671" means either."""
    numbers = re.findall(r"^## (\d+)\.", (ROOT / "DECISIONS.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(numbers) > 100
    assert [number for number in dict.fromkeys(numbers) if numbers.count(number) > 1] == []
