"""The journal of jobs: one result for each item, one owner, and folders that can't be used."""

import json
import os
import signal
import sqlite3
import stat
import time
from pathlib import Path

import pytest

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy.jobs_folder import JobFolder, choose_job_dir
from argosy.deploy.jobs_rows import Ended, FileRow
from argosy.deploy.jobs_turns import MAX_ATTEMPTS, SUSPECT_ATTEMPTS, Turns

from .journal_rig import Clock, add_input, done, finish, lines_of, new_job, new_journal


def test_a_job_from_its_first_line_to_its_last(tmp_path: Path) -> None:
    """Two items are done, one fails: each in its file in the order of the input, all in the order of the end."""
    journal = new_journal(tmp_path)
    job_id = new_job(journal, 3)
    turns = Turns(journal)
    assert turns.live_jobs(["tiny", "other"]) == [job_id]
    assert turns.live_jobs(["other"]) == []
    assert [item.line for item in turns.turn(job_id, [], 2, num_running=0).items] == [1, 2]
    failed = Ended(2, result=b'{"no": 2}')
    assert [item.line for item in turns.turn(job_id, [failed], 2, num_running=1).items] == [3]
    turn = turns.turn(job_id, [done(3), done(1)], 2, num_running=0)
    assert (turn.status, turn.num_open) == ("finalizing", 0)
    job = turns.finish(job_id)
    assert (job.status, job.total, job.completed, job.failed) == ("completed", 3, 2, 1)
    assert [(seq, line) for seq, line, _ in journal.results(job_id, 0, 10)] == [(1, 2), (2, 3), (3, 1)]
    assert [line for line, _ in journal.result_lines(job_id, "batch_output", 0, 10)] == [1, 3]
    assert job.output_file_id is not None
    output = journal.file("", job.output_file_id)
    assert output is not None
    assert output.bytes == sum(len(text) + 1 for _, text in journal.result_lines(job_id, "batch_output", 0, 10))
    journal.check()


def test_the_first_result_of_an_item_is_its_only_one(tmp_path: Path) -> None:
    """A frozen runner wakes up after another has done its work, and reports what it once ran."""
    journal = new_journal(tmp_path)
    job_id = new_job(journal, 1)
    turns = Turns(journal)
    turns.turn(job_id, [], 1, num_running=0)
    turns.turn(job_id, [done(1, "first"), done(1, "second")], 1, num_running=0)
    turns.turn(job_id, [done(1, "third"), Ended(1)], 1, num_running=0)
    assert [json.loads(text)["word"] for _, _, text in journal.results(job_id, 0, 10)] == ["first"]
    journal.check()


def test_a_key_makes_one_job_of_two_calls(tmp_path: Path) -> None:
    """A client that was killed, or lost the answer, asks again; another tenant's key is another key."""
    journal = new_journal(tmp_path)
    assert new_job(journal, 0, key="nightly") == new_job(journal, 0, key="nightly")
    assert new_job(journal, 0, key="other") != new_job(journal, 0, key="nightly")
    assert new_job(journal, 0) != new_job(journal, 0)


def test_cancel_and_resume(tmp_path: Path) -> None:
    """What was done stays; what was called off has a line that says so, until it is run after all."""
    journal = new_journal(tmp_path)
    job_id = new_job(journal, 4)
    turns = Turns(journal)
    turns.turn(job_id, [], 2, num_running=0)
    assert journal.cancel(job_id)
    assert not journal.cancel(job_id)
    turn = turns.turn(job_id, [done(1)], 2, num_running=1)
    assert (turn.status, turn.items) == ("cancelling", [])
    job = turns.finish(job_id)
    assert (job.status, job.completed, job.failed) == ("cancelled", 1, 3)
    assert sorted(lines_of(journal, job_id)) == [1, 2, 3, 4]
    errors = [json.loads(text)["error"]["code"] for _, text in journal.result_lines(job_id, "batch_error", 0, 9)]
    assert errors == ["batch_cancelled"] * 3
    journal.check()
    assert journal.resume(job_id)
    assert not journal.resume(job_id)
    journal.check()
    job = finish(journal, job_id)
    assert (job.status, job.completed, job.failed, job.error_file_id) == ("completed", 4, 0, None)
    assert sorted(lines_of(journal, job_id)) == [1, 2, 3, 4]
    assert len(journal.files("", limit=10)) == 2  # the input and one output: those of the cancelled job have gone
    journal.check()


def test_a_job_expires_and_can_be_resumed(tmp_path: Path) -> None:
    """The window is over in the middle."""
    clock = Clock()
    journal = new_journal(tmp_path, clock)
    job_id = new_job(journal, 2, seconds=60)
    turns = Turns(journal)
    turns.turn(job_id, [], 1, num_running=0)
    clock.now += 60
    assert turns.turn(job_id, [done(1)], 1, num_running=0).status == "finalizing"
    job = turns.finish(job_id)
    assert (job.status, job.completed, job.failed) == ("expired", 1, 1)
    assert journal.resume(job_id)
    assert finish(journal, job_id).status == "completed"


def test_a_file_in_use_stays_and_results_go_with_their_file(tmp_path: Path) -> None:
    """A job reads its input to its end; deleting an output file deletes what was answered."""
    journal = new_journal(tmp_path)
    job_id = new_job(journal, 1)
    assert journal.delete_file("", "file-in") == job_id
    job = finish(journal, job_id)
    assert job.output_file_id is not None
    assert journal.delete_file("other tenant", job.output_file_id) is None
    assert journal.file("", job.output_file_id) is not None
    assert journal.delete_file("", job.output_file_id) is None
    assert b"word" not in b"".join(text for _, _, text in journal.results(job_id, 0, 9))
    assert journal.delete_file("", "file-in") is None
    assert not journal.folder.file("file-in").exists()


def test_what_a_killed_upload_left_is_swept_away_after_a_while(tmp_path: Path) -> None:
    """Files whose time is up, and bytes that no row knows; a young one may be an upload that goes on."""
    clock = Clock(time.time())
    journal = new_journal(tmp_path, clock)
    add_input(journal, "file-kept")
    journal.folder.file("file-x.part").write_bytes(b"half")
    journal.folder.file("file-short").write_bytes(b"x")
    row = FileRow(id="file-short", purpose="batch", filename="s", bytes=1, created_at=0, expires_at=journal.now() + 60)
    journal.add_file("", row)
    assert journal.sweep() == 0
    clock.now += 7200
    assert journal.sweep() == 2
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["file-kept"]
    assert journal.file("", "file-short") is None


def test_an_item_that_kills_is_found_and_its_neighbours_are_not_blamed(tmp_path: Path) -> None:
    """Item 2 kills the server each time it runs: it alone gets an error line, all others are done."""
    journal = new_journal(tmp_path)
    job_id = new_job(journal, 6)
    turns = Turns(journal)
    num_deaths = 0
    running: list[int] = []
    ended: list[Ended] = []
    while True:
        turn = turns.turn(job_id, ended, 4 - len(running), num_running=len(running))
        running += [item.line for item in turn.items]
        if turn.status != "in_progress":
            break
        if any(item.line == 2 and item.attempts > SUSPECT_ATTEMPTS for item in turn.items):
            assert running == [2]
        ended = []
        if 2 in running:  # everything dies
            num_deaths += 1
            running = []
            turns.take_up(job_id)
        else:
            ended, running = [done(line) for line in running], []
    job = turns.finish(job_id)
    assert (num_deaths, job.completed, job.failed) == (MAX_ATTEMPTS, 5, 1)
    (error,) = (json.loads(text) for _, text in journal.result_lines(job_id, "batch_error", 0, 9))
    assert (error["custom_id"], error["error"]["code"]) == ("item 2", "item_lost")


def test_what_was_never_begun_does_not_count_as_an_attempt(tmp_path: Path) -> None:
    """The queue was full a hundred times."""
    journal = new_journal(tmp_path)
    job_id = new_job(journal, 1)
    turns = Turns(journal)
    turn = turns.turn(job_id, [], 1, num_running=0)
    for _ in range(100):
        turn = turns.turn(job_id, [Ended(1, is_innocent=True)], 1, num_running=0)
    assert turn.items[0].attempts == 1


def test_one_process_works_on_a_job_and_its_death_frees_it(tmp_path: Path) -> None:
    """The lock is the kernel's: no time has to pass."""
    folder = JobFolder(tmp_path)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        lock = JobFolder(tmp_path).try_lock("batch_1")
        os.write(writer, b"1" if lock else b"0")
        signal.pause()
    assert os.read(reader, 1) == b"1"
    assert folder.try_lock("batch_1") is None
    other = folder.try_lock("batch_2")
    assert other is not None
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    lock = folder.try_lock("batch_1")
    assert lock is not None
    lock.close()
    lock.close()
    assert folder.try_lock("batch_1") is not None


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    """Prompts and answers are in there."""
    old = os.umask(0)
    try:
        journal = new_journal(tmp_path / "a" / "jobs")
        new_job(journal, 1)
        journal.folder.try_lock("batch_1")
    finally:
        os.umask(old)
    for path in [tmp_path / "a" / "jobs", *(tmp_path / "a" / "jobs").rglob("*")]:
        if path.name != "file-in":  # written by this test
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_folder_that_cannot_be_used_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the name of the flag, before a model is loaded; the default folder is never a reason not to serve."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"job_dir='.*file/x'"):
        choose_job_dir(str(tmp_path / "file" / "x"))
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write there"):
        choose_job_dir(str(open_folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert choose_job_dir(None) is None
    assert "no jobs" in capsys.readouterr().err
    assert choose_job_dir("none") is None


def test_a_journal_of_another_version_or_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """After going back to an older Argosy, and when the folder is that of another program."""
    for name, statement, words in (("newer", "PRAGMA user_version = 99", "schema is 99"), ("theirs", "", "no journal")):
        folder = JobFolder(tmp_path / name)
        if statement:
            db = folder.connect()
        else:
            db = sqlite3.connect(folder.path / "journal.sqlite3")
            statement = "CREATE TABLE theirs (x)"
        db.execute(statement)
        db.close()
        with pytest.raises(ConfigError, match=words):
            folder.connect()
