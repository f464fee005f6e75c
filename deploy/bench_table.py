"""What peers did and what we aim at, from a suite's file; and the tables that put our figures beside them."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.errors import ConfigError

Row = Mapping[str, Any]
LOWER_IS_BETTER: Final = ("ms/step", "s")


class Target(msgspec.Struct, frozen=True):
    """What a row of a suite is compared with; None where nobody measured, or nothing was promised."""

    vllm: float | None
    goal: float | None


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows that one engine answers: a model in one layout."""

    model: str
    rows: dict[str, tuple[float | None, float | None]]
    quantization: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    @property
    def name(self) -> str:
        """Such as 8b-bf16-TP2xPP2."""
        layout = layout_of(self.tensor_parallel_size, self.pipeline_parallel_size)
        return name_of(self.model, self.quantization or "bf16", layout)

    @property
    def num_cards(self) -> int:
        """One for each rank."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class Ratios(msgspec.Struct, frozen=True):
    """Two layouts compared: KV blocks and output tokens a second of the larger over those of the smaller."""

    blocks_ratio: float
    tokens_ratio: float
    blocks: tuple[int, ...] = ()
    tokens: tuple[float, ...] = ()


class SuperLinear(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The pair of runs in which twice the cards give more than twice: their memory is what one of them lacks."""

    model: str
    workload: str
    usable_memory: int  # bytes a card, for everything
    tensor_parallel_sizes: tuple[int, int]
    settings: dict[str, int]
    vllm: Ratios
    goal: Ratios


class Suite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of figures to beat."""

    what: str
    device: str
    units: str
    groups: tuple[Group, ...]
    doors: tuple[Group, ...] = ()  # whose HTTP doors are measured
    super_linear: SuperLinear | None = None

    def target(self, row: Row) -> Target:
        """For a measured row; empty when the suite has none."""
        for group in self.groups:
            if group.name == row.get("group") and row.get("workload") in group.rows:
                return Target(*group.rows[row["workload"]])
        return Target(None, None)


def read_suite(name: str) -> Suite:
    """A suite that ships (h200), or a JSON file of the same form. Raises `ConfigError`."""
    shipped = Path(str(files("argosy.deploy"))) / "suites" / f"{name}.json"
    path = shipped if shipped.is_file() else Path(name)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Suite)
    except OSError as error:
        raise ConfigError(f"--suite {name!r}: neither a suite that ships (h200) nor a file ({error})") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--suite {name!r}: {error}") from error


def name_of(model: str, numbers: str, layout: str) -> str:
    """The name of a group of rows; `numbers` are the quantization, or the dtype where there is none."""
    return f"{Path(model).name}-{'bf16' if numbers == 'bfloat16' else numbers}-{layout}"


def layout_of(tp_size: int, pp_size: int) -> str:
    """Such as TP1 or TP2xPP2."""
    return f"TP{tp_size}" + (f"xPP{pp_size}" if pp_size > 1 else "")


def times_better(row: Row, peer: float | None) -> float | None:
    """How many times better than `peer` the row's figure is; above 1 is better, whichever way the unit goes."""
    figure = row.get("figure")
    if not peer or not figure:
        return None
    ratio: float = peer / figure if row["unit"] in LOWER_IS_BETTER else figure / peer
    return ratio


def verdict(row: Row, target: Target) -> str:
    """In a word or two."""
    goal, vllm = times_better(row, target.goal), times_better(row, target.vllm)
    if goal is not None and goal >= 1.0:
        return "goal"
    if vllm is None:
        return "" if goal is None else "below goal"
    return "ahead" if vllm >= 1.0 else "BEHIND"


def comparison(rows: Sequence[Row], suite: Suite) -> str:
    """Our figures beside the suite's, for a terminal."""
    lines = [("row", "argosy", "spread", "vLLM", "ratio", "goal", "verdict", "TTFT ms")]
    for row in rows:
        if "figure" not in row:
            continue
        target = suite.target(row)
        low, high = row.get("spread") or (row["figure"], row["figure"])
        lines.append(
            (
                f"{row['group']}/{row['workload']}",
                f"{number(row['figure'])} {row['unit']}",
                f"{number(low)}..{number(high)}",
                number(target.vllm),
                _ratio(times_better(row, target.vllm)),
                number(target.goal),
                verdict(row, target),
                number(row.get("ttft_ms_p50")),
            )
        )
    return text_table(lines)


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Columns side by side under a rule."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def markdown(rows: Sequence[Row], suite: Suite) -> str:
    """The suite's whole table for a page, with the newest of our figures for each row and gaps where there is none."""
    newest = {(row["group"], row["workload"]): row for row in rows if "figure" in row}
    lines = ["| model, layout | workload | argosy | vLLM 0.24 | times vLLM | goal | |", "|---|---|---|---|---|---|---|"]
    for group in suite.groups:
        for place, workload in enumerate(group.rows):
            target = Target(*group.rows[workload])
            row = newest.get((group.name, workload))
            name = group.name if place == 0 else ""
            cells = [name, workload, "", number(target.vllm), "", number(target.goal), "not measured"]
            if row is not None:
                cells[2] = f"{number(row['figure'])} {row['unit']}"
                cells[4], cells[6] = _ratio(times_better(row, target.vllm)), verdict(row, target)
                if cells[6] == "BEHIND":
                    cells[4], cells[6] = f"**{cells[4]}**", "**behind**"
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The JSON lines of result files, oldest first; what is no line of a suite is left out."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        rows += [_with_group(json.loads(line)) for line in lines]
    return sorted((row for row in rows if "group" in row), key=lambda row: str(row.get("time", "")))


def tell(row: Row, output: str | None) -> None:
    """Print a row as a JSON line, and append it to the file `output` if one is named."""
    line = json.dumps(row)
    print(line, flush=True)
    if output:
        with open(output, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def _with_group(row: dict[str, Any]) -> dict[str, Any]:
    """Older lines name model, dtype and layout, from which the group follows."""
    if "group" in row or not {"model", "dtype", "layout", "figure"} <= row.keys():
        return row
    return {**row, "group": name_of(row["model"], row.get("quantization") or row["dtype"], row["layout"])}


def number(value: float | None) -> str:
    """For people: four digits that count, thousands apart."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
