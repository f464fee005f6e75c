"""The examples run as they stand: nobody who tries one should be the first."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *words: str) -> str:
    """What it prints."""
    command = [sys.executable, "-P", str(EXAMPLES / name), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples_that_talk_to_a_server(tmp_path: Path) -> None:
    """A job is found again by its key, with the same results; chats come in pieces."""
    command = [sys.executable, str(Path(__file__).with_name("job_server.py")), str(tmp_path / "jobs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            first = run("a_job.py", url)
            assert first.splitlines()[-1] == "20 of 20 done"
            assert run("a_job.py", url) == first
            assert run("many_chats.py", url).count(" pieces: ") == 3
        finally:
            server.kill()


@pytest.mark.timeout(180)
def test_the_example_without_a_server() -> None:
    """Two answers to each of three prompts."""
    assert run("offline.py").count(" -> ") == 6
