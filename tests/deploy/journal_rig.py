"""A journal with a clock moved by hand, jobs in it, and a runner that nothing disturbs."""

import json
from pathlib import Path

from argosy.deploy.jobs_folder import JobFolder
from argosy.deploy.jobs_journal import Journal
from argosy.deploy.jobs_rows import Ended, FileRow, JobRow, NewItem
from argosy.deploy.jobs_turns import Turns

SERVED = ("tiny",)


class Clock:
    """Seconds since 1970, moved by hand."""

    def __init__(self, now: float = 1_000_000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def new_journal(path: Path, clock: Clock | None = None) -> Journal:
    return Journal(JobFolder(path), clock=clock or Clock())


def add_input(journal: Journal, file_id: str = "file-in", tenant: str = "") -> None:
    journal.folder.file(file_id).write_bytes(b"x")
    row = FileRow(id=file_id, purpose="batch", filename="in.jsonl", bytes=1, created_at=journal.now())
    journal.add_file(tenant, row)


def new_job(journal: Journal, num_items: int, *, key: str | None = None, seconds: int = 86400) -> str:
    """A job whose input was found to be sound."""
    if journal.file("", "file-in") is None:
        add_input(journal)
    job = journal.create_job(
        "",
        endpoint="/v1/completions",
        served=SERVED,
        input_file_id="file-in",
        completion_window="24h",
        window_seconds=seconds,
        key=key,
    )
    if num_items:
        Turns(journal).begin(job.id, "tiny", [NewItem(n, f"item {n}", 10 * n, 9) for n in range(1, num_items + 1)])
    return job.id


def done(line: int, word: str = "done") -> Ended:
    return Ended(line, is_done=True, result=json.dumps({"line": line, "word": word}).encode())


def lines_of(journal: Journal, job_id: str) -> list[int]:
    """The lines of the input that have a result, as its two files have them."""
    return [line for kind in ("output", "error") for line, _ in journal.result_lines(job_id, f"batch_{kind}", 0, 10**6)]


def finish(journal: Journal, job_id: str) -> JobRow:
    """What a runner does that nothing disturbs."""
    turns = Turns(journal)
    turns.take_up(job_id)
    running: list[int] = []
    while True:
        turn = turns.turn(job_id, [done(line) for line in running], 3, num_running=0)
        running = [item.line for item in turn.items]
        if turn.status != "in_progress":
            assert not running
            return turns.finish(job_id)
