"""`/v1/files`: upload, list, retrieve, download and delete the inputs and the results of jobs."""

import secrets
from typing import Any, Final

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.deploy.http_io import HttpRequest, Responder, run_while_client_stays
from argosy.deploy.jobs_rows import FileRow
from argosy.deploy.jobs_service import JobService
from argosy.deploy.openai.errors import HttpRefusal, missing
from argosy.deploy.openai.multipart import Upload, boundary_of, read_upload

PURPOSE: Final = "batch"
_MAX_FILES_LISTED: Final = 10_000
_MAX_NAME_CHARS: Final = 255


async def serve_files(jobs: JobService, path: str, request: HttpRequest, responder: Responder) -> None:
    """One request below `/v1/files`; `path` is what comes behind it."""
    match (request.method, path.strip("/").split("/") if path else []):
        case ("POST", []):
            await responder.json(file_json(await _upload(jobs, request)))
        case ("GET", []):
            await _list(jobs, request, responder)
        case ("GET", [file_id]):
            await responder.json(file_json(await _find(jobs, request, file_id)))
        case ("GET", [file_id, "content"]):
            row = await _find(jobs, request, file_id)
            await run_while_client_stays(lambda: _send(jobs, row, responder), request, responder)
        case ("DELETE", [file_id]):
            await _delete(jobs, request, responder, file_id)
        case _:
            raise HttpRefusal(405, "method_not_allowed", "files are uploaded by POST, read by GET, deleted by DELETE")


def file_json(row: FileRow) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
        "status_details": None,
    }


def page_json(rows: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """OpenAI's list; `rows` holds one more than the limit when there are more."""
    page = rows[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(rows) > limit}


def read_limit(request: HttpRequest, default: int, most: int) -> int:
    """The `limit` of a list."""
    text = request.query.get("limit")
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= most:
        raise InvalidRequest("limit", text, f"must be from 1 to {most}")
    return int(text)


async def _upload(jobs: JobService, request: HttpRequest) -> FileRow:
    boundary = boundary_of(request.headers.get(b"content-type", b"").decode("latin-1"))
    declared = request.headers.get(b"content-length", b"0")
    if not jobs.has_room_for(int(declared) if declared.isdigit() else jobs.server.max_upload_bytes):
        raise HttpRefusal(507, "disk_full", "the server has no room left for this file; delete some, or tell its owner")
    file_id = f"file-{secrets.token_hex(12)}"
    part = jobs.folder.file(f"{file_id}.part")
    try:
        upload = await read_upload(request.chunks(), boundary, part)
        row = _row_of(file_id, upload, jobs.journal.now())
        await jobs.keep_upload(request.tenant, row, part)
    finally:
        part.unlink(missing_ok=True)
    return row


def _row_of(file_id: str, upload: Upload, now: int) -> FileRow:
    purpose = upload.fields.get("purpose")
    if purpose is None:
        raise missing("purpose")
    if purpose != PURPOSE:
        raise InvalidRequest("purpose", purpose, f"must be {PURPOSE!r}: files here are the input of batches")
    anchor, seconds = upload.fields.get("expires_after[anchor]"), upload.fields.get("expires_after[seconds]")
    if anchor not in (None, "created_at"):
        raise InvalidRequest("expires_after.anchor", anchor, "must be 'created_at'")
    if seconds is not None and not (seconds.isascii() and seconds.isdigit() and 0 < int(seconds[:12]) < 10**9):
        raise InvalidRequest("expires_after.seconds", seconds, "must be a number of seconds")
    return FileRow(
        id=file_id,
        purpose=purpose,
        filename="".join(c if c.isprintable() else "?" for c in upload.filename or "")[:_MAX_NAME_CHARS],
        bytes=upload.num_bytes,
        created_at=now,
        expires_at=now + int(seconds) if seconds is not None else None,
    )


async def _list(jobs: JobService, request: HttpRequest, responder: Responder) -> None:
    limit = read_limit(request, _MAX_FILES_LISTED, _MAX_FILES_LISTED)
    order = request.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order", order, "must be 'asc' or 'desc'")
    rows = await jobs.call(
        jobs.journal.files,
        request.tenant,
        purpose=request.query.get("purpose"),
        after=request.query.get("after"),
        limit=limit + 1,
        newest_first=order == "desc",
    )
    await responder.json(page_json([file_json(row) for row in rows], limit))


async def _find(jobs: JobService, request: HttpRequest, file_id: str) -> FileRow:
    row = await jobs.call(jobs.journal.file, request.tenant, file_id)
    if row is None:
        raise HttpRefusal(404, "not_found", "there is no file of that id", param="file_id")
    return row


async def _delete(jobs: JobService, request: HttpRequest, responder: Responder, file_id: str) -> None:
    await _find(jobs, request, file_id)
    if user := await jobs.call(jobs.journal.delete_file, request.tenant, file_id):
        raise HttpRefusal(409, "file_in_use", f"{user} still reads this file; cancel it first", param="file_id")
    await responder.json({"id": file_id, "object": "file", "deleted": True})


async def _send(jobs: JobService, row: FileRow, responder: Responder) -> None:
    kind = (b"content-type", b"application/octet-stream")
    responder.add_header(b"content-length", str(row.bytes).encode())
    await responder.start(200, kind)
    async for piece in jobs.content(row):
        await responder.events(piece)
    await responder.end()
