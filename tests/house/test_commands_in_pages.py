"""What pages and help tell people to type can be typed: commands are known, and so are their flags."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from argosy.deploy import batch_command, cli, jobs_cli, plan_command, simulate_command

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    name
    for name in subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if name not in ("CHANGELOG.md", "DECISIONS.md")  # which tell how things were
]
EXAMPLES = {
    "serve": cli._SERVE_EXAMPLES,
    "chat": cli._CHAT_EXAMPLES,
    "complete": cli._COMPLETE_EXAMPLES,
    "bench": cli._BENCH_EXAMPLES,
    "plan": plan_command.EXAMPLES,
    "simulate": simulate_command.EXAMPLES,
    "submit": jobs_cli.SUBMIT_EXAMPLES,
    "jobs": jobs_cli.JOBS_EXAMPLES,
    "batch": batch_command.EXAMPLES,
}
FENCE = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}.*$", re.MULTILINE)
FLAG = re.compile(r"(?<!\S)\[?(--?[a-z][a-z0-9-]*)")


def whole_commands(text: str) -> list[str]:
    """Lines that begin with a command of ours, without what is said behind two blanks or a hash."""
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    found = [re.match(r"\s*(?:\$ |[A-Z_]+=\S+ |echo [^|]*\| )*(argosy [a-z]\S*(?: .*)?)$", line) for line in lines]
    return [re.split(r"\s{2,}|\s#\s", match[1])[0] for match in found if match]


def unknown_part(command: str) -> str:
    """What the command line would not take of it; empty if it takes all. Brackets and dots may be left out."""
    words = shlex.split(re.sub(r"\[[^]]*\]|\.\.\.", "", command))[1:]
    try:
        kept = [word for word in words if not re.fullmatch(r"[<>&|]", word)]
        return " ".join(cli.build_parser().parse_known_args(kept)[1])
    except SystemExit:
        return command


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_pages_can_be_typed(page: str) -> None:
    """A flag that was renamed lives on in the pages."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in (*FENCE.findall(text), "\n".join(INDENTED.findall(text))):
        assert [command for command in whole_commands(block) if unknown_part(command)] == []
    parser, wrong = cli.build_parser(), []
    for command in re.findall(r"`argosy ([a-z]+\b[^`]*)`", FENCE.sub("", text)):
        name = command.split()[0]
        known = cli.flags_of(parser, name) if name in cli._USAGE else []
        if name != "import" and (not known or any(flag not in known for flag in FLAG.findall(command))):
            wrong.append(command)
    assert wrong == []


@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_of_the_help_can_be_typed(command: str) -> None:
    found = whole_commands(EXAMPLES[command])
    assert found, "no example?"
    assert [line for line in found if unknown_part(line)] == []


@pytest.mark.parametrize("page", PAGES)
def test_scripts_on_pages_are_there_and_take_their_flags(page: str) -> None:
    """Benchmarks and tests are run by hand, from what the pages say."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for script, rest in re.findall(r"python ((?:benchmarks|tests|examples)/\S+\.py)([^`\n#|]*)", text):
        assert (ROOT / script).is_file(), script
        source = (ROOT / script).read_text(encoding="utf-8")
        assert [flag for flag in FLAG.findall(rest) if flag != "--help" and f'"{flag}"' not in source] == []


def test_the_judge_can_say_no() -> None:
    assert whole_commands("$ argosy serve M -tp 2   # two\nsome argosy text\n  A=b argosy plan \\\n   M") == [
        "argosy serve M -tp 2",
        "argosy plan M",
    ]
    assert unknown_part("argosy serve MODEL -tp 2 [-pp 2] ...") == ""
    assert unknown_part("argosy serve MODEL --tensor 2") == "--tensor 2"
    assert unknown_part("argosy plan --gpus '1 x H200'")
