"""Which steps a rank runs before the first request: within its limits, one of each kind, nothing left behind."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rig import InProcessRank, oracle_config

from argosy.kernels import paged_attention, step_ops
from argosy.workers.warm_up import warm_up_shapes


def test_warming_up_fits_the_settings_and_leaves_no_trace(tmp_path: Path) -> None:
    """One row, one token, a tiny budget: no shape may exceed them, and block 0 is as empty as before."""
    config = oracle_config(tmp_path, max_num_seqs=2, max_num_batched_tokens=3)
    rank = InProcessRank(config, 4)
    shapes = warm_up_shapes(rank.runner)
    assert all(rows <= 2 and rows * tokens <= 3 for rows, tokens, *_ in shapes)
    for rows, tokens, beside, _ in shapes_on_a_card(rank):
        assert rows + beside <= 2
        assert rows * tokens + beside <= 3
    rank.runner.warm_up([*shapes, (1, 2, 1)])
    assert rank.runner.kv_cache is not None
    assert all(not cache.any() for layer in rank.runner.kv_cache.layers for cache in layer)
    assert not rank.runner.batch.active
    assert rank.runner.sampler.is_greedy


def shapes_on_a_card(rank: InProcessRank) -> list[tuple[int, ...]]:
    """(rows, tokens a row, rows of one token beside, tokens in the cache before); the device is only asked for its
    name."""
    rank.runner.device = torch.device("cuda")
    shapes = [(*shape, 0, 0)[:4] for shape in warm_up_shapes(rank.runner)]
    rank.runner.device = torch.device("cpu")
    return shapes


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8, 16])
def test_no_number_of_rows_attends_by_sizes_that_the_warm_up_had_not(num_kv_heads: int) -> None:
    """The first batch of prompts over two cards waited a second for three kernels: beside 33, 264 and 363 rows."""
    known = (1, 32, 256)
    others = step_ops.rows_of_each_kind(num_kv_heads, 1023, 132, known)
    met = {paged_attention._kinds(rows * num_kv_heads, 132) for rows in (*known, *others)}
    assert {paged_attention._kinds(rows * num_kv_heads, 132) for rows in range(1, 1024)} == met
    assert len(others) == len(met) - len({paged_attention._kinds(rows * num_kv_heads, 132) for rows in known})


def test_a_card_meets_each_kind_of_rows_before_the_first_request(tmp_path: Path) -> None:
    """Two key/value heads: 16, 66, 133, 528 and 726 rows beside a prompt; behind a context those that it cuts."""
    config = oracle_config(tmp_path, max_num_seqs=1024, max_num_batched_tokens=2048, max_model_len=900)
    rank = InProcessRank(config, 4)
    shapes = shapes_on_a_card(rank)
    heads = rank.runner.spec.num_kv_heads
    kinds = {paged_attention._kinds(rows * heads, 132) for rows in range(1, 1024)}
    assert {paged_attention._kinds(beside * heads, 132) for *_, beside, _ in shapes if beside} == kinds
    behind = {beside for *_, beside, context in shapes if context}
    assert behind == {beside for *_, beside, _ in shapes if 0 < beside <= 256}


def test_a_card_meets_rows_behind_a_long_context_before_the_first_request(tmp_path: Path) -> None:
    """Their pieces are kernels of their own; one that is compiled while requests wait costs them a second."""
    config = oracle_config(tmp_path, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=900)
    rank = InProcessRank(config, 4)
    shapes = shapes_on_a_card(rank)
    assert {beside for *_, beside, context in shapes if context} >= {1, 32}
    assert any(rows > 1 and 1 < tokens < 32 and context for rows, tokens, _, context in shapes), "few queries a row"
    for rows, tokens, beside, context in shapes:
        assert rows + beside <= 64
        assert rows * tokens + beside <= 512
        assert tokens + context <= 900
    rank.runner.warm_up([(2, 8, 3, 40)])
    assert not rank.runner.batch.active


def test_a_card_meets_a_prompt_whose_keys_are_read_often_however_few_rows_may_run(tmp_path: Path) -> None:
    """Over a cache in 8 bits such prompts attend by a kernel that neither the largest step nor short prompts take."""
    config = oracle_config(tmp_path, max_num_seqs=64, max_num_batched_tokens=1024, max_model_len=900)
    rank = InProcessRank(config, 4)
    assert (1, 512, 63, 0) in shapes_on_a_card(rank)
