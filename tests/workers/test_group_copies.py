"""Sums by copies and flags, without cards: each rank's streams go on in any order that the flags allow."""

import ctypes
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from argosy.kernels import group_sum
from argosy.workers.layers import group_sum as group_sum_of_ranks
from argosy.workers.layers.group_sum import GroupCopies, GroupSum

WIDTH, TOKENS, MIDDLE = 4, 22, 12
HALVES = (slice(0, MIDDLE), slice(MIDDLE, TOKENS))
Operation = tuple[str, Any]


class Later:
    """In place of the driver and of the kernel: notes what a stream is told, to be done when its turn comes."""

    FLAG_BYTES = group_sum.FLAG_BYTES  # before the parts, as the sums reckoned with

    def __init__(self) -> None:
        self.told: list[Operation] = []

    def meeting(self, tell: list[int], hear: list[int]) -> list[Operation]:
        steps: list[Operation] = [("raise", address) for address in tell]
        return [*steps, *(("wait", address) for address in hear), *(("lower", address) for address in hear)]

    def meet(self, stream: object, meeting: list[Operation]) -> None:
        self.told += meeting

    def copy(self, stream: object, target: int, source: int, num_bytes: int) -> None:
        self.told.append(("run", lambda: ctypes.memmove(target, source, num_bytes)))

    def add_staged_norm(
        self, own_RD: Tensor, staged_PRD: Tensor, residual_RD: Tensor, norm: None, eps: float, out_RD: Tensor
    ) -> None:
        self.told.append(("run", lambda: out_RD.copy_(residual_RD.add_(own_RD + staged_PRD.sum(0)))))


def run_all(streams: list[list[Operation]], rng: random.Random) -> None:
    """One operation of a stream after the other, of any stream that does not wait."""
    flags: dict[int, int] = {}
    places = [0] * len(streams)
    while any(place < len(stream) for place, stream in zip(places, streams, strict=True)):
        able = []
        for number, stream in enumerate(streams):
            if places[number] < len(stream):
                what, on = stream[places[number]]
                if what not in ("wait", "after") or (flags.get(on) if what == "wait" else places[on[0]] >= on[1]):
                    able.append(number)
        assert able, "all wait for each other"
        number = rng.choice(able)
        what, on = streams[number][places[number]]
        places[number] += 1
        if what == "raise":
            assert not flags.get(on), "raised a flag that was up: whoever lowers it misses one"
            flags[on] = 1
        elif what == "lower":
            flags[on] = 0
        elif what == "run":
            on()


class Rank:
    """A rank's sums by copies, and what it is to compute."""

    def __init__(self, rank: int, world: int, buffers: list[Tensor]):
        parallel: Any = SimpleNamespace(
            rank=SimpleNamespace(tp_rank=rank), tp_size=world, device=torch.device("cpu"),
            shared_buffer=lambda num_bytes: SimpleNamespace(
                local=buffers[rank], pointers=[buffer.data_ptr() for buffer in buffers], addresses_W=torch.zeros(world)
            ),
        )  # fmt: skip
        self.later = Later()
        self.sums = GroupSum(parallel, max_tokens=TOKENS, width=WIDTH, max_rows=4, dtype=torch.float32)
        self.sums._kernels = self.later  # type: ignore[assignment]  # a stand-in
        self.copies = GroupCopies(self.sums, self.later, max_rows=MIDDLE)  # type: ignore[arg-type]  # a stand-in
        self.residual_TD = torch.zeros(TOKENS, WIDTH)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_flags_that_are_lowered_again_order_all_sums(world: int, seed: int) -> None:
    """Sixteen sums in halves, the same orders to the driver each time: whatever rank runs ahead, nobody reads what is
    not there, nobody writes what is still read, and no flag is missed."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    buffers = [torch.zeros(1 << 17, dtype=torch.uint8) for _ in range(world)]
    ranks = [Rank(number, world, buffers) for number in range(world)]
    num_sums = 16
    products = torch.randint(-50, 50, (num_sums, world, TOKENS, WIDTH), generator=generator).float()
    streams: list[list[Operation]] = []
    seen: dict[tuple[int, int], Tensor] = {}

    def product(rank: Rank, number: int, turn: int, half: slice) -> Callable[[], object]:
        return lambda: rank.sums.part(turn // 2 % 2, TOKENS)[half].copy_(products[turn, number, half])

    def look(rank: Rank, number: int, turn: int, half: slice) -> Callable[[], object]:
        return lambda: seen.__setitem__((number, turn), rank.sums.shared(TOKENS)[half].clone())

    for number, rank in enumerate(ranks):
        main, side = 2 * number, 2 * number + 1
        mains: list[Operation] = []
        ends: list[int] = []
        for turn in range(num_sums):
            half = HALVES[turn % 2]
            if turn >= 2:  # the sum of this half, which this product is made of
                mains += [("after", (side, ends[turn - 2])), ("run", look(rank, number, turn - 2, half))]
            mains.append(("run", product(rank, number, turn, half)))
            rank.later.told.append(("after", (main, len(mains))))
            rank.copies.sum_rows(None, turn // 2 % 2, rank.residual_TD, half, None)  # type: ignore[arg-type]  # copies alone
            ends.append(len(rank.later.told))
        for turn in (num_sums - 2, num_sums - 1):
            mains += [("after", (side, ends[turn])), ("run", look(rank, number, turn, HALVES[turn % 2]))]
        streams += [mains, rank.later.told]
    run_all(streams, rng)
    total = torch.zeros(TOKENS, WIDTH)
    for turn in range(num_sums):
        half = HALVES[turn % 2]
        total[half] += products[turn].sum(0)[half]
        for number in range(world):
            assert torch.equal(seen[number, turn], total[half]), (number, turn)
    owned = [rank.copies.owns(torch.arange(TOKENS), HALVES) for rank in ranks]
    assert torch.equal(torch.stack(owned).sum(0), torch.ones(TOKENS, dtype=torch.long))
    for rank, owned_T in zip(ranks, owned, strict=True):
        assert torch.equal(rank.residual_TD[owned_T], total[owned_T])


@pytest.mark.parametrize(("with_flags", "that_record"), [(4, 4), (4, 3), (3, 3)])
def test_a_group_does_what_all_of_its_ranks_can(
    monkeypatch: pytest.MonkeyPatch, with_flags: int, that_record: int
) -> None:
    """Drivers that differ: one rank that recorded a sum alone, or copied it, would be waited for by nobody."""
    flags: Any = SimpleNamespace(can_be_recorded=lambda device: True, meeting=lambda tell, hear: ())
    monkeypatch.setattr(group_sum_of_ranks, "open_stream_flags", lambda device: flags)

    def all_reduce(answers: Tensor) -> Tensor:
        assert answers.tolist() == [1.0] * 64  # this rank can do both
        return torch.tensor([float(with_flags)] * 32 + [float(that_record)] * 32)

    parallel: Any = SimpleNamespace(device=torch.device("cpu"), tp_size=4, all_reduce=all_reduce)
    buffer = SimpleNamespace(pointers=[0] * 4, local=torch.zeros(1))
    sums: Any = SimpleNamespace(_rank=0, _world=4, _buffer=buffer, _width=8, _dtype=torch.float32, _flag_bytes=0)
    copies = group_sum_of_ranks.open_group_copies(parallel, sums, max_rows=8)
    assert (copies is None) == (with_flags < 4)
    assert copies is None or copies.in_graphs == (that_record == 4)
