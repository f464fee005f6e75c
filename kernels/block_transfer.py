"""Whole blocks of many cache tensors to rows of one buffer, and back: one launch for all.

    caches      [B, ...] each       block 7 of cache 0 | block 7 of cache 1 | ...     =  row 0 of the buffer
                                    block 3 of cache 0 | block 3 of cache 1 | ...     =  row 1

A block of one cache is some 32 KiB, which a host link carries at a fraction of its speed; a row is megabytes. Meaning:
`tables_reference.gather_blocks`, `tables_reference.scatter_blocks`.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from argosy.kernels import tables_reference

COPY_BYTES = 16384  # that one program copies: 128 threads with eight 16-byte loads in flight each
ALIGNED = 16


@triton.jit
def _move_kernel(
    tables_ptr,  # int64 [3, caches]: where each cache begins, 4-byte words of its blocks, where they stand in a row
    ids_ptr,  # int64 [rows]
    staged_ptr,  # int32 [rows, words of a row]
    num_caches,
    row_words,
    OUT: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cache = tl.program_id(1)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    words = tl.multiple_of(tl.load(tables_ptr + num_caches + cache), 4)  # so that the mask allows 16 bytes at once
    block = tl.load(tables_ptr + cache).to(tl.pointer_type(tl.int32)) + tl.load(ids_ptr + row) * words
    staged = staged_ptr + row * row_words + tl.load(tables_ptr + 2 * num_caches + cache)
    block = tl.multiple_of(block, 16)
    staged = tl.multiple_of(staged, 16)
    inside = word < words
    if OUT:
        tl.store(staged + word, tl.load(block + word, inside), inside)
    else:
        tl.store(block + word, tl.load(staged + word, inside), inside)


@lru_cache(maxsize=16)
def _tables(pointers: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where caches begin and how large their blocks are, on the device: few and fixed, so one upload serves."""
    starts = [sum(sizes[:place]) // 4 for place in range(len(sizes))]
    return torch.tensor([pointers, [size // 4 for size in sizes], starts], dtype=torch.int64, device=device)


def gather_blocks(caches: Sequence[Tensor], block_ids: Sequence[int] | Tensor, staged_MB: Tensor) -> None:
    """Row i of `staged_MB` becomes block `block_ids[i]` of all caches."""
    _move(caches, block_ids, staged_MB, is_out=True)


def scatter_blocks(staged_MB: Tensor, caches: Sequence[Tensor], block_ids: Sequence[int] | Tensor) -> None:
    """Block `block_ids[i]` of all caches becomes row i of `staged_MB`."""
    _move(caches, block_ids, staged_MB, is_out=False)


def _move(caches: Sequence[Tensor], block_ids: Sequence[int] | Tensor, staged_MB: Tensor, *, is_out: bool) -> None:
    """`staged_MB` is uint8 and contiguous. Blocks of other than a multiple of 16 bytes go the slow way."""
    if not len(block_ids):
        return
    sizes = tuple([cache.stride(0) * cache.element_size() for cache in caches])
    if any(size % ALIGNED for size in sizes):
        if is_out:
            tables_reference.gather_blocks(caches, block_ids, staged_MB)
        else:
            tables_reference.scatter_blocks(staged_MB, caches, block_ids)
        return
    assert staged_MB.is_contiguous()
    assert staged_MB.shape[0] >= len(block_ids)
    assert staged_MB.shape[1] == sum(sizes)
    device = staged_MB.device
    ids = torch.as_tensor(block_ids, dtype=torch.int64)
    if ids.device != device:
        ids = ids.pin_memory().to(device, non_blocking=True)
    tables = _tables(tuple([cache.data_ptr() for cache in caches]), sizes, device)
    grid = (len(block_ids), len(caches), triton.cdiv(max(sizes), COPY_BYTES))
    _move_kernel[grid](
        tables, ids, staged_MB.view(torch.int32), len(caches), staged_MB.shape[1] // 4, OUT=is_out,
        WORDS=COPY_BYTES // 4, num_warps=4,
    )  # fmt: skip
