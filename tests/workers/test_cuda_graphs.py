"""What of recorded decode steps can be checked without a GPU: sizes, and which tokens all rows share."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import SchedulerOutput
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.kernels import paged_attention, tuning
from argosy.placement import step_memory
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan import make_plan
from argosy.placement.rank_memory import Serving
from argosy.placement.step_memory import even_ladder, ladder
from argosy.workers.cuda_graphs import (
    EVEN,
    ORDER,
    PLAIN,
    SHARES,
    CUDAGraphRunner,
    DecodeTables,
    RecordedStep,
    is_even,
    shared_ladder,
)
from argosy.workers.input_batch import InputBatch
from argosy.workers.step_recording import recorded_prompts

ROWS, BLOCK, BLOCKS = 64, 16, 100
LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "torch_dtype": "bfloat16",
         "max_position_embeddings": 8192}  # fmt: skip


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


@pytest.mark.parametrize(
    ("lengths", "even"),
    [([7], True), ([256] * 64, True), ([128, 256, 384], True), ([100, 100, 100, 190], False), ([1, 1000], False)],
)
def test_rows_are_even_where_none_is_much_longer_than_the_mean(lengths: list[int], even: bool) -> None:
    """A half is not much."""
    assert is_even(np.array(lengths)) == even


def test_even_rows_take_the_step_that_was_recorded_for_them(tables: DecodeTables) -> None:
    """Only where that size has one, and a prefix in common comes before it; who leaves or joins is looked at anew."""
    runner = CUDAGraphRunner(
        tables.batch, lambda *_: torch.zeros(1), None, max_rows=ROWS, max_model_len=BLOCK * BLOCKS, hidden_size=4,
        dtype=torch.float32, is_first_stage=True, even_pays=lambda num_rows: num_rows in (48, 64),
    )  # fmt: skip
    assert runner.even_sizes == [48, 64]
    runner.shared_sizes = [ROWS]
    runner._size_of[1] = np.full(ROWS + 1, ROWS)
    kinds = [(size, PLAIN) for size in runner.sizes] + [(size, EVEN) for size in runner.even_sizes] + [(ROWS, SHARES)]
    for size, kind in kinds:
        metadata = tables.metadata(size, 100, kind)
        runner._recorded[size, kind] = RecordedStep(None, None, metadata, torch.zeros(0))

    def taken(rows: list[int]) -> tuple[int, bool, bool]:
        inputs = runner.begin(SchedulerOutput(step_id=0, epoch=0, rows=rows))
        assert inputs is not None
        tables.batch.num_computed_N[rows] += 1
        metadata = inputs.metadata
        assert metadata is runner._step(len(rows)).metadata
        return metadata.num_rows, metadata.even, metadata.shared_len_R is not None

    every = list(range(ROWS))
    tables.batch.num_computed_N[5] = 2000
    assert taken(every) == taken(every) == (64, True, False)
    assert taken(every[:40]) == (40, False, False)
    assert taken(every[:41]) == (48, True, False)
    tables.batch.num_computed_N[5] = 1400 * 2
    assert taken(every) == (64, False, False)
    tables.batch.num_computed_N[5] = 1500
    tables.batch.block_table_NGB[:, 0, :70] = 7
    assert taken(every[1:]) == (64, False, True)


def test_the_plan_counts_the_steps_for_even_rows_that_ranks_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The two rooms say the same of an H200: Llama 8B on one card, and as two ranks, whose rows are half as much."""
    assert tuple(paged_attention.EVEN_PROGRAMS.values()) == step_memory.EVEN_PROGRAMS
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    spec = read_model_spec(tmp_path)
    h200 = tuning.DeviceFacts("nvidia_h200", 132, True)
    monkeypatch.setattr(paged_attention.tuning, "device_facts", lambda _: h200)
    for tp_size, sizes in ((1, [120, 128, 208, 224, 240, 256]), (2, [240, 256, 416, 448, 480, 512])):
        cache = torch.zeros((1, 16, 8 // tp_size, 128), dtype=torch.bfloat16)
        pays = [size for size in ladder(1024) if paged_attention.even_sizes(size, cache) is not None]
        assert pays == even_ladder(1024, spec, tp_size) == sizes
    assert paged_attention.even_sizes(256, torch.zeros((1, 16, 8, 128), dtype=torch.int8)) is None


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "places", "settings"),
    [
        (1, 1, 64, {}), (2, 1, 64, {}), (1, 2, 128, {}), (2, 3, 150, {"max_num_seqs": 300}),
        (1, 3, 128, {"kv_cache_dtype": "int8"}), (1, 2, 32, {"max_cuda_graph_batch": 32}),
        (1, 2, 0, {"enforce_eager": True}),
        (1, 2, 128, {"max_num_batched_tokens": 16384, "activation_offload_gb": "auto", "activation_slice_tokens": 600}),
    ],
    ids=str,
)  # fmt: skip
def test_ranks_record_the_steps_with_prompts_that_plans_reckon_with(
    tp_size: int, pp_size: int, places: int, settings: dict[str, Any]
) -> None:
    """Each stage of a layout; fewer where a rank's model can't be recorded with so many tokens, and none of a model
    that doesn't say."""
    given = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 4096, **settings}
    config = ServingConfig.from_mapping({"model": "m", **given})
    shape = read_model_shape("qwen3-0.6b")
    serving = Serving.from_config(config, shape)
    slice_tokens = serving.slice_tokens
    for rank in make_plan(shape.num_layers, tp_size, pp_size).ranks:
        runner: Any = SimpleNamespace(
            config=config, spec=shape.spec, rank=rank, device=torch.device("cuda"), dtype=torch.bfloat16,
            cache_dtype=torch.int8 if "kv_cache_dtype" in settings else torch.bfloat16,
            long_steps=None if slice_tokens is None else SimpleNamespace(slice_tokens=slice_tokens),
            model=SimpleNamespace(records_prompts=lambda num_tokens: True),
        )  # fmt: skip
        planned = serving.prompt_kinds(shape.spec, tp_size, rank.last_layer - rank.first_layer)
        assert recorded_prompts(runner) == planned
        assert max((each for size, each in planned if size < step_memory.LONG_UNIT), default=0) == places
        runner.model.records_prompts = lambda num_tokens: num_tokens != 128
        assert recorded_prompts(runner) == [kind for kind in planned if kind[0] != 128]
        runner.model = SimpleNamespace()
        assert recorded_prompts(runner) == []
