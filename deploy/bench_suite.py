"""A whole table: one engine after another, or several at once on the cards of this host, beside a suite's figures.

Each engine is `argosy bench` in a process of its own with its cards; what it measured is read from its output file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import bench_models, bench_table
from argosy.deploy.bench_table import Group, SuperLinear
from argosy.deploy.device_defaults import read_gpus
from argosy.placement.calibration import default_calibration
from argosy.placement.data_sheets import DATA_SHEETS
from argosy.placement.model_sources import read_model_shape
from argosy.placement.rank_memory import Serving, StageBytes, rank_memory
from argosy.placement.topology import Gpu

SUPER_LINEAR: Final = "super-linear"
DOORS: Final = "doors-"
_CARD: Final = "H200"  # whose calibration foretells what a rank needs beside weights
_DOORS_ROWS: Final = 5  # as long as so many rows of an engine
_LONGEST_SECONDS: Final = 3600.0
_POLL_SECONDS: Final = 0.2
Row = dict[str, Any]


@dataclass(slots=True)
class Job:
    """One engine: what it is asked for and where it runs."""

    name: str
    num_cards: int
    words: list[str]
    output: Path
    cards: list[str] = field(default_factory=list)
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    beside: int = 0  # the most engines that ran at the same time
    num_told: int = 0

    num_rows: int = 1

    def disturbs(self, others: "Sequence[Job]") -> bool:
        """Whether it must wait for one of them: two Ray clusters with doors on one host would share ports."""
        return self.name.startswith(DOORS) and any(other.name.startswith(DOORS) for other in others)

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.output.with_suffix(".log")

    def new_rows(self) -> list[Row]:
        """What it measured since the last call."""
        if not self.output.exists():
            return []
        lines = self.output.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may not be whole yet
        new, self.num_told = lines[self.num_told :], len(lines)
        return [{**json.loads(line), "engines_at_once": self.beside + 1} for line in new]


def main(args: argparse.Namespace) -> int:
    """Run the picked rows, print a JSON line for each and the table last; 1 when an engine failed."""
    suite = bench_table.read_suite(args.suite)
    picked = pick(suite, args.rows or ["*"])
    if args.list:
        print("\n".join(f"{name}/{workload}" for name, workloads in picked.items() for workload in workloads))
        return 0
    cards = cards_of_host(args.cards)
    rows: list[Row] = []
    failed = []
    folder = Path(tempfile.mkdtemp(prefix="argosy-suite-"))
    try:
        try:
            for job in run_jobs(make_jobs(suite, picked, args, folder), cards, one_at_a_time=args.one_at_a_time):
                name = {"group": job.name} if job.name.startswith(SUPER_LINEAR) else {}
                for row in job.new_rows():
                    rows.append({**row, **name, "suite": args.suite})
                    bench_table.tell(rows[-1], args.output)
                if job.process is not None and job.process.returncode:
                    failed.append(f"{job.name}: {_last_words(job.log)}")
        except KeyboardInterrupt:
            failed.append("it was interrupted: the table has what was measured until then")
        if suite.super_linear is not None and (ratio := super_linear_row(rows, suite.super_linear, folder)):
            bench_table.tell(ratio, args.output)
            rows.append(ratio)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n" + bench_table.comparison([row for row in rows if row["workload"] != SUPER_LINEAR], suite))
    for row in rows:
        if row["workload"] == SUPER_LINEAR and suite.super_linear is not None:
            print("\n" + describe_super_linear(row, suite.super_linear))
    for sentence in failed:
        print(f"failed: {sentence}", file=sys.stderr)
    return 1 if failed else 0


def pick(suite: bench_table.Suite, patterns: Sequence[str]) -> dict[str, list[str]]:
    """Groups with those of their rows that a pattern names, as group/workload or group alone. Raises `ConfigError`."""
    everything = {group.name: list(group.rows) for group in suite.groups}
    everything |= {f"{DOORS}{group.name}": ["http"] for group in suite.doors}
    if suite.super_linear is not None:
        everything[SUPER_LINEAR] = [suite.super_linear.workload]
    wanted = [(p, f"{p}/*") for p in patterns]
    picked = {
        name: [w for w in workloads if any(fnmatch(f"{name}/{w}", a) or fnmatch(f"{name}/{w}", b) for a, b in wanted)]
        for name, workloads in everything.items()
    }
    found = {name: workloads for name, workloads in picked.items() if workloads}
    if not found:
        raise ConfigError(f"--rows {' '.join(patterns)}: no row has such a name; --list shows them all")
    return found


def cards_of_host(wanted: int | None) -> list[str]:
    """The cards that this process may use, as CUDA_VISIBLE_DEVICES names them. Raises `ConfigError` without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = [card.strip() for card in visible.split(",")] if visible else [str(i) for i in range(len(read_gpus()))]
    if not cards:
        raise ConfigError("--suite: there is no NVIDIA GPU here")
    if wanted is not None and not 1 <= wanted <= len(cards):
        raise ConfigError(f"--cards {wanted}: must be from 1 to {len(cards)}")
    return cards[:wanted]


def make_jobs(
    suite: bench_table.Suite, picked: dict[str, list[str]], args: argparse.Namespace, folder: Path
) -> list[Job]:
    """One for each engine."""
    jobs = []
    for number, group in enumerate(suite.groups):
        if group.name in picked:
            words = [*_engine_words(group), "--workload", *picked[group.name], "--repeats", str(args.repeats)]
            output = folder / f"group-{number}.jsonl"
            jobs.append(Job(group.name, group.num_cards, words, output, num_rows=len(picked[group.name])))
    if SUPER_LINEAR in picked and (pair := suite.super_linear) is not None:
        for tp_size in pair.tensor_parallel_sizes:
            words = [*_engine_words(Group(model=pair.model, rows={}, tensor_parallel_size=tp_size))]
            words += ["--workload", pair.workload, "--usable-memory", str(pair.usable_memory), "--repeats", "1"]
            words += [word for key, value in pair.settings.items() for word in (_flag(key), str(value))]
            jobs.append(Job(f"{SUPER_LINEAR}-TP{tp_size}", tp_size, words, folder / f"super-{tp_size}.jsonl"))
    for job in jobs:
        job.words += ["--backend", args.backend]
    for number, group in enumerate(suite.doors):
        if (name := f"{DOORS}{group.name}") not in picked:
            continue
        if find_spec("ray") is None:
            print(f"left out: {name} needs Ray, which is not installed", file=sys.stderr)
            continue
        words = [*_engine_words(group), "--over", "http", "--backend", "ray", "--repeats", str(args.repeats)]
        jobs.append(Job(name, group.num_cards, words, folder / f"doors-{number}.jsonl", num_rows=_DOORS_ROWS))
    for job in jobs:
        job.words += ["--output", str(job.output), "--note", args.note]
    return jobs


def in_order(jobs: Sequence[Job], num_cards: int) -> list[Job]:
    """Those that need all cards first, then those that measure most, so that short ones fill the gaps at the end."""
    return sorted(jobs, key=lambda job: (-job.num_cards if job.num_cards == num_cards else 0, -job.num_rows))


def run_jobs(jobs: Sequence[Job], cards: Sequence[str], *, one_at_a_time: bool = False) -> Iterator[Job]:
    """Start each job as soon as there are cards for it; those that need more than there are stay out, and say so.

    Yields a job whenever it may have measured something, and once more when it has ended.
    """
    waiting = in_order([job for job in jobs if job.num_cards <= len(cards)], len(cards))
    for job in jobs:
        if job not in waiting:
            print(f"left out: {job.name} needs {job.num_cards} cards", file=sys.stderr)
    running: list[Job] = []
    free = list(cards)
    try:
        while waiting or running:
            for job in list(waiting):
                if job.num_cards <= len(free) and not (running and (one_at_a_time or job.disturbs(running))):
                    waiting.remove(job)
                    job.cards, free = free[: job.num_cards], free[job.num_cards :]
                    start(job)
                    running.append(job)
            for job in running:
                job.beside = max(job.beside, len(running) - 1)
            time.sleep(_POLL_SECONDS)
            for job in list(running):
                assert job.process is not None
                if job.process.poll() is None and time.monotonic() - job.started < _LONGEST_SECONDS:
                    yield job
                    continue
                stop(job)
                running.remove(job)
                free = sorted([*free, *job.cards], key=list(cards).index)
                seconds = time.monotonic() - job.started
                print(f"{job.name} on {','.join(job.cards)}: {seconds:.0f} s", file=sys.stderr, flush=True)
                yield job
    finally:
        for job in running:
            stop(job)


def start(job: Job) -> None:
    """`argosy bench` with these cards."""
    job.started = time.monotonic()
    with job.log.open("wb") as log:
        job.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "argosy", "bench", *job.words],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(job.cards)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def stop(job: Job) -> None:
    """End it if it runs; its engine ends with it."""
    assert job.process is not None
    if job.process.poll() is None:
        job.process.terminate()
        try:
            job.process.wait(timeout=30.0)
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait(timeout=30.0)


def foretell_blocks(folder: Path, pair: SuperLinear, tp_size: int) -> int:
    """KV blocks of a rank that may use so many bytes, by the planner's accounting: no card is asked."""
    shape = read_model_shape(folder)
    card = DATA_SHEETS[_CARD].memory_bytes
    share = {"gpu_memory_utilization": pair.usable_memory / card}
    config = ServingConfig.from_mapping({"model": str(folder), **pair.settings, **share})
    memory = rank_memory(
        StageBytes(shape, Serving.from_config(config, shape)),
        default_calibration(_CARD),
        Gpu(index=0, model=_CARD, memory_bytes=card),
        tp_size=tp_size,
        pp_size=1,
        first_layer=0,
        last_layer=shape.num_layers,
    )
    return memory.num_blocks


def super_linear_row(rows: Sequence[Row], pair: SuperLinear, parent: Path) -> Row | None:
    """The ratio of the two layouts, with what block accounting foretold; None unless both were measured."""
    found = {row["group"]: row for row in rows}
    small, large = (found.get(f"{SUPER_LINEAR}-TP{size}") for size in pair.tensor_parallel_sizes)
    if small is None or large is None:
        return None
    folder, _ = bench_models.make_folder(pair.model, parent)
    keep = ("time", "gpus", "versions", "commit", "python", "argosy", "digest", "repeats")
    return {
        **{key: large[key] for key in keep if key in large},
        "group": SUPER_LINEAR,
        "workload": SUPER_LINEAR,
        "blocks": [small["num_blocks"], large["num_blocks"]],
        "tokens": [small["output_tokens_per_second"], large["output_tokens_per_second"]],
        "blocks_ratio": round(large["num_blocks"] / small["num_blocks"], 2),
        "tokens_ratio": round(large["output_tokens_per_second"] / small["output_tokens_per_second"], 2),
        **foretold_pair(folder, pair),
    }


def foretold_pair(folder: Path, pair: SuperLinear) -> Row:
    """Blocks of the two layouts by block accounting, and their ratio."""
    blocks = [foretell_blocks(folder, pair, size) for size in pair.tensor_parallel_sizes]
    return {"blocks_foretold": blocks, "blocks_ratio_foretold": round(blocks[1] / max(blocks[0], 1), 2)}


def describe_super_linear(row: Row, pair: SuperLinear) -> str:
    """Both ratios beside vLLM's and the goals."""
    number = bench_table.number
    lines = [("super-linear", "argosy", "foretold", "vLLM", "goal", "verdict")]
    for name, foretold in (("blocks", row["blocks_foretold"]), ("tokens", None)):
        ours, theirs = row[name], getattr(pair.vllm, name)
        ratio, goal = row[f"{name}_ratio"], getattr(pair.goal, f"{name}_ratio")
        told = row.get(f"{name}_ratio_foretold")
        lines.append((name, _pair(ours), _pair(foretold) if foretold else "", _pair(theirs), "", ""))
        verdict = "goal" if ratio >= goal else "below goal"
        lines.append(
            (
                f"{name} ratio",
                f"{ratio:.2f}x",
                f"{told:.2f}x" if told else "",
                f"{getattr(pair.vllm, f'{name}_ratio'):.2f}x",
                f"{number(goal)}x",
                verdict,
            )
        )
    return bench_table.text_table(lines)


def _pair(values: Sequence[float]) -> str:
    return " -> ".join(bench_table.number(value) for value in values)


def _engine_words(group: Group) -> list[str]:
    words = ["--model", group.model, "-tp", str(group.tensor_parallel_size), "-pp", str(group.pipeline_parallel_size)]
    return [*words, "--quantization", group.quantization] if group.quantization else words


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"
