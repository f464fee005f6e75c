"""The input of a job, read without a server: what is wrong is said with the line that it is about."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.deploy.jobs_input import JobInput, read_input


def check_body(body: Mapping[str, Any]) -> str:
    """Served under two names; a body without a prompt is none."""
    if "prompt" not in body:
        raise InvalidRequest("prompt", None, "must be text")
    return str(body["model"])


def read(folder: Path, *lines: str | dict[str, Any]) -> JobInput:
    path = folder / "in.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return read_input(path, endpoint="/v1/completions", check_body=check_body, max_line_bytes=1000)


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    """One whose body is right."""
    whole = {"model": "a", "prompt": "x", **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": whole}


def test_lines_have_the_places_that_they_are_read_from_again(tmp_path: Path) -> None:
    """Empty lines count as lines, and are no items."""
    found = read(tmp_path, "", line("first"), "  ", line("second"))
    text = (tmp_path / "in.jsonl").read_bytes()
    assert (found.model, found.errors) == ("a", [])
    assert [item.line for item in found.items] == [2, 4]
    for item, custom_id in zip(found.items, ("first", "second"), strict=True):
        assert json.loads(text[item.start : item.start + item.length])["custom_id"] == custom_id


def test_what_contradicts_another_line_names_it(tmp_path: Path) -> None:
    """The first line was a wrong one: the model that all must have is that of the second."""
    wrong = line("one")
    del wrong["body"]["prompt"]
    found = read(tmp_path, wrong, line("two"), line("three", model="b"), line("two"))
    assert [(error["line"], error["message"]) for error in found.errors] == [
        (1, "line 1: body.prompt=None: must be text"),
        (3, "line 3: body.model=b: all items of a job name one model, and line 2 has a"),
        (4, "line 4: custom_id=two: is that of line 2, too"),
    ]
