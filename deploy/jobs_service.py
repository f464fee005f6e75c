"""Jobs as one replica of the doors has them: the journal behind its thread, and the runner beside it."""

import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from argosy.cluster.protocol.config import ServerConfig
from argosy.deploy.gateway import Gateway
from argosy.deploy.jobs_folder import JobFolder
from argosy.deploy.jobs_items import GatewayItems, Work
from argosy.deploy.jobs_journal import Journal
from argosy.deploy.jobs_rows import FileRow
from argosy.deploy.jobs_runner import JobRunner, JournalThread

SPARE_DISK_BYTES: Final = 64 * 1024 * 1024  # stay free for results, after an upload
_ROWS_AT_ONCE: Final = 256
_BYTES_AT_ONCE: Final = 256 * 1024

Value = TypeVar("Value")


class JobService:
    """Raises `ConfigError` when the folder can't be used. `start` and `stop` belong to the engine client's loop."""

    def __init__(
        self,
        folder: JobFolder,
        gateway: Gateway,
        works: Mapping[str, Work],
        *,
        num_interactive: Callable[[], int] = lambda: 0,
        is_alone: bool = False,
        clock: Callable[[], float] = time.time,
    ):
        self.folder = folder
        self.gateway = gateway
        self.journal = Journal(folder, clock=clock)
        self.endpoints = tuple(works)
        self._thread = JournalThread(self.journal)
        items = GatewayItems(gateway, works, folder, num_interactive=num_interactive, is_alone=is_alone)
        self.runner = JobRunner(self._thread, items)

    @property
    def server(self) -> ServerConfig:
        """The doors' settings."""
        return self.gateway.config.server

    def start(self) -> None:
        """Take up the jobs that wait."""
        self.runner.start()

    async def stop(self) -> None:
        """Put down what runs; whoever opens the folder next goes on."""
        await self.runner.stop()
        await self._thread.close()

    async def call(self, function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        """A method of the journal, in its thread."""
        return await self._thread.call(function, *args, **kwargs)

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether an upload of so many bytes leaves the disk some room."""
        return shutil.disk_usage(self.folder.path).free > num_bytes + SPARE_DISK_BYTES

    async def keep_upload(self, tenant: str, row: FileRow, written: Path) -> None:
        """A file whose bytes are on disk becomes one of ours."""
        os.rename(written, self.folder.file(row.id))
        await self.call(self.journal.add_file, tenant, row)

    async def content(self, row: FileRow) -> AsyncIterator[bytes]:
        """The bytes of a file, a piece at a time."""
        if not row.job:
            with self.folder.file(row.id).open("rb") as file:
                while piece := file.read(_BYTES_AT_ONCE):
                    yield piece
            return
        line = 0
        while rows := await self.call(self.journal.result_lines, row.job, row.purpose, line, _ROWS_AT_ONCE):
            line = rows[-1][0]
            yield b"".join(result + b"\n" for _, result in rows)
