"""The doctor says what is missing and how to mend it, and never fails itself."""

import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

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
