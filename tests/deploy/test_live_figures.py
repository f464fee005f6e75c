"""What a running server says of itself every ten seconds, and when ranks were lost."""

import threading
from types import TracebackType
from typing import Any

import pytest

from argosy.cluster.protocol.errors import ChannelClosed
from argosy.cluster.protocol.messages import StatsReply
from argosy.deploy import live_figures
from argosy.deploy.live_figures import LiveFigures, watching

STEPS, EPOCH, BACK = "argosy_steps_total", "argosy_epoch", "argosy_recoveries_total"


def reading(**given: float) -> dict[str, float]:
    """Figures as the driver sends them, with our names cut short."""
    return {f"argosy_{name}": value for name, value in given.items()}


def test_rates_are_those_since_the_last_reading() -> None:
    """Two readings ten seconds apart; the first one has nothing to be compared with."""
    figures = LiveFigures()
    assert figures.line(reading(prompt_tokens_total=500, generation_tokens_total=100), 100.0) is None
    line = figures.line(
        reading(
            requests_running=3, requests_waiting=1, prompt_tokens_total=1500, generation_tokens_total=12_600,
            kv_usage_ratio=0.123, prefix_cache_queries_total=1000, prefix_cache_hits_total=250, preemptions_total=2,
        ),
        110.0,
    )  # fmt: skip
    assert line == (
        "3 running, 1 waiting, 100.0 prompt and 1,250.0 answer tokens/s, KV 12.3% used, 25% of prompts cached, "
        "2 preempted"
    )


def test_an_idle_server_is_silent() -> None:
    """No line a tick through the night, but one for requests that came and went between two ticks."""
    figures = LiveFigures()
    assert [figures.line(reading(generation_tokens_total=5), at) for at in (0.0, 10.0, 20.0)] == [None] * 3
    assert figures.line(reading(generation_tokens_total=25), 30.0) is not None


def test_lost_ranks_and_drivers_are_said_once() -> None:
    """An epoch more is a loss of ranks; counters that begin anew are a driver's."""
    figures = LiveFigures()
    first, then = {STEPS: 50.0, EPOCH: 0.0, BACK: 0.0}, {STEPS: 60.0, EPOCH: 1.0, BACK: 4.0}
    figures.line(first, 0.0)
    assert "4 requests went on" in (figures.loss(then) or "")
    figures.line(then, 10.0)
    assert figures.loss(then) is None
    figures.line({STEPS: 60.0, EPOCH: 1.0, BACK: 11.0}, 20.0)  # lost; ranks take more than a reading to come back
    assert "7 requests went on" in (figures.loss({STEPS: 60.0, EPOCH: 2.0, BACK: 11.0}) or "")
    assert "driver was lost" in (figures.loss({STEPS: 2.0, EPOCH: 0.0}) or "")
    figures.line({STEPS: 2.0, EPOCH: 0.0}, 30.0)
    assert "5 requests went on" in (figures.loss({STEPS: 3.0, EPOCH: 1.0, BACK: 5.0}) or "")


def test_an_engine_that_is_away_is_said_once_until_it_is_back() -> None:
    """A start of many minutes is one line."""
    figures = LiveFigures()
    assert "does not answer" in (figures.away() or "")
    assert figures.away() is None
    figures.line({}, 0.0)
    assert figures.away() is not None


class _Engine:
    """Answers with one reading after another, then is away."""

    def __init__(self, readings: list[dict[str, float]]):
        self.readings = readings

    async def stats(self) -> StatsReply:
        if not self.readings:
            raise ChannelClosed("gone")
        return StatsReply(values=self.readings.pop(0))

    async def close(self, *_: type[BaseException] | TracebackType | None) -> None:
        pass


def test_the_engine_is_asked_while_the_server_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three questions: nothing yet, figures, nobody there. The thread ends with the server."""
    engine, lines, is_told = _Engine([reading(), reading(generation_tokens_total=7)]), [], threading.Event()

    async def connect(address: str, secret: str, **_: Any) -> _Engine:
        assert (address, secret) == ("here:1", "s")
        return engine

    def say(text: str) -> None:
        lines.append(text)
        if len(lines) == 2:
            is_told.set()

    monkeypatch.setattr(live_figures, "connect_engine", connect)
    with watching("here:1", "s", period_seconds=0.01, say=say):
        assert is_told.wait(30)
    assert "answer tokens/s" in lines[0]
    assert "does not answer" in lines[1]
    assert not [thread for thread in threading.enumerate() if thread.name == "live-figures"]


def test_no_line_where_they_are_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--disable-log-stats`: nobody asks."""
    monkeypatch.setattr(live_figures, "connect_engine", None)
    with watching("here:1", "s", is_on=False):
        assert not [thread for thread in threading.enumerate() if thread.name == "live-figures"]
