"""What tuners share: the table of sizes that they read, try and write, and processes that compile beforehand."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from argosy.kernels import tuning

Table = dict[str, dict[str, dict[str, int]]]  # kernel -> shape -> sizes


def read_table(path: str) -> Table:
    """What was tuned before; empty where there is no such file."""
    found: Table = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    return found


def write_table(path: str, table: Table) -> None:
    """As the tables of kernels/ are written: a change is a line."""
    Path(path).write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def try_table(table: Table) -> None:
    """From now on kernels take their sizes from `table` as it is at each launch, and from nowhere else."""
    tuning.pick = lambda kernel, key, device: table.get(kernel, {}).get(key)  # type: ignore[assignment]  # under trial


def part_of(text: str) -> tuple[int, int]:
    """(i, n) of the "i/n" that `compile_apart` gives to `--compile-part`."""
    index, count = map(int, text.split("/"))
    return index, count


def compile_apart(most: int, *, over_cards: bool = False, quiet: bool = False) -> Callable[[], None]:
    """Run this script again in up to `most` processes with `--compile-part i/n`; what it returns waits for them.

    `over_cards`: each sees one of the visible cards, in turn. `quiet`: what they print is nobody's business.
    """
    began, count = time.perf_counter(), min(most, os.cpu_count() or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if over_cards else ""
    cards = [str(card) for card in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    others = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--compile-part", f"{index}/{count}"],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": cards[index % len(cards)]} if over_cards else None,
            stdout=subprocess.DEVNULL if quiet else None,
        )
        for index in range(count)
    ]

    def wait() -> None:
        for other in others:
            other.wait()
        print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)

    return wait
