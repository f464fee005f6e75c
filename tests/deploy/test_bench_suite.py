"""A table of figures to beat: which rows, on which cards, in which order, and what is said of the outcome."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import bench_models, bench_suite, bench_table
from argosy.deploy.bench_suite import Job
from argosy.deploy.cli import build_parser

SUITE = bench_table.read_suite("h200")


def measured(group: str, workload: str, figure: float, unit: str = "ms/step", **more: Any) -> dict[str, Any]:
    """A row as an engine's process writes it."""
    return {"group": group, "workload": workload, "figure": figure, "unit": unit, **more}


def test_the_suite_that_ships_has_every_row_of_the_targets() -> None:
    """Eight engines, and the names of workloads that there are."""
    assert [group.name for group in SUITE.groups] == [
        "06b-bf16-TP1", "8b-bf16-TP1", "8b-fp8-TP1", "8b-bf16-TP2", "8b-bf16-TP4", "8b-bf16-TP2xPP2", "70b-bf16-TP4",
        "70b-bf16-TP2xPP2",
    ]  # fmt: skip
    assert sum(len(group.rows) for group in SUITE.groups) == 45
    for group in SUITE.groups:
        for name, (vllm, goal) in group.rows.items():
            assert name == "start" or bench_suite.pick(SUITE, [f"{group.name}/{name}"])
            lower = name.startswith("decode") or name == "start"
            assert goal is None or vllm is None or (goal < vllm if lower else goal > vllm), (group.name, name)


def test_better_is_better_whichever_way_the_unit_goes() -> None:
    """Fewer milliseconds, more tokens; at the goal, ahead, behind."""
    decode, rate = ("8b-bf16-TP1", "decode1"), ("8b-bf16-TP1", "chat1000")
    for row, ratio, word in (
        (measured(*decode, 3.95), 4.84 / 3.95, "goal"),
        (measured(*decode, 4.5), 4.84 / 4.5, "ahead"),
        (measured(*decode, 5.0), 4.84 / 5.0, "BEHIND"),
        (measured(*rate, 13_300, "output tokens/s"), 13_300 / 11_470, "goal"),
        (measured(*rate, 11_000, "output tokens/s"), 11_000 / 11_470, "BEHIND"),
        (measured("9b-bf16-TP1", "decode1", 1.0), None, ""),
    ):
        target = SUITE.target(row)
        assert bench_table.times_better(row, target.vllm) == (None if ratio is None else pytest.approx(ratio))
        assert bench_table.verdict(row, target) == word


def test_rows_are_picked_by_name_and_a_typo_is_told() -> None:
    """By group, by workload, by both."""
    assert bench_suite.pick(SUITE, ["8b-fp8-TP1"]) == {"8b-fp8-TP1": list(SUITE.groups[2].rows)}
    assert set(bench_suite.pick(SUITE, ["*/start"])) == {"06b-bf16-TP1", "8b-bf16-TP1", "70b-bf16-TP4"}
    assert bench_suite.pick(SUITE, ["super-linear"]) == {"super-linear": ["fixed256x128"]}
    with pytest.raises(ConfigError, match="--list"):
        bench_suite.pick(SUITE, ["9b-*"])


def test_the_words_of_a_job_are_words_that_bench_takes(tmp_path: Path) -> None:
    """Each engine is a command line of its own; those of all cards first, and short ones fill the gaps at the end."""
    parser = build_parser()
    args = parser.parse_args(["bench", "--suite", "h200", "--repeats", "2"])
    jobs = bench_suite.make_jobs(SUITE, bench_suite.pick(SUITE, ["*"]), args, tmp_path)
    order = [job.name for job in bench_suite.in_order(jobs, 4)]
    assert order[:5] == ["8b-bf16-TP4", "8b-bf16-TP2xPP2", "70b-bf16-TP4", "70b-bf16-TP2xPP2", "8b-bf16-TP1"]
    assert set(order[-2:]) == {"super-linear-TP1", "super-linear-TP2"}
    doors = [job for job in jobs if job.name.startswith("doors")]
    assert not doors or (doors[0].disturbs(doors[1:]) and not jobs[0].disturbs(doors))
    asked = {job.name: parser.parse_args(["bench", *job.words]) for job in jobs}
    assert asked["8b-fp8-TP1"].quantization == "fp8"
    assert asked["8b-bf16-TP2xPP2"].pipeline_parallel_size == 2
    assert asked["super-linear-TP2"].usable_memory == 18_300_000_000
    assert asked["super-linear-TP2"].max_model_len == 2048
    assert asked["8b-bf16-TP1"].repeats == 2
    if "doors-8b-bf16-TP2" in asked:  # with Ray
        assert (asked["doors-8b-bf16-TP2"].over, asked["doors-8b-bf16-TP2"].backend) == ("http", "ray")


def fake(name: str, num_cards: int, folder: Path, code: str) -> Job:
    """A job that runs this Python instead of an engine."""
    return Job(name, num_cards, [code], folder / f"{name}.jsonl")


@pytest.fixture
def _python_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(job: Job) -> None:
        job.started = time.monotonic()
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(job.cards), "OUT": str(job.output)}
        with job.log.open("wb") as log:
            job.process = subprocess.Popen([sys.executable, "-c", job.words[0]], env=env, stdout=log, stderr=log)

    monkeypatch.setattr(bench_suite, "start", start)
    monkeypatch.setattr(bench_suite, "_POLL_SECONDS", 0.01)


TELL = """
import json, os
with open(os.environ["OUT"], "a") as file:
    file.write(json.dumps({"cards": os.environ["CUDA_VISIBLE_DEVICES"]}) + chr(10))
"""


@pytest.mark.usefixtures("_python_jobs")
def test_no_card_has_two_engines_and_what_needs_too_many_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two cards: a pair, two alone, and one job for four."""
    slow = TELL + "import time; time.sleep(0.3)"
    jobs = [fake("four", 4, tmp_path, TELL), fake("pair", 2, tmp_path, slow)]
    jobs += [fake("one", 1, tmp_path, slow), fake("other", 1, tmp_path, slow)]
    found: dict[str, str] = {}
    busy: list[set[str]] = []
    for job in bench_suite.run_jobs(jobs, ["5", "7"]):
        for row in job.new_rows():
            found[job.name] = row["cards"]
        busy.append({one.name for one in jobs if one.process is not None and one.process.poll() is None})
    assert found["pair"] == "5,7"
    assert {found["one"], found["other"]} == {"5", "7"}
    assert not any("pair" in names and len(names) > 1 for names in busy)
    assert "left out: four needs 4 cards" in capsys.readouterr().err


@pytest.mark.usefixtures("_python_jobs")
def test_an_engine_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its last words; the table has what the others measured."""
    row = measured("06b-bf16-TP1", "decode1", 0.79, ttft_ms_p50=9.0)
    tell = f"import os; open(os.environ['OUT'], 'a').write('''{json.dumps(row)}''' + chr(10))"

    def make_jobs(suite: object, picked: object, args: argparse.Namespace, folder: Path) -> list[Job]:
        return [fake("good", 1, folder, tell), fake("bad", 1, folder, "raise SystemExit('argosy: no memory')")]

    monkeypatch.setattr(bench_suite, "make_jobs", make_jobs)
    monkeypatch.setattr(bench_suite, "cards_of_host", lambda wanted: ["0"])
    args = build_parser().parse_args(["bench", "--suite", "h200", "--output", str(tmp_path / "all.jsonl")])
    assert bench_suite.main(args) == 1
    printed = capsys.readouterr()
    assert "failed: bad: argosy: no memory" in printed.err
    assert "06b-bf16-TP1/decode1" in printed.out
    assert "goal" in printed.out
    (kept,) = bench_table.read_rows([tmp_path / "all.jsonl"])
    assert (kept["figure"], kept["suite"]) == (0.79, "h200")


def test_twice_the_cards_give_more_than_twice_the_blocks(tmp_path: Path) -> None:
    """Block accounting: what one card lacks after its weights, two have."""
    pair = SUITE.super_linear
    assert pair is not None
    folder, _ = bench_models.make_folder("8b", tmp_path)
    one, two = (bench_suite.foretell_blocks(folder, pair, size) for size in (1, 2))
    assert 200 < one < 1000
    assert two / one > 10.0
    rows = [
        {"group": "super-linear-TP1", "num_blocks": 700, "output_tokens_per_second": 2500.0},
        {"group": "super-linear-TP2", "num_blocks": 9800, "output_tokens_per_second": 10_000.0},
    ]
    assert bench_suite.super_linear_row(rows[:1], pair, tmp_path) is None
    row = bench_suite.super_linear_row(rows, pair, tmp_path)
    assert row is not None
    assert (row["blocks_ratio"], row["tokens_ratio"]) == (14.0, 4.0)
    text = bench_suite.describe_super_linear(row, pair)
    assert "14.00x" in text
    assert text.count("goal") == 3  # the head and both verdicts


def test_the_page_shows_every_row_the_newest_figure_and_the_gaps() -> None:
    """A row that was not measured says so."""
    old, new = (measured("8b-bf16-TP1", "decode1", figure) for figure in (5.0, 4.0))
    page = bench_table.markdown([old, new], SUITE)
    assert "| 8b-bf16-TP1 | start |  | 52 |  | 10 | not measured |" in page
    assert "|  | decode1 | 4 ms/step | 4.84 | 1.21 | 3.95 | ahead |" in page
    assert page.count("\n") == 46
