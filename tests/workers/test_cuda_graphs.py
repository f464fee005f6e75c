"""What of recorded decode steps can be checked without a GPU: sizes, and which tokens all rows share."""

import numpy as np
import pytest
import torch

from argosy.placement.step_memory import ladder
from argosy.workers.cuda_graphs import ORDER, DecodeTables, shared_ladder
from argosy.workers.input_batch import InputBatch

ROWS, BLOCK, BLOCKS = 64, 16, 100


@pytest.fixture
def tables() -> DecodeTables:
    """64 requests, each with 100 blocks of its own, 1500 tokens computed."""
    batch = InputBatch(
        max_num_seqs=ROWS, max_model_len=BLOCK * BLOCKS, max_num_batched_tokens=64, block_size=BLOCK, vocab_size=9,
        device=torch.device("cpu"),
    )  # fmt: skip
    batch.block_table_NGB[:, 0][:ROWS, :BLOCKS] = 1 + np.arange(ROWS * BLOCKS).reshape(ROWS, BLOCKS)
    batch.num_computed_N[:ROWS] = 1500
    return DecodeTables(batch, ROWS)


def shared(tables: DecodeTables, handles: list[int]) -> list[int]:
    handles_R = np.array(handles)
    shared_R = tables.shared_tokens(handles_R, tables.batch.num_computed_N[handles_R])
    return [] if shared_R is None else shared_R.tolist()


def test_rows_share_the_whole_blocks_at_the_front_of_their_tables(tables: DecodeTables) -> None:
    """One prompt for all, of 70 blocks; two requests have a block more in common."""
    table = tables.batch.block_table_NGB[:, 0]
    table[:, :70] = table[0, :70]
    table[3, 70] = table[4, 70]
    assert shared(tables, list(range(ROWS))) == [70 * BLOCK] * ROWS
    assert shared(tables, list(range(ROWS))[::-1]) == [70 * BLOCK] * ROWS


def test_the_first_requests_with_a_prompt_have_copies_of_their_own(tables: DecodeTables) -> None:
    """They were computed in one step, before any of them could find the prompt in the cache."""
    table = tables.batch.block_table_NGB[:, 0]
    table[4:, :80] = table[4, :80]
    assert shared(tables, list(range(ROWS))) == [0] * 4 + [80 * BLOCK] * (ROWS - 4)


def test_the_length_that_saves_most_is_shared(tables: DecodeTables) -> None:
    """All have 40 blocks in common, more than half of them 90; then only a few have more than 70."""
    table = tables.batch.block_table_NGB[:, 0]
    table[:, :70] = table[0, :70]
    table[:60, :90] = table[0, :90]
    assert shared(tables, list(range(ROWS))) == [90 * BLOCK] * 60 + [0] * 4
    table[8:60, 80:] += 100_000 * np.arange(52)[:, None]
    table[8:60, 72:] += 200_000 * np.arange(52)[:, None]
    assert shared(tables, list(range(ROWS))) == [70 * BLOCK] * ROWS


def test_what_a_row_has_not_computed_yet_it_does_not_share(tables: DecodeTables) -> None:
    """Stale ids behind the end of a table may be equal by chance, and the block that takes the new token is its own."""
    table = tables.batch.block_table_NGB[:, 0]
    table[:, :] = table[0]
    tables.batch.num_computed_N[7] = 80 * BLOCK + 5
    tables.batch.num_computed_N[9] = 3
    got = shared(tables, list(range(ROWS)))
    assert got.pop(9) == 0
    assert got.pop(7) == 0
    assert got == [1500 // BLOCK * BLOCK] * (ROWS - 2)


def test_a_prefix_that_saves_little_is_read_row_by_row(tables: DecodeTables) -> None:
    """None, a short one, or of few rows."""
    table = tables.batch.block_table_NGB[:, 0]
    assert not shared(tables, list(range(ROWS)))
    table[:, :15] = table[0, :15]
    assert not shared(tables, list(range(ROWS)))
    table[:, :90] = table[0, :90]
    assert not shared(tables, list(range(40)))
    assert shared(tables, list(range(50))) == [90 * BLOCK] * 50


def test_sizes_grow_to_the_most_rows() -> None:
    for most in (1, 5, 64, 100, 1024):
        for sizes in (ladder(most), shared_ladder(most)):
            assert sizes == sorted(set(sizes))
            assert not sizes or sizes[-1] == most
    assert not shared_ladder(63)


def test_rows_with_long_contexts_come_first_and_padding_behind(tables: DecodeTables) -> None:
    """Padding up to the recorded size is in the order, too; what a longer step left there before is not."""
    tables.clear()
    assert tables.control_CR[ORDER].tolist() == list(range(ROWS))
    for count, padded in ((ROWS, ROWS), (3, 8)):
        order_R = np.argsort(-np.arange(count))
        tables.send(np.arange(count), np.full((1, count), -1), padded, order_R)
        assert tables.control_CR[ORDER, :padded].tolist() == [*range(count)][::-1] + list(range(count, padded))
    order_R = tables.metadata(8, 100).order_R
    assert order_R is not None
    assert order_R.tolist() == [2, 1, 0, 3, 4, 5, 6, 7]
