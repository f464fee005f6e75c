"""Run the tests of all families in every layout, and write what they found beside transformers into docs/models.md.

    python benchmarks/families/make_table.py            # some minutes on two cores

The tests are `tests/workers/test_model_families.py` and `test_transformers_fallback.py`: tiny random configs, float32,
greedy, whole prompts, chunks of five, preempted and computed anew, swapped, three answers to one prompt. One rank has a
column for each of these; over several ranks a cell is the worst of the last three, which begin in chunks. A cell is the
largest difference of any logit before any token. Where a test fails nothing is written.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "workers"))
from family_cases import CASES, FALLBACKS  # noqa: E402  # after the path is set
from family_harness import FOUND, WAYS  # noqa: E402  # after the path is set

TESTS = ("tests/workers/test_model_families.py", "tests/workers/test_transformers_fallback.py")
CHOSEN = "one_rank_equals or a_layout_equals or answers_as_there or test_layouts"

PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- table: made by benchmarks/families/make_table.py -->", "<!-- end of table -->"
COLUMNS = (*WAYS, "TP2", "PP2", "TP2xPP2", "EP2", "A2A2", "A2A4")
TITLES = {
    "whole": "TP1, whole",
    "preempted": "computed anew",
    "EP2": "EP2, summed",
    "A2A2": "EP2, exchanged",
    "A2A4": "EP4, exchanged",
}


def main() -> int:
    """Measure, print, write."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="argosy-families-") as folder:
        found = measure(Path(folder))
    lines = [f"| model | {' | '.join(TITLES.get(name, name) for name in COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name in [*CASES, *FALLBACKS]:
        cells = [found.get((name, layout)) for layout in COLUMNS]
        shown = ["–" if cell is None else "differs" if cell > 1e-2 else f"{cell:.0e}" for cell in cells]
        fallback = " (transformers' modules)" if name in FALLBACKS else ""
        lines.append(f"| {name}{fallback} | {' | '.join(shown)} |")
    import transformers

    lines.append("")
    lines.append(
        f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}."
    )
    table = "\n".join(lines)
    print(table)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")
    return int(any(cell > 1e-2 for cell in found.values()))


def measure(folder: Path) -> dict[tuple[str, str], float]:
    """(case, way on one rank, or layout of several) -> the largest difference that its test found."""
    started, notes = time.perf_counter(), folder / "found.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", CHOSEN]
    subprocess.run(command, cwd=ROOT, env={**os.environ, FOUND: str(notes)}, check=True)
    found: dict[tuple[str, str], float] = {}
    for line in notes.read_text(encoding="utf-8").splitlines():
        name, column, difference = json.loads(line)
        found[name, column] = max(found.get((name, column), 0.0), difference)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
