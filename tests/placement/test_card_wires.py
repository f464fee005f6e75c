"""Messages through slots in the other card's memory, in whatever order the two cards get to their commands."""

import itertools
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from argosy.placement import card_wires  # noqa: E402  # after the skip
from argosy.placement.card_wires import (  # noqa: E402  # after the skip
    COUNTER_BYTES,
    HEADER_BYTES,
    NUM_WIRES,
    SLOTS,
    CardWire,
    CardWires,
)
from argosy.placement.plan import make_plan  # noqa: E402  # after the skip
from argosy.placement.process_groups import ParallelContext  # noqa: E402  # after the skip
from argosy.placement.step_memory import SHARED_UNIT, wire_bytes  # noqa: E402  # after the skip

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
        self._tell(stream, lambda: int(self.memory.get(address, 0)) >= value)  # type: ignore[call-overload]  # only numbers there

    def write(self, stream: int, address: int, value: int) -> None:
        """A counter only goes up."""

        def command() -> bool:
            assert int(self.memory.get(address, 0)) < value  # type: ignore[call-overload]  # only numbers there
            self.memory[address] = value
            return True

        self._tell(stream, command)

    def copy(self, stream: int, target: int, source: int, num_bytes: int) -> None:
        """All bytes of a message as one thing."""
        del num_bytes
        self._tell(stream, lambda: (self.memory.__setitem__(target, self.memory[source]), True)[1])

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


@pytest.mark.parametrize("seed", range(8))
def test_every_message_arrives_once_and_none_is_overwritten(seed: int) -> None:
    """A sender that is told everything at once, as hosts run ahead of their cards; the receiver as well."""
    cards, count = Cards(seed), 12
    sender, receiver = 0, 1 << 20
    slots_at = HEADER_BYTES
    outgoing = CardWire(cards, 1, sender, receiver, slots_at, SLOT_BYTES)
    incoming = CardWire(cards, 1, receiver, sender, slots_at, SLOT_BYTES)
    sources, targets = 1 << 30, 1 << 31
    for message in range(count):
        cards.memory[sources + message] = f"message {message}"
        outgoing.send(0, sources + message, SLOT_BYTES)
        incoming.receive(1, targets + message, SLOT_BYTES)
    cards.run()
    assert [cards.memory[targets + message] for message in range(count)] == [f"message {m}" for m in range(count)]
    slots = {address for address in cards.memory if receiver + slots_at <= address < sources}
    assert len(slots) == SLOTS


def test_a_sender_with_slots_for_all_steps_in_flight_never_waits() -> None:
    """Prompts alone: their tokens are needed by no step, so none is taken, and yet the last stage has to go on."""
    cards = Cards(0)
    outgoing = CardWire(cards, 0, 0, 1 << 20, HEADER_BYTES, SLOT_BYTES, slots=3)
    for message in range(3):
        cards.memory[(1 << 30) + message] = f"message {message}"
        outgoing.send(0, (1 << 30) + message, SLOT_BYTES)
    cards.run()
    outgoing.send(0, 1 << 30, SLOT_BYTES)
    with pytest.raises(AssertionError, match="all streams wait"):
        cards.run()


def test_wires_have_their_own_counters() -> None:
    """Tokens one way and hidden states the other, between the same two cards: nothing of them overlaps."""
    cards = Cards(0)
    ends = [CardWire(cards, wire, 0, 1 << 20, HEADER_BYTES, SLOT_BYTES) for wire in range(NUM_WIRES)]
    counters = [address for end in ends for address in (end._sent_here, end._taken_here)]
    assert len(set(counters)) == 2 * NUM_WIRES
    assert max(counters) + 4 <= HEADER_BYTES - COUNTER_BYTES


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 2), (2, 2), (1, 3)])
def test_both_ends_of_each_wire_mean_the_same_places(
    tp_size: int, pp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks of a replica, with buffers at made-up addresses: what one end writes is where the other looks, wires
    of different ranks lie in different places, and the last slot ends where the buffer does."""
    sizes: list[int] = []

    class Buffer:
        """Where the buffers of all ranks begin; how large they are is noted."""

        def __init__(self, group: object, device: object, num_bytes: int):
            sizes.append(num_bytes)
            self.addresses_W = torch.arange(tp_size * pp_size, dtype=torch.int64) * (1 << 30)

    monkeypatch.setattr(card_wires, "SymmetricBuffer", Buffer)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: priority)
    ranks = make_plan(4, tp_size, pp_size).ranks
    made = []
    for rank in ranks:
        parallel = ParallelContext(rank, torch.device("cpu"), 1.0, world=object())  # type: ignore[arg-type]  # nobody is asked
        made.append(
            CardWires(parallel, Cards(0), token_bytes=800, token_slots=4, hidden_bytes=5 << 20)  # type: ignore[arg-type]  # a stand-in
        )
    assert len(set(sizes)) == 1
    planned = wire_bytes(1280, 2048, 100, pp_size=pp_size, dtype_bytes=2)  # 5 MiB of hidden states, 100 tokens
    assert 0 <= planned - sizes[0] < 2 * SHARED_UNIT
    places: list[tuple[int, int]] = []
    for rank, wires in zip(ranks, made, strict=True):
        for kind, outgoing in wires.outgoing.items():
            stage = 0 if kind == "tokens" else rank.pp_rank + 1
            incoming = made[stage * tp_size + rank.tp_rank].incoming[kind]
            assert outgoing._sent_there == incoming._sent_here
            assert outgoing._taken_here == incoming._taken_there
            assert outgoing._slots_there == incoming._slots_here
            assert (outgoing._slots, outgoing._slot_bytes) == (incoming._slots, incoming._slot_bytes)
            end = outgoing._slots_there + outgoing._slots * outgoing._slot_bytes
            assert end % (1 << 30) <= sizes[0]
            places += [(outgoing._slots_there, end), (outgoing._sent_there, outgoing._sent_there + COUNTER_BYTES)]
            places.append((outgoing._taken_here, outgoing._taken_here + COUNTER_BYTES))
    places.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))


@pytest.mark.parametrize("broken", ["", "write", "copy"])
def test_a_card_that_does_not_reach_the_next_one_is_found_out(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks in turn, each of which is asked twice, since both must have told their cards before either looks.
    Where the driver refuses a command, no rank leaves early: all meet, and nothing has come."""
    memory: dict[int, int] = {}

    def refuse(*_: int) -> None:
        raise RuntimeError("refused with error 1")

    commands = SimpleNamespace(
        write=lambda stream, address, value: memory.__setitem__(address, value),
        copy=lambda stream, target, source, num_bytes: memory.__setitem__(target, memory[source]),
    )
    met: list[int] = []
    if broken:
        setattr(commands, broken, refuse)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(card_wires.dist, "barrier", lambda group: met.append(1))
    found = []
    for rank in [*make_plan(2, 1, 2).ranks] * 2:
        wires = object.__new__(CardWires)
        wires._commands, wires._device, wires.addresses = commands, torch.device("cpu"), [0, 1 << 20]
        here = rank.global_rank << 20
        wires._word_at = lambda place, here=here: memory.get(here + place, 0)  # type: ignore[method-assign,misc]  # bound now, a stand-in
        parallel = ParallelContext(rank, torch.device("cpu"), 1.0, world=object())  # type: ignore[arg-type]  # nobody is asked
        found.append(wires.reaches(parallel))
    assert found == ([False, True, True, True] if not broken else [False] * 4)
    assert len(met) == 4
