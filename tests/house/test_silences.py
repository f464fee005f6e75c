"""Every silence has a reason: who switches a checker off, or drops an error, says beside it why that is right."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("cluster", "placement", "kernels", "workers", "deploy", "tests", "benchmarks", "examples")
CHECKERS = re.compile(r"# (?:type: ignore|noqa)\b(?:\[[\w, -]+\]|: ?[A-Z]+\d+(?:, ?[A-Z]+\d+)*)?")
NAMED = re.compile(r"# (?:type: ignore\[|noqa: ?[A-Z])")
EVERYTHING = re.compile(r"^\s*except(?: \(?(?:Base)?Exception\b.*)?:", re.MULTILINE)


def is_told(lines: list[str], place: int) -> bool:
    """Whether the line above is a comment: some lines have no room for one."""
    return place > 0 and lines[place - 1].lstrip().startswith("# ")


def silences(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of those that want a reason and have none."""
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if markers := list(CHECKERS.finditer(line)):
            has_reason = re.search(r"[#-] *\w+", line[markers[-1].end() :]) is not None
            if not has_reason or not all(NAMED.match(marker[0]) for marker in markers):
                yield number, line.strip()
        elif re.search(r"\bwith .*\bsuppress\(", line) and "  #" not in line and not is_told(lines, number - 1):
            yield number, line.strip()
    if EVERYTHING.search(text):
        handlers = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ExceptHandler))
        for handler in handlers:
            line = lines[handler.lineno - 1]
            is_raised = any(isinstance(node, ast.Raise) for node in ast.walk(handler))
            if (
                EVERYTHING.match(line)
                and not is_raised
                and "  #" not in line
                and not is_told(lines, handler.lineno - 1)
            ):
                yield handler.lineno, line.strip()


def test_every_silence_has_a_reason() -> None:
    """Behind the marker, or behind the colon: `# type: ignore[code]  # why`, `with suppress(Error):  # why`."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    assert len(paths) > 300
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in paths
        for number, line in silences(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_the_judge_can_say_no() -> None:
    """A marker without a code, a code without a reason, an error that is dropped, and one that is not."""
    lines = [
        "x = f()  # type: {}  # a stand-in",
        "x = f()  # type: {}[arg-type]",
        "x = f()  # type: {}[arg-type]  # a stand-in",
        "import x  # no{}: E402",
        "import x  # no{}: E402 - after the skip",
        "with {}(OSError):",
        "    pass",
        "with {}(OSError):  # gone already",
        "    pass",
        "# gone already, and there is no room behind the colon",
        "with {}(OSError):",
        "    pass",
        "try:",
        "    f()",
        "except Exception as error:",
        "    log(error)",
        "try:",
        "    f()",
        "except BaseException:",
        "    close()",
        "    raise",
    ]
    words = {"no{}": "qa", "with {}": "contextlib.suppress"}  # this file has no silence itself
    text = "\n".join(line.format(next((words[w] for w in words if w in line), "ignore")) for line in lines)
    assert [number for number, _ in silences(text)] == [1, 2, 4, 6, 15]
