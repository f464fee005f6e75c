"""A job without a server: an engine in this process tree, the job's folder beside its output, removed at the end."""

import asyncio
import json
import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import Final, Literal

from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_app import HttpApp
from argosy.deploy.jobs_client import key_of, write_input
from argosy.deploy.jobs_folder import JobFolder
from argosy.deploy.jobs_rows import LIVE, FileRow, JobRow
from argosy.deploy.jobs_service import JobService
from argosy.deploy.offline import LLM
from argosy.deploy.progress import JobProgress

_POLL_SECONDS: Final = 0.1
_ONE_YEAR_SECONDS: Final = 365 * 86400
_LINES_AT_ONCE: Final = 256


def run_file(
    config: ServingConfig, path: Path, output: Path, *, endpoint: str | None, backend: Literal["ray", "local"]
) -> int:
    """Answer every request in `path`; 0 when all were done. Killed and called again, it goes on where it was.

    Raises `InvalidRequest` for a line that is no request, and what stops an engine from starting.
    """
    part = output.absolute().with_name(f".{output.name}.{secrets.token_hex(4)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            endpoint = write_input(file, path, endpoint, {})
        folder = JobFolder(output.absolute().with_name(f"{output.name}.job"))
        with LLM.from_config(config, backend=backend) as llm:
            status = llm.run(lambda gateway: _work(gateway, folder, part, endpoint, output))
    finally:
        part.unlink(missing_ok=True)
    shutil.rmtree(folder.path, ignore_errors=True)
    return status


async def _work(gateway: Gateway, folder: JobFolder, part: Path, endpoint: str, output: Path) -> int:
    works = HttpApp(gateway, gateway.config.server).job_works()
    jobs = JobService(folder, gateway, works, is_alone=True)
    jobs.start()
    try:
        job = await _submit(jobs, part, endpoint)
        with JobProgress() as bar:
            while job.status in LIVE:
                await asyncio.sleep(_POLL_SECONDS)
                job = await jobs.call(jobs.journal.job_of_any, job.id)
                bar.show({"total": job.total, "completed": job.completed, "failed": job.failed}, job.status)
        for error in json.loads(job.errors):
            print(f"argosy: {error['message']}", file=sys.stderr)
        if job.status != "failed":
            await _write(jobs, job, output)
        print(f"argosy: {job.status}: {job.completed} done, {job.failed} failed", file=sys.stderr)
        return 0 if job.status == "completed" and not job.failed else 1
    finally:
        await jobs.stop()


async def _submit(jobs: JobService, part: Path, endpoint: str) -> JobRow:
    key = key_of(part, endpoint, jobs.gateway.model_names)
    if found := await jobs.call(jobs.journal.jobs, "", key=key, limit=1):
        return found[0]
    row = FileRow(
        id=f"file-{secrets.token_hex(12)}",
        purpose="batch",
        filename=part.name,
        bytes=part.stat().st_size,
        created_at=jobs.journal.now(),
    )
    await jobs.keep_upload("", row, part)
    return await jobs.call(
        jobs.journal.create_job,
        "",
        endpoint=endpoint,
        served=jobs.gateway.model_names,
        input_file_id=row.id,
        completion_window="365d",
        window_seconds=_ONE_YEAR_SECONDS,
        key=key,
    )


async def _write(jobs: JobService, job: JobRow, output: Path) -> None:
    """All result lines in the order of the input; the output appears whole or not at all."""
    part = output.with_name(f"{output.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            line = 0
            while rows := await jobs.call(jobs.journal.result_lines, job.id, None, line, _LINES_AT_ONCE):
                file.writelines(result + b"\n" for _, result in rows)
                line = rows[-1][0]
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
