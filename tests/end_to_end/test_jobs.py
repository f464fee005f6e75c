"""A job on a real server while every process that has to do with it is killed: one exact result line for each item."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from argosy import Client, Job
from argosy.cluster.oracle import oracle_continuation, write_oracle_model
from argosy.deploy.owned_folder import short_temp_folder
from argosy.placement.ports import free_port

START_SECONDS = 240
NUM_ITEMS, NUM_TOKENS, VOCAB_SIZE = 200, 100, 997


class Server:
    """`argosy serve` of the oracle model, whose only right answers are known, at two tensor-parallel ranks."""

    def __init__(self, model: Path, jobs: Path, tmp: str):
        self.port = free_port("127.0.0.1")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"TMPDIR": tmp, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        flags = ["--load-format=dummy", "--skip-tokenizer-init", "--cpu-threads=1", "-tp=2", f"--port={self.port}"]
        flags += ["--max-model-len=512", "--num-gpu-blocks-override=400", "--max-num-seqs=16"]
        command = [sys.executable, "-P", "-m", "argosy.deploy.cli", "serve", str(model), *flags, f"--job-dir={jobs}"]
        with Path(f"{tmp}.err").open("ab") as err:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=err, env=environment, start_new_session=True
            )
        assert self.process.stdout is not None
        while b"Try it" not in (line := self.process.stdout.readline()):
            assert line, Path(f"{tmp}.err").read_text()
        self.url = f"http://127.0.0.1:{self.port}"

    def kill(self, title: str) -> int:
        """kill -9 of all processes of a kind; how many they were."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{title}"):
                    process.kill()
                    found.append(process)
            except psutil.Error:
                continue
        psutil.wait_procs(found, timeout=20)
        return len(found)

    def kill_all(self) -> None:
        """kill -9 of the server and of all that it started, at once, as when a machine's power goes."""
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=20)
        self.process.wait()


@pytest.fixture
def short_tmp() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="j", dir=short_temp_folder(20))
    yield folder
    subprocess.run(["rm", "-rf", folder, f"{folder}.err"], check=True)


def wait_for_more(job: Job, seconds: float = 120.0) -> None:
    """Until results come (again)."""
    before, deadline = job.refresh().counts["completed"], time.monotonic() + seconds
    while job.refresh().counts["completed"] <= before and not job.has_ended:
        assert time.monotonic() < deadline, job.raw
        time.sleep(0.05)


def test_a_job_outlives_the_door_the_ranks_the_driver_and_the_whole_server(short_tmp: str, tmp_path: Path) -> None:
    """One after the other is killed while items run, at last everything at once; the next server ends the job."""
    model = write_oracle_model(tmp_path / "oracle", vocab_size=VOCAB_SIZE)
    prompts = [[1 + n % 7, 2 + n, 3] for n in range(NUM_ITEMS)]
    server = Server(model, tmp_path / "jobs", short_tmp)
    num_killed = {}
    try:
        with Client(server.url) as client:
            job = client.submit(prompts, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, return_token_ids=True)
            for title in ("ServeReplica", "WorkerActor", "DriverActor"):
                wait_for_more(job)
                assert not job.has_ended
                num_killed[title] = server.kill(title)
            wait_for_more(job)
            assert not job.has_ended
    finally:
        server.kill_all()
    doors = num_killed.pop("ServeReplica")  # as many as the cores of this machine can work
    assert (doors >= 1, num_killed) == (True, {"WorkerActor": 2, "DriverActor": 1})
    server = Server(model, tmp_path / "jobs", short_tmp)
    try:
        with Client(server.url) as client:
            job = client.job(job.id).wait(timeout_seconds=START_SECONDS)
            assert job.counts == {"total": NUM_ITEMS, "completed": NUM_ITEMS, "failed": 0}
            results = list(job.results())
    finally:
        server.kill_all()
    assert sorted(result.line for result in results) == list(range(1, NUM_ITEMS + 1))
    for result in results:
        expected = oracle_continuation(prompts[result.line - 1], NUM_TOKENS, VOCAB_SIZE)
        assert result.answer.raw["choices"][0]["token_ids"] == expected, result.line
