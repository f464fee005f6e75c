"""The folder of jobs on disk: where it is, who may read it, the journal's schema, and who works on which job.

    FOLDER/journal.sqlite3    what is known of files, jobs and items (SQLite, write-ahead log)
    FOLDER/files/<id>         what was uploaded, byte for byte
    FOLDER/locks/<id>         locked by the one process that works on this job

All of it is readable by its owner alone. A lock is the kernel's (`flock`): it ends with the process that holds it,
however that ended, so whoever takes a job up again needs neither a clock nor a heartbeat.
"""

import contextlib
import fcntl
import os
import sqlite3
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from argosy.cluster.protocol.errors import ConfigError

SCHEMA_VERSION: Final = 1
_APPLICATION_ID: Final = 0x41524759  # "ARGY"
_BUSY_SECONDS: Final = 30.0
_FOLDERS: Final = ("files", "locks")
_SCHEMA: Final = """
CREATE TABLE files (
    n INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    purpose TEXT NOT NULL,
    filename TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    job TEXT NOT NULL DEFAULT ''      -- of a result file: the job whose items are its lines
);
CREATE TABLE jobs (
    n INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    key TEXT,                         -- the client's own word for this job: sent twice, it is one job
    endpoint TEXT NOT NULL,
    model TEXT NOT NULL DEFAULT '',   -- known once the input was read
    served TEXT NOT NULL,             -- names of the server that took it, as JSON: only such a server works on it
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    window_seconds INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    status TEXT NOT NULL,
    ending TEXT NOT NULL DEFAULT '',  -- what the status will be after finalizing, if not completed
    errors TEXT NOT NULL DEFAULT '[]',
    output_file_id TEXT,
    error_file_id TEXT,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    next_seq INTEGER NOT NULL DEFAULT 1,
    created_at INTEGER NOT NULL,
    in_progress_at INTEGER, expires_at INTEGER, finalizing_at INTEGER, completed_at INTEGER, failed_at INTEGER,
    expired_at INTEGER, cancelling_at INTEGER, cancelled_at INTEGER,
    UNIQUE (tenant, key)
);
CREATE TABLE items (
    job TEXT NOT NULL,
    line INTEGER NOT NULL,            -- in the input, from 1
    custom_id TEXT NOT NULL,
    start INTEGER NOT NULL,           -- where the line begins in the input, and
    length INTEGER NOT NULL,          -- how many bytes it has
    state INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    seq INTEGER,                      -- the how-manyth of its job to end
    result BLOB,                      -- the line of the output, NULL where it follows from the state
    PRIMARY KEY (job, line),
    UNIQUE (job, seq)
) WITHOUT ROWID;
CREATE INDEX items_by_state ON items (job, state, attempts, line);
"""


class JobFolder:
    """Paths of one folder of jobs. Raises `ConfigError` where it can't be used."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        try:
            for folder in (self.path, *(self.path / name for name in _FOLDERS)):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"job_dir={str(self.path)!r}: can't be made: {error.strerror}") from error
        found = self.path.stat()
        if found.st_uid != os.getuid():
            raise ConfigError(f"job_dir={str(self.path)!r}: belongs to another user; name a folder of your own")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(f"job_dir={str(self.path)!r}: others may write there; chmod 700 it")

    def file(self, file_id: str) -> Path:
        """Where the bytes of an uploaded file are. The id is one of ours."""
        return self.path / "files" / file_id

    def connect(self) -> sqlite3.Connection:
        """The journal, made or checked. Raises `ConfigError` when a newer Argosy wrote it or it is something else."""
        path = self.path / "journal.sqlite3"
        try:
            # SQLite gives its log the mode of the database, and the database that of the umask: so make it first, once:
            # closing a file drops all locks that this process has on it, also those of another connection
            with contextlib.suppress(FileExistsError):  # made before
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")  # a result that was reported stays, also without power
            with transaction(db):
                _prepare(db, path)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"job_dir={str(self.path)!r}: its journal can't be opened: {error}") from error
        return db

    def try_lock(self, job_id: str) -> "JobLock | None":
        """The right to work on a job, until it is closed or this process ends; None while somebody else has it."""
        descriptor = os.open(self.path / "locks" / job_id, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return JobLock(descriptor)


class JobLock:
    """Held by one process at a time."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def close(self) -> None:
        """Let others work on the job. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, and one writer at a time over all processes."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back by itself, as when the disk is full
            db.execute("ROLLBACK")
        raise


def default_job_folder() -> Path:
    """Where jobs are kept when nobody says where: in the user's state folder."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "argosy" / "jobs"


def choose_job_dir(given: str | None) -> str | None:
    """What `--job-dir` means: a folder that was tried; the default one, if it can be used; none for "none".

    Raises `ConfigError` for a folder that was named and can't be used.
    """
    if given == "none":
        return None
    folder = Path(given).expanduser() if given else default_job_folder()
    try:
        JobFolder(folder.absolute()).connect().close()
    except ConfigError as error:
        if given:
            raise
        print(f"argosy: no jobs (/v1/files, /v1/batches) in this server: {error}", file=sys.stderr)
        return None
    return str(folder.absolute())  # the doors have another current folder


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables, or see that they are ours and of this version."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    owner = int(db.execute("PRAGMA application_id").fetchone()[0])
    if owner == 0 and version == 0 and not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
        for statement in _SCHEMA.split(";"):
            if statement.strip():
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    elif owner != _APPLICATION_ID:
        raise ConfigError(f"{path} is no journal of Argosy; name another --job-dir")
    elif version != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} was written by another version of Argosy (its schema is {version}, this one's is "
            f"{SCHEMA_VERSION}); name another --job-dir, or use that version"
        )
