"""Every test that needs a GPU, over all cards of this host at once: several processes a card, a few tests at a time.

    python benchmarks/gpu/run_tests.py --processes 3

What `pytest -m gpu` runs one after the other. Tests of one card see one card each, those of whole layouts all of them,
each beginning with another one. Prints a line for each test that failed or was not reached, then the sums by
file; exit code 1 if there was one. With Ray absent, tests that need it are left out by pytest and counted as skipped.
"""

import argparse
import collections
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = (
    "tests/deploy/test_on_gpu.py", "tests/deploy/test_losses_on_gpu.py", "tests/end_to_end/test_on_cards.py",
    "tests/workers/test_group_sum_gpu.py",
)  # fmt: skip
SLOW = ("tests/deploy", "tests/end_to_end", "tests/workers")  # engines and whole models: some seconds each
VERDICT = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu"]


def collect(paths: list[str]) -> list[str]:
    """Ids of all tests with the marker. Raises `SystemExit` where pytest can't collect them."""
    found = subprocess.run([*PYTEST, "--collect-only", "-q", *paths], cwd=ROOT, capture_output=True, text=True)
    ids = [line for line in found.stdout.splitlines() if "::" in line]
    if found.returncode not in (0, 5) or not ids:
        raise SystemExit(found.stdout[-2000:] + found.stderr[-2000:])
    return ids


def cut(ids: list[str], fast: int, slow: int) -> list[list[str]]:
    """Neighbours stay together, since they compile the same kernels; slow ones come first."""
    files: dict[str, list[str]] = {}
    for one in ids:
        files.setdefault(one.split("::")[0], []).append(one)
    parts: list[list[str]] = []
    for file, some in sorted(files.items(), key=lambda item: not item[0].startswith(SLOW)):
        size = slow if file.startswith(SLOW) else fast
        parts += [some[at : at + size] for at in range(0, len(some), size)]
    return parts


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=["tests"], help="files or folders of tests")
    parser.add_argument("--processes", type=int, default=3, help="on each card (3)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="what was not run by then is not reached")
    parser.add_argument("--fast", type=int, default=30, help="tests of kernels a process (30)")
    parser.add_argument("--slow", type=int, default=3, help="tests with engines a process (3)")
    args = parser.parse_args()
    began, ids = time.monotonic(), collect(args.paths)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = named.split(",") if named else [str(card) for card in range(torch.cuda.device_count())]
    parts: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    for part in cut(ids, args.fast, args.slow):
        parts.put(part)
    said: dict[str, str] = {}
    errors: list[str] = []

    def serve(place: int) -> None:
        while (left := args.seconds - (time.monotonic() - began)) > 5:
            try:
                part = parts.get_nowait()
            except queue.Empty:
                return
            first = place % len(cards)
            own = [*cards[first:], *cards[:first]] if part[0].startswith(LAYOUTS) else [cards[first]]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(own), "OMP_NUM_THREADS": "2"}
            with subprocess.Popen(
                [*PYTEST, "-v", "--tb=short", "--color=no", *part], cwd=ROOT, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            ) as process:  # fmt: skip
                try:
                    text, _ = process.communicate(timeout=left)
                except subprocess.TimeoutExpired:
                    process.terminate()
                    text, _ = process.communicate()
            verdicts = dict(VERDICT.findall(text))
            said.update(verdicts)
            if "FAILED" in verdicts.values() or "ERROR" in verdicts.values() or not verdicts:
                errors.append(text[-6000:])
            counts = collections.Counter(verdicts.values())
            print(f"{time.monotonic() - began:5.0f} s  {part[0].split('::')[0]}: {dict(counts)}", flush=True)

    threads = [threading.Thread(target=serve, args=(place,)) for place in range(args.processes * len(cards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text in errors:
        print(text, flush=True)
    bad = [one for one in ids if said.get(one, "not reached") not in ("PASSED", "SKIPPED")]
    for one in bad:
        print(said.get(one, "not reached"), one)
    sums: dict[str, collections.Counter[str]] = {}
    for one in ids:
        sums.setdefault(one.split("::")[0], collections.Counter())[said.get(one, "not reached")] += 1
    for file, count in sums.items():
        print(f"{file}: {', '.join(f'{number} {verdict.lower()}' for verdict, number in count.items())}")
    total = collections.Counter(said.get(one, "not reached").lower() for one in ids)
    print(f"{len(ids)} tests on {len(cards)} cards in {time.monotonic() - began:.0f} s: {dict(total)}")
    return min(len(bad), 1)


if __name__ == "__main__":
    sys.exit(main())
