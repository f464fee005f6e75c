"""The journal as the one process sees it that works on a job: items out, results in, a transaction a turn.

An item is pending, running, or ended (done, failed, cancelled, expired); only a running one takes a result, and taking
it ends it. So however often an item is run, it has exactly one result line.
"""

import json
import secrets
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from argosy.deploy.jobs_folder import transaction
from argosy.deploy.jobs_journal import LIVE_SQL, Journal
from argosy.deploy.jobs_rows import (
    ClaimedItem,
    Ended,
    FileRow,
    ItemState,
    JobRow,
    NewItem,
    Turn,
    error_line,
    result_line,
)

SUSPECT_ATTEMPTS: Final = 3  # an item that was running in so many losses runs alone, so that the guilty one is found
MAX_ATTEMPTS: Final = 6
_LOST: Final = f"the engine or the server was lost {MAX_ATTEMPTS} times while this item ran, at last with nothing else"


class Turns:
    """The moves of a runner. Hold the job's lock for all but `live_jobs`."""

    def __init__(self, journal: Journal):
        self._journal, self._db = journal, journal.db

    def live_jobs(self, served: Sequence[str]) -> list[str]:
        """Jobs that have not ended and were taken for one of these models, oldest first."""
        rows = self._db.execute(f"SELECT id, served FROM jobs WHERE status IN {LIVE_SQL} ORDER BY n").fetchall()
        return [row["id"] for row in rows if set(json.loads(row["served"])) & set(served)]

    def take_up(self, job_id: str) -> JobRow:
        """The job as its last runner left it; what was running then will be run again."""
        with transaction(self._db):
            self._db.execute("UPDATE items SET state = 0 WHERE job = ? AND state = 1", (job_id,))
        return self._journal.job_of_any(job_id)

    def begin(self, job_id: str, model: str, items: Sequence[NewItem]) -> None:
        """The input is sound: these are the items."""
        with transaction(self._db):
            changed = self._db.execute(
                "UPDATE jobs SET status = 'in_progress', model = ?, total = ?, in_progress_at = ? "
                "WHERE id = ? AND status = 'validating'",
                (model, len(items), self._journal.now(), job_id),
            )
            if changed.rowcount == 1:  # else it was cancelled meanwhile
                self._db.executemany(
                    "INSERT INTO items (job, line, custom_id, start, length) VALUES (?, ?, ?, ?, ?)",
                    ((job_id, item.line, item.custom_id, item.start, item.length) for item in items),
                )

    def refuse(self, job_id: str, errors: Sequence[Mapping[str, Any]]) -> None:
        """The input is not sound, and why: the job has failed before anything ran."""
        with transaction(self._db):
            self._db.execute(
                "UPDATE jobs SET status = 'failed', errors = ?, failed_at = ? WHERE id = ? AND status = 'validating'",
                (json.dumps(list(errors)), self._journal.now(), job_id),
            )

    def turn(self, job_id: str, ended: Sequence[Ended], num_wanted: int, *, num_running: int) -> Turn:
        """Write down what ended and take what to run next, in one transaction.

        `num_running` is what the runner still has: an item that others may have died of is given out alone.
        """
        now = self._journal.now()
        with transaction(self._db):
            job = self._db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            seq, completed, failed = job["next_seq"], job["completed"], job["failed"]
            for one in ended:
                state = ItemState.DONE if one.is_done else ItemState.FAILED
                if one.result is None:
                    self._db.execute(
                        "UPDATE items SET state = 0, attempts = attempts - ? WHERE job = ? AND line = ? AND state = 1",
                        (int(one.is_innocent), job_id, one.line),
                    )
                    continue
                taken = self._end_item(job_id, one.line, ItemState.RUNNING, state, seq, one.result)
                seq += taken
                completed += taken * one.is_done
                failed += taken * (not one.is_done)
            status, ending = job["status"], job["ending"]
            if status in ("validating", "in_progress") and now >= job["expires_at"]:
                status, ending = "finalizing", "expired"
            items: list[ClaimedItem] = []
            if status == "in_progress":
                for row in self._suspects_lost_for_good(job_id):
                    result = error_line(job_id, row["line"], row["custom_id"], "item_lost", _LOST)
                    taken = self._end_item(job_id, row["line"], ItemState.PENDING, ItemState.FAILED, seq, result)
                    seq, failed = seq + taken, failed + taken
                items = self._claim(job_id, num_wanted, is_idle=num_running == 0)
                if job["total"] == completed + failed:
                    status = "finalizing"
            self._db.execute(
                "UPDATE jobs SET status = ?, ending = ?, next_seq = ?, completed = ?, failed = ?, "
                "finalizing_at = CASE WHEN ? = 'finalizing' THEN coalesce(finalizing_at, ?) ELSE finalizing_at END "
                "WHERE id = ?",
                (status, ending, seq, completed, failed, status, now, job_id),
            )
        return Turn(status, items, job["total"] - completed - failed)

    def finish(self, job_id: str) -> JobRow:
        """Give a job that is finalizing or cancelling its last status and its result files. Nothing may be running."""
        now = self._journal.now()
        with transaction(self._db):
            job = self._db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if job["status"] in ("finalizing", "cancelling"):
                ending, seq = job["ending"] or "completed", job["next_seq"]
                state = ItemState.CANCELLED if ending == "cancelled" else ItemState.EXPIRED
                lines = self._db.execute(
                    "SELECT line FROM items WHERE job = ? AND state IN (0, 1) ORDER BY line", (job_id,)
                ).fetchall()
                assert not (lines and ending == "completed"), (job_id, len(lines))
                self._db.executemany(
                    "UPDATE items SET state = ?, seq = ?, result = NULL WHERE job = ? AND line = ?",
                    ((int(state), seq + place, job_id, row["line"]) for place, row in enumerate(lines)),
                )
                self._db.execute(
                    f"UPDATE jobs SET status = ?, {ending}_at = ?, next_seq = ?, failed = failed + ? WHERE id = ?",
                    (ending, now, seq + len(lines), len(lines), job_id),
                )
                self._add_result_file(job, "output", (ItemState.DONE,), now)
                self._add_result_file(job, "error", (ItemState.FAILED, ItemState.CANCELLED, ItemState.EXPIRED), now)
        return self._journal.job_of_any(job_id)

    def _end_item(self, job_id: str, line: int, before: ItemState, state: ItemState, seq: int, result: bytes) -> int:
        changed = self._db.execute(
            "UPDATE items SET state = ?, seq = ?, result = ? WHERE job = ? AND line = ? AND state = ?",
            (int(state), seq, result, job_id, line, int(before)),
        )
        return changed.rowcount

    def _suspects_lost_for_good(self, job_id: str) -> list[sqlite3.Row]:
        return self._db.execute(
            "SELECT line, custom_id FROM items WHERE job = ? AND state = 0 AND attempts >= ?", (job_id, MAX_ATTEMPTS)
        ).fetchall()

    def _claim(self, job_id: str, num_wanted: int, *, is_idle: bool) -> list[ClaimedItem]:
        sql = "SELECT * FROM items WHERE job = ? AND state = 0 AND attempts {} ? ORDER BY attempts, line LIMIT ?"
        rows = self._db.execute(sql.format("<"), (job_id, SUSPECT_ATTEMPTS, num_wanted)).fetchall()
        if not rows and is_idle:
            rows = self._db.execute(sql.format(">="), (job_id, SUSPECT_ATTEMPTS, min(1, num_wanted))).fetchall()
        self._db.executemany(
            "UPDATE items SET state = 1, attempts = attempts + 1 WHERE job = ? AND line = ?",
            ((job_id, row["line"]) for row in rows),
        )
        return [
            ClaimedItem(row["line"], row["custom_id"], row["start"], row["length"], row["attempts"] + 1) for row in rows
        ]

    def _add_result_file(self, job: sqlite3.Row, kind: str, states: Sequence[ItemState], now: int) -> None:
        marks = ", ".join(str(int(state)) for state in states)
        rows = self._db.execute(f"SELECT * FROM items WHERE job = ? AND state IN ({marks})", (job["id"],))
        num_bytes = sum(len(result_line(row)) + 1 for row in rows)
        if not num_bytes:
            return
        file_id = f"file-{secrets.token_hex(12)}"
        row = FileRow(
            id=file_id,
            purpose=f"batch_{kind}",
            filename=f"{job['id']}_{kind}.jsonl",
            bytes=num_bytes,
            created_at=now,
            job=job["id"],
        )
        self._journal.insert("files", {**msgspec.structs.asdict(row), "tenant": job["tenant"]})
        self._db.execute(f"UPDATE jobs SET {kind}_file_id = ? WHERE id = ?", (file_id, job["id"]))
