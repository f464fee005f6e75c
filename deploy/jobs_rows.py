"""What the journal of jobs holds, as values: states, rows, and the one result line of an item."""

import json
import sqlite3
from enum import IntEnum
from typing import Final

import msgspec

LIVE: Final = ("validating", "in_progress", "finalizing", "cancelling")  # statuses of a job that has not ended


class ItemState(IntEnum):
    """How far an item is."""

    PENDING = 0
    RUNNING = 1
    DONE = 2
    FAILED = 3
    CANCELLED = 4
    EXPIRED = 5


class FileRow(msgspec.Struct, kw_only=True, frozen=True):
    """A file: uploaded bytes, or the result lines of `job`."""

    id: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    job: str = ""


class JobRow(msgspec.Struct, kw_only=True, frozen=True):
    """A job as it stands. Times are seconds since 1970."""

    id: str
    tenant: str
    key: str | None
    endpoint: str
    model: str
    input_file_id: str
    completion_window: str
    window_seconds: int
    metadata: str
    status: str
    errors: str
    output_file_id: str | None
    error_file_id: str | None
    total: int
    completed: int
    failed: int
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None


class NewItem(msgspec.Struct, frozen=True):
    """An item of a job, and where its line is in the input."""

    line: int
    custom_id: str
    start: int
    length: int


class ClaimedItem(msgspec.Struct, frozen=True):
    """An item to run."""

    line: int
    custom_id: str
    start: int
    length: int
    attempts: int  # this one included


class Ended(msgspec.Struct, frozen=True):
    """What became of a running item: a result line, or none, when it has to be run again."""

    line: int
    is_done: bool = False
    result: bytes | None = None
    is_innocent: bool = False  # not run at all (queue full, server stopping): the attempt does not count


class Turn(msgspec.Struct, frozen=True):
    """The answer to a runner's report: the job's status, and what to run next."""

    status: str
    items: list[ClaimedItem]
    num_open: int  # items that have not ended


def result_id(job_id: str, line: int) -> str:
    """The id of an item's result: the same however often the item is run."""
    return f"batch_req_{job_id.removeprefix('batch_')}_{line}"


_NOT_RUN: Final = {
    ItemState.CANCELLED: ("batch_cancelled", "the job was cancelled before this item had ended"),
    ItemState.EXPIRED: ("batch_expired", "the job's completion_window was over before this item had ended"),
}


def error_line(job_id: str, line: int, custom_id: str, code: str, message: str) -> bytes:
    """The result of an item that has no answer."""
    value = {"id": result_id(job_id, line), "custom_id": custom_id, "response": None}
    return json.dumps({**value, "error": {"code": code, "message": message}}).encode()


def result_line(row: sqlite3.Row) -> bytes:
    """The result of an item that has ended."""
    if row["result"] is not None:
        return bytes(row["result"])
    code, message = _NOT_RUN.get(row["state"], ("deleted", "the file with this result was deleted"))
    return error_line(row["job"], row["line"], row["custom_id"], code, message)


def file_row(row: sqlite3.Row) -> FileRow:
    """From the table."""
    return FileRow(**{name: row[name] for name in FileRow.__struct_fields__})


def job_row(row: sqlite3.Row) -> JobRow:
    """From the table."""
    return JobRow(**{name: row[name] for name in JobRow.__struct_fields__})
