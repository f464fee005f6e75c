"""The list of tiles: each query once, with all of its keys, long tiles first."""

import itertools
import random

import pytest
import torch

from argosy.kernels import tile_plan
from argosy.kernels.prompt_tiles import plan_tiles


@pytest.mark.parametrize("block_q", [1, 18, 32, 64])
def test_the_plan_has_each_query_once_and_long_tiles_first(block_q: int, device: torch.device) -> None:
    """Every token of every row lies in one tile, with the keys up to the last of its queries."""
    drawn = random.Random(block_q)
    rows = [(n, n + drawn.randrange(90)) for n in (drawn.choice((0, 1, 17, 32, 33, 64, 100)) for _ in range(70))]
    starts = [0, *itertools.accumulate(n for n, _ in rows)]
    plan = plan_tiles(
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor([context for _, context in rows], dtype=torch.int32, device=device), starts[-1], block_q,
    ).tolist()  # fmt: skip
    tiles = [tile for tile in plan[:-1] if tile[0]]
    assert plan[-1][0] == len(tiles)
    assert plan[: len(tiles)] == tiles, "those that there are not come last"
    assert [tile[0] for tile in tiles] == sorted((tile[0] for tile in tiles), reverse=True)
    seen = []
    for keys, position, token, left, row, *_ in tiles:
        queries, context = rows[row]
        first = token - starts[row]
        assert left == queries - first
        assert position == context - queries + first
        assert keys == min(position + block_q, context)
        seen += range(token, token + min(block_q, left))
    assert sorted(seen) == list(range(starts[-1]))


@pytest.mark.parametrize("block_q", [18, 32, 128])
@pytest.mark.parametrize("num_rows", [1, 5, 16])
def test_one_launch_plans_the_same(num_rows: int, block_q: int, device: torch.device) -> None:
    """Rows behind tokens of others and with empty rows between and behind them, as recorded steps have them."""
    drawn = random.Random(num_rows * block_q)
    counts = [drawn.choice((0, 1, 17, 32, 33, 64)) for _ in range(num_rows)]
    counts[-1] = 0 if num_rows > 1 else 70
    starts = torch.tensor([7, *(7 + end for end in itertools.accumulate(counts))], dtype=torch.int32)
    lengths = torch.tensor([n + drawn.randrange(90) if n else 0 for n in counts], dtype=torch.int32)
    num_tokens = int(starts[-1]) + 50
    want = plan_tiles(starts, lengths, num_tokens, block_q)
    got = tile_plan.plan_tiles(starts.to(device), lengths.to(device), len(want) - 1, block_q).cpu()
    count = int(want[-1, 0])
    assert int(got[-1, 0]) == count
    assert got[:count, 0].tolist() == want[:count, 0].tolist()
    assert got[count:-1, 0].tolist() == [0] * (len(want) - 1 - count)
    assert sorted(got[:count, :5].tolist()) == sorted(want[:count, :5].tolist())
