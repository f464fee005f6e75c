"""Ranks and a driver as plain processes of this machine, without Ray: for tests, and where Ray is not wanted.

The driver is `python -m argosy.deploy.local_launch`. Its input carries one line with what to run and then commands; the
end of its input (its owner has gone) ends it, and a rank ends when its driver's connection does. So nothing outlives
whoever started it, however that ended.
"""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

import msgspec

from argosy.cluster.driver_loop import DriverLoop, DriverStatus, settle_garbage
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ChannelClosed, PlacementImpossible
from argosy.cluster.protocol.messages import EngineInfo
from argosy.cluster.rank_processes import RankDoor
from argosy.deploy.owned_folder import short_temp_folder
from argosy.placement.plan import PlacementPlan
from argosy.placement.ports import free_port

RANK_MODULE: Final = "argosy.workers.worker_main"
_EXIT_SECONDS: Final = 20.0


class LocalBoot(msgspec.Struct, frozen=True, kw_only=True):
    """Owner -> driver process: what to run."""

    config: ServingConfig
    plan: PlacementPlan
    info: EngineInfo
    folder: str  # private to this engine: sockets and logs
    secret: str
    rank_module: str = RANK_MODULE


class LocalCommand(msgspec.Struct, frozen=True, kw_only=True):
    """Owner -> driver process: say how you are (answered by a line of `DriverStatus`), or stop."""

    stop: bool = False
    drain_seconds: float = 0.0


class LocalRanks:
    """Starts the ranks of a plan as processes; satisfies `StartRanks`."""

    def __init__(self, config: ServingConfig, plan: PlacementPlan, *, log_folder: str, rank_module: str = RANK_MODULE):
        self.config, self.plan = config, plan
        self.log_folder, self.rank_module = log_folder, rank_module

    def __call__(self, door: RankDoor, on_dead: Callable[[int, str], None]) -> "LocalProcesses":
        """Start them all."""
        processes = LocalProcesses(rendezvous=f"127.0.0.1:{free_port('127.0.0.1')}")
        try:
            for rank in self.plan.ranks:
                boot = {
                    # Without a GPU the index means nothing; with some, each rank has its own.
                    "rank": msgspec.structs.replace(rank, gpu=rank.global_rank),
                    "config": self.config,
                    "driver_address": door.unix,
                    "secret": door.secret,
                    "node": os.uname().nodename,
                }
                log = Path(self.log_folder, f"rank-{rank.global_rank}.log")
                process = start_process(self.rank_module, log)
                processes.add(rank.global_rank, process, log, on_dead)
                with contextlib.suppress(BrokenPipeError):  # it has ended already: the watcher tells
                    assert process.stdin is not None
                    process.stdin.write(msgspec.json.encode(boot))
                    process.stdin.close()
        except OSError as error:
            processes.kill()
            raise PlacementImpossible(f"could not start a rank's process: {error}") from error
        return processes


class LocalProcesses:
    """The processes of one epoch; satisfies `RankHandles`."""

    def __init__(self, *, rendezvous: str):
        self.rendezvous = rendezvous
        self._processes: list[subprocess.Popen[bytes]] = []
        self._killed = threading.Event()

    def add(
        self, global_rank: int, process: "subprocess.Popen[bytes]", log: Path, on_dead: Callable[[int, str], None]
    ) -> None:
        """Watch this one, too."""
        self._processes.append(process)

        def watch() -> None:
            status = process.wait()
            if not self._killed.is_set():
                on_dead(global_rank, f"{_ending(status)}; {last_line(log)}")

        threading.Thread(target=watch, name=f"watch-rank-{global_rank}", daemon=True).start()

    def kill(self) -> None:
        """End all of them now and wait until they are gone. May be called twice."""
        self._killed.set()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait(timeout=_EXIT_SECONDS)


class LocalDriver:
    """The driver's process, from its owner's side."""

    def __init__(
        self,
        config: ServingConfig,
        plan: PlacementPlan,
        info: EngineInfo,
        *,
        secret: str,
        rank_module: str = RANK_MODULE,
    ):
        self.folder = tempfile.mkdtemp(prefix="argosy-", dir=short_temp_folder(50))  # mode 0700
        self._log = Path(self.folder, "driver.log")
        self._lock = threading.Lock()
        self._process = start_process("argosy.deploy.local_launch", self._log, own_session=True, answers=True)
        boot = LocalBoot(
            config=config, plan=plan, info=info, folder=self.folder, secret=secret, rank_module=rank_module
        )
        self._write(boot)

    @property
    def pid(self) -> int:
        """The driver's process."""
        return self._process.pid

    def status(self) -> DriverStatus:
        """Ask the driver how it is. Raises `ChannelClosed` when its process has ended."""
        with self._lock:
            self._write(LocalCommand())
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
        if not line:
            raise ChannelClosed(f"the driver's process ended: {last_line(self._log)}")
        return msgspec.json.decode(line, type=DriverStatus)

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Stop driver and ranks and remove what they used. May be called twice."""
        with contextlib.suppress(ChannelClosed), self._lock:  # ended already
            self._write(LocalCommand(stop=True, drain_seconds=drain_seconds))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.wait(timeout=drain_seconds + _EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):  # ended meanwhile
                os.killpg(self._process.pid, signal.SIGKILL)  # its own session: the driver and its ranks, nobody else
            self._process.wait(timeout=_EXIT_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # broken already
                pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise ChannelClosed(f"the driver's process ended: {last_line(self._log)}") from error


def start_process(
    module: str, log: Path, *, own_session: bool = False, answers: bool = False
) -> "subprocess.Popen[bytes]":
    """`python -m module` of this same Python, its words in a file, and nothing imported from the current folder."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if answers else out,
            stderr=out,
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=own_session,
        )


def last_line(log: Path) -> str:
    """What a process said last, for an error of one line."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return "it left no log"
    return f"it said last: {lines[-1][:500]}" if lines else "it said nothing"


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def main() -> int:
    """The driver's process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    commands: IO[bytes] = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    boot = msgspec.json.decode(commands.readline(), type=LocalBoot)
    ranks = LocalRanks(boot.config, boot.plan, log_folder=boot.folder, rank_module=boot.rank_module)
    loop = DriverLoop(boot.config, ranks, info=boot.info, folder=boot.folder, secret=boot.secret)
    settle_garbage()
    thread = threading.Thread(target=loop.run, name="driver-loop")
    thread.start()
    try:
        for line in _lines(commands):
            command = msgspec.json.decode(line, type=LocalCommand)
            if command.stop:
                loop.stop(command.drain_seconds)
                loop.stopped.wait(command.drain_seconds + _EXIT_SECONDS)
                break
            with contextlib.suppress(BrokenPipeError):  # who asked has gone: the end of the input says so, too
                answers.write(msgspec.json.encode(loop.status()) + b"\n")
    finally:  # whatever it was: a loop that nobody owns must not go on
        loop.stop()
        thread.join(timeout=_EXIT_SECONDS)
        shutil.rmtree(boot.folder, ignore_errors=True)  # the owner does so as well, unless it was killed
    return 0


def _lines(pipe: IO[bytes]) -> Iterator[bytes]:
    return iter(pipe.readline, b"")


if __name__ == "__main__":
    sys.exit(main())
