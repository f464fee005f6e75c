"""The list of a small step's tiles (`prompt_tiles`) in one launch of one program.

Some thirty launches of a few numbers each take longer than a layer of a small step, and its first layer waits for them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_TILES = 64  # one size for all: another would be another compilation in the middle of serving
NUM_FACTS = 8


@triton.jit
def _find(tile, starts_ptr, context_ptr, num_rows, BLOCK_Q: tl.constexpr, X: tl.constexpr, ROWS: tl.constexpr):
    """Of each tile: keys (0: there is no such tile), first position, first token, queries from it on, row; and how many
    tiles there are."""
    row = tl.zeros((X,), tl.int32)
    begin = tl.zeros((X,), tl.int32)
    total = 0
    for first in range(0, num_rows, ROWS):
        other = first + tl.arange(0, ROWS)
        inside = other < num_rows
        start = tl.load(starts_ptr + other, inside, other=0)
        stop = tl.load(starts_ptr + other + 1, inside, other=0)
        count = (stop - start + BLOCK_Q - 1) // BLOCK_Q
        end = total + tl.cumsum(count, 0)
        before = (end[None, :] <= tile[:, None]) & inside[None, :]
        row += tl.sum(before.to(tl.int32), 1)
        begin = tl.maximum(begin, tl.max(tl.where(before, end[None, :], 0), 1))
        total += tl.sum(count, 0)
    there = tile < total
    row = tl.minimum(row, num_rows - 1)
    start = tl.load(starts_ptr + row)
    queries = tl.load(starts_ptr + row + 1) - start
    context = tl.load(context_ptr + row)
    first_query = (tile - begin) * BLOCK_Q
    left = queries - first_query
    position = context - left
    keys = tl.where(there, tl.minimum(position + BLOCK_Q, context), 0)
    return keys, position, start + first_query, left, row, total


@triton.jit(do_not_specialize=["num_rows", "num_tiles"], do_not_specialize_on_alignment=["starts_ptr", "context_ptr"])
def _plan_kernel(
    starts_ptr, context_ptr, out_ptr, num_rows, num_tiles, BLOCK_Q: tl.constexpr, X: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    tile = tl.arange(0, X)
    keys, position, token, left, row, total = _find(tile, starts_ptr, context_ptr, num_rows, BLOCK_Q, X, ROWS)
    order = tl.sort(keys.to(tl.int64) * X + (X - 1 - tile), descending=True)
    tile = X - 1 - (order % X).to(tl.int32)
    keys, position, token, left, row, total = _find(tile, starts_ptr, context_ptr, num_rows, BLOCK_Q, X, ROWS)
    place = tl.arange(0, X)
    out = out_ptr + place * 8
    inside = place < num_tiles
    tl.store(out, keys, inside)
    tl.store(out + 1, position, inside)
    tl.store(out + 2, token, inside)
    tl.store(out + 3, left, inside)
    tl.store(out + 4, row, inside)
    tl.store(out_ptr + num_tiles * 8 + tl.arange(0, 8), tl.where(tl.arange(0, 8) == 0, total, 0))


def plan_tiles(query_start_R1: Tensor, context_len_R: Tensor, num_tiles: int, block_q: int) -> Tensor:
    """Up to `num_tiles` tiles, itself at most MOST_TILES; see `prompt_tiles.plan_tiles`."""
    assert num_tiles <= MOST_TILES
    facts_XF = torch.empty((num_tiles + 1, NUM_FACTS), dtype=torch.int32, device=context_len_R.device)
    _plan_kernel[(1,)](
        query_start_R1, context_len_R, facts_XF, context_len_R.shape[0], num_tiles, BLOCK_Q=block_q, X=MOST_TILES,
        ROWS=16, num_warps=4,
    )  # fmt: skip
    return facts_XF
