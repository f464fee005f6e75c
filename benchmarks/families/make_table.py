"""Compare every family in every layout with transformers and write what was found into docs/models.md.

    python benchmarks/families/make_table.py            # some minutes on two cores

The cases and the comparison are those of `tests/workers/test_model_families.py`: tiny random configs, float32, greedy,
whole prompts, chunks of five, preempted and computed anew, swapped, three answers to one prompt. One rank has a column
for each of these; over several ranks a cell is the worst of the last three, which begin in chunks. A cell is the
largest difference of any logit before any token; a token that differs makes it "differs".
"""

import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "workers"))
from family_cases import CASES, FALLBACKS, WHOLE_ONLY, make_checkpoint, num_layers_of  # noqa: E402
from family_harness import CPU, LAYOUTS, WAYS, Harness, run_layouts  # noqa: E402

from argosy.placement.plan import make_plan  # noqa: E402
from argosy.placement.process_groups import init_parallel  # noqa: E402

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
    """(case, way on one rank, or layout of several) -> the largest difference."""
    started = time.perf_counter()
    found: dict[tuple[str, str], float] = {}
    models: dict[str, list[tuple[str, str, int, int | None]]] = {layout: [] for layout in LAYOUTS}
    for number, name in enumerate([*CASES, *FALLBACKS]):
        path = folder / str(number)
        expected = make_checkpoint(path, name)
        case, layers = (CASES | FALLBACKS)[name], num_layers_of(name)
        rank = make_plan(layers, 1, 1).ranks[0]
        harness = Harness(path, rank, init_parallel(rank, "", CPU, 1.0), max_model_len=case.max_model_len)
        found |= {(name, way): harness.largest_difference(expected, way) for way in WAYS}
        for layout in ("TP2",) if name in WHOLE_ONLY else ("TP2", "PP2", "TP2xPP2"):
            models[layout].append((name, str(path), layers, case.max_model_len))
        for layout in ("EP2", "A2A2", "A2A4") if harness.spec.moe is not None else ():
            models[layout].append((name, str(path), layers, case.max_model_len))
    print(f"one rank: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    for rank_found in run_layouts(models, folder, deadline_seconds=900.0):
        for key, difference in rank_found.items():
            name, layout, _ = key.split("|")
            found[name, layout] = max(found.get((name, layout), 0.0), difference)
    print(f"all: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
