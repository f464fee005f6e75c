"""Blocks that a card swaps are copied on streams of their own: no copy may meet a step, or another one, in a byte."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from stream_order import Event, Stream, bytes_of, watch

from argosy.cluster.protocol.messages import BlockSwaps
from argosy.workers import host_pool
from argosy.workers.host_pool import CardHostPool

ROW_BYTES = 4 * 2 * 8 * 4 + 32


class Unfinished(Event):
    """Of a copy that is always still under way: what is not waited for may happen at any time."""

    def query(self) -> bool:
        """Not done yet."""
        return False


def gather(tensors: Sequence[Tensor], ids: Tensor, rows_RB: Tensor) -> None:
    """As the kernel: bytes of these blocks alone are touched."""
    for row, block_id in enumerate(ids.tolist()):
        for part, block in parts(tensors, rows_RB[row], block_id):
            part.copy_(block)


def scatter(rows_RB: Tensor, tensors: Sequence[Tensor], ids: Tensor) -> None:
    """The way back."""
    for row, block_id in enumerate(ids.tolist()):
        for part, block in parts(tensors, rows_RB[row], block_id):
            block.copy_(part)


def parts(tensors: Sequence[Tensor], row_B: Tensor, block_id: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of a row the part of each tensor, and that tensor's block, as bytes."""
    start = 0
    for tensor in tensors:
        block = tensor[block_id].view(-1).view(torch.uint8)
        yield row_B[start : start + len(block)], block
        start += len(block)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> CardHostPool:
    """Eight device blocks of two tensors, ten host blocks, buffers of two rows; streams that are watched."""
    names = iter(("out", "in"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(names)))
    monkeypatch.setattr(host_pool, "_event", Unfinished)
    monkeypatch.setattr(host_pool, "_upload", lambda ids, device: torch.tensor(ids, dtype=torch.int64))
    monkeypatch.setattr(host_pool, "ops", SimpleNamespace(gather_blocks=gather, scatter_blocks=scatter))
    monkeypatch.setattr(host_pool, "OUT_BUFFER_BYTES", 2 * ROW_BYTES)
    monkeypatch.setattr(host_pool, "IN_BUFFER_BYTES", 2 * ROW_BYTES)
    torch.manual_seed(1)
    return CardHostPool([torch.randn(8, 4, 2, 8), torch.randint(0, 99, (8, 32), dtype=torch.uint8)], 10)


def test_copies_are_ordered_against_steps_and_each_other(pool: CardHostPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders as the driver gives them, and after each the step that computes in the blocks that it may touch: those
    swapped out at once, those swapped in from the step on that awaits them."""
    keys, small = pool.tensors
    first = [tensor.clone() for tensor in pool.tensors]
    with watch(monkeypatch) as seen:

        def step(step_id: int, used: list[int], **orders: Any) -> None:
            pool.begin(step_id, BlockSwaps(**orders))
            for block_id in used:
                for tensor in pool.tensors:
                    tensor[block_id].add_(1)

        step(0, [0, 1, 2, 3, 4], out=[(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)])  # more than buffers of one turn
        step(1, [5, 6, 7, 0], out=[(5, 5), (6, 6), (7, 7), (0, 8)])
        step(2, [3], into=[(0, 1), (8, 2)])  # blocks that a step was computing in, rows that are still on their way out
        step(3, [3, 4], into=[(5, 5)], out=[(3, 9)])
        step(4, [1, 2, 3], await_step_id=2)
        step(5, [5, 4], await_step_id=3, out=[(1, 0)])  # a row that nobody needs any more
        step(6, [6], into=[(0, 6)], await_step_id=6)  # and back at once: nobody else runs
    places = [*pool.tensors, pool.rows_NB, *pool._out_buffers, pool._in_buffer]
    races = seen.races([bytes_of(place) for place in places])
    assert not races, races[0]
    assert {touch.stream for touch in seen.touches} == {"main", "out", "in"}
    for block_id, home, steps in ((1, 0, 1), (2, 0, 2), (5, 5, 1), (6, 0, 2)):  # whose content, and steps since
        assert torch.equal(small[block_id], first[1][home] + steps), block_id
        assert torch.allclose(keys[block_id], first[0][home] + steps), block_id
