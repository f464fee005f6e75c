"""The journal of jobs: one result for each item, whatever dies between any two of its statements."""

import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.deploy.jobs_journal import Journal
from argosy.deploy.jobs_rows import LIVE, Ended, NewItem
from argosy.deploy.jobs_turns import Turns

from .journal_rig import Clock, done, finish, lines_of, new_job, new_journal

MOVES = st.sampled_from(["turn", "turn", "turn", "die", "cancel", "resume", "wait", "close"])


@settings(max_examples=150, deadline=None)
@given(st.lists(MOVES, max_size=40), st.randoms(use_true_random=False), st.integers(1, 7))
def test_whatever_happens_each_item_has_one_line(moves: list[str], rng: random.Random, num_items: int) -> None:
    """Runners die, come back with stale news, jobs are cancelled, expire and are resumed, in any order."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        journal = new_journal(Path(folder), clock)
        journal.db.execute("PRAGMA synchronous = OFF")
        job_id = new_job(journal, num_items, seconds=1000)
        turns, running = Turns(journal), list[int]()
        stale: list[int] = []
        for move in moves:
            if move == "turn":
                ended = []
                for line in [*running, *stale]:
                    kind = rng.choice(["done", "done", "failed", "again", "innocent", "still runs"])
                    if kind != "still runs":
                        result = b"{}" if kind in ("done", "failed") else None
                        ended.append(Ended(line, kind == "done", result, kind == "innocent"))
                        running = [other for other in running if other != line]
                turn = turns.turn(job_id, ended, rng.randrange(4), num_running=len(running))
                running += [item.line for item in turn.items]
                if turn.status in ("finalizing", "cancelling"):
                    turns.finish(job_id)
                    running = []
            elif move == "die":
                stale, running = running, []
                turns.take_up(job_id)
            elif move == "close":
                journal.close()
                journal = new_journal(Path(folder), clock)
                turns, running = Turns(journal), []
                turns.take_up(job_id)
            elif move == "wait":
                clock.now += rng.choice([1, 400])
            else:
                getattr(journal, move)(job_id)
            journal.check()
        while journal.job_of_any(job_id).status in LIVE:
            finish(journal, job_id)
        journal.check()
        assert sorted(lines_of(journal, job_id)) == list(range(1, num_items + 1))
        journal.close()


def life(journal: Journal) -> None:
    """A whole life of a job, from upload to deletion, that ends wherever the process is killed."""
    turns = Turns(journal)
    job_id = new_job(journal, 3, key="life")
    for _ in range(2):
        turn = turns.turn(job_id, [], 2, num_running=0)
        turns.turn(job_id, [done(item.line) for item in turn.items[:1]], 0, num_running=1)
        journal.cancel(job_id)
        turns.finish(job_id)
        journal.resume(job_id)
        turns.take_up(job_id)
    job = finish(journal, job_id)
    assert job.output_file_id is not None
    journal.delete_file("", job.output_file_id)


def run_and_die(path: Path, story: Callable[[Journal], None], at_statement: int) -> bool:
    """Run the story in a child that is gone before its nth statement; whether it died of it."""
    pid = os.fork()
    if pid == 0:
        try:
            journal = new_journal(path)
            left = at_statement

            def count(statement: str) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)

            journal.db.set_trace_callback(count)
            story(journal)
            os._exit(0)
        except BaseException:  # the status says it
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9), status
    return status == 9


def test_a_kill_before_any_statement_loses_nothing(tmp_path: Path) -> None:
    """Killed at each of its statements in turn, the job is taken up and ends with one line for each item."""
    died, at = True, 0
    ends: Counter[str] = Counter()
    while died:
        at += 1
        folder = tmp_path / str(at)
        died = run_and_die(folder, life, at)
        journal = new_journal(folder)
        journal.db.execute("PRAGMA synchronous = OFF")
        journal.check()
        add = journal.file("", "file-in") is None
        job_id = new_job(journal, 0, key="life") if not add else new_job(journal, 3, key="life")
        job = journal.job_of_any(job_id)
        ends[job.status] += 1
        if job.status == "validating":
            items = [NewItem(n, f"item {n}", 10 * n, 9) for n in (1, 2, 3)]
            Turns(journal).begin(job_id, "tiny", items)
        if job.status in LIVE:
            job = finish(journal, job_id)
        assert job.status in ("completed", "cancelled")
        assert sorted(lines_of(journal, job_id)) == [1, 2, 3]
        journal.check()
        journal.close()
    assert at > 60
    assert {"validating", "in_progress", "cancelling", "cancelled", "finalizing", "completed"} <= ends.keys()
