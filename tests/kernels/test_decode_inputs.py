"""The device-side inputs of a decode step against their plain meaning."""

import pytest
import torch
from torch import Tensor

from argosy.kernels import decode_inputs, tables_reference


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_handles", "max_blocks", "block_size", "num_rows"), [(5, 3, 16, 4), (9, 300, 4, 7), (3, 1, 32, 1)]
)
def test_the_kernels_do_what_the_references_say(
    seed: int, num_handles: int, max_blocks: int, block_size: int, num_rows: int, device: torch.device
) -> None:
    """Rows with and without a new block, padding, one block and hundreds; tokens drawn of rows that are sick."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    rows = torch.randperm(num_handles, generator=generator)[:num_rows].int()
    rows[numbers(num_rows, 1)] = -1
    new_block = torch.where(numbers(2, num_rows) > 0, numbers(999, num_rows), -1).int()
    token = torch.where(numbers(3, num_rows) > 1, numbers(999, num_rows), -1).int()
    last, computed = numbers(5000, num_handles), numbers(max_blocks * block_size, num_handles).int()
    table = numbers(999, num_handles, max_blocks).int()
    outs = [torch.full((num_rows,), -7) for _ in range(3)]
    tables = [torch.full((num_rows,), -7).int(), torch.full((num_rows, max_blocks), -7).int()]
    given = (rows, new_block, token, last, computed, table, *outs, *tables)
    want, got = ([tensor.clone().to(where) for tensor in given] for where in ("cpu", device))
    for reach_blocks, advances in ((2, False), (0, True)):  # a window's table first, as for a second group
        tables_reference.prepare_decode(*want, block_size=block_size, reach_blocks=reach_blocks, advances=advances)
        decode_inputs.prepare_decode(*got, block_size=block_size, reach_blocks=reach_blocks, advances=advances)
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b.cpu())
    logits = torch.randn(num_rows, 77, generator=generator)
    logits[0], logits[-1] = float("nan"), float("-inf")
    ids = numbers(77, num_rows)
    given = (rows, ids, logits, last, ids)
    want, got = ([tensor.clone().to(where) for tensor in given] for where in ("cpu", device))
    tables_reference.remember_tokens(*want)
    decode_inputs.remember_tokens(*got)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=0, equal_nan=True)
