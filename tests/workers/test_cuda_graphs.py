"""What of recorded decode steps can be checked without a GPU: sizes, and which tokens all rows share."""

import numpy as np
import pytest
import torch

from argosy.workers.cuda_graphs import DecodeTables, ladder, shared_ladder
from argosy.workers.input_batch import InputBatch

ROWS, BLOCK, BLOCKS = 64, 16, 100


@pytest.fixture
def tables() -> DecodeTables:
    """64 requests, each with 100 blocks of its own, 1500 tokens computed."""
    batch = InputBatch(
        max_num_seqs=ROWS, max_model_len=BLOCK * BLOCKS, max_num_batched_tokens=64, block_size=BLOCK, vocab_size=9,
        device=torch.device("cpu"),
    )  # fmt: skip
    batch.block_table_NB[:ROWS, :BLOCKS] = 1 + np.arange(ROWS * BLOCKS).reshape(ROWS, BLOCKS)
    batch.num_computed_N[:ROWS] = 1500
    return DecodeTables(batch, ROWS)


def shared(tables: DecodeTables, handles: list[int]) -> int:
    handles_R = np.array(handles)
    return tables.shared_tokens(handles_R, tables.batch.num_computed_N[handles_R])


def test_rows_share_the_whole_blocks_at_the_front_of_all_their_tables(tables: DecodeTables) -> None:
    """One prompt for all, of 70 blocks; one request has a block more in common with another."""
    table = tables.batch.block_table_NB
    table[:, :70] = table[0, :70]
    table[3, 70] = table[4, 70]
    assert shared(tables, list(range(ROWS))) == 70 * BLOCK
    assert shared(tables, list(range(ROWS))[::-1]) == 70 * BLOCK


def test_what_no_row_has_computed_yet_is_not_shared(tables: DecodeTables) -> None:
    """Stale ids behind the end of a table may be equal by chance, and the block that takes the new token is its own."""
    table = tables.batch.block_table_NB
    table[:, :] = table[0]
    tables.batch.num_computed_N[7] = 80 * BLOCK + 5
    assert shared(tables, list(range(ROWS))) == 80 * BLOCK


def test_a_prefix_that_saves_little_is_read_row_by_row(tables: DecodeTables) -> None:
    """Short, or of few rows, or not of all."""
    table = tables.batch.block_table_NB
    assert shared(tables, list(range(ROWS))) == 0
    table[:, :63] = table[0, :63]
    assert shared(tables, list(range(ROWS))) == 0
    table[:, :90] = table[0, :90]
    assert shared(tables, list(range(30))) == 0
    assert shared(tables, list(range(50))) == 90 * BLOCK
    table[40, 0] = 99_999
    assert shared(tables, list(range(50))) == 0


def test_sizes_grow_to_the_most_rows() -> None:
    for most in (1, 5, 64, 100, 1024):
        for sizes in (ladder(most), shared_ladder(most)):
            assert sizes == sorted(set(sizes))
            assert not sizes or sizes[-1] == most
    assert not shared_ladder(63)
