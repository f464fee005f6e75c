"""`argosy batch`: a file to a file, without a server; killed and run again it goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from argosy.deploy import cli

FLAGS = ["--backend", "local", "--max-model-len", "256", "--num-gpu-blocks-override", "64", "--cpu-threads", "1"]


def test_killed_in_the_middle_and_run_again(tmp_path: Path) -> None:
    """What was answered before the kill is not asked again; the output is whole, and nothing else remains."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"def f{n}(", "max_tokens": 40}) + "\n" for n in range(60)))
    command = [sys.executable, "-P", "-m", "argosy.deploy.cli", "batch", str(path), "--output", str(out), *FLAGS]
    command += ["--max-num-seqs", "4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        for text in first.stderr:
            if "in_progress" in text and not text.strip().startswith("in_progress: 0"):
                break
        first.send_signal(signal.SIGKILL)
    assert not out.exists()
    time.sleep(1.2)  # answers say whole seconds
    began = time.time()
    again = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert again.returncode == 0, again.stderr
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == [f"item-{n}" for n in range(1, 61)]
    created = [row["response"]["body"]["created"] for row in rows]
    assert min(created) < began - 1, "nothing of the first run was kept"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_cannot_be_is_said_before_an_engine_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there, an output that has no folder, a line that is no JSON: exit code not 0, one line."""
    path = tmp_path / "in.jsonl"
    path.write_text('"a"\n{"prompt"')
    out = str(tmp_path / "out.jsonl")
    for words, told in (
        ([str(tmp_path / "none"), "--output", out], "no such file"),
        ([str(path), "--output", str(tmp_path / "no" / "out")], "no such folder"),
        ([str(path), "--output", out], "in.jsonl:2"),
    ):
        assert cli.main(["batch", *words, *FLAGS]) != 0
        assert told in capsys.readouterr().err
    path.write_bytes(b'\xef\xbb\xbf"a"\r\n\xff\xfe"b"')  # of Windows the mark and the ends of lines, and no text at all
    assert cli.main(["batch", str(path), "--output", out, *FLAGS]) == 1
    assert "in.jsonl:2=a line: is not valid JSON in UTF-8" in capsys.readouterr().err
    for line, told in (
        ("[" * 100_000, "in.jsonl:1=a line: is not valid"),
        (r'"\ud800"', "requests[0].body=text: holds half of"),
    ):
        path.write_text(line)
        assert cli.main(["batch", str(path), "--output", out, *FLAGS]) == 1
        assert told in capsys.readouterr().err
    assert [found.name for found in tmp_path.iterdir()] == ["in.jsonl"]
