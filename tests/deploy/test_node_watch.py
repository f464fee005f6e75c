"""A server whose Ray has no node left ends, instead of letting requests wait for ever."""

import threading
import time
from collections.abc import Callable, Iterator

from argosy.deploy import server
from argosy.deploy.node_watch import NodeWatch


def answers(*given: bool | Exception) -> tuple[Callable[[], bool], threading.Event]:
    """One after the other, then the last for ever; the event says that all were given."""
    left, all_given = list(given), threading.Event()

    def ask() -> bool:
        found = left.pop(0) if len(left) > 1 else left[0]
        if len(left) == 1:
            all_given.set()
        if isinstance(found, Exception):
            raise found
        return found

    return ask, all_given


def test_two_looks_without_a_node_are_a_loss() -> None:
    """A single one may be the moment between two nodes, and no answer is none."""
    ask, _ = answers(True, False, True, RuntimeError("no answer"), False)
    with NodeWatch(ask, period_seconds=0.005) as nodes:
        deadline = time.monotonic() + 30
        while not nodes.is_lost and time.monotonic() < deadline:
            time.sleep(0.005)
        assert nodes.is_lost
    ask, all_given = answers(True, False, True, False, True)
    with NodeWatch(ask, period_seconds=0.005) as nodes:
        assert all_given.wait(30)
        assert not nodes.is_lost


def test_no_answer_is_none() -> None:
    """Ray in trouble, between two looks that found no node and some: nothing says that they are gone."""
    ask, all_given = answers(False, RuntimeError("no answer"), RuntimeError("no answer"), True)
    with NodeWatch(ask, period_seconds=0.005) as nodes:
        assert all_given.wait(30)
        assert not nodes.is_lost


def test_the_server_stops_waiting_for_signals_and_says_what_was_lost() -> None:
    """Whoever looks after the process starts it again."""
    stop = server._StopSignals()
    looks: Iterator[str] = iter(("", "", "raylet"))
    assert stop.wait(lambda: next(looks)) == "raylet"
    stop._asked_at = 0.0
    assert stop.wait(lambda: "raylet") == ""  # asked to stop already: an orderly end
    stop._asked_at = None

    def look() -> str:
        stop._asked_at = 0.0  # while it looked: the signal went to Ray's processes as well
        return "raylet"

    assert stop.wait(look) == ""
