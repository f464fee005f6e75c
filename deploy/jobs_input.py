"""The input of a job: JSON lines, each a request with a name. What is wrong is said with its line and its field.

{"custom_id": "a-1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 9}}
"""

import codecs
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.errors import InvalidRequest, RequestError
from argosy.deploy.jobs_rows import NewItem
from argosy.deploy.openai.json_body import read_json_object

MAX_ITEMS: Final = 50_000
MAX_CUSTOM_ID_CHARS: Final = 512
MAX_ERRORS_LISTED: Final = 100
_FIELDS: Final = frozenset({"custom_id", "method", "url", "body"})
_LINES_AT_ONCE: Final = 64

CheckBody = Callable[[Mapping[str, Any]], str]


class JobInput(msgspec.Struct, frozen=True):
    """What was read: the items and the model they all name, or what is wrong."""

    items: list[NewItem]
    model: str
    errors: list[dict[str, Any]]


def read_input(
    path: Path, *, endpoint: str, check_body: CheckBody, max_line_bytes: int, max_items: int = MAX_ITEMS
) -> JobInput:
    """Check every line. `check_body` gives the served name of the body's model or raises our `RequestError`s.

    Blocks, and gives way to other threads now and then; meant for a thread of its own.
    """
    reader = _Reader(endpoint, check_body, max_line_bytes)
    num_items = 0
    try:
        for number, start, line in _lines(path, max_line_bytes):
            if not line.strip():
                continue
            num_items += 1
            if num_items > max_items:
                reader.refuse(number, "too_many_items", None, f"a job has at most {max_items} items; split the file")
                break
            reader.read(number, start, line)
            if num_items % _LINES_AT_ONCE == 0:
                time.sleep(0)
    except OSError as error:
        reader.refuse(None, "file_unreadable", "input_file_id", f"the input can't be read: {error.strerror}")
    if not num_items and not reader.errors:
        reader.refuse(None, "empty_file", "input_file_id", "the input holds no line")
    return JobInput(reader.items, reader.model, reader.errors)


class _Reader:
    """Collects items and errors, and what all lines together must keep."""

    def __init__(self, endpoint: str, check_body: CheckBody, max_line_bytes: int):
        self.items: list[NewItem] = []
        self.errors: list[dict[str, Any]] = []
        self.model, self._model_line = "", 0
        self._endpoint, self._check_body, self._max_line_bytes = endpoint, check_body, max_line_bytes
        self._line_of: dict[str, int] = {}

    def refuse(self, line: int | None, code: str, param: str | None, message: str) -> None:
        """Note what is wrong."""
        if len(self.errors) < MAX_ERRORS_LISTED:
            self.errors.append({"code": code, "line": line, "message": message, "param": param})

    def read(self, number: int, start: int, line: bytes) -> None:
        """Take one line."""
        try:
            if len(line) > self._max_line_bytes:
                raise InvalidRequest("line", f"more than {self._max_line_bytes} bytes", "send less in one request")
            custom_id = self._check(number, line)
        except RequestError as error:
            field = error.param or ""
            self.refuse(number, error.code, field or None, f"line {number}: {error}")
        else:
            self.items.append(NewItem(number, custom_id, start, len(line)))

    def _check(self, number: int, line: bytes) -> str:
        try:
            value = read_json_object(line)
        except InvalidRequest as error:
            raise InvalidRequest("line", error.value, error.fix) from error
        if unknown := sorted(value.keys() - _FIELDS):
            raise InvalidRequest(unknown[0], "given", f"a line has {', '.join(sorted(_FIELDS))} and nothing else")
        custom_id = value.get("custom_id")
        if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
            raise InvalidRequest("custom_id", custom_id, f"must be text of 1 to {MAX_CUSTOM_ID_CHARS} characters")
        if custom_id in self._line_of:
            raise InvalidRequest("custom_id", custom_id, f"is that of line {self._line_of[custom_id]}, too")
        self._line_of[custom_id] = number
        if value.get("method") != "POST":
            raise InvalidRequest("method", value.get("method"), "must be 'POST'")
        if value.get("url") != self._endpoint:
            raise InvalidRequest("url", value.get("url"), f"must be the job's endpoint, {self._endpoint!r}")
        body = value.get("body")
        if not isinstance(body, dict):
            raise InvalidRequest("body", type(body).__name__, "must be the JSON object of a request")
        if body.get("stream"):
            raise InvalidRequest("body.stream", True, "an item's answer is one line; leave it out")
        self._take_model(self._check_named(body), number)
        return custom_id

    def _check_named(self, body: Mapping[str, Any]) -> str:
        try:
            return self._check_body(body)
        except InvalidRequest as error:
            raise InvalidRequest(f"body.{error.field}", error.value, error.fix) from error

    def _take_model(self, model: str, number: int) -> None:
        if self.model and model != self.model:
            fix = f"all items of a job name one model, and line {self._model_line} has {self.model}"
            raise InvalidRequest("body.model", model, fix)
        if not self.model:
            self.model, self._model_line = model, number


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, where it begins, bytes without the line's end). A line that is too long comes cut."""
    with path.open("rb") as file:
        number = start = 0
        while line := file.readline(max_line_bytes + 2):
            number += 1
            length = len(line)
            while line[-1:] != b"\n" and (rest := file.readline(1 << 20)):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
            # which editors of Windows begin a file with
            skipped = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            yield number, start + skipped, line[skipped:].rstrip(b"\r\n")
            start += length
