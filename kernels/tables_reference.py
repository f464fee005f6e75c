"""What moves between tables means, in plain torch: blocks of a cache, and rows of the tables that a decode step is of.

Letters as in `reference`; N handles, R rows of a step, M blocks that are moved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from argosy.kernels.reference import as_bytes


def copy_blocks(sources: Sequence[Tensor], destinations: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy block a of each source to block b of its destination for each (a, b), as if all pairs were done at once."""
    if not pairs:
        return
    source_ids, destination_ids = (torch.tensor(ids) for ids in zip(*pairs, strict=True))
    for source, destination in zip(sources, destinations, strict=True):
        source, destination = as_bytes(source), as_bytes(destination)
        picked = source.index_select(0, source_ids.to(source.device))
        destination.index_copy_(0, destination_ids.to(destination.device), picked.to(destination.device))


def gather_blocks(caches: Sequence[Tensor], block_ids: Sequence[int] | Tensor, staged_MB: Tensor) -> None:
    """Row i of `staged_MB` (bytes) becomes block `block_ids[i]` of all caches, one after the other."""
    ids, start = torch.as_tensor(block_ids, dtype=torch.int64), 0
    for cache in caches:
        flat = _rows_of_bytes(cache)
        end = start + flat.shape[1]
        staged_MB[: len(block_ids), start:end] = flat.index_select(0, ids.to(flat.device))
        start = end


def scatter_blocks(staged_MB: Tensor, caches: Sequence[Tensor], block_ids: Sequence[int] | Tensor) -> None:
    """The way back: block `block_ids[i]` of all caches becomes what row i of `staged_MB` holds."""
    ids, start = torch.as_tensor(block_ids, dtype=torch.int64), 0
    for cache in caches:
        flat = _rows_of_bytes(cache)
        end = start + flat.shape[1]
        flat.index_copy_(0, ids.to(flat.device), staged_MB[: len(block_ids), start:end].contiguous())
        start = end


def _rows_of_bytes(cache: Tensor) -> Tensor:
    return cache.view(cache.shape[0], -1).view(torch.uint8)


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
    """See `step_ops.prepare_decode`."""
    for row, (handle, new_block) in enumerate(zip(rows_R.tolist(), new_block_R.tolist(), strict=True)):
        if handle < 0:
            token_ids_R[row], positions_R[row], slots_R[row], context_len_R[row] = 0, 0, -1, 0
            continue
        position = int(num_computed_N[handle])
        place = position // block_size
        if new_block >= 0:
            block_table_NB[handle, place] = new_block
        known = int(token_R[row])
        token_ids_R[row], positions_R[row] = known if known >= 0 else last_token_N[handle], position
        slots_R[row] = int(block_table_NB[handle, place]) * block_size + position % block_size
        context_len_R[row] = position + 1
        first = max(0, place + 1 - reach_blocks) if reach_blocks else 0
        block_table_RB[row, first : place + 1] = block_table_NB[handle, first : place + 1]
        if advances:
            num_computed_N[handle] = position + 1


def remember_tokens(
    rows_R: Tensor, token_ids_R: Tensor, logits_RV: Tensor, last_token_N: Tensor, out_R: Tensor
) -> None:
    """See `step_ops.remember_tokens`."""
    best_R = logits_RV if logits_RV.ndim == 1 else logits_RV.gather(1, token_ids_R.clamp(min=0)[:, None])[:, 0]
    out_R.copy_(torch.where(torch.isfinite(best_R), token_ids_R, torch.where(best_R == float("-inf"), -2, -1)))
    kept = rows_R >= 0
    last_token_N[rows_R[kept].long()] = token_ids_R[kept].clamp(min=0)
