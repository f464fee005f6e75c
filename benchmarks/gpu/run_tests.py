"""Every test that needs a GPU, over all cards of this host at once: many processes a card, a few tests at a time.

    python benchmarks/gpu/run_tests.py --processes 12 --seconds 300 --output found.jsonl --left left.txt
    python benchmarks/gpu/run_tests.py @left.txt

What `pytest -m gpu` runs one after the other. The longest come first, as long as they took when they were last
recorded (`benchmarks/results/gpu_tests_h200.jsonl`); tests over several cards get as many, and those that look at what
a card holds come last and have their cards to themselves. Ends with a line for each test that failed, was cut off or
was not run, and the sums by file; exit code 1 if there was one. Without Ray, tests that need it are left out by pytest.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "benchmarks" / "results" / "gpu_tests_h200.jsonl"
GUESSES = (  # seconds of a test whose name begins so, where none was recorded; the first that fits
    ("tests/deploy/test_losses", 45.0), ("tests/deploy/", 25.0), ("tests/end_to_end/", 30.0),
    ("tests/workers/test_group_sum", 45.0), ("tests/workers/test_layer_chain", 60.0), ("tests/workers/test_fp8", 20.0),
    ("tests/workers/test_transformers_fallback.py::test_cards", 40.0), ("tests/workers/test_transformers", 20.0),
    ("tests/workers/", 12.0), ("tests/kernels/test_hopper_attention.py::test_it_compiles", 30.0),
    ("tests/kernels/test_compile_for", 30.0), ("tests/kernels/test_hopper", 4.0), ("", 1.5),
)  # fmt: skip
START = 12.0  # seconds until a process runs its first test
ALONE = re.compile(r"opens_one_card|ledger_adds_up|actors_with_a_card|blocks_that_the_plan")  # they read a card's bytes
RANKS = re.compile(r"(\d)-(\d)(?:-killed|-hangs)?\]$")  # TP and PP
CARDS = re.compile(r"(?:test_group_sum|test_layer_chain)_gpu.*-(\d)\]$")
VERDICT = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b")
BEGUN = re.compile(r"^(tests/\S+?::.+?) *$")
PYTEST = [sys.executable, "-u", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu"]
BUSY = 1.2  # processes a core: some of them wait for a card or for each other
GRACE = 8.0  # seconds in which pytest says what failed after it was interrupted


def collect(paths: list[str]) -> tuple[list[str], list[str]]:
    """(ids of all tests with the marker, what pytest could not collect), files beside each other."""
    marked = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "tests").rglob("test_*.py")) if _is_marked(file)]
    several = [inner for path in paths for inner in (marked if path.rstrip("/") == "tests" else [path])]

    def ask(path: str) -> tuple[list[str], list[str]]:
        command = [*PYTEST, "--collect-only", "-q", path]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = found.stdout.splitlines()
        errors = [] if found.returncode in (0, 5) else [path, *lines[-20:], found.stderr[-2000:]]
        return [line for line in lines if line.startswith("tests/") and "::" in line], errors

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        answers = list(pool.map(ask, several))
    return [one for ids, _ in answers for one in ids], [line for _, errors in answers for line in errors]


def _is_marked(file: Path) -> bool:
    return "kernels" in file.parts or "mark.gpu" in file.read_text(encoding="utf-8")  # see tests/kernels/conftest.py


def function_of(test: str) -> str:
    """Its id without parameters."""
    return test.split("[", 1)[0]


def cards_of(test: str) -> int:
    """How many it computes on. One rank that opens one card shows that best where there is another."""
    if found := CARDS.search(test):
        return int(found[1])
    if test.startswith("tests/kernels/") or not (found := RANKS.search(test)):
        return 2 if "opens_one_card" in test else 1
    return int(found[1]) * int(found[2])


@dataclass
class Part:
    """Tests that one process runs, one after the other, on the same number of cards."""

    tests: list[str]
    num_cards: int
    is_alone: bool
    seconds: float  # that it is expected to take
    cards: tuple[int, ...] = ()

    @property
    def cores(self) -> float:
        """How many it keeps busy: ranks import, compile and start; a test of kernels is one process."""
        is_engine = self.num_cards > 1 or self.tests[0].startswith(("tests/deploy", "tests/end_to_end"))
        return 1.0 + 0.8 * self.num_cards * is_engine


def cut(ids: list[str], expected: dict[str, float], most: float) -> list[Part]:
    """Neighbours stay together, since they compile the same kernels; the longest come first, those alone at the end."""
    groups: dict[tuple[str, int, bool], list[str]] = {}
    for one in ids:
        groups.setdefault((one.split("::")[0], cards_of(one), bool(ALONE.search(one))), []).append(one)
    parts = []
    for (_, num_cards, is_alone), tests in groups.items():
        part = Part([], num_cards, is_alone, START)
        for one in tests:
            known = expected.get(function_of(one))
            took = next(guess for begin, guess in GUESSES if one.startswith(begin)) if known is None else known
            if part.tests and part.seconds + took > START + most * (3 if is_alone else 1):
                parts.append(part)
                part = Part([], num_cards, is_alone, START)
            part.tests.append(one)
            part.seconds += took
        parts.append(part)
    return sorted(parts, key=lambda part: (part.is_alone, -part.num_cards * part.is_alone, -part.seconds))


@dataclass
class Host:
    """The cards, what runs on them, and what was found."""

    cards: list[str]
    per_card: int
    per_card_layouts: int
    num_cores: int
    deadline: float
    running: list[Part] = field(default_factory=list)
    verdicts: dict[str, str] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    under_way: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def has_cores(self, part: Part) -> bool:
        """Whether the host has some left for it."""
        most = max(BUSY * self.num_cores, part.cores)
        return sum(one.cores for one in self.running) + part.cores <= most

    def place(self, part: Part) -> tuple[int, ...]:
        """Cards for it, the least busy ones; none if it has to wait. Layouts have places of their own, for one that
        needs several cards would hardly ever find all of them at once."""
        free = []
        for card in range(len(self.cards)):
            here = [one for one in self.running if card in one.cards]
            alike = sum((one.num_cards > 1) == (part.num_cards > 1) for one in here)
            is_full = alike >= (self.per_card_layouts if part.num_cards > 1 else self.per_card)
            if is_full or any(one.is_alone for one in here) or (part.is_alone and here):
                continue
            free.append((alike, len(here), card))
        wanted = min(part.num_cards, len(self.cards))
        return tuple(sorted(card for *_, card in sorted(free)[:wanted])) if len(free) >= wanted else ()

    def run(self, parts: list[Part]) -> None:
        """All of them, or as many as there is time for. None overtakes one that waits for cores, nor one that waits to
        be alone, which is its turn when nobody else waits."""
        threads = []
        while parts and time.monotonic() < self.deadline:
            with self.changed:
                chosen = None
                for part in parts:
                    if (part.is_alone and not parts[0].is_alone) or not self.has_cores(part):
                        break
                    if cards := self.place(part):
                        chosen, part.cards = part, cards
                    if cards or part.is_alone:
                        break
                if chosen is None:
                    self.changed.wait(1.0)
                    continue
                parts.remove(chosen)
                self.running.append(chosen)
            threads.append(threading.Thread(target=self._serve, args=(chosen,)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _serve(self, part: Part) -> None:
        try:
            text = self._pytest(part)
        finally:
            with self.changed:
                self.running.remove(part)
                self.changed.notify_all()
        counts = collections.Counter(self.verdicts.get(one, "not run").lower() for one in part.tests)
        if counts["failed"] or counts["error"] or len(counts) == counts["not run"]:
            self.errors.append(text[-6000:])
        said = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
        left = self.deadline - time.monotonic()
        print(f"{left:5.0f} s left, cards {part.cards}: {function_of(part.tests[0])}: {said}", flush=True)

    def _pytest(self, part: Part) -> str:
        names = ",".join(self.cards[card] for card in part.cards)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": names, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        lines: list[str] = []
        with subprocess.Popen(
            [*PYTEST, "-v", "--tb=short", "--color=no", *part.tests], cwd=ROOT, env=environment, text=True,
            errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            interrupt = threading.Timer(self.deadline - time.monotonic(), process.send_signal, [signal.SIGINT])
            kill = threading.Timer(self.deadline + GRACE - time.monotonic(), _kill_group, [process.pid])
            interrupt.start()
            kill.start()
            last = time.monotonic()
            current = ""
            for line in process.stdout:
                lines.append(line)
                if found := VERDICT.match(line):
                    name, verdict = found[1], found[2]
                elif (found := BEGUN.match(line)) and found[1] in part.tests:
                    current = found[1]
                    continue
                elif current and (plain := re.match(r"(PASSED|FAILED|ERROR|SKIPPED)\b", line)):
                    name, verdict = current, plain[1]  # a test wrote to the descriptor after its name
                else:
                    last = time.monotonic() if line.startswith("collecting") else last
                    continue
                if name in part.tests and self.verdicts.get(name) not in ("FAILED", "ERROR"):
                    now = time.monotonic()
                    self.verdicts[name], self.took[name], last, current = verdict, now - last, now, ""
            process.wait()
            interrupt.cancel()
            kill.cancel()
            _kill_group(process.pid)  # ranks that a test left behind
        if process.returncode not in (0, 1, 5):
            self.under_way.update([one for one in part.tests if one not in self.verdicts][:1])
        return "".join(lines)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or not ours
        os.killpg(group, signal.SIGKILL)


def rows_of(ids: list[str], host: Host) -> list[dict[str, object]]:
    """One for each test function: how many passed, failed, were skipped or not run, and the seconds of one."""
    rows: dict[str, collections.Counter[str]] = {}
    seconds: dict[str, list[float]] = {}
    for one in ids:
        verdict = host.verdicts.get(one, "not run").lower().replace("error", "failed")
        rows.setdefault(function_of(one), collections.Counter())[verdict] += 1
        if one in host.took and verdict == "passed":
            seconds.setdefault(function_of(one), []).append(host.took[one])
    about = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "cards": len(host.cards)}
    about["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    return [
        {
            "test": name,
            **{verdict.replace(" ", "_"): count[verdict] for verdict in ("passed", "failed", "skipped", "not run")},
            "seconds": round(sum(seconds.get(name, [0.0])) / max(1, len(seconds.get(name, []))), 2),
            **about,
        }
        for name, count in rows.items()
    ]


def expected_seconds(file: Path) -> dict[str, float]:
    """Of one test of each function, as recorded."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["test"]: row["seconds"] for row in rows if row["passed"]}


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=["tests"], help="files or folders of tests, ids, @FILE with ids")
    parser.add_argument(
        "--processes", type=int, default=4, help="on each card, of tests of one card, as far as there are cores (4)"
    )
    parser.add_argument("--layouts", type=int, default=4, help="on each card beside them, over several cards (4)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="what has not run by then is not run")
    parser.add_argument("--part", type=float, default=25.0, help="seconds of tests that a process gets (25)")
    parser.add_argument("--output", help="write what was found of each test function here, as JSON lines")
    parser.add_argument("--left", help="write the ids of tests that failed or were not run here")
    args = parser.parse_args()
    began = time.monotonic()
    deadline = began + args.seconds - GRACE
    ids: list[str] = []
    folders = [path for path in args.paths if not path.startswith("@") and "::" not in path]
    for path in args.paths:
        if path.startswith("@"):
            ids += Path(path[1:]).read_text().splitlines()
        elif "::" in path:
            ids.append(path)
    found, errors = collect(folders) if folders else ([], [])
    ids += found
    if not ids:
        print("\n".join(errors))
        raise SystemExit(f"no test with the marker gpu in {args.paths}")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = named.split(",") if named else [str(card) for card in range(torch.cuda.device_count())] or ["0"]
    host = Host(cards, args.processes, args.layouts, len(os.sched_getaffinity(0)), deadline)
    parts = cut(ids, expected_seconds(RECORDED), args.part)
    print(f"{len(ids)} tests in {len(parts)} parts, {host.num_cores} cores, after {time.monotonic() - began:.0f} s")
    host.run(parts)
    for text in (*host.errors, *errors):
        print(text, flush=True)
    bad = [one for one in ids if host.verdicts.get(one) not in ("PASSED", "SKIPPED")]
    not_run: collections.Counter[str] = collections.Counter()
    for one in bad:
        if one in host.verdicts or one in host.under_way:
            print(host.verdicts.get(one, "CUT OFF"), one)
        else:
            not_run[function_of(one)] += 1
    for name, number in not_run.items():
        print(f"NOT RUN {name}: {number}")
    rows = rows_of(ids, host)
    sums: dict[str, collections.Counter[str]] = {}
    for one in ids:
        sums.setdefault(one.split("::")[0], collections.Counter())[host.verdicts.get(one, "not run").lower()] += 1
    for file, count in sums.items():
        print(f"{file}: {', '.join(f'{number} {verdict}' for verdict, number in count.items())}")
    if args.output:
        Path(args.output).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if args.left:
        Path(args.left).write_text("".join(f"{one}\n" for one in bad), encoding="utf-8")
    total = collections.Counter(host.verdicts.get(one, "not run").lower() for one in ids)
    said = ", ".join(f"{number} {verdict}" for verdict, number in total.items())
    print(f"{len(ids)} tests on {len(cards)} cards in {time.monotonic() - began:.0f} s: {said}")
    return min(len(bad) + len(errors), 1)


if __name__ == "__main__":
    sys.exit(main())
