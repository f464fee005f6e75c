"""The doctor says what is missing and how to mend it, and never fails itself."""

import json
import shutil
import socket
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from argosy.deploy import cli, doctor
from argosy.deploy.doctor import Finding
from argosy.deploy.settings import default_model


def test_this_machine_is_examined_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """As a new user runs it."""
    cli.main(["doctor", "--port", "0"])
    shown = capsys.readouterr().out
    for name in ("Python", "torch", "ray", "memory", "/dev/shm", "port 0", "model"):
        assert name in shown


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_is_none_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It was tried all the same, and ended with the socket's traceback."""
    assert cli.main(["doctor", "--port", port]) == 2
    assert f"port={port}: must be from 0 to 65535" in capsys.readouterr().err


def test_programs_get_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Every finding has a state; whatever is not ok says how to mend it."""
    cli.main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert {finding["state"] for finding in findings} <= {"ok", "warn", "fail"}
    assert all(finding["fix"] for finding in findings if finding["state"] != "ok")


def test_a_broken_model_folder_fails(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    """An empty folder is no model."""
    assert cli.main(["doctor", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_no_hub_name(capsys: pytest.CaptureFixture[str]) -> None:
    """It was said to be fetched later, and everything to be fine."""
    assert cli.main(["doctor", "/no/such/folder"]) == 1
    assert "/no/such/folder is no folder here" in capsys.readouterr().out
    assert doctor._model("Qwen/Qwen3-0.6B").state == "warn"


def test_a_missing_or_old_package_names_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too old fails like missing."""
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor._package("torch") == Finding(
        "torch", "fail", "not installed; needed for the models", "pip install 'torch>=2.11'"
    )
    monkeypatch.setattr(doctor, "_version", lambda name: "2.9.1+cpu")
    assert doctor._package("torch").state == "fail"
    monkeypatch.setattr(doctor, "_version", lambda name: "2.11.0")
    assert doctor._package("torch").state == "ok"


def test_a_card_wants_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are written in it; a machine without a card does without."""
    monkeypatch.setattr(doctor, "_rank_memory", lambda port: ())
    for gpus, version, state in (
        (["NVIDIA H200"], None, "fail"), (["NVIDIA H200"], "3.5.1", "fail"), (["NVIDIA H200"], "3.6.0", "ok"),
        ([], None, ""),
    ):  # fmt: skip
        monkeypatch.setattr(doctor, "read_gpus", lambda found=gpus: found)
        monkeypatch.setattr(doctor, "_version", lambda name, found=version: found)
        found = {finding.name: finding for finding in doctor.examine(None, 0)}
        assert (found["triton"].state if "triton" in found else "") == state
        assert found["GPUs"].state == ("ok" if gpus else "warn")


@pytest.mark.parametrize(
    ("check", "name", "enough", "too_little", "state"),
    [
        ("_python", "sys.version_info", (3, 13, 9), (3, 14, 0), "warn"),
        ("_cores", "os.sched_getaffinity", lambda _: {0, 1}, lambda _: {0}, "warn"),
        ("_memory", "psutil.virtual_memory", lambda: SimpleNamespace(available=2 << 30, total=4 << 30),
         lambda: SimpleNamespace(available=(2 << 30) - 1, total=4 << 30), "warn"),
        ("_shared_memory", "shutil.disk_usage", lambda _: SimpleNamespace(free=128 << 20),
         lambda _: SimpleNamespace(free=(128 << 20) - 1), "fail"),
        ("_temporary_folder", "shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 30),
         lambda _: SimpleNamespace(free=(1 << 30) - 1), "warn"),
        ("_open_files", "resource.getrlimit", lambda _: (1024, 4096), lambda _: (1023, 4096), "warn"),
    ],
)  # fmt: skip
def test_too_little_is_told_with_its_cure(
    check: str, name: str, enough: object, too_little: object, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just enough is; a little less is not."""
    module, attribute = name.split(".")
    for given, expected in ((enough, "ok"), (too_little, state)):
        monkeypatch.setattr(getattr(doctor, module), attribute, given)
        found = getattr(doctor, check)()
        assert (found.state, bool(found.fix)) == (expected, expected != "ok"), found


def test_a_long_temporary_folder_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's files go to another then; the doctor said that serving could not work."""
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=len(folder) << 30))
    for folder, found in (
        ("/short", "/short, 6.0 GiB free"),
        ("/" + "x" * 40, f"/tmp, 4.0 GiB free (not /{'x' * 40}, where names of Ray's sockets would be too long)"),
    ):
        monkeypatch.setattr(tempfile, "tempdir", folder)
        assert doctor._temporary_folder() == Finding("temporary folder", "ok", found)


def test_versions_are_compared_as_numbers() -> None:
    """2.9 comes before 2.11, whatever was built of it."""
    assert [doctor._numbers(text) for text in ("2.9.1+cpu", "2.11", "3.6.0rc1", "5")] == [(2, 9), (2, 11), (3, 6), (5,)]
    assert doctor._numbers("2.9.1+cpu") < (2, 11) <= doctor._numbers("2.13.0")


def test_weights_that_nothing_here_can_hold_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a card nor the machine's memory."""
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=4 << 30))
    for gpus, state in (([], "warn"), (["NVIDIA H200"], "ok")):
        monkeypatch.setattr(doctor, "read_gpus", lambda found=gpus: found)
        assert doctor._model(None).state == state


def test_a_folder_without_weights_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A clone without Git LFS, or weights in another form."""
    folder = tmp_path / "model"
    shutil.copytree(default_model(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert cli.main(["doctor", str(folder)]) == 1
    assert "has no *.safetensors" in capsys.readouterr().out


def test_a_taken_port_is_seen() -> None:
    """Somebody else's server."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert doctor._port(other.getsockname()[1]).state == "warn"


def test_a_folder_without_a_tokenizer_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The server refuses it, so the doctor does as well."""
    folder = tmp_path / "model"
    shutil.copytree(default_model(), folder)
    (folder / "tokenizer.json").unlink()
    assert cli.main(["doctor", str(folder)]) == 1
    assert "has no tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", b"\x10", "model.safetensors"),
        ("chat_template.jinja", b"{{ messages", "is not a template that can be compiled"),
        ("tokenizer.json", b"{}", "tokenizer.json"),
    ],
)
def test_what_serve_would_refuse_is_no_ok(
    name: str, content: bytes, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A folder whose weights were cut off, or whose chat template had a mistake, was 'ok' until it was served."""
    folder = tmp_path / "model"
    shutil.copytree(default_model(), folder)
    (folder / name).write_bytes(content)
    assert cli.main(["doctor", str(folder)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail  model")]
    assert said in line


def test_the_last_line_is_true_where_the_port_is_taken() -> None:
    """As it stands 'argosy serve' would end at once there; one warning is no plural."""
    taken = Finding("port 8000", "warn", "taken", "argosy serve --port 8001")
    assert doctor.table([taken]).endswith("Ready: 'argosy serve' should work here, on another port (1 warning).")
    slow = Finding("memory", "warn", "1 GiB free", "add some")
    assert doctor.table([slow, slow]).endswith("Ready: 'argosy serve' should work here (2 warnings).")
    assert doctor.table([slow._replace(state="fail"), taken]).endswith("1 to mend before 'argosy serve' can work.")
    assert doctor.table([taken._replace(state="ok")]).endswith("Ready: 'argosy serve' should work here.")


def test_a_server_that_listens_says_where_its_ranks_bytes_went() -> None:
    """Its figures are read as Prometheus does; whatever else listens there is passed over."""
    lines = [
        f'argosy_rank_memory_{name}{{model_name="m",rank="{rank}"{labels}}} {size}'
        for rank in (0, 1)
        for name, labels, size in (
            ("bytes", ',place="device",purpose="weights"', 3 << 20),
            ("bytes", ',place="device",purpose="kv"', 8 << 30),
            ("bytes", ',place="device",purpose="free"', 2 << 30),
            ("bytes", ',place="host",purpose="kv"', 6 << 30),
            ("total_bytes", "", 10 << 30),
        )
    ]

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write("\n".join(["argosy_epoch 0", *lines]).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        found = list(doctor._rank_memory(server.server_port))
        server.shutdown()
        thread.join(timeout=10)
    assert [one.name for one in found] == ["rank 0 memory", "rank 1 memory"]
    assert found[0].found == "weights 3.0 MiB + kv 8.00 + free 2.00 = 10.00 GiB; host: kv 6.00 GiB"
    assert list(doctor._rank_memory(server.server_port)) == []
