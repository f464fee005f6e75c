"""Load on a server from outside, as clients see it: streamed completions, a given number at once."""

import asyncio
import json
import time
from typing import Any

import httpx
import msgspec

from argosy.cluster.protocol.errors import ServingError
from argosy.deploy.client import StreamBroken, error_of
from argosy.deploy.workload import Workload, WorkloadRequest


class Timing(msgspec.Struct, frozen=True):
    """One request as its client saw it, in seconds from the moment it was sent."""

    num_tokens: int
    first_seconds: float
    last_seconds: float


async def run_load(
    url: str, workload: Workload, *, concurrency: int, api_key: str | None = None, extra: dict[str, Any] | None = None
) -> tuple[float, list[Timing]]:
    """Send all of it, at most `concurrency` at once; (seconds in all, one timing a request)."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=url.rstrip("/"), headers=headers, timeout=600.0, limits=limits, trust_env=False
    ) as http:
        listing = await http.get("/v1/models")
        if listing.status_code != 200:
            raise error_of(listing)
        model = listing.json()["data"][0]["id"]
        room = asyncio.Semaphore(concurrency)

        async def one(request: WorkloadRequest) -> Timing:
            async with room:
                return await _stream(http, model, request, extra or {})

        started = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(one(request)) for request in workload]
        except* ServingError as errors:
            raise errors.exceptions[0] from None
        return time.perf_counter() - started, [task.result() for task in running]


async def _stream(http: httpx.AsyncClient, model: str, request: WorkloadRequest, extra: dict[str, Any]) -> Timing:
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }
    started = time.perf_counter()
    first = last = 0.0
    num_tokens = 0
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise error_of(response)
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("choices"):
                last = time.perf_counter() - started
                first = first or last
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    if not num_tokens:
        raise StreamBroken("a stream ended without its usage; the server must support stream_options.include_usage")
    return Timing(num_tokens, first, last)
