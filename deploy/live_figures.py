"""What a running server says of itself: a line of figures while requests come, and a line when ranks were lost.

`LiveFigures` decides what to say from two readings; `watch` asks the engine and prints, on a thread of its own.
"""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from argosy.cluster.protocol.errors import ServingError
from argosy.cluster.replica_client import connect_engine

PERIOD_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.2  # between two looks at whether the server ends
_LOST: Final = "argosy_recoveries_total"
_STEPS: Final = "argosy_steps_total"


class LiveFigures:
    """Lines for one reading after another; None where there is nothing new to say."""

    def __init__(self) -> None:
        self._before: tuple[float, Mapping[str, float]] | None = None
        self._is_away = False
        self._told = 0.0  # requests of which `loss` has said that they went on

    def line(self, values: Mapping[str, float], now: float) -> str | None:
        """What the figures since the last reading come to; None for the first one and while nothing runs."""
        before, self._before = self._before, (now, dict(values))
        self._is_away = False
        if before is None:
            self._told = values.get(_LOST, 0.0)
            return None
        seconds = max(now - before[0], 1e-9)

        def new(name: str) -> float:
            return max(values.get(name, 0.0) - before[1].get(name, 0.0), 0.0)

        running, waiting = values.get("argosy_requests_running", 0.0), values.get("argosy_requests_waiting", 0.0)
        prompt, answer = new("argosy_prompt_tokens_total"), new("argosy_generation_tokens_total")
        if not (running or waiting or prompt or answer):
            return None
        parts = [
            f"{running:.0f} running, {waiting:.0f} waiting",
            f"{prompt / seconds:,.1f} prompt and {answer / seconds:,.1f} answer tokens/s",
            f"KV {values.get('argosy_kv_usage_ratio', 0.0):.1%} used",
        ]
        if asked := new("argosy_prefix_cache_queries_total"):
            parts.append(f"{new('argosy_prefix_cache_hits_total') / asked:.0%} of prompts cached")
        if preempted := new("argosy_preemptions_total"):
            parts.append(f"{preempted:.0f} preempted")
        return ", ".join(parts)

    def loss(self, values: Mapping[str, float]) -> str | None:
        """That ranks or a driver are new since the last reading, or None; before `line`, which takes the reading."""
        if self._before is None:
            return None
        before = self._before[1]
        if values.get(_STEPS, 0.0) < before.get(_STEPS, 0.0):  # counted from its start
            self._told = 0.0
            return "the engine's driver was lost and started again; requests that it had go on"
        rebuilt = values.get("argosy_epoch", 0.0) - before.get("argosy_epoch", 0.0)
        if rebuilt <= 0:
            return None
        # sent back when the ranks were lost, maybe several readings before there are new ones
        moved, self._told = max(values.get(_LOST, 0.0) - self._told, 0.0), values.get(_LOST, 0.0)
        return (
            f"a rank was lost and all ranks of its replica were started again; {moved:.0f} requests went on from there"
        )

    def away(self) -> str | None:
        """That the engine does not answer, said once until it does again."""
        if self._is_away:
            return None
        self._is_away = True
        return "the engine does not answer: requests wait until it is started again"


@contextlib.contextmanager
def watching(
    address: str,
    secret: str,
    *,
    is_on: bool = True,
    period_seconds: float = PERIOD_SECONDS,
    say: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Print lines of the engine at `address` as long as this is open; nothing where it is not on."""
    if not is_on:
        yield
        return
    is_over = threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(_watch(address, secret, period_seconds, say or _to_stderr, is_over)),
        name="live-figures",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(timeout=5.0)


async def _watch(
    address: str, secret: str, period_seconds: float, say: Callable[[str], None], is_over: threading.Event
) -> None:
    figures = LiveFigures()
    while not is_over.is_set():
        lines: list[str | None] = []
        try:
            client = await connect_engine(address, secret, timeout_seconds=period_seconds)
            try:
                values = (await client.stats()).values
            finally:
                await client.close()
            lines += [figures.loss(values), figures.line(values, time.monotonic())]
        except ServingError:
            lines.append(None if is_over.is_set() else figures.away())
        for text in lines:
            if text is not None:
                say(text)
        until = time.monotonic() + period_seconds
        while time.monotonic() < until and not is_over.is_set():
            await asyncio.sleep(_LOOK_SECONDS)


def _to_stderr(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
