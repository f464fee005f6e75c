"""An engine without Ray, as tests handle it: its processes, to be killed, and what a stream of it said to the end."""

import psutil

from argosy.cluster.driver_client import TokenStream
from argosy.cluster.protocol.sampling import FinishReason
from argosy.deploy.launch import Engine


def driver_process(engine: Engine) -> psutil.Process:
    """The one that all ranks are children of."""
    return psutil.Process(engine._driver.pid)  # type: ignore[attr-defined]  # a process here, not an actor


def rank_processes(engine: Engine) -> list[psutil.Process]:
    """The ranks, by age."""
    return sorted(driver_process(engine).children(), key=lambda process: process.create_time())


async def tokens_of(stream: TokenStream) -> tuple[list[int], FinishReason | None]:
    """(tokens still to come, why it ended)."""
    token_ids: list[int] = []
    reason = None
    async for deltas in stream:
        for delta in deltas:
            token_ids += delta.token_ids
            reason = delta.finish_reason or reason
    return token_ids, reason
