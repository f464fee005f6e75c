"""Jobs from outside: the official client, our own, the command line, and kill -9 of who serves and of who asks."""

import contextlib
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from argosy import Client
from argosy.deploy import cli
from argosy.deploy.client import RemoteError
from argosy.placement.ports import free_port

HERE = Path(__file__).parent
SECRET = "xylophone-73-quicksilver"


class JobServer:
    """The server of `job_server.py`, which can be killed and started again at the same address."""

    def __init__(self, folder: Path, *, step_seconds: float = 0.002):
        self.folder, self.port = folder, free_port("127.0.0.1")
        self._step_seconds = step_seconds
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder.with_suffix(".log")
        self.start()

    def start(self) -> None:
        """Begin, or begin again."""
        command = [
            sys.executable,
            str(HERE / "job_server.py"),
            str(self.folder),
            str(self.port),
            str(self._step_seconds),
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip(), self.log.read_text()

    def kill(self) -> None:
        """As the kernel does it."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """In order."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobServer]:
    running = JobServer(tmp_path_factory.mktemp("jobs") / "jobs")
    yield running
    running.kill()


@pytest.fixture
def client(server: JobServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as found:
        yield found


def line(number: int, **more: Any) -> dict[str, Any]:
    """One of OpenAI's batch lines."""
    body = {"model": "tiny", "prompt": f"def f{number}(x):", "max_tokens": 6, "temperature": 0, **more}
    return {"custom_id": f"item-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def upload(client: openai.OpenAI, lines: list[Any]) -> str:
    text = "\n".join(part if isinstance(part, str) else json.dumps(part) for part in lines)
    return client.files.create(file=("in.jsonl", text.encode()), purpose="batch").id


def wait(client: openai.OpenAI, batch_id: str, *statuses: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while (batch := client.batches.retrieve(batch_id)).status not in statuses:
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def test_the_official_client_from_upload_to_deletion(client: openai.OpenAI) -> None:
    """Good lines go to the output, an impossible one to the errors, all counted, and files can be taken away."""
    first = "\ufeff" + json.dumps(line(1))  # as editors of Windows begin a file
    file_id = upload(client, [first, line(2, temperature=-1), line(3, n=2, temperature=1.0)])
    assert client.files.retrieve(file_id).purpose == "batch"
    assert client.files.content(file_id).text.count("custom_id") == 3
    batch = client.batches.create(
        input_file_id=file_id, endpoint="/v1/completions", completion_window="24h", metadata={"night": "1"}
    )
    assert batch.status == "validating"
    batch = wait(client, batch.id, "completed")
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 2, 1)
    assert batch.metadata == {"night": "1"}
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    content = client.files.content(batch.output_file_id)
    rows = [json.loads(text) for text in content.text.splitlines()]
    assert [row["custom_id"] for row in rows] == ["item-1", "item-3"]
    assert len(content.content) == client.files.retrieve(batch.output_file_id).bytes
    direct = client.completions.create(model="tiny", prompt="def f1(x):", max_tokens=6, temperature=0)
    assert rows[0]["response"]["status_code"] == 200
    assert rows[0]["response"]["body"]["choices"][0]["text"] == direct.choices[0].text
    assert len(rows[1]["response"]["body"]["choices"]) == 2
    (error,) = [json.loads(text) for text in client.files.content(batch.error_file_id).text.splitlines()]
    assert (error["custom_id"], error["response"]["status_code"]) == ("item-2", 400)
    assert error["response"]["body"]["error"]["param"] == "temperature"
    for found in (batch.output_file_id, batch.error_file_id, file_id):
        assert client.files.delete(found).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(found)


def test_chat_and_lists_a_page_at_a_time(client: openai.OpenAI) -> None:
    """The other endpoint, and the client's own paging."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    chat = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body}
    files = [upload(client, [chat]) for _ in range(3)]
    batches = [
        client.batches.create(input_file_id=f, endpoint="/v1/chat/completions", completion_window="24h").id
        for f in files
    ]
    for batch_id in batches:
        batch = wait(client, batch_id, "completed")
        assert batch.output_file_id is not None
        answer = json.loads(client.files.content(batch.output_file_id).text)["response"]["body"]
        assert answer["choices"][0]["message"]["role"] == "assistant"
    assert [b.id for b in client.batches.list(limit=1)][:3] == batches[::-1]
    listed = [f.id for f in client.files.list(purpose="batch", limit=2, order="asc")]
    assert listed[-3:] == files
    first = client.files.list(limit=1)
    assert first.has_more


BROKEN: list[tuple[Any, str]] = [
    ("{", "line"),
    ('["a"]', "line"),
    ({**line(2), "custom_id": 7}, "custom_id"),
    (line(1), "custom_id"),  # as the line before
    ({**line(2), "method": "GET"}, "method"),
    ({**line(2), "url": "/v1/chat/completions"}, "url"),
    ({**line(2), "body": "text"}, "body"),
    ({**line(2), "extra": 1}, "extra"),
    (line(2, max_tokens="many"), "body.max_tokens"),
    (line(2, prompt=None), "body.prompt"),
    (line(2, model="other"), "model"),
    (line(2, stream=True), "body.stream"),
    (line(2, guided_json={}), "body.guided_json"),
]


def test_what_is_wrong_is_said_with_its_line_and_its_field(client: openai.OpenAI) -> None:
    """Before anything runs; the words of a prompt are not repeated."""
    for broken, field in BROKEN:
        file_id = upload(client, [line(1, prompt=SECRET), "", broken])
        batch = client.batches.create(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h")
        batch = wait(client, batch.id, "failed", "completed")
        assert batch.status == "failed", broken
        assert batch.errors is not None
        assert batch.errors.data is not None
        (error,) = batch.errors.data
        assert (error.line, error.param) == (3, field), (error, broken)
        assert SECRET not in str(error)


def test_requests_for_files_and_batches_that_make_no_sense(server: JobServer, client: openai.OpenAI) -> None:
    """Each a 4xx with the field."""
    http = httpx.Client(base_url=server.url)
    file_id = upload(client, [line(1)])
    good = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    for change, field in (
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "99d"}, "completion_window"),
        ({"input_file_id": "file-x"}, "input_file_id"),
        ({"input_file_id": None}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
    ):
        answer = http.post("/v1/batches", json={**good, **change})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    for method, path, status in (
        ("GET", "/v1/files/file-x", 404),
        ("GET", "/v1/files/file-x/content", 404),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd/content", 405),
        ("DELETE", "/v1/files/file-x", 404),
        ("GET", "/v1/batches/batch_x", 404),
        ("POST", "/v1/batches/batch_x/cancel", 404),
        ("PUT", "/v1/files", 405),
        ("GET", "/v1/files?limit=0", 400),
        ("GET", "/v1/batches?limit=1000", 400),
        ("GET", "/v1/files?order=best", 400),
        ("POST", "/v1/files", 400),
    ):
        answer = http.request(method, path)
        assert (answer.status_code, "error" in answer.json()) == (status, True), (method, path, answer.text)
    forms: list[dict[str, Any]] = [
        {"files": {"file": ("a", b"x")}},
        {"files": {"file": ("a", b"x")}, "data": {"purpose": "fine-tune"}},
        {"files": {"other": ("a", b"x")}, "data": {"purpose": "batch"}},
        {"files": [("file", ("a", b"x")), ("file", ("b", b"x"))], "data": {"purpose": "batch"}},
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
    ]
    for form in forms:
        assert http.post("/v1/files", **form).status_code == 400, form
    assert not [path for path in (server.folder / "files").iterdir() if path.suffix]


def test_a_client_that_is_killed_finds_its_job_again(server: JobServer, tmp_path: Path) -> None:
    """`argosy submit FILE --output OUT`, killed while it waits, and the same command again: one job, whole results."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(f'"def g{n}(x):"\n' for n in range(60)))
    command = [sys.executable, "-P", "-m", "argosy.deploy.cli", "submit", str(path), "--url", server.url]
    command += ["--output", str(out), "--max-tokens", "32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as first:
        assert first.stdout is not None
        job_id = first.stdout.readline().decode().strip()
        first.kill()
    assert not out.exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == job_id
    assert "60 done, 0 failed" in again.stderr
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == [f"item-{n}" for n in range(1, 61)]


def test_the_command_line_lists_shows_and_refuses(
    server: JobServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a person types."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 2, "custom_id": "mine"}\n')
    assert cli.main(["submit", str(path), "--url", server.url, "--wait", "--key", "the key"]) == 0
    job_id = capsys.readouterr().out.strip()
    assert cli.main(["jobs", "--url", server.url]) == 0
    assert re.search(rf"{job_id}  \[#+\] completed  1/1", capsys.readouterr().out)
    assert cli.main(["jobs", "show", job_id, "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "completed"
    assert cli.main(["jobs", "results", job_id, "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out)["custom_id"] == "mine"
    assert cli.main(["jobs", "cancel", job_id, "--url", server.url]) == 1
    assert "only a job that runs can be cancelled" in capsys.readouterr().err
    assert cli.main(["jobs", "show", "--url", server.url]) == 2
    assert cli.main(["submit", str(tmp_path / "none.jsonl"), "--url", server.url]) == 2
    assert cli.main(["submit", str(path), "--url", server.url, "--again"]) == 0
    told = capsys.readouterr()
    assert f"'argosy jobs wait {told.out.strip()} --url {server.url}'" in told.err  # as it can be pasted
    path.write_text('{"prompt": "a"}\nnot json\n')
    assert cli.main(["submit", str(path), "--url", server.url]) == 1
    assert "in.jsonl:2" in capsys.readouterr().err


def test_results_come_one_by_one_and_a_cancelled_job_goes_on_where_it_was(tmp_path: Path) -> None:
    """The first results are there long before the last; cancelling keeps them; resuming adds the rest, none twice."""
    server = JobServer(tmp_path / "jobs", step_seconds=0.02)
    try:
        with Client(server.url) as client:
            job = client.submit([f"def f{n}(x):" for n in range(40)], max_tokens=8)
            stream = job.results()
            early = [next(stream) for _ in range(3)]
            assert not job.refresh().has_ended
            assert job.cancel().status in ("cancelling", "cancelled")
            assert job.cancel().status in ("cancelling", "cancelled")  # asked twice: the first answer was lost
            rest = list(stream)
            assert job.refresh().status == "cancelled"
            results = [*early, *rest]
            assert sorted(r.line for r in results) == list(range(1, 41))
            done = {r.line for r in results if r.is_done}
            assert 3 <= len(done) < 40
            assert "cancelled" in str(next(r.error for r in results if not r.is_done))
            after = max(r.seq for r in results)
            assert job.resume().status == "in_progress"
            more = list(job.results(after=after))
            assert {r.line for r in more} == set(range(1, 41)) - done
            assert all(r.is_done and r.text for r in more)
            assert job.counts == {"total": 40, "completed": 40, "failed": 0}
            with pytest.raises(RemoteError, match="only a cancelled or expired job"):
                job.resume()
            slow = client.submit(["x"] * 30, max_tokens=200, completion_window="1s")
            assert slow.wait(timeout_seconds=60).status == "expired"
    finally:
        server.kill()


def test_kill_9_of_the_server_at_random_moments_leaves_one_line_for_each_item(tmp_path: Path) -> None:
    """Uploads, validation, work and ends are interrupted; results that were seen stay as they were seen."""
    rng = random.Random(7)
    server = JobServer(tmp_path / "jobs", step_seconds=0.005)
    num_kills = 0
    try:
        with Client(server.url) as client:
            job = client.submit([f"def f{n}(x):" for n in range(150)], max_tokens=12, temperature=0, key="k")
            seen: dict[int, tuple[int, Any]] = {}
            for _ in range(4):
                time.sleep(rng.random())
                server.kill()
                num_kills += 1
                server.start()
                job.refresh()
                after = max((seq for seq, _ in seen.values()), default=0)
                with contextlib.suppress(TimeoutError):  # the next round has the rest
                    for result in job.results(after=after, timeout_seconds=0.2):
                        assert result.line not in seen
                        seen[result.line] = (result.seq, result.raw)
            assert client.submit([], key="k").id == job.id
            for result in job.results():
                assert seen.setdefault(result.line, (result.seq, result.raw)) == (result.seq, result.raw)
            assert job.wait(timeout_seconds=60).status == "completed"
            assert job.counts == {"total": 150, "completed": 150, "failed": 0}
            assert sorted(seen) == list(range(1, 151))
            assert client.job(job.id).download(tmp_path / "out.jsonl") == 150
        texts = [json.loads(t)["response"]["body"]["choices"][0]["text"] for t in (tmp_path / "out.jsonl").open()]
        quiet = JobServer(tmp_path / "quiet", step_seconds=0.001)
        with Client(quiet.url) as client:
            calm = client.submit([f"def f{n}(x):" for n in range(150)], max_tokens=12, temperature=0)
            expected = {result.line: result.text for result in calm.results()}
        quiet.kill()
        assert dict(enumerate(texts, 1)) == expected
    finally:
        server.kill()
    assert num_kills == 4


def test_an_orderly_stop_puts_the_work_down_and_a_second_server_takes_it_up(tmp_path: Path) -> None:
    """SIGTERM: nothing counts as lost. Meanwhile two servers share one folder, and one of them works on the job."""
    first = JobServer(tmp_path / "jobs", step_seconds=0.02)
    second = JobServer(tmp_path / "jobs", step_seconds=0.02)
    try:
        with Client(first.url) as client:
            job = client.submit([f"def f{n}(x):" for n in range(40)], max_tokens=8)
            next(job.results())
            first.stop()
        with Client(second.url) as client:
            assert client.job(job.id).wait(timeout_seconds=60).counts == {"total": 40, "completed": 40, "failed": 0}
    finally:
        first.kill()
        second.kill()


def test_a_full_disk_stops_the_work_and_room_lets_it_go_on(tmp_path: Path) -> None:
    """Files may not grow any more, as under a quota: the job waits, the doors answer, and later all is well."""
    server = JobServer(tmp_path / "jobs", step_seconds=0.001)
    try:
        with Client(server.url) as client:
            job = client.submit([f"def f{n}(x):" for n in range(120)], max_tokens=64)
            next(job.results())
            journal = server.folder / "journal.sqlite3-wal"
            subprocess.run(
                ["prlimit", f"--pid={server.process.pid}", f"--fsize={journal.stat().st_size}:unlimited"], check=True
            )
            deadline = time.monotonic() + 30
            while "can't go on" not in server.log.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert client.complete("x", max_tokens=1).finish_reason == "length"
            subprocess.run(["prlimit", f"--pid={server.process.pid}", "--fsize=unlimited:unlimited"], check=True)
            assert job.wait(timeout_seconds=60).counts == {"total": 120, "completed": 120, "failed": 0}
            assert len(list(job.results())) == 120
    finally:
        server.kill()


def test_prompts_and_answers_are_in_no_log_and_readable_by_their_owner_only(
    server: JobServer, client: openai.OpenAI
) -> None:
    """What was asked lies in files of mode 0600, nowhere else."""
    file_id = upload(client, [line(1, prompt=SECRET)])
    batch = client.batches.create(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h")
    wait(client, batch.id, "completed")
    assert SECRET not in server.log.read_text()
    for path in [server.folder, *server.folder.rglob("*")]:
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0, path
