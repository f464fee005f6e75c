"""Steps of many tokens over a group, in halves: sums by copies and flags beside products, without a card.

In the first test one rank dawdles wherever it has waited, until its peers can do nothing more without it: a flag that
nobody waits for, or that is told too early, gives wrong numbers each time. The second one looks at what two streams of
a rank may do at the same time: whatever touches one place must be in order by the streams' own waits.
"""

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_group_order import DEADLINE_SECONDS, EPS, NUM_LAYERS, VOCABULARY, WIDTH, Ranks, _normed
from torch import Tensor

from argosy.workers.layers.group_sum import GroupCopies, GroupSum
from argosy.workers.models import group_forward
from argosy.workers.models.group_forward import GroupForward


class Lagging:
    """Waits of all ranks; behind each of its own the slow one stands until all others stand, too."""

    def __init__(self, num_ranks: int, slow: int):
        self.values: dict[int, int] = {}
        self._counts, self._slow = [0] * num_ranks, slow
        self._ended: set[int] = set()
        self._blocked: dict[int, Callable[[], bool]] = {}
        self._changed = threading.Condition()

    def wait(self, rank: int, ready: Callable[[], bool]) -> None:
        """Until it is ready."""
        with self._changed:
            self._blocked[rank] = ready
            self._changed.notify_all()
            assert self._changed.wait_for(ready, DEADLINE_SECONDS), "what it waits for never came"
            del self._blocked[rank]
            if rank == self._slow:
                assert self._changed.wait_for(self._are_stuck, DEADLINE_SECONDS), "nobody is ahead"

    def _are_stuck(self) -> bool:
        others = [n for n in range(len(self._counts)) if n != self._slow and n not in self._ended]
        return all(n in self._blocked and not self._blocked[n]() for n in others)

    def tell(self, address: int, value: int) -> None:
        """A flag is so much now."""
        with self._changed:
            self.values[address] = value
            self._changed.notify_all()

    def meet(self, rank: int) -> None:
        """As in sums by kernels."""
        with self._changed:
            self._counts[rank] += 1
            turn = self._counts[rank]
        self.wait(rank, lambda: min(self._counts) >= turn)

    def dawdle(self, rank: int) -> None:
        """It has."""

    def end(self, rank: int) -> None:
        """It has nothing more to do."""
        with self._changed:
            self._ended.add(rank)
            self._changed.notify_all()


class Halves(Ranks):
    """Ranks whose sums of many rows go by copies."""

    def __init__(self, num_ranks: int, slow: int, asked_rows_S: Tensor | None, *, is_last_stage: bool):
        super().__init__(num_ranks, slow, is_last_stage=is_last_stage, max_tokens=64)
        self.meetings: Any = Lagging(num_ranks, slow)
        self.asked_rows_S = asked_rows_S
        self.all_made = threading.Barrier(num_ranks)

    def _make(self, rank: int) -> Any:
        forward = super()._make(rank)
        for layer, (attention, mlp) in zip(forward._layers, self.products[rank], strict=True):
            layer.attention = SimpleNamespace(
                qkv_proj=SimpleNamespace(num_out_own=WIDTH, part=lambda x_TD, out_TX: out_TX.copy_(x_TD)),
                attend=lambda qkv_TX, positions_T, ctx: qkv_TX.clone(),
                o_proj=SimpleNamespace(part=_times(attention)),
            )  # fmt: skip
            layer.mlp = SimpleNamespace(inner=torch.clone, down_proj=SimpleNamespace(part=_times(mlp)))

        def begin(token_ids_T: Tensor, hidden_TD: None, positions_T: Tensor, ctx: object) -> Tensor:
            if forward._copies is None:
                self.all_made.wait(DEADLINE_SECONDS)  # all buffers exist
                forward._copies = self._copies(rank, forward.sums)
            context: Any = SimpleNamespace(
                asked_rows_S=self.asked_rows_S, metadata=SimpleNamespace(is_padded=False)
            )  # fmt: skip
            return forward(token_ids_T, hidden_TD, positions_T, context)

        return begin

    def _buffer(self, rank: int, num_bytes: int) -> Any:
        buffer = super()._buffer(rank, num_bytes)
        buffer.pointers = [0] * self.num_ranks  # until all buffers exist
        return buffer

    def _copies(self, rank: int, sums: GroupSum) -> GroupCopies:
        waits = self.meetings

        def is_up(address: int) -> bool:
            return waits.values.get(address, 0) == 1

        def meet(stream: object, meeting: tuple[list[int], list[int]]) -> None:
            tell, hear = meeting
            for address in tell:
                assert not waits.values.get(address), "a flag that is up tells nothing"
                waits.tell(address, 1)
            for address in hear:
                waits.wait(rank, partial(is_up, address))
                waits.tell(address, 0)

        flags: Any = SimpleNamespace(
            meeting=lambda tell, hear: (tell, hear), meet=meet,
            copy=lambda stream, target, source, num_bytes: ctypes.memmove(target, source, num_bytes),
        )  # fmt: skip
        sums._buffer.pointers[:] = [buffer.data_ptr() for buffer in self.buffers if buffer is not None]
        sums._kernels.add_staged_norm = _add_staged_norm  # type: ignore[method-assign]  # a stand-in
        return GroupCopies(sums, flags, max_rows=self.max_tokens)


def _times(weight_DD: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x_TD, out_TD: out_TD.copy_(x_TD @ weight_DD)


def _add_staged_norm(
    own_RD: Tensor, staged_PRD: Tensor, residual_RD: Tensor, weight_D: Tensor | None, eps: float, out_RD: Tensor
) -> None:
    """As `kernels/group_sum.py`."""
    residual_RD += own_RD + staged_PRD.sum(0)
    out_RD.copy_(residual_RD if weight_D is None else _normed(residual_RD, SimpleNamespace(weight=weight_D, eps=eps)))


class Stream:
    """What it does is done at once; `race` remembers what it had to wait for."""

    def __init__(self, race: "Race | None" = None, name: str = ""):
        self._race, self.name = race, name

    def wait_stream(self, other: "Stream") -> None:
        """All that was queued there so far."""
        if self._race is not None:
            self._race.clocks[self.name] |= self._race.clocks[other.name]

    def wait_event(self, event: "Event") -> None:
        """All that was queued there when it was recorded."""
        if self._race is not None:
            self._race.clocks[self.name] |= event.seen


class Event:
    """Of a stream."""

    def __init__(self) -> None:
        self.seen: frozenset[int] = frozenset()

    def record(self, stream: Stream) -> None:
        """As it is now."""
        if stream._race is not None:
            self.seen = stream._race.clocks[stream.name]


class Race:
    """Who touched what, and which of all that was done each of it had waited for."""

    def __init__(self) -> None:
        self.clocks: dict[str, frozenset[int]] = {"main": frozenset(), "side": frozenset()}
        self.done: list[tuple[str, set[str], set[str], frozenset[int]]] = []

    def do(self, stream: str, what: str, reads: set[str], writes: set[str]) -> None:
        """Next in that stream."""
        self.done.append((f"{what} on {stream}", reads, writes, self.clocks[stream]))
        self.clocks[stream] |= {len(self.done) - 1}

    def races(self) -> list[tuple[str, str]]:
        """Pairs that touch one place, one of them to write, and neither has waited for the other."""
        found = []
        for number, (later, reads, writes, seen) in enumerate(self.done):
            for before, (what, read, written, _) in enumerate(self.done[:number]):
                if (written & (reads | writes) or read & writes) and before not in seen:
                    found.append((what, later))
        return found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams without a card, and halves of a few rows."""
    monkeypatch.setenv("ARGOSY_OVERLAP_TOKENS", "16")
    monkeypatch.setattr(group_forward, "HALF_MULTIPLE", 8)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())


@pytest.mark.parametrize("is_last_stage", [False, True], ids=["first stage", "whole model"])
@pytest.mark.parametrize("asked", [None, [0, 15, 16, 23], []], ids=["all rows", "some rows", "no row"])
@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(2, 24), (4, 27), (4, 17)])
def test_sums_by_copies_are_those_of_one_rank_however_far_others_are_ahead(
    at_once: None, num_ranks: int, num_tokens: int, asked: list[int] | None, is_last_stage: bool
) -> None:
    """Shares of a half that are not alike, ranks that own none of it, the rows that sample alone at the end."""
    generator = torch.Generator().manual_seed(5)
    steps = [torch.randint(VOCABULARY, (num_tokens,), generator=generator) for _ in range(3)]
    rows_S = None if asked is None else torch.tensor([row for row in asked if row < num_tokens], dtype=torch.int64)
    for slow in range(num_ranks):
        group = Halves(num_ranks, slow, rows_S, is_last_stage=is_last_stage)
        for made in group.run(steps):
            for step, made_TD in zip(steps, made, strict=True):
                expected_TD = group.expected(step)
                if rows_S is not None and is_last_stage:
                    expected_TD = expected_TD[rows_S]
                torch.testing.assert_close(made_TD, expected_TD, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("asked", [None, torch.tensor([3, 20])], ids=["all rows", "some rows"])
def test_what_two_streams_touch_is_in_order(
    monkeypatch: pytest.MonkeyPatch, at_once: None, asked: Tensor | None
) -> None:
    """Products write parts that sums read, sums write rows that products read, and so on in turn."""
    race, num_tokens = Race(), 24
    main, side = Stream(race, "main"), Stream(race, "side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: side)
    places = {name: torch.zeros(num_tokens, WIDTH) for name in ("part 0", "part 1", "shared", "residual")}

    def name_of(x: Tensor) -> str:
        (name,) = [
            f"{name} {'A' if x.data_ptr() == tensor.data_ptr() else 'B'}"
            for name, tensor in places.items()
            if tensor.data_ptr() <= x.data_ptr() < tensor.data_ptr() + tensor.nbytes
        ] or ["own"]
        return name

    def product(x_TD: Tensor, out_TD: Tensor) -> None:
        race.do("main", "product", {name_of(x_TD)} - {"own"}, {name_of(out_TD)} - {"own"})

    def inner(x_TD: Tensor) -> Tensor:
        race.do("main", "inner", {name_of(x_TD)}, set())
        return x_TD.clone()

    def add_norm(which: int, residual_SD: Tensor, norm: object, **_: object) -> Tensor:
        return residual_SD

    def sum_rows(stream: Stream, which: int, residual_TD: Tensor, rows: slice, norm: object) -> None:
        half = "B" if rows.start else "A"
        race.do(stream.name, "sum", {f"part {which} {half}"}, {f"shared {half}", f"residual {half}"})

    def make_layer() -> Any:
        attention = SimpleNamespace(
            qkv_proj=SimpleNamespace(num_out_own=WIDTH, part=product), attend=lambda qkv_TX, *_: qkv_TX.clone(),
            o_proj=SimpleNamespace(part=product),
        )  # fmt: skip
        mlp = SimpleNamespace(inner=inner, down_proj=SimpleNamespace(part=product))
        norm = SimpleNamespace(weight=torch.ones(WIDTH), eps=EPS)
        return SimpleNamespace(
            attention=attention, mlp=mlp, input_norm=norm, mlp_norm=norm, parameters=lambda: iter(())
        )

    layers: Any = [make_layer() for _ in range(NUM_LAYERS + 1)]
    sums: Any = SimpleNamespace(
        num_ranks=2, part=lambda which, num: places[f"part {which}"][:num], shared=lambda num: places["shared"][:num],
        add_norm=add_norm,
    )  # fmt: skip
    copies: Any = SimpleNamespace(sum_rows=sum_rows, owns=lambda rows_S, parts: torch.ones(len(rows_S), dtype=bool))
    forward = GroupForward(
        layers, None, layers[0].input_norm, sums, copies, width=WIDTH, dtype=torch.float32,
        device=torch.device("cpu"), in_turn=lambda: layers,
    )  # fmt: skip
    context: Any = SimpleNamespace(asked_rows_S=asked)
    forward._overlapped(copies, torch.zeros(num_tokens, WIDTH), places["residual"], torch.arange(num_tokens), context)
    race.do("main", "who asked", {"shared A", "shared B"} if asked is None else set(), {"part 0 A", "part 0 B"})
    sums_seen = [what for what, *_ in race.done if what.startswith("sum")]
    assert len(sums_seen) == 4 * len(layers) - (0 if asked is None else 4)
    assert all("side" in what for what in sums_seen)
    assert race.races() == []
