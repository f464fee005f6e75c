"""Where a server's keys come from, and how commands end when nobody reads on."""

import io
import os
import subprocess
import sys

import pytest

from argosy.deploy import cli
from argosy.deploy.cli import serve_keys


def test_keys_come_from_the_environment_and_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both names count, each key once; what the server starts afterwards inherits none."""
    monkeypatch.setenv("ARGOSY_API_KEY", "one")
    monkeypatch.setenv("VLLM_API_KEY", "two")
    assert serve_keys(None, None) == ("one", "two")
    assert "ARGOSY_API_KEY" not in os.environ
    assert "VLLM_API_KEY" not in os.environ
    assert serve_keys(None, None) == ()


def test_a_flag_wins_and_is_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The warning does not repeat the key."""
    monkeypatch.setenv("ARGOSY_API_KEY", "hidden")
    assert serve_keys(["shown"], None) == ("shown",)
    told = capsys.readouterr().err
    assert "list processes" in told
    assert "shown to all" in told
    assert "hidden" not in told


def test_a_file_of_keys_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's key is for clients then."""
    monkeypatch.setenv("ARGOSY_API_KEY", "for-clients")
    assert serve_keys(None, "keys.txt") == ()


@pytest.mark.parametrize(
    "words",
    [["plan", "llama-3.1-405b", "--gpus", "8 x H200", "--all"],
     ["simulate", "qwen3-0.6b", "--gpus", "1 x H200", "--requests", "200"]],
)  # fmt: skip
def test_a_command_whose_reader_had_enough_ends_quietly(words: list[str]) -> None:
    """`argosy plan ... | head -1`: no traceback, and the code that the shell gives any program in that place."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "argosy", *words]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("closed", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_streams_may_be_closed_from_the_start(closed: tuple[int, ...]) -> None:
    """Some tools start others without: a server ended without a word, `plan >&-` with a traceback."""
    program = (
        "import os, sys\n"
        "from argosy.deploy import cli\n"
        "code = cli.main(['plan', 'qwen3-0.6b', '--gpus', '1 x H200'])\n"
        "assert os.open('.', os.O_RDONLY) > 2\n"
        "assert os.get_inheritable(1) and print('more', file=sys.stderr) is None and not sys.stdin.readline()\n"
        "os._exit(code)\n"
    )
    words = " ".join(["exec", '"$@"', "0</dev/null", *(f"{number}>&-" for number in closed)])
    command = ["sh", "-c", words, "sh", sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "" if 2 in closed else "more\n")


def test_a_full_disk_is_said() -> None:
    """Of what standard output goes to: it was a traceback, and a second one at the end."""
    command = [sys.executable, "-m", "argosy", "plan", "qwen3-0.6b", "--gpus", "1 x H200"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (
        1,
        "argosy: no room is left: where standard output goes; make some and try again\n",
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_the_letters_of_a_bar_gets_question_marks(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Servers are often set up in the locale "C": the figures count, not the bars."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    assert cli.main(["simulate", "qwen3-0.6b", "--gpus", "1 x H200", "--requests", "20"]) == 0
    sys.stdout.flush()
    text = written.getvalue().decode(encoding)
    assert "output tokens/s" in text
    assert ("\u2588" in text) == (encoding == "utf-8")
    assert ("???" in text) == (encoding != "utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["collect-env"], "'argosy doctor' says what this machine has"),
        (["calibrate"], "'argosy bench --calibration FILE'"),
        (["run-batch", "-i", "a"], "'argosy batch FILE --output FILE'"),
        (["serv"], "did you mean 'argosy serve'?"),
        (["bench", "serve"], "use 'argosy bench --url http://127.0.0.1:8000'"),
        (["serve", "--dry-run"], "'argosy plan MODEL' says what would be chosen"),
        (["bench", "latency", "--model", "m"], "use 'argosy bench --workload decode1'"),
    ],
)
def test_commands_of_vllm_lead_to_ours(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest by letters may be another thing: 'collect-env' was answered with 'complete'."""
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--foo"], ["--foo", "serve"], ["--versio"]])
def test_a_flag_without_a_command_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It was answered with the help and 0, so a script took it for done."""
    assert cli.main(words) == 2
    assert f"unknown flag {words[0]}" in capsys.readouterr().err


def test_flags_are_read_as_vllm_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Underscores, levels of compilation, and switches of what we lack that are turned off."""
    words = ["serve", "some/model", "--max_model_len=32k", "--gpu_memory_utilization", "0.5", "-O3", "--no-enable-lora"]
    parser = cli.build_parser()
    kept, ignored = cli.settings.take_ignored([cli._with_dashes(word) for word in words])
    args = parser.parse_args(kept)
    assert (args.max_model_len, args.gpu_memory_utilization) == ("32k", "0.5")
    assert ignored == ["optimization_level"]
    assert cli.settings.take_ignored(["serve", "-O", "2", "m"]) == (["serve", "m"], ["optimization_level"])
    assert cli.main(["serve", "--port_=3"]) == 2
    assert "unknown flag --port-" in capsys.readouterr().err


def test_planning_takes_the_words_of_serving(capsys: pytest.CaptureFixture[str]) -> None:
    """`--model` and `-dp` were unknown flags there, and the nearest that was named is one of 'serve'."""
    shown = []
    for words in (["llama-3.1-8b", "--replicas", "2"], ["--model", "llama-3.1-8b", "-dp", "2"]):
        assert cli.main(["plan", *words, "--gpus", "8 x H100"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "plan: 2 x " in shown[0]
    assert cli.main(["plan", "m", "--model-imp=m"]) == 2
    assert "--model-impl" not in capsys.readouterr().err  # of 'serve'
