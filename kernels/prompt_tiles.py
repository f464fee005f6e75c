"""The tiles of a step's prompts as a list, those with the most keys first: what `hopper_attention` walks over."""

import torch
from torch import Tensor

NUM_FACTS = 8  # of a tile: keys, first position, first token, queries of it and of later ones, row; the rest is unused


def plan_tiles(query_start_R1: Tensor, context_len_R: Tensor, num_tokens: int, block_q: int) -> Tensor:
    """int32 [X + 1, NUM_FACTS], for tiles of `block_q` positions of the rows that the two tensors (int32) describe.

    X bounds the tiles by what the host knows; those that there are not have no keys and come last. The last line says
    how many there are. Nothing waits for the device: on a GPU it is one launch, of many tiles some thirty small ones.
    The first row may begin behind some tokens, and rows may be empty.
    """
    device, num_rows = context_len_R.device, context_len_R.shape[0]
    num_tiles = num_tokens // block_q + num_rows
    if device.type == "cuda":
        from argosy.kernels import tile_plan

        if num_tiles <= tile_plan.MOST_TILES:
            return tile_plan.plan_tiles(query_start_R1, context_len_R, num_tiles, block_q)
    starts_R = query_start_R1[:-1].long()
    counts_R = query_start_R1[1:] - starts_R
    tiles_R = -(-counts_R // block_q)
    ends_R = tiles_R.cumsum(0)
    tile_X = torch.arange(num_tiles, device=device)
    row_X = torch.searchsorted(ends_R, tile_X, right=True).clamp_(max=num_rows - 1)
    first_X = (tile_X - (ends_R - tiles_R)[row_X]) * block_q
    left_X = counts_R[row_X] - first_X
    context_X = context_len_R[row_X]
    position_X = context_X - left_X
    keys_X = torch.minimum(position_X + block_q, context_X)
    keys_X = torch.where(tile_X < ends_R[-1], keys_X, 0)
    keys_X, order_X = keys_X.sort(descending=True)
    columns = (keys_X, *(x[order_X] for x in (position_X, starts_R[row_X] + first_X, left_X, row_X)))
    facts_XF = torch.zeros((num_tiles + 1, NUM_FACTS), dtype=torch.int32, device=device)
    facts_XF[:-1, :5] = torch.stack(columns, 1)
    facts_XF[-1, 0] = ends_R[-1]
    return facts_XF
