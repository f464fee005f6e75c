"""Works off jobs: takes up those that nobody works on, keeps a bounded number of their items running, writes results.

A runner lives in each replica of the doors. Which of them works on a job is settled by the job's lock, so when one is
killed another one (or the one that replaces it) takes the job up and runs again what was running.
"""

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeVar

from argosy.deploy.jobs_folder import JobLock
from argosy.deploy.jobs_input import JobInput
from argosy.deploy.jobs_journal import Journal
from argosy.deploy.jobs_rows import ClaimedItem, Ended, JobRow, Turn
from argosy.deploy.jobs_turns import Turns

log = logging.getLogger("argosy.jobs")

POLL_SECONDS: Final = 1.0  # for jobs, and ends of jobs, that other processes wrote down
_FULL_DISK_SECONDS: Final = 2.0
_HOUSEKEEPING_SECONDS: Final = 60.0

Value = TypeVar("Value")


class ItemRunner(Protocol):
    """How an item becomes a result line."""

    @property
    def model_names(self) -> Sequence[str]:
        """Jobs for these are ours."""

    def read_input(self, job: JobRow) -> JobInput:
        """Check a job's input. Called in a thread."""

    async def run(self, job: JobRow, item: ClaimedItem) -> Ended:
        """Run one item. Never raises, except when it is cancelled."""

    def num_seats(self) -> int:
        """How many items may run now, all jobs together; 0 while the engine takes none."""


class JournalThread:
    """The one thread of this process that reads and writes the journal."""

    def __init__(self, journal: Journal):
        self.journal, self.turns = journal, Turns(journal)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs-journal")

    async def call(self, function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        """Run a method of the journal there. What has begun is done to its end, also when the caller is cancelled."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._thread, lambda: function(*args, **kwargs)))

    async def close(self) -> None:
        """After what has begun."""
        await self.call(self.journal.close)
        self._thread.shutdown(wait=False)


class JobRunner:
    """Start it in the event loop of the engine's client; `stop` it there."""

    def __init__(self, thread: JournalThread, items: ItemRunner):
        self._thread, self._items = thread, items
        self._wake = asyncio.Event()
        self._working: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for jobs."""
        self._task = asyncio.create_task(self._look_for_jobs(), name="jobs")

    async def stop(self) -> None:
        """Put down what is being worked on, for whoever comes next."""
        tasks = [task for task in (self._task, *self._working.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """Something was written to the journal that a runner should see at once."""
        self._wake.set()
        self._wake = asyncio.Event()

    async def pause(self, seconds: float) -> None:
        """Sleep, or until somebody wakes us."""
        wake = self._wake
        with contextlib.suppress(TimeoutError):  # nobody woke us
            async with asyncio.timeout(seconds):
                await wake.wait()

    async def _look_for_jobs(self) -> None:
        loop = asyncio.get_running_loop()
        next_housekeeping = loop.time()
        while True:
            try:
                for job_id in await self._thread.call(self._thread.turns.live_jobs, self._items.model_names):
                    if job_id not in self._working:
                        self._take(job_id)
                if loop.time() >= next_housekeeping:
                    next_housekeeping = loop.time() + _HOUSEKEEPING_SECONDS
                    await self._thread.call(self._thread.journal.sweep)
            except (sqlite3.Error, OSError) as error:  # a loop that must not die: a full disk gets room again
                log.error("the journal of jobs can't be read or written: %s", error)
                await asyncio.sleep(_FULL_DISK_SECONDS)
            await self.pause(POLL_SECONDS)

    def _take(self, job_id: str) -> None:
        lock = self._thread.journal.folder.try_lock(job_id)
        if lock is None:
            return
        task = asyncio.create_task(self._work(job_id, lock), name=job_id)
        self._working[job_id] = task

    async def _work(self, job_id: str, lock: JobLock) -> None:
        try:
            while not await self._try_to_finish(job_id):
                await asyncio.sleep(_FULL_DISK_SECONDS)
        finally:
            lock.close()
            del self._working[job_id]

    async def _try_to_finish(self, job_id: str) -> bool:
        turns = self._thread.turns
        try:
            job = await self._thread.call(turns.take_up, job_id)
            if job.status == "validating":
                job = await self._validate(job)
            await _Round(self, job_id, self._thread, self._items).run(job)
            job = await self._thread.call(turns.finish, job_id)
            log.info("job %s %s: %d of %d done", job_id, job.status, job.completed, job.total)
        except (sqlite3.Error, OSError) as error:  # the disk is full, or its folder has gone for a while
            log.error("job %s can't go on: %s", job_id, error)
            return False
        return True

    async def _validate(self, job: JobRow) -> JobRow:
        turns = self._thread.turns
        found = await asyncio.to_thread(self._items.read_input, job)
        if found.errors:
            await self._thread.call(turns.refuse, job.id, found.errors)
        else:
            await self._thread.call(turns.begin, job.id, found.model, found.items)
        return await self._thread.call(self._thread.journal.job_of_any, job.id)

    @property
    def num_jobs(self) -> int:
        """Jobs that share the seats."""
        return max(1, len(self._working))


class _Round:
    """One job from its first item to its last, or until it is called off."""

    def __init__(self, runner: JobRunner, job_id: str, thread: JournalThread, items: ItemRunner):
        self._runner, self._job_id, self._thread, self._items = runner, job_id, thread, items
        self._running: dict[asyncio.Task[Ended], int] = {}  # its line
        self._ended: list[Ended] = []  # not written down yet

    async def run(self, job: JobRow) -> None:
        """Until no item is open, or the job is to end."""
        try:
            while True:
                seats = self._items.num_seats()
                share = max(1, seats // self._runner.num_jobs) if seats else 0
                turn = await self._turn(max(0, share - len(self._running)))
                if turn.status != "in_progress":
                    return
                for item in turn.items:
                    self._running[asyncio.create_task(self._items.run(job, item))] = item.line
                await self._wait()
        finally:
            for task in self._running:
                task.cancel()
            while self._running:
                await self._wait()
            await self._turn(0)

    async def _turn(self, num_wanted: int) -> Turn:
        ended, self._ended = self._ended, []
        turns = self._thread.turns
        return await self._thread.call(turns.turn, self._job_id, ended, num_wanted, num_running=len(self._running))

    async def _wait(self) -> None:
        """Until something has ended, or a while has passed: the job may have been called off."""
        woken = asyncio.ensure_future(self._runner.pause(POLL_SECONDS))
        await asyncio.wait((*self._running, woken), return_when=asyncio.FIRST_COMPLETED)
        woken.cancel()
        for task in [task for task in self._running if task.done()]:
            line = self._running.pop(task)
            self._ended.append(Ended(line, is_innocent=True) if task.cancelled() else task.result())
