"""A given number of requests at once, and what each of them saw on the client's side: over HTTP or in process."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TypeAlias

import msgspec

from argosy.cluster.protocol.sampling import SamplingParams
from argosy.deploy.gateway import Gateway
from argosy.deploy.workload import Workload, WorkloadRequest


class Timing(msgspec.Struct, frozen=True):
    """One request as its client saw it, in seconds from the moment it was sent."""

    num_tokens: int
    first_seconds: float
    last_seconds: float

    @property
    def gap_seconds(self) -> float:
        """Between two tokens, on average; nothing to say about one alone."""
        return (self.last_seconds - self.first_seconds) / max(self.num_tokens - 1, 1)


Ask: TypeAlias = Callable[[WorkloadRequest], Awaitable[Timing]]


async def run_clients(clients: list[Ask], workload: Workload) -> tuple[float, list[Timing]]:
    """Each client sends one request after another until none is left. (Seconds in all, one timing a request.)"""

    waiting = iter(workload)
    timings: list[Timing] = []

    async def work(ask: Ask) -> None:
        for request in waiting:
            timings.append(await ask(request))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for ask in clients[: len(workload)]:
            tasks.create_task(work(ask))
    return time.perf_counter() - started, timings


def params_of(request: WorkloadRequest) -> SamplingParams:
    """Greedy, and as long as it says."""
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=request.max_tokens, detokenize=False)


def ask_gateway(gateway: Gateway) -> Ask:
    """A client in the same process as the gateway: no HTTP, no text."""

    async def ask(request: WorkloadRequest) -> Timing:
        started = time.perf_counter()
        first = last = 0.0
        num_tokens = 0
        prepared = await gateway.prepare(request.prompt, params_of(request))
        async with aclosing(gateway.stream(prepared)) as batches:
            async for batch in batches:
                last = time.perf_counter() - started
                first = first or last
                num_tokens += sum(len(delta.token_ids) for delta in batch)
        return Timing(num_tokens, first, last)

    return ask
