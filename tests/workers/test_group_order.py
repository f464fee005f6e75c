"""Ranks of a group meet only where kernels say so: between two meetings one may be ahead of another by all it can do.

`Ranks` runs the real `GroupForward` and `GroupSum` of each rank in a thread, with torch in place of the kernels. One
rank dawdles: after each meeting it reads its peers' parts only when these can do nothing more without it. A place that
a peer writes too early then gives wrong numbers, each time.
"""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from argosy.kernels import group_push
from argosy.workers.forward_context import ForwardContext
from argosy.workers.layers.group_sum import SCATTER_ROWS, GroupSum, Left
from argosy.workers.models.group_forward import GroupForward

WIDTH, NUM_LAYERS, VOCABULARY, EPS, FLAG_BYTES = 16, 2, 32, 1e-6, 64
DEADLINE_SECONDS = 60.0


class Meetings:
    """Where ranks wait for each other, and where the one that dawdles waits for all others to be stuck."""

    def __init__(self, num_ranks: int, slow: int):
        self._counts, self._ended, self._slow = [0] * num_ranks, [False] * num_ranks, slow
        self._changed = threading.Condition()

    def meet(self, rank: int) -> None:
        """Until all ranks have come to their meeting of this number."""
        with self._changed:
            self._counts[rank] += 1
            turn = self._counts[rank]
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: min(self._counts) >= turn, DEADLINE_SECONDS), "a rank never came"

    def dawdle(self, rank: int) -> None:
        """The slow rank, until each of the others stands at a later meeting or has nothing more to do."""
        if rank != self._slow:
            return
        with self._changed:
            turn = self._counts[rank]

            def are_stuck() -> bool:
                others = [n for n in range(len(self._counts)) if n != rank]
                return all(self._counts[n] > turn or self._ended[n] for n in others)

            assert self._changed.wait_for(are_stuck, DEADLINE_SECONDS), "nobody is ahead"

    def end(self, rank: int) -> None:
        """It has nothing more to do."""
        with self._changed:
            self._ended[rank] = True
            self._changed.notify_all()


class Ranks:
    """A group of ranks whose buffers all can read."""

    def __init__(self, num_ranks: int, slow: int, *, is_last_stage: bool, max_tokens: int, way: str | None = None):
        self.way = way
        generator = torch.Generator().manual_seed(3)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).div(WIDTH**0.5)

        self.num_ranks, self.is_last_stage, self.max_tokens = num_ranks, is_last_stage, max_tokens
        self.tables = [numbers(VOCABULARY, WIDTH) for _ in range(num_ranks)]
        self.products = [
            [(numbers(WIDTH, WIDTH), numbers(WIDTH, WIDTH)) for _ in range(NUM_LAYERS)] for _ in range(num_ranks)
        ]
        self.norms = [SimpleNamespace(weight=1 + numbers(WIDTH), eps=EPS) for _ in range(2 * NUM_LAYERS + 1)]
        self.meetings = Meetings(num_ranks, slow)
        self.buffers: list[Tensor | None] = [None] * num_ranks

    def run(self, steps: list[Tensor]) -> list[list[Tensor]]:
        """What each rank gives for each step; no step draws a token."""
        ranks = [self._make(rank) for rank in range(self.num_ranks)]
        found: list[list[Tensor]] = [[] for _ in ranks]
        failed: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                for token_ids_T in steps:
                    made_TD = ranks[rank](token_ids_T, None, torch.arange(len(token_ids_T)), _NO_CONTEXT)
                    found[rank].append(made_TD.clone())
            except BaseException as error:  # shown where they are joined
                failed.append(error)
            finally:
                self.meetings.end(rank)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        return found

    def expected(self, token_ids_T: Tensor) -> Tensor:
        """The same on one rank."""
        residual_TD: Tensor = torch.stack([table[token_ids_T] for table in self.tables]).sum(0)
        x_TD = _normed(residual_TD, self.norms[0])
        for layer in range(NUM_LAYERS):
            for place in range(2):
                residual_TD = residual_TD + sum((x_TD @ each[layer][place] for each in self.products), torch.zeros(()))
                last = not self.is_last_stage and (layer, place) == (NUM_LAYERS - 1, 1)
                x_TD = residual_TD if last else _normed(residual_TD, self.norms[1 + 2 * layer + place])
        return x_TD

    def _make(self, rank: int) -> GroupForward:
        parallel: Any = SimpleNamespace(
            rank=SimpleNamespace(tp_rank=rank), tp_size=self.num_ranks, device=torch.device("cpu"),
            shared_buffer=lambda num_bytes: self._buffer(rank, num_bytes),
        )  # fmt: skip
        sums = GroupSum(parallel, max_tokens=self.max_tokens, width=WIDTH, max_rows=8, dtype=torch.float32)
        sums._kernels = SimpleNamespace(FLAG_BYTES=FLAG_BYTES, sum_add_norm=self._sum_add_norm)  # type: ignore[assignment]  # a stand-in
        sums._push = SimpleNamespace(push_add_norm=self._push_add_norm, MAX_ROWS=0)  # type: ignore[assignment]  # a stand-in
        if self.way is not None:
            sums.way_of = lambda *args, **kwargs: self.way  # type: ignore[method-assign,return-value]  # the way asked for
        layers: Any = []
        for number, (attention, mlp) in enumerate(self.products[rank]):
            layers.append(
                SimpleNamespace(
                    attention=_Product(attention), mlp=_Product(mlp), input_norm=self.norms[2 * number],
                    mlp_norm=self.norms[2 * number + 1], parameters=lambda: iter(()),
                )
            )  # fmt: skip
        table = self.tables[rank]
        embed: Any = SimpleNamespace(part=lambda token_ids_T, out_TD: out_TD.copy_(table[token_ids_T]))
        norm: Any = self.norms[-1] if self.is_last_stage else None
        return GroupForward(
            layers, embed, norm, sums, None, width=WIDTH, dtype=torch.float32, device=torch.device("cpu"),
            in_turn=lambda: layers,
        )  # fmt: skip

    def _buffer(self, rank: int, num_bytes: int) -> Any:
        local = self.buffers[rank] = torch.zeros(num_bytes, dtype=torch.uint8)
        return SimpleNamespace(local=local, addresses_W=torch.zeros(self.num_ranks, dtype=torch.int64))

    def _of(self, rank: int, at: int, num_rows: int) -> Tensor:
        buffer = self.buffers[rank]
        assert buffer is not None
        return buffer[at : at + num_rows * WIDTH * 4].view(torch.float32).view(num_rows, WIDTH)

    def _sum_add_norm(
        self, bases_W: Tensor, counters: Tensor, rank: int, residual_TD: Tensor, weight_D: Tensor | None, eps: float, *,
        parts_bytes: int, shared_bytes: int | None, shared_TD: Tensor | None, add: bool, asked: None,
    ) -> Tensor:  # fmt: skip
        """As `kernels/group_sum.py`."""
        num_rows = len(residual_TD)
        self.meetings.meet(rank)
        self.meetings.dawdle(rank)
        total_TD = sum(self._of(peer, parts_bytes, num_rows) for peer in range(self.num_ranks))
        made_TD = total_TD + residual_TD if add else total_TD
        assert isinstance(made_TD, Tensor)
        own = slice(rank, num_rows, self.num_ranks) if shared_bytes is not None else slice(0, num_rows)
        residual_TD[own] = made_TD[own]
        if weight_D is not None:
            made_TD = _normed(made_TD, SimpleNamespace(weight=weight_D, eps=eps))
        if shared_bytes is None or shared_TD is None:
            return made_TD if weight_D is not None else residual_TD
        for peer in range(self.num_ranks):
            self._of(peer, shared_bytes, num_rows)[own] = made_TD[own]
        self.meetings.meet(rank)
        return shared_TD

    def _push_add_norm(
        self, bases_W: Tensor, counters: Tensor, rank: int, part_TD: Tensor, residual_TD: Tensor,
        weight_D: Tensor | None, eps: float, *, inbox_at: int, scatter: bool, add: bool,
    ) -> Tensor:  # fmt: skip
        """As `kernels/group_push.py`: to all, or to the one who sums a row and from there to all."""
        num_rows, most = len(residual_TD), group_push.MAX_ROWS
        result_at = inbox_at + self.num_ranks * most * WIDTH * 4
        places = [inbox_at + sender * most * WIDTH * 4 for sender in range(self.num_ranks)]
        result = [self._of(peer, result_at, num_rows) for peer in range(self.num_ranks)]
        made_TD = self._by_messages(rank, part_TD, residual_TD, weight_D, eps, places, result, add, scatter)
        return made_TD.clone()

    def _by_messages(
        self, rank: int, part_TD: Tensor, residual_TD: Tensor, weight_D: Tensor | None, eps: float, places: list[int],
        result: list[Tensor], add: bool, scatter: bool,
    ) -> Tensor:  # fmt: skip
        """Each rank writes where its peers read, whenever it comes by; they read late."""
        num_rows = len(part_TD)
        rows_of = [
            slice(peer, num_rows, self.num_ranks) if scatter else slice(0, num_rows) for peer in range(self.num_ranks)
        ]
        for peer, rows in enumerate(rows_of):
            self._of(peer, places[rank], num_rows)[rows] = part_TD[rows]
        self.meetings.meet(rank)
        self.meetings.dawdle(rank)
        own = rows_of[rank]
        total_TD: Tensor = torch.stack([self._of(rank, place, num_rows)[own] for place in places]).sum(0)
        if add:
            total_TD = total_TD + residual_TD[own]
        residual_TD[own] = total_TD
        if weight_D is not None:
            total_TD = _normed(total_TD, SimpleNamespace(weight=weight_D, eps=eps))
        if not scatter:
            return total_TD
        for each in result:
            each[own] = total_TD
        self.meetings.meet(rank)
        self.meetings.dawdle(rank)
        return result[rank]


class _Product:
    """In place of attention and MLP."""

    def __init__(self, weight_DD: Tensor):
        self._weight_DD = weight_DD

    def part(self, x_TD: Tensor, *rest: Any, in_pieces: bool) -> Left:
        """Both sorts of calls end with where the product goes."""
        rest[-1].copy_(x_TD @ self._weight_DD)
        return Left()


def _normed(x_TD: Tensor, norm: Any) -> Tensor:
    made_TD: Tensor = x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    return made_TD


_NO_CONTEXT: Any = ForwardContext.__new__(ForwardContext)


@pytest.mark.parametrize("is_last_stage", [False, True], ids=["first stage", "whole model"])
@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(2, 3), (2, 40), (4, 5), (4, SCATTER_ROWS + 9)])
def test_a_rank_that_is_ahead_overwrites_nothing_that_others_read(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int, num_tokens: int, is_last_stage: bool
) -> None:
    """Chunks of a long prompt: no step draws a token, so between two steps nobody waits for anybody."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda *args, **kwargs: None)
    generator = torch.Generator().manual_seed(5)
    steps = [torch.randint(VOCABULARY, (num_tokens,), generator=generator) for _ in range(4)]
    for slow in range(num_ranks):
        group = Ranks(num_ranks, slow, is_last_stage=is_last_stage, max_tokens=64)
        for made in group.run(steps):
            for step, made_TD in zip(steps, made, strict=True):
                torch.testing.assert_close(made_TD, group.expected(step), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_last_stage", [False, True], ids=["first stage", "whole model"])
@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(2, 3), (4, 9)])
@pytest.mark.parametrize("way", ["push", "push scatter"])
def test_nothing_that_was_sent_is_overwritten_before_it_was_read(
    monkeypatch: pytest.MonkeyPatch, way: str, num_ranks: int, num_tokens: int, is_last_stage: bool
) -> None:
    """Inboxes and stages of three sums take turns, and nobody asks whether the one before was emptied."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda *args, **kwargs: None)
    monkeypatch.setattr(group_push, "suits", lambda *args: True)  # so that there are inboxes for 32 bits too
    generator = torch.Generator().manual_seed(5)
    steps = [torch.randint(VOCABULARY, (num_tokens,), generator=generator) for _ in range(3)]
    for slow in range(num_ranks):
        group = Ranks(num_ranks, slow, is_last_stage=is_last_stage, max_tokens=64, way=way)
        for made in group.run(steps):
            for step, made_TD in zip(steps, made, strict=True):
                torch.testing.assert_close(made_TD, group.expected(step), atol=1e-4, rtol=1e-4)
