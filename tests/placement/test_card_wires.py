"""Messages through slots in the other card's memory, in whatever order the two cards get to their commands."""

import random
from collections import deque
from collections.abc import Callable

import pytest

pytest.importorskip("torch")

from argosy.placement.card_wires import COUNTER_BYTES, HEADER_BYTES, NUM_WIRES, SLOTS, CardWire

SLOT_BYTES = 16


class Cards:
    """Streams that take their commands one at a time, in an order of their own; one memory."""

    def __init__(self, seed: int):
        self.memory: dict[int, object] = {}
        self.streams: dict[int, deque[Callable[[], bool]]] = {}
        self._rng = random.Random(seed)
        self.current = 0

    def wait(self, stream: int, address: int, value: int) -> None:
        """Stays first in its stream until the counter is there."""
        self._tell(stream, lambda: int(self.memory.get(address, 0)) >= value)  # type: ignore[call-overload]

    def write(self, stream: int, address: int, value: int) -> None:
        """A counter only goes up."""

        def command() -> bool:
            assert int(self.memory.get(address, 0)) < value  # type: ignore[call-overload]
            self.memory[address] = value
            return True

        self._tell(stream, command)

    def copy(self, stream: int, target: int, source: int, num_bytes: int) -> None:
        """All bytes of a message as one thing."""
        del num_bytes
        self._tell(stream, lambda: (self.memory.__setitem__(target, self.memory[source]), True)[1])

    def move(
        self,
        source: int,
        target: int,
        num_bytes: int,
        *,
        await_address: int,
        least: int,
        announce_address: int,
        count: int,
    ) -> None:
        """One launch is these three in a row; which card's stream is told by the test."""
        self.wait(self.current, await_address, least)
        self.copy(self.current, target, source, num_bytes)
        self.write(self.current, announce_address, count)

    def _tell(self, stream: int, command: Callable[[], bool]) -> None:
        self.streams.setdefault(stream, deque()).append(command)

    def run(self) -> None:
        """Until nothing is left; a stream that can't go on is tried again when others have."""
        while any(self.streams.values()):
            ready = [stream for stream, commands in self.streams.items() if commands and commands[0]()]
            assert ready, "all streams wait"
            for stream in ready:
                self.streams[stream].popleft()
            for _ in range(self._rng.randrange(6)):  # one of them runs ahead
                commands = self.streams[self._rng.choice(list(self.streams))]
                if commands and commands[0]():
                    commands.popleft()


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_every_message_arrives_once_and_none_is_overwritten(seed: int, short: bool) -> None:
    """A sender that is told everything at once, as hosts run ahead of their cards; the receiver as well."""
    cards, count = Cards(seed), 12
    sender, receiver = 0, 1 << 20
    slots_at = HEADER_BYTES
    outgoing = CardWire(cards, 1, sender, receiver, slots_at, SLOT_BYTES)
    incoming = CardWire(cards, 1, receiver, sender, slots_at, SLOT_BYTES)
    sources, targets = 1 << 30, 1 << 31
    for message in range(count):
        cards.memory[sources + message] = f"message {message}"
        if short:
            cards.current = 0
            outgoing.send_short(cards.move, sources + message, SLOT_BYTES)
            cards.current = 1
            incoming.receive_short(cards.move, targets + message, SLOT_BYTES)
        else:
            outgoing.send(0, sources + message, SLOT_BYTES)
            incoming.receive(1, targets + message, SLOT_BYTES)
    cards.run()
    assert [cards.memory[targets + message] for message in range(count)] == [f"message {m}" for m in range(count)]
    slots = {address for address in cards.memory if receiver + slots_at <= address < sources}
    assert len(slots) == SLOTS


def test_wires_have_their_own_counters() -> None:
    """Tokens one way and hidden states the other, between the same two cards: nothing of them overlaps."""
    cards = Cards(0)
    ends = [CardWire(cards, wire, 0, 1 << 20, HEADER_BYTES, SLOT_BYTES) for wire in range(2 * NUM_WIRES)]
    counters = [address for end in ends for address in (end._sent_here, end._taken_here)]
    assert len(set(counters)) == 4 * NUM_WIRES
    assert max(counters) + 4 <= HEADER_BYTES - COUNTER_BYTES
