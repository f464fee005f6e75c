"""The journal of jobs: what happened to every item, in transactions, so that a kill at any moment loses nothing.

    validating -> in_progress -> finalizing -> completed | expired        (failed: the input was refused)
                  in_progress -> cancelling -> cancelled                  (resume: cancelled | expired -> in_progress)

Methods block (they write to disk) and belong to one thread.
"""

import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from argosy.deploy.jobs_folder import JobFolder, transaction
from argosy.deploy.jobs_rows import LIVE, FileRow, ItemState, JobRow, file_row, job_row, result_line

ORPHAN_SECONDS: Final = 3600
MAX_RESULT_BYTES_AT_ONCE: Final = 8 * 1024 * 1024
LIVE_SQL: Final = f"({', '.join(repr(status) for status in LIVE)})"
_RESUMABLE: Final = ("cancelled", "expired")


class Journal:
    """All tables of one folder. `clock` gives seconds since 1970."""

    def __init__(self, folder: JobFolder, *, clock: Callable[[], float]):
        self.folder = folder
        self._clock = clock
        self.db: sqlite3.Connection = folder.connect()

    def close(self) -> None:
        """Close the journal; it may be opened again by anybody."""
        self.db.close()

    # ------------------------------------------------------------------------------------------------------- files

    def add_file(self, tenant: str, row: FileRow) -> None:
        """An uploaded file whose bytes are in their place."""
        with transaction(self.db):
            self.insert("files", {**msgspec.structs.asdict(row), "tenant": tenant})

    def file(self, tenant: str, file_id: str) -> FileRow | None:
        """One file."""
        rows = self.db.execute("SELECT * FROM files WHERE id = ? AND tenant = ?", (file_id, tenant))
        return next((file_row(row) for row in rows), None)

    def files(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int,
        newest_first: bool = True,
    ) -> list[FileRow]:
        """Files of a tenant, from the one behind `after` on."""
        more = ("purpose = ?", purpose) if purpose is not None else ("?", 1)
        return [file_row(row) for row in self._page("files", tenant, after, limit, newest_first, more)]

    def delete_file(self, tenant: str, file_id: str) -> str | None:
        """Forget a file. The id of the job that still needs it, when it may not be deleted."""
        with transaction(self.db):
            user = self.db.execute(
                f"SELECT id FROM jobs WHERE input_file_id = ? AND status IN {LIVE_SQL}", (file_id,)
            ).fetchone()
            if user is not None:
                return str(user["id"])
            row = self.db.execute(
                "DELETE FROM files WHERE id = ? AND tenant = ? RETURNING job, purpose", (file_id, tenant)
            ).fetchone()
            if row is not None and row["job"]:
                state = ItemState.DONE if row["purpose"] == "batch_output" else ItemState.FAILED
                self.db.execute("UPDATE items SET result = NULL WHERE job = ? AND state = ?", (row["job"], state))
        self.folder.file(file_id).unlink(missing_ok=True)
        return None

    def sweep(self) -> int:
        """Delete files whose time is up and which no job needs, and bytes that a kill left; how many they were."""
        rows = self.db.execute("SELECT tenant, id FROM files WHERE expires_at <= ?", (self.now(),)).fetchall()
        num_deleted = sum(self.delete_file(row["tenant"], row["id"]) is None for row in rows)
        known = {row["id"] for row in self.db.execute("SELECT id FROM files").fetchall()}
        for path in self.folder.file("").iterdir():
            # what is young may be an upload that goes on, or whose row is about to be written
            if path.name not in known and path.stat().st_mtime < self.now() - ORPHAN_SECONDS:
                path.unlink(missing_ok=True)
                num_deleted += 1
        return num_deleted

    # -------------------------------------------------------------------------------------------------------- jobs

    def create_job(
        self,
        tenant: str,
        *,
        endpoint: str,
        served: Sequence[str],
        input_file_id: str,
        completion_window: str,
        window_seconds: int,
        metadata: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> JobRow:
        """A new job, or the one that was made with the same key before."""
        now = self.now()
        values = {
            "id": f"batch_{secrets.token_hex(12)}",
            "tenant": tenant,
            "key": key,
            "endpoint": endpoint,
            "served": json.dumps(list(served)),
            "input_file_id": input_file_id,
            "completion_window": completion_window,
            "window_seconds": window_seconds,
            "metadata": json.dumps(dict(metadata) if metadata else None),
            "status": "validating",
            "created_at": now,
            "expires_at": now + window_seconds,
        }
        with transaction(self.db):
            if key is not None:
                rows = self.db.execute("SELECT * FROM jobs WHERE tenant = ? AND key = ?", (tenant, key)).fetchall()
                if rows:
                    return job_row(rows[0])
            self.insert("jobs", values)
        return self.job_of_any(str(values["id"]))

    def job(self, tenant: str, job_id: str) -> JobRow | None:
        """One job."""
        rows = self.db.execute("SELECT * FROM jobs WHERE id = ? AND tenant = ?", (job_id, tenant))
        return next((job_row(row) for row in rows), None)

    def job_of_any(self, job_id: str) -> JobRow:
        """One job, whosever it is, for who works on it."""
        return job_row(self.db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone())

    def jobs(self, tenant: str, *, key: str | None = None, after: str | None = None, limit: int) -> list[JobRow]:
        """Jobs of a tenant, newest first, from the one behind `after` on; with `key` the one of that key."""
        more = ("key = ?", key) if key is not None else ("?", 1)
        return [job_row(row) for row in self._page("jobs", tenant, after, limit, True, more)]

    def cancel(self, job_id: str) -> bool:
        """Ask for an end; False when there is nothing that could be ended."""
        with transaction(self.db):
            changed = self.db.execute(
                "UPDATE jobs SET status = 'cancelling', ending = 'cancelled', cancelling_at = ? "
                "WHERE id = ? AND status IN ('validating', 'in_progress')",
                (self.now(), job_id),
            )
            return changed.rowcount == 1

    def resume(self, job_id: str) -> bool:
        """Run what was not run because the job was cancelled or its time was up; False when it is not such a job."""
        now = self.now()
        with transaction(self.db):
            row = self.db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            has_input = self.db.execute("SELECT 1 FROM files WHERE id = ?", (row["input_file_id"],)).fetchone()
            if row["status"] not in _RESUMABLE or not has_input:
                return False
            again = self.db.execute(
                "UPDATE items SET state = 0, attempts = 0, seq = NULL WHERE job = ? AND state IN (4, 5)", (job_id,)
            ).rowcount
            # cancelled while it was validated, it has no items yet
            status = "in_progress" if row["total"] else "validating"
            self.db.execute(
                "UPDATE jobs SET status = ?, ending = '', failed = failed - ?, expires_at = ?, finalizing_at = NULL, "
                "expired_at = NULL, cancelling_at = NULL, cancelled_at = NULL, output_file_id = NULL, "
                "error_file_id = NULL WHERE id = ?",
                (status, again, now + row["window_seconds"], job_id),
            )
            self.db.execute("DELETE FROM files WHERE job = ?", (job_id,))
        return True

    # ----------------------------------------------------------------------------------------------------- results

    def results(self, job_id: str, after_seq: int, limit: int) -> list[tuple[int, int, bytes]]:
        """(seq, line, result line) of items in the order in which they ended: `limit`, or fewer when they are large."""
        rows = self.db.execute(
            "SELECT * FROM items WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?", (job_id, after_seq, limit)
        )
        found, num_bytes = [], 0
        for row in rows:
            found.append((row["seq"], row["line"], result_line(row)))
            num_bytes += len(found[-1][2])
            if num_bytes > MAX_RESULT_BYTES_AT_ONCE:
                break
        return found

    def result_lines(self, job_id: str, purpose: str | None, after_line: int, limit: int) -> list[tuple[int, bytes]]:
        """(line, result line) in the order of the input: of the items that were done, of the others, or of all."""
        states = {"batch_output": "(2)", "batch_error": "(3, 4, 5)"}.get(purpose or "", "(2, 3, 4, 5)")
        rows = self.db.execute(
            f"SELECT * FROM items WHERE job = ? AND line > ? AND state IN {states} ORDER BY line LIMIT ?",
            (job_id, after_line, limit),
        )
        return [(row["line"], result_line(row)) for row in rows]

    def check(self) -> None:
        """Every count is the count of its rows, every ended item has its own place, every end its one line."""
        for job in self.db.execute("SELECT * FROM jobs").fetchall():
            rows = self.db.execute("SELECT * FROM items WHERE job = ? ORDER BY seq", (job["id"],)).fetchall()
            states = [row["state"] for row in rows]
            assert len(rows) == job["total"], job["id"]
            assert states.count(ItemState.DONE) == job["completed"], job["id"]
            assert sum(state > ItemState.DONE for state in states) == job["failed"], job["id"]
            ended = [row for row in rows if row["state"] > ItemState.RUNNING]
            assert all((row["seq"] is not None) == (row["state"] > ItemState.RUNNING) for row in rows), job["id"]
            assert len({row["seq"] for row in ended}) == len(ended), job["id"]
            assert all(row["seq"] < job["next_seq"] for row in ended), job["id"]
            if job["status"] not in LIVE and job["status"] != "failed":
                assert len(ended) == len(rows), (job["id"], job["status"])

    # ------------------------------------------------------------------------------------------------------- small

    def now(self) -> int:
        """Seconds since 1970."""
        return int(self._clock())

    def insert(self, table: str, values: Mapping[str, Any]) -> None:
        """One row, within the caller's transaction."""
        marks = ", ".join("?" * len(values))
        self.db.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))

    def _page(
        self, table: str, tenant: str, after: str | None, limit: int, newest_first: bool, more: tuple[str, Any]
    ) -> Iterator[sqlite3.Row]:
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        bound = f"AND n {sign} coalesce((SELECT n FROM {table} WHERE id = ?), -1)" if after is not None else ""
        values = [tenant, more[1], *([after] if after is not None else []), limit]
        sql = f"SELECT * FROM {table} WHERE tenant = ? AND {more[0]} {bound} ORDER BY n {order} LIMIT ?"
        return iter(self.db.execute(sql, values))
