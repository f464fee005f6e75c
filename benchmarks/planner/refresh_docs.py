#!/usr/bin/env python3
"""Print anew what `docs/planning.md` shows of `argosy plan` and `argosy simulate`, and its table of what was measured
beside what is foretold, and what the calibration says of itself: after each change of prices and new rows.

    python benchmarks/planner/refresh_docs.py [--check]

Each block of the page that begins with `$ argosy ...` is that command and what it prints; each row of the table of
clusters has the layout that its command gets. `--check` changes nothing and ends with 1 where the page says otherwise;
seconds that a simulation took don't count.
"""

import argparse
import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import msgspec

from argosy.deploy import cli
from argosy.deploy.calibrate import write
from argosy.placement.calibration import FOLDER, default_calibration, read_calibration

sys.path.insert(0, str(Path(__file__).parent))
import forecast_rows  # a script beside this one

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
CLUSTERS = Path(__file__).resolve().parents[2] / "examples" / "clusters"
ROW = re.compile(r"^\| `(\w+)` \| `(plan [^`]+)` \| ([^|]+) \|$", re.MULTILINE)
PRICES = FOLDER / "nvidia_h200.json"
TABLE = re.compile(r"(<!-- table: forecasts -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
BLOCK = re.compile(r"```text\n\$ (argosy [^\n]+)\n(.*?)```", re.DOTALL)


def printed(command: str) -> str:
    """What the command says, complaints included."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        cli.main(shlex.split(command)[1:])
    return re.sub(r"[ \t]+\n", "\n", out.getvalue().rstrip() + "\n")


def layout(cluster: str, command: str) -> str:
    """The layout of a row: '1 x TP4 x PP2, layers 33 / 31'."""
    answer = json.loads(printed(f"argosy {command} --json --cluster {CLUSTERS / cluster}.yaml"))
    replicas = answer["replicas"]
    counts = [stage["last_layer"] - stage["first_layer"] for stage in replicas[0]["stages"]]
    sizes = answer["settings"]
    text = f"{len(replicas)} x TP{sizes['tensor_parallel_size']} x PP{len(counts)}"
    return text + (f", layers {' / '.join(map(str, counts))}" if len(counts) > 1 else "")


def timeless(text: str) -> str:
    """Without what the machine's speed decides."""
    return re.sub(r"simulated in [\d.]+ s", "simulated", text)


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page, stale = PAGE.read_text(encoding="utf-8"), []
    prices = read_calibration(PRICES)
    found = forecast_rows.forecasts(prices)
    if (judged := forecast_rows.judge(found)) != prices.judged:
        stale.append("how far off the calibration says that it is")
        if not args.check:
            write(msgspec.structs.replace(prices, judged=judged), str(PRICES))
            default_calibration.cache_clear()

    def renew(match: re.Match[str]) -> str:
        command, shown = match[1], match[2]
        now = printed(command)
        if timeless(now) == timeless(shown):
            return match[0]
        stale.append(command)
        return f"```text\n$ {command}\n{now}```"

    def renew_row(match: re.Match[str]) -> str:
        now = layout(match[1], match[2])
        if now != match[3]:
            stale.append(f"{match[2]} on {match[1]}")
        return f"| `{match[1]}` | `{match[2]}` | {now} |"

    def renew_table(match: re.Match[str]) -> str:
        now = f"{match[1]}{forecast_rows.table(found)}{match[2]}"
        if now != match[0]:
            stale.append("the table of forecasts")
        return now

    renewed = TABLE.sub(renew_table, ROW.sub(renew_row, BLOCK.sub(renew, page)))
    for command in stale:
        print(f"{'stale' if args.check else 'renewed'}: {command}")
    if not args.check:
        PAGE.write_text(renewed, encoding="utf-8")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
