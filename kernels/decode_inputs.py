"""The inputs of a decode step, made on the device from what it remembers of each request.

Meaning: `tables_reference.prepare_decode`. A program takes one row. With this first in a CUDA graph, a decode step
needs one small copy from the host (which requests, which new blocks) whatever the context lengths.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _prepare_kernel(
    rows_ptr,  # [R] handle of the row, -1: padding
    new_block_ptr,  # [R] block that the row's next token opens, -1: none
    token_ptr,  # [R] the row's token where the host knows it, -1: the last one that was sampled
    last_token_ptr,
    computed_ptr,
    table_ptr,
    token_ids_ptr,
    positions_ptr,
    slots_ptr,
    context_ptr,
    out_table_ptr,
    stride_table,
    stride_out_table,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    REACH: tl.constexpr,  # blocks up to the row's last that are looked at; 0: all
    ADVANCES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    handle = tl.load(rows_ptr + row).to(tl.int64)
    if handle < 0:
        tl.store(token_ids_ptr + row, 0)
        tl.store(positions_ptr + row, 0)
        tl.store(slots_ptr + row, -1)
        tl.store(context_ptr + row, 0)
        return
    position = tl.load(computed_ptr + handle).to(tl.int64)
    place = position // S
    new_block = tl.load(new_block_ptr + row)
    block = tl.where(new_block >= 0, new_block, tl.load(table_ptr + handle * stride_table + place))
    token = tl.load(token_ptr + row).to(tl.int64)
    tl.store(token_ids_ptr + row, tl.where(token >= 0, token, tl.load(last_token_ptr + handle)))
    tl.store(positions_ptr + row, position)
    tl.store(slots_ptr + row, block.to(tl.int64) * S + position % S)
    tl.store(context_ptr + row, (position + 1).to(tl.int32))
    first = tl.maximum(place + 1 - REACH, 0) if REACH > 0 else 0
    for start in tl.range(first, place + 1, BLOCK):
        index = start + tl.arange(0, BLOCK)
        seen = index <= place
        ids = tl.load(table_ptr + handle * stride_table + index, seen, other=0)
        ids = tl.where(index == place, block, ids)
        tl.store(out_table_ptr + row * stride_out_table + index, ids, seen)
    tl.debug_barrier()  # the table was read above by all threads; one writes the new block
    tl.store(table_ptr + handle * stride_table + place, block)
    if ADVANCES:
        tl.store(computed_ptr + handle, (position + 1).to(tl.int32))


def prepare_decode(
    rows_R: Tensor,
    new_block_R: Tensor,
    token_R: Tensor,
    last_token_N: Tensor,
    num_computed_N: Tensor,
    block_table_NB: Tensor,
    token_ids_R: Tensor,
    positions_R: Tensor,
    slots_R: Tensor,
    context_len_R: Tensor,
    block_table_RB: Tensor,
    *,
    block_size: int,
    reach_blocks: int = 0,
    advances: bool = True,
) -> None:
    """One launch; shapes as in `step_ops.prepare_decode`."""
    _prepare_kernel[(rows_R.shape[0],)](
        rows_R, new_block_R, token_R, last_token_N, num_computed_N, block_table_NB, token_ids_R, positions_R, slots_R,
        context_len_R, block_table_RB, block_table_NB.stride(0), block_table_RB.stride(0),
        S=block_size, BLOCK=256, REACH=reach_blocks, ADVANCES=advances, num_warps=4,
    )  # fmt: skip


@triton.jit
def _remember_kernel(
    rows_ptr, token_ids_ptr, logits_ptr, last_token_ptr, out_ptr, stride_logits, CHOSEN: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    handle = tl.load(rows_ptr + row).to(tl.int64)
    token = tl.load(token_ids_ptr + row)
    best = tl.load(logits_ptr + row * stride_logits + (0 if CHOSEN else tl.maximum(token, 0))).to(tl.float32)
    finite = (best == best) & (tl.abs(best) != float("inf"))
    tl.store(out_ptr + row, tl.where(finite, token, tl.where(best == float("-inf"), -2, -1)))
    if handle >= 0:
        tl.store(last_token_ptr + handle, tl.maximum(token, 0))


def remember_tokens(
    rows_R: Tensor, token_ids_R: Tensor, logits_RV: Tensor, last_token_N: Tensor, out_R: Tensor
) -> None:
    """One launch; shapes as in `step_ops.remember_tokens`."""
    _remember_kernel[(rows_R.shape[0],)](
        rows_R, token_ids_R, logits_RV, last_token_N, out_R, logits_RV.stride(0), CHOSEN=logits_RV.ndim == 1,
        num_warps=1,
    )  # fmt: skip
