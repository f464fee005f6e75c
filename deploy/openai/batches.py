"""`/v1/batches`: jobs in OpenAI's words, and what is our own: keys, results as they come, and resume.

POST /v1/batches                           with an Idempotency-Key: sent twice, it is one job
GET  /v1/batches?key=K                     the job of that key
POST /v1/batches/{id}/resume               run what was not run because of a cancel or an expiry
GET  /v1/batches/{id}/results?after=N      lines {"seq", "line", "result"} in the order in which items ended
"""

import json
import re
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.deploy.http_io import HttpRequest, Responder, run_while_client_stays
from argosy.deploy.jobs_rows import LIVE, JobRow
from argosy.deploy.jobs_service import JobService
from argosy.deploy.openai.errors import HttpRefusal, missing
from argosy.deploy.openai.fields import read_fields
from argosy.deploy.openai.files import PURPOSE, page_json, read_limit

MAX_RESULTS_AT_ONCE: Final = 1000
MAX_WAIT_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.25
_MAX_JOBS_LISTED: Final = 100
_MAX_KEY_CHARS: Final = 256
_MAX_METADATA: Final = (16, 64, 512)  # entries, characters of a name, characters of a value
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_WINDOW_SECONDS: Final = 30 * 86400
_CANCELLED: Final = ("cancelling", "cancelled")
_RESUMED: Final = ("validating", "in_progress", "finalizing")
_REFUSALS: Final = {
    _CANCELLED: "only a job that runs can be cancelled",
    _RESUMED: "only a cancelled or expired job whose input is still there can be resumed",
}


class BatchFields(msgspec.Struct, kw_only=True):
    """What a batch is made from."""

    input_file_id: str | None = None
    endpoint: str | None = None
    completion_window: str = "24h"
    metadata: dict[str, Any] | None = None


async def serve_batches(jobs: JobService, path: str, request: HttpRequest, responder: Responder) -> None:
    """One request below `/v1/batches`; `path` is what comes behind it."""
    match (request.method, path.strip("/").split("/") if path else []):
        case ("POST", []):
            await responder.json(batch_json(await _create(jobs, request)))
        case ("GET", []):
            limit = read_limit(request, 20, _MAX_JOBS_LISTED)
            after, key = request.query.get("after"), request.query.get("key")
            rows = await jobs.call(jobs.journal.jobs, request.tenant, key=key, after=after, limit=limit + 1)
            await responder.json(page_json([batch_json(row) for row in rows], limit))
        case ("GET", [job_id]):
            await responder.json(batch_json(await _find(jobs, request, job_id)))
        case ("POST", [job_id, "cancel"]):
            await _change(jobs, request, responder, job_id, jobs.journal.cancel, _CANCELLED)
        case ("POST", [job_id, "resume"]):
            await _change(jobs, request, responder, job_id, jobs.journal.resume, _RESUMED)
        case ("GET", [job_id, "results"]):
            job = await _find(jobs, request, job_id)
            await run_while_client_stays(lambda: _send_results(jobs, job, request, responder), request, responder)
        case _:
            raise HttpRefusal(405, "method_not_allowed", "batches are made by POST and read by GET")


def batch_json(job: JobRow) -> dict[str, Any]:
    """OpenAI's batch object."""
    errors = json.loads(job.errors)
    times = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": job.endpoint,
        "model": job.model or None,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": job.input_file_id,
        "completion_window": job.completion_window,
        "status": job.status,
        "output_file_id": job.output_file_id,
        "error_file_id": job.error_file_id,
        "created_at": job.created_at,
        **{f"{name}_at": getattr(job, f"{name}_at") for name in times},
        "request_counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "metadata": json.loads(job.metadata),
    }


async def _create(jobs: JobService, request: HttpRequest) -> JobRow:
    fields, _ = read_fields(await request.json(), BatchFields)
    if fields.input_file_id is None:
        raise missing("input_file_id")
    if fields.endpoint not in jobs.endpoints:
        raise InvalidRequest("endpoint", fields.endpoint, f"must be one of {', '.join(jobs.endpoints)}")
    window_seconds = read_window(fields.completion_window)
    _check_metadata(fields.metadata or {})
    row = await jobs.call(jobs.journal.file, request.tenant, fields.input_file_id)
    if row is None or row.purpose != PURPOSE:
        raise InvalidRequest("input_file_id", fields.input_file_id, "must be a file that was uploaded for batches")
    job = await jobs.call(
        jobs.journal.create_job,
        request.tenant,
        endpoint=fields.endpoint,
        served=jobs.gateway.model_names,
        input_file_id=fields.input_file_id,
        completion_window=fields.completion_window,
        window_seconds=window_seconds,
        metadata=fields.metadata,
        key=_key(request),
    )
    jobs.runner.wake()
    return job


def read_window(text: str) -> int:
    """Seconds of a `completion_window`, such as 24h."""
    match = _WINDOW.fullmatch(text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 1 <= seconds <= _MAX_WINDOW_SECONDS:
        raise InvalidRequest("completion_window", text, "must be a time such as '24h', of 30d at most")
    return seconds


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    most, most_name, most_value = _MAX_METADATA
    if len(metadata) > most:
        raise InvalidRequest("metadata", f"{len(metadata)} entries", f"at most {most}")
    for name, value in metadata.items():
        if not isinstance(value, str) or len(name) > most_name or len(value) > most_value:
            raise InvalidRequest("metadata", "an entry", f"maps text of {most_name} to text of {most_value} characters")


def _key(request: HttpRequest) -> str | None:
    key = request.headers.get(b"idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= _MAX_KEY_CHARS or not key.isascii():
        raise InvalidRequest("Idempotency-Key", f"{len(key)} bytes", f"has 1 to {_MAX_KEY_CHARS} ASCII characters")
    return key.decode("ascii")


async def _find(jobs: JobService, request: HttpRequest, job_id: str) -> JobRow:
    job = await jobs.call(jobs.journal.job, request.tenant, job_id)
    if job is None:
        raise HttpRefusal(404, "not_found", "there is no batch of that id", param="batch_id")
    return job


async def _change(
    jobs: JobService, request: HttpRequest, responder: Responder, job_id: str, change: Any, wanted: tuple[str, ...]
) -> None:
    """Make the change, unless it was made already: who did not hear our answer asks twice."""
    job = await _find(jobs, request, job_id)
    if job.status not in wanted and not await jobs.call(change, job_id):
        raise HttpRefusal(409, "wrong_status", f"{job_id} is {job.status}: {_REFUSALS[wanted]}", param="batch_id")
    jobs.runner.wake()
    await responder.json(batch_json(await _find(jobs, request, job_id)))


async def _send_results(jobs: JobService, job: JobRow, request: HttpRequest, responder: Responder) -> None:
    """Results behind `after`; with `wait` not before there is one, the job has ended, or so many seconds are over."""
    after = _number(request, "after", 2**53)
    deadline = time.monotonic() + min(_number(request, "wait", 3600), MAX_WAIT_SECONDS)
    limit = read_limit(request, MAX_RESULTS_AT_ONCE, MAX_RESULTS_AT_ONCE)
    while True:
        job = await jobs.call(jobs.journal.job_of_any, job.id)  # before its results: then an end is seen after them
        rows = await jobs.call(jobs.journal.results, job.id, after, limit)
        if rows or job.status not in LIVE or time.monotonic() >= deadline:
            break
        await jobs.runner.pause(_POLL_SECONDS)
    responder.add_header(b"x-argosy-job-status", job.status.encode())
    body = b"".join(b'{"seq":%d,"line":%d,"result":%b}\n' % row for row in rows)
    await responder.whole(body, content_type=(b"content-type", b"application/jsonl"))


def _number(request: HttpRequest, name: str, most: int) -> int:
    text = request.query.get(name, "0")
    if not text.isascii() or not text.isdigit() or int(text[:20]) > most:
        raise InvalidRequest(name, text, f"must be a whole number from 0 to {most}")
    return int(text)
