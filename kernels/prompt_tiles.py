"""The tiles of a step's prompts as a list, those with the most keys first: what `hopper_attention` walks over.

Two launches: what each tile is, and where it comes in the list (its rank among all, counted). They serve all layers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_FACTS = 8  # of a tile: keys, first position, first token, queries of it and of later ones, row; the rest is unused
BLOCK = tl.constexpr(64)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"], do_not_specialize_on_alignment=["start_ptr", "context_ptr"])
def _facts_kernel(
    start_ptr, context_ptr, facts_ptr, num_rows, num_tiles, BLOCK_Q: tl.constexpr, FACTS: tl.constexpr
):  # fmt: skip
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Row r owns tiles [start_r // BLOCK_Q + r, start_(r+1) // BLOCK_Q + r + 1): enough for its queries, maybe one too
    # many, and known without a sum over the rows before it.
    begun = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_rows, BLOCK):
        other = first + tl.arange(0, BLOCK)
        start = tl.load(start_ptr + other, other < num_rows, other=1 << 30)
        begun += tl.sum((start // BLOCK_Q + other)[None, :] <= tile[:, None], 1).to(tl.int32)
    row = tl.maximum(begun, 1) - 1
    start = tl.load(start_ptr + row)
    count = tl.load(start_ptr + row + 1) - start
    context = tl.load(context_ptr + row)
    first_query = (tile - start // BLOCK_Q - row) * BLOCK_Q
    left = count - first_query
    position = context - left
    keys = tl.where((left > 0) & (tile < num_tiles), tl.minimum(position + BLOCK_Q, context), 0)
    place = facts_ptr + tile * FACTS
    there = tile < num_tiles
    tl.store(place, keys, there)
    tl.store(place + 1, position, there)
    tl.store(place + 2, start + first_query, there)
    tl.store(place + 3, left, there)
    tl.store(place + 4, row, there)


@triton.jit(do_not_specialize=["num_tiles"])
def _rank_kernel(facts_ptr, out_ptr, num_tiles, FACTS: tl.constexpr):
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = tile < num_tiles
    keys = tl.load(facts_ptr + tile * FACTS, there, other=0)
    rank = tl.zeros((BLOCK,), tl.int32)
    total = 0
    for first in range(0, num_tiles, BLOCK):
        other = first + tl.arange(0, BLOCK)
        theirs = tl.load(facts_ptr + other * FACTS, other < num_tiles, other=-1)
        before = (theirs[None, :] > keys[:, None]) | (
            (theirs[None, :] == keys[:, None]) & (other[None, :] < tile[:, None])
        )
        rank += tl.sum(before.to(tl.int32), 1)
        total += tl.sum((theirs > 0).to(tl.int32), 0)
    for fact in tl.static_range(5):
        tl.store(out_ptr + rank * FACTS + fact, tl.load(facts_ptr + tile * FACTS + fact, there, other=0), there)
    if tl.program_id(0) == 0:
        tl.store(out_ptr + num_tiles * FACTS, total)


def plan_tiles(query_start_R1: Tensor, context_len_R: Tensor, num_tokens: int, block_q: int) -> Tensor:
    """int32 [X + 1, NUM_FACTS], for tiles of `block_q` positions of the rows that the two tensors (int32) describe.

    X bounds the tiles by what the host knows; those that there are not have no keys and come last. The last line says
    how many there are.
    """
    num_rows = context_len_R.shape[0]
    num_tiles = num_tokens // block_q + num_rows
    shape = (num_tiles + 1, NUM_FACTS)
    facts, ranked = (torch.empty(shape, dtype=torch.int32, device=context_len_R.device) for _ in range(2))
    grid = (triton.cdiv(num_tiles, BLOCK.value),)
    _facts_kernel[grid](
        query_start_R1, context_len_R, facts, num_rows, num_tiles, BLOCK_Q=block_q, FACTS=NUM_FACTS, num_warps=4
    )
    _rank_kernel[grid](facts, ranked, num_tiles, FACTS=NUM_FACTS, num_warps=4)
    return ranked
