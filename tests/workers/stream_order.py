"""Streams and events that only keep order, on a CPU: which of two touches of the same memory surely comes first.

Every operation is noted with the bytes that it reads and writes and with the vector clock of its stream. Two touches of
one byte on two streams, one of them a write, must be ordered by a chain of events; else a card may do either first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    """Knows how far it and the streams that it waited for have come."""

    def __init__(self, name: str):
        self.name, self.clock = name, {name: 0}

    def wait_event(self, event: "Event") -> None:
        """All that was before the event's last record comes before what follows here."""
        for name, count in event.clock.items():
            self.clock[name] = max(self.clock.get(name, 0), count)

    def wait_stream(self, other: "Stream") -> None:
        """The same for all that the other was given so far."""
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    """A place in a stream."""

    def __init__(self) -> None:
        self.clock: dict[str, int] = {}

    def record(self, stream: Stream) -> None:
        """Here, from now on."""
        self.clock = dict(stream.clock)


@dataclass
class Touch:
    """One operation's touch of some bytes."""

    stream: str
    number: int
    clock: dict[str, int]
    first: int
    last: int
    writes: bool
    what: str


class Watch(TorchDispatchMode):
    """Notes every operation; `check` says which could meet."""

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = Stream("main")
        self.touches: list[Touch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2]
        if func.is_view or name in ("empty", "new_empty", "set_", "detach"):
            return result
        stream = self.current
        stream.clock[stream.name] += 1
        for place, tensor in enumerate(args):
            if isinstance(tensor, Tensor) and tensor.numel():
                writes = name.endswith("_") and place == 0
                first = tensor.data_ptr()
                touch = (stream.clock[stream.name], dict(stream.clock), first, first + tensor.nbytes, writes, name)
                self.touches.append(Touch(stream.name, *touch))
        return result

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """As `torch.cuda.stream`."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def races(self, ranges: list[tuple[int, int]]) -> list[tuple[Touch, Touch]]:
        """Pairs of touches of these bytes that nothing orders."""
        seen = [t for t in self.touches if any(t.first < last and first < t.last for first, last in ranges)]
        return [
            (early, late)
            for place, late in enumerate(seen)
            for early in seen[:place]
            if early.stream != late.stream
            and (early.writes or late.writes)
            and early.first < late.last
            and late.first < early.last
            and late.clock.get(early.stream, 0) < early.number
        ]


def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """In place of the card's streams."""
    made = Watch()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made.current)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    return made


def bytes_of(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
