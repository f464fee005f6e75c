"""`Job`: many requests that a server keeps on its disk and works off, whatever is restarted in between.

    with Client() as client:
        job = client.submit(["Return a list of", "Once upon a time"], max_tokens=32)     # or a Path to JSON lines
        for result in job.results():                       # as they come; goes on after a restart of the server
            print(result.custom_id, result.text)
        client.job(job.id).wait(progress=True)             # another day, from another process

A request is text to continue, a conversation (a list of messages), the body of a request, or one of OpenAI's batch
lines. Calls here may be sent again without harm, so they outlast a server that is away for `outage_seconds`.
"""

import hashlib
import json
import logging
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final, Self, TypeAlias

import httpx
import msgspec

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.deploy.client_wire import Answer, answer_of, checked, error_of, json_bytes, unreachable
from argosy.deploy.progress import JobProgress

_log = logging.getLogger(__name__)

JobRequest: TypeAlias = str | Mapping[str, Any] | list[Any]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENDED: Final = ("completed", "failed", "expired", "cancelled")
_WAIT_SECONDS: Final = 10  # that the server may keep a question for results open
_SILENT_SECONDS: Final = 5.0  # who waits longer for a server that is away is told so
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 4.0
_GATEWAY_STATUSES: Final = (404, 500, 502, 503, 504)  # of a proxy whose application is being restarted


class JobResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one item. `seq` counts the ends of a job's items: ask for what comes behind it later on."""

    seq: int
    line: int  # of the input, from 1
    custom_id: str
    body: dict[str, Any] | None  # the server's answer, or its error
    error: str | None
    raw: dict[str, Any]

    @property
    def is_done(self) -> bool:
        """Whether there is an answer."""
        return self.error is None

    @property
    def answer(self) -> Answer:
        """The answer. Raises `ValueError` when there is none."""
        if self.error is not None or self.body is None:
            raise ValueError(f"{self.custom_id} has no answer: {self.error}")
        return answer_of(self.body)

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.answer.text


class JobServer:
    """The doors of jobs. Every call may be repeated, and is while the server is away."""

    def __init__(self, http: httpx.Client, outage_seconds: float):
        self._http, self._outage_seconds = http, outage_seconds

    def call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """The JSON of an answer."""
        return checked(self.send(method, path, **request))

    def send(self, method: str, path: str, *, file: IO[bytes] | None = None, **request: Any) -> httpx.Response:
        """An answer that is no error."""
        deadline, pause, is_told = time.monotonic() + self._outage_seconds, _FIRST_PAUSE_SECONDS, False
        while True:
            try:
                if file is not None:
                    file.seek(0)
                    request["files"] = {"file": ("jobs.jsonl", file, "application/jsonl")}
                response = self._http.request(method, path, **request)
                if response.status_code < 400:
                    return response
                problem: Exception = error_of(response)
                if response.status_code not in _GATEWAY_STATUSES or _is_ours(response):
                    raise problem
            except httpx.TransportError as error:
                problem = unreachable(self._http.base_url, error)
            if time.monotonic() + pause >= deadline:
                raise problem
            if not is_told and self._outage_seconds > _SILENT_SECONDS:
                _log.warning("%s Trying again for up to %.0f s.", problem, self._outage_seconds)
                is_told = True
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


class Job:
    """A job on a server. `raw` is OpenAI's batch object as it was read last."""

    def __init__(self, server: JobServer, raw: dict[str, Any]):
        self._server, self.raw = server, raw

    @property
    def id(self) -> str:
        """Its name, for `Client.job`."""
        return str(self.raw["id"])

    @property
    def status(self) -> str:
        """validating, in_progress, finalizing, completed, failed, expired, cancelling or cancelled, when last read."""
        return str(self.raw["status"])

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen, as far as was read."""
        return self.status in ENDED

    @property
    def counts(self) -> dict[str, int]:
        """Items: total, completed, failed."""
        return dict(self.raw["request_counts"])

    @property
    def errors(self) -> list[dict[str, Any]]:
        """Why the input was refused: line, param, code, message."""
        return list((self.raw["errors"] or {}).get("data", ()))

    def refresh(self) -> Self:
        """Read it again."""
        self.raw = self._server.call("GET", f"/v1/batches/{self.id}")
        return self

    def cancel(self) -> Self:
        """Call off what has not ended."""
        self.raw = self._server.call("POST", f"/v1/batches/{self.id}/cancel")
        return self

    def resume(self) -> Self:
        """Run what was not run because the job was cancelled or its time was up."""
        self.raw = self._server.call("POST", f"/v1/batches/{self.id}/resume")
        return self

    def results(
        self, after: int = 0, *, progress: bool = False, timeout_seconds: float | None = None
    ) -> Iterator[JobResult]:
        """Each item's result once, as they come, until the job has ended. Raises `TimeoutError`.

        `after` is the `seq` of the last one that is known already.
        """
        deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
        with JobProgress(is_shown=progress) as bar:
            while True:
                rows, status = self._results_after(after)
                for row in rows:
                    after = row.seq
                    yield row
                if not rows and status in ENDED:
                    bar.show(self.refresh().counts, self.status)
                    return
                if progress:
                    bar.show(self.refresh().counts, self.status)
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"{self.id} is {status} after {timeout_seconds:g} s; it goes on")

    def wait(self, *, progress: bool = False, timeout_seconds: float | None = None) -> Self:
        """Until the job has ended, however. Raises `TimeoutError`."""
        deadline, pause = time.monotonic() + timeout_seconds if timeout_seconds is not None else None, 0.1
        with JobProgress(is_shown=progress) as bar:
            while True:
                bar.show(self.refresh().counts, self.status)
                if self.has_ended:
                    return self
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"{self.id} is {self.status} after {timeout_seconds:g} s; it goes on")
                time.sleep(pause)
                pause = min(1.5 * pause, 1.0)

    def download(self, path: str | Path) -> int:
        """Write all result lines to a file, in the order of the input; how many. What was there before is replaced."""
        lines = {row.line: row.raw for row in self.results()}
        target = Path(path)
        part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("x", encoding="utf-8") as out:
                out.writelines(json.dumps(lines[line], ensure_ascii=False) + "\n" for line in sorted(lines))
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return len(lines)

    def _results_after(self, seq: int) -> tuple[list[JobResult], str]:
        params = {"after": seq, "wait": _WAIT_SECONDS}
        response = self._server.send("GET", f"/v1/batches/{self.id}/results", params=params)
        rows = [_result_of(json.loads(line)) for line in response.text.split("\n") if line]
        return rows, response.headers.get("x-argosy-job-status", "")


def submit(
    server: JobServer,
    requests: str | Path | Iterable[JobRequest],
    *,
    endpoint: str | None,
    key: str | None,
    completion_window: str,
    metadata: Mapping[str, str] | None,
    defaults: Mapping[str, Any],
) -> Job:
    """Upload the requests and make a job of them; with a key that was used before, that job."""
    if key is not None and not (0 < len(key) <= 256 and key.isascii() and key.isprintable() and key == key.strip()):
        raise InvalidRequest("key", key, "has 1 to 256 characters of ASCII, in one line, without spaces at its ends")
    if key is not None and (found := server.call("GET", "/v1/batches", params={"key": key})["data"]):
        return Job(server, found[0])
    with tempfile.TemporaryFile() as file:
        endpoint = write_input(file, requests, endpoint, defaults)
        uploaded = server.call("POST", "/v1/files", file=file, data={"purpose": "batch"})
    body = {
        "input_file_id": uploaded["id"],
        "endpoint": endpoint,
        "completion_window": completion_window,
        "metadata": dict(metadata) if metadata else None,
    }
    headers = {"idempotency-key": key or secrets.token_hex(16)}
    return Job(server, server.call("POST", "/v1/batches", json=body, headers=headers))


def write_input(
    file: IO[bytes], requests: str | Path | Iterable[JobRequest], endpoint: str | None, defaults: Mapping[str, Any]
) -> str:
    """Write requests as batch lines and give the endpoint that they are for. Line numbers stay those of the input."""
    number = 0
    for number, request in enumerate(_read(requests), 1):
        if request is None:
            file.write(b"\n")
            continue
        line = _line_of(number, request, defaults)
        endpoint = endpoint or line["url"]
        line["url"] = line["url"] or endpoint
        file.write(json_bytes(line, f"requests[{number - 1}].") + b"\n")
    if endpoint is None:
        raise InvalidRequest("requests", f"{number} lines", "there is no request to submit")
    file.flush()
    return endpoint


def key_of(path: Path, *more: object) -> str:
    """A key for what is in a file and how it is asked: the same again is the same job."""
    digest = hashlib.sha256(repr(more).encode())
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _read(requests: str | Path | Iterable[JobRequest]) -> Iterator[JobRequest | None]:
    """The requests; None for a line without one."""
    if not isinstance(requests, str | Path):
        yield from requests
        return
    path = Path(requests)
    if not path.is_file():
        raise InvalidRequest("requests", str(requests), "must be a file of JSON lines, or a list of requests")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(
                    f"{path.name}:{number}", "a line", f"is not valid JSON in UTF-8: {error}"
                ) from error


def _line_of(number: int, request: JobRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """One of OpenAI's batch lines. What is neither text, messages nor a body goes as it is: the server says why not."""
    line: dict[str, Any] = {"custom_id": f"item-{number}", "method": "POST", "url": None}
    if isinstance(request, str):
        body: dict[str, Any] = {"prompt": request}
    elif isinstance(request, list):
        is_chat = bool(request) and all(isinstance(message, Mapping) for message in request)
        body = {"messages" if is_chat else "prompt": request}
    elif isinstance(request, Mapping) and isinstance(request.get("body"), Mapping):
        line, body = {**line, **request}, dict(request["body"])
    elif isinstance(request, Mapping):
        body = {name: value for name, value in request.items() if name != "custom_id"}
        line["custom_id"] = request.get("custom_id", line["custom_id"])
    else:
        raise InvalidRequest(f"requests[{number - 1}]", type(request).__name__, "must be text, messages, or a body")
    line["body"] = {**defaults, **body}
    line["url"] = line["url"] or (CHAT if "messages" in body else COMPLETIONS if "prompt" in body else None)
    return line


def _result_of(row: dict[str, Any]) -> JobResult:
    raw = row["result"]
    response, error = raw["response"], raw["error"]
    body = response["body"] if response is not None else None
    if body is not None and error is None and response["status_code"] >= 400:
        error = body.get("error") or {}
    message = str(error.get("message") or error.get("code") or "no reason given") if error is not None else None
    return JobResult(seq=row["seq"], line=row["line"], custom_id=raw["custom_id"], body=body, error=message, raw=raw)


def _is_ours(response: httpx.Response) -> bool:
    """Whether the application itself refused, and not a proxy in front of one that is being restarted."""
    if response.status_code not in (404, 500):
        return False
    try:
        return "error" in response.json()
    except (ValueError, TypeError):
        return False
