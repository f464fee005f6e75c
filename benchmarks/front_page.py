"""What the front page says of vLLM: some rows of the suite as ratios, how many there are, all rows as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import limits  # beside this script

from argosy.deploy import bench_table

COLUMNS = {
    "one request": ("decode1",),
    "8": ("decode8",),
    "64": ("decode64",),
    "256 at once": ("decode256",),
    "batch of prompts": ("fixed512x256", "fixed256x128"),
    "chat": ("chat1000",),
}
# the picture, in pixels
NAME_WIDTH, BAR_WIDTH, FIGURE_WIDTH, BAR, ROW, GROUP_GAP, TOP, MARGIN = 198, 480, 84, 7, 19, 10, 68, 8
OURS, THEIRS, QUIET, INK = "#1f6feb", "#9aa4ae", "#d0d7de", "#57606a"
MODELS = {"06b": "Qwen3 0.6B", "8b": "Llama 3.1 8B", "70b": "Llama 3.1 70B"}
Row = Mapping[str, Any]


class Place(NamedTuple):
    """A row of the suite that was measured."""

    group: bench_table.Group
    workload: str
    row: Row
    target: bench_table.Target
    times_vllm: float


def places(rows: Sequence[dict[str, Any]], suite: bench_table.Suite) -> Iterator[Place]:
    """Those that vLLM has a figure for, the newest line of each, in the suite's order."""
    newest = {(row["group"], row["workload"]): row for row in rows if "figure" in row}
    for group in suite.groups:
        for workload in group.rows:
            row, target = newest.get((group.name, workload)), bench_table.Target(*group.rows[workload])
            times = bench_table.times_better(row, target.vllm) if row is not None else None
            if row is not None and times is not None:
                yield Place(group, workload, row, target, times)


def name_of(group: bench_table.Group) -> str:
    """For people, such as Llama 3.1 8B, FP8, 2 x 2 cards."""
    tp_size, pp_size = group.tensor_parallel_size, group.pipeline_parallel_size
    cards = f"{tp_size} x {pp_size} cards" if pp_size > 1 else f"{tp_size} card{'s' * (tp_size > 1)}"
    return ", ".join([MODELS[group.model], *([group.quantization.upper()] if group.quantization else []), cards])


def ratios_table(rows: Sequence[dict[str, Any]], suite: bench_table.Suite) -> str:
    """Times vLLM, a line a model and layout; then how many rows there are, the worst and the best of them."""
    found = list(places(rows, suite))
    lines = ["| times vLLM | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for group in suite.groups:
        own = {place.workload: place.times_vllm for place in found if place.group is group}
        cells = [next((f"{own[name]:.2f}" for name in names if name in own), "") for names in COLUMNS.values()]
        lines.append("| " + " | ".join([name_of(group), *cells]) + " |")
    ratios = sorted(place.times_vllm for place in found if place.workload != "start")
    starts = [place.times_vllm for place in found if place.workload == "start"]
    num_slower = sum(ratio < 1 for ratio in ratios)
    num_goals = sum(bench_table.verdict(dict(place.row), place.target) == "goal" for place in found)
    said = (
        f"Of {len(found)} rows measured {num_slower or 'none'} {'is' if num_slower < 2 else 'are'} slower than vLLM's: "
    )
    said += f"{ratios[0]:.2f} to {ratios[-1]:.2f} times as fast"
    said += f" (starts {min(starts):.1f} times and more)" if starts else ""
    return "\n".join([*lines, "", f"{said}; {num_goals} reach the goals that we set."])


def picture(rows: Sequence[dict[str, Any]], suite: bench_table.Suite) -> str:
    """Every row but starts as two bars, ours and vLLM's, of what the card can do at most (`limits.py`), as an SVG."""
    parts: list[str] = []
    below = float(TOP)
    shown: bench_table.Group | None = None
    for place in places(rows, suite):
        best = limits.limit(place.group, place.workload)
        if best is None:
            continue
        if place.group is not shown:
            shown, below = place.group, below + GROUP_GAP
            parts.append(_text(MARGIN, below + BAR, name_of(place.group), weight="600"))
            below += ROW
        figure = place.row["figure"]
        share = best / figure if place.row["unit"] in bench_table.LOWER_IS_BETTER else figure / best
        parts.append(_text(2 * MARGIN, below + BAR, place.workload))
        for bar, (part, colour) in enumerate(((share, OURS), (share / place.times_vllm, THEIRS))):
            parts.append(_box(NAME_WIDTH, below + bar * BAR - 2, part * BAR_WIDTH, BAR - 1, colour))
        parts.append(_text(NAME_WIDTH + BAR_WIDTH + MARGIN, below + BAR, f"{place.times_vllm:.2f} times"))
        below += ROW
    head = [_text(MARGIN, 18, f"{suite.device}: of what the card can do at most", weight="600")]
    for left, colour, name in ((MARGIN, OURS, "Argosy"), (MARGIN + 80, THEIRS, "vLLM 0.24")):
        head += [_box(left, 30, 12, BAR, colour), _text(left + 18, 38, name)]
    for tenths in range(0, 11, 2):
        left = NAME_WIDTH + BAR_WIDTH * tenths / 10
        head.append(_box(left, TOP - 6, 1, below - TOP, QUIET))
        head.append(_text(left - 8, TOP - 12, f"{10 * tenths} %"))
    width, height = NAME_WIDTH + BAR_WIDTH + FIGURE_WIDTH, below + MARGIN
    style = f"font: 12px system-ui, sans-serif; fill: {INK}"
    shape = f'width="{width}" height="{height:g}" viewBox="0 0 {width} {height:g}"'
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    inside = "\n".join([ground, *head, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {shape} style="{style}">\n{inside}\n</svg>\n'


def _box(left: float, top: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:g}" fill="{colour}"/>'


def _text(left: float, base: float, text: str, weight: str = "400") -> str:
    return f'<text x="{left:.1f}" y="{base:.1f}" font-weight="{weight}">{text}</text>'
