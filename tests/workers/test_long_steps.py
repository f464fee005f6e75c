"""Steps in slices, with the hidden states of the other slices on the host: the same tokens, and a bounded peak."""

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import make_checkpoint
from rig import InProcessRank, RankHosts, Run, answers, greedy, make_config, start, transformers_greedy, write_family
from test_parallel_ranks import LAYOUTS, prompts

from argosy.cluster.protocol.errors import ConfigError, PlacementImpossible
from argosy.workers import host_memory
from argosy.workers.attention.base import AttentionMetadata
from argosy.workers.long_steps import NUM_BUFFERS, cut
from argosy.workers.memory import MemoryLedger, measure_num_blocks
from argosy.workers.step_inputs import StepInputs
from argosy.workers.warm_up import largest_shapes

NUM_TOKENS = 8
LONG = {"max_num_batched_tokens": 64, "activation_offload_gb": "auto", "activation_slice_tokens": 5}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A folder of four layers, and what transformers says."""
    folder = write_family(tmp_path_factory.mktemp("long"), "llama")
    return folder, transformers_greedy(folder, prompts(), NUM_TOKENS)


def run_all(ranks: Any, config: Any, asked: list[list[int]], num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    """Greedy answers to all of these at once."""
    run = Run(ranks, config, 128)
    made = [run.add(greedy(prompt, num_tokens, stream_id=n))[0] for n, prompt in enumerate(asked)]
    run.finish()
    return answers(made)


# ---------------------------------------------------------------------------------------------------------- the slices


def random_step(draw: random.Random) -> StepInputs:
    """Rows of one token first, then longer ones, each with some context before it; some sample."""
    counts = [1] * draw.randrange(4) + [draw.randrange(2, 30) for _ in range(draw.randrange(1, 5))]
    before = [draw.randrange(40) for _ in counts]
    ends = np.array([b + c for b, c in zip(before, counts, strict=True)])
    total = sum(counts)
    positions = np.concatenate([np.arange(b, b + c) for b, c in zip(before, counts, strict=True)])
    sampling = np.flatnonzero([draw.random() < 0.7 for _ in counts])
    rows = torch.arange(len(counts), dtype=torch.int32)
    metadata = AttentionMetadata(
        num_rows=len(counts), num_decode_rows=counts.count(1), query_start_R1=torch.zeros(0), context_len_R=rows,
        block_table_RB=rows[:, None], slot_mapping_T=torch.arange(total), max_query_len=0, max_context_len=0,
    )  # fmt: skip
    other = replace(metadata, block_table_RB=rows[:, None] + 100, slot_mapping_T=torch.arange(total) + 1000)
    metadata.others = (other,)  # a second group of layers
    return StepInputs(
        handles_R=np.arange(len(counts)), num_tokens_R=np.array(counts), end_R=ends, num_tokens=total,
        token_ids_T=torch.arange(total), positions_T=torch.from_numpy(positions), metadata=metadata,
        sample_rows_S=sampling, hidden_rows_S=torch.from_numpy(np.cumsum(counts)[sampling] - 1), handles_device_R=None,
        sample_handles_device_S=None, same_rows=False,
    )  # fmt: skip


def test_slices_are_steps_of_their_own_and_make_up_the_whole() -> None:
    """Every token once and in order, with the row, the position and the context that it has in the whole step."""
    draw = random.Random(5)
    for _ in range(200):
        step = random_step(draw)
        slices = list(cut(step, draw.randrange(1, 20)))
        assert torch.cat([part.token_ids_T for part in slices]).tolist() == list(range(step.num_tokens))
        sampled: list[int] = []
        for part in slices:
            metadata = part.metadata
            starts = metadata.query_start_R1.tolist()
            assert starts[-1] == part.num_tokens
            owners: Tensor = torch.repeat_interleave(metadata.block_table_RB[:, 0], metadata.query_start_R1.diff())
            expected = np.repeat(np.arange(step.num_rows), step.num_tokens_R)[part.first : part.last]
            assert owners.tolist() == expected.tolist()
            (other,) = metadata.others
            assert other.block_table_RB.tolist() == (metadata.block_table_RB + 100).tolist()
            assert other.slot_mapping_T.tolist() == (metadata.slot_mapping_T + 1000).tolist()
            assert other.scratch is not metadata.scratch
            last_positions = part.positions_T[metadata.query_start_R1[1:].long() - 1]
            assert metadata.context_len_R.tolist() == (last_positions + 1).tolist()
            counts = metadata.query_start_R1.diff().tolist()
            assert counts[: metadata.num_decode_rows] == [1] * metadata.num_decode_rows
            assert metadata.max_query_len == max(counts)
            assert metadata.max_context_len == int(metadata.context_len_R.max())
            prompts = metadata.context_len_R[metadata.num_decode_rows :]  # what they have in the cache is made room for
            assert metadata.num_context_tokens == int(prompts.sum())
            sampled += part.sampled.tolist()
            assert step.hidden_rows_S is not None
            assert [part.first + place for place in part.places] == step.hidden_rows_S[part.sampled].tolist()
        assert sampled == list(range(step.num_sampled))


# ---------------------------------------------------------------------------------------------------------- the tokens


@pytest.mark.parametrize("size", [1, 5, 16, 40])
def test_slices_of_any_size_give_the_same_tokens(size: int, llama: tuple[Path, list[list[int]]]) -> None:
    """Each token by itself, a few that stay on the device, many that don't; decode steps are cut as well."""
    folder, expected = llama
    config = make_config(folder, **{**LONG, "activation_slice_tokens": size})
    rank = InProcessRank(config, 128)
    assert rank.runner.long_steps is not None
    assert run_all(rank, config, prompts()) == expected


@pytest.mark.parametrize("layout", ["TP2", "PP2", "TP2xPP2"])
def test_every_layout_gives_the_same_tokens(
    layout: str, llama: tuple[Path, list[list[int]]], hosts: RankHosts, tmp_path: Path
) -> None:
    """Stages hand slice after slice on; weights come from the host as well, once a step."""
    folder, expected = llama
    tp_size, pp_size = LAYOUTS[layout]
    config = make_config(
        folder, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, cpu_offload_gb=1.0, **LONG
    )
    ranks = start(hosts, config, 128, tmp_path)
    try:
        assert run_all(ranks, config, prompts()) == expected
        assert all(report.ledger["host: hidden states"] == 64 * 64 * 4 for report in ranks.reports)
    finally:
        ranks.stop()


FAMILIES = ["mistral", "opt post-norm, projected", "bloom", "gemma2", "olmo2", "falcon 7b", "gpt-oss", "deepseek v2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_shape_can_be_run_in_slices(family: str, tmp_path: Path) -> None:
    """Windows, norms before and after, parallel blocks, experts, latents: with all weights on the host besides."""
    expected = make_checkpoint(tmp_path, family)
    config = make_config(tmp_path, cpu_offload_gb=1.0, **LONG)
    rank = InProcessRank(config, 128)
    assert rank.runner.long_steps is not None
    assert rank.runner.offload is not None
    assert run_all(rank, config, expected.prompts, len(expected.tokens[0])) == expected.tokens


def test_log_probabilities_of_a_prompt_are_read_back_from_the_host(llama: tuple[Path, list[list[int]]]) -> None:
    """The only thing that needs the last layer's states of all tokens."""
    told: list[tuple[Any, Any]] = []
    for settings in ({"max_num_batched_tokens": 64}, LONG):
        config = make_config(llama[0], **settings)
        rank = InProcessRank(config, 128)
        run = Run(rank, config, 128)
        asked = greedy(prompts()[3], 3, prompt_logprobs=2, logprobs=1, read_prefix_cache=False)
        (request,) = run.add(asked)
        run.finish()
        told.append((answers([request]), request.deltas[0].prompt_logprobs))
    (tokens, plain), (long_tokens, long) = told
    assert tokens == long_tokens
    assert len(plain) == len(long) >= 32
    for first, second in zip(plain[1:], long[1:], strict=True):
        assert (first.rank, first.top_ids) == (second.rank, second.top_ids)
        assert first.top_logprobs == pytest.approx(second.top_logprobs, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- the bytes


def test_the_peak_depends_on_the_slice_and_not_on_the_step(llama: tuple[Path, list[list[int]]]) -> None:
    """Four times the tokens of a step: as many bytes of activations, and four times as many on the host."""
    found = {}
    for longest in (64, 256):
        config = make_config(llama[0], **{**LONG, "max_num_batched_tokens": longest, "activation_slice_tokens": 16})
        runner = InProcessRank(config, 8).runner
        ledger = MemoryLedger()
        measure_num_blocks(runner, ledger)
        assert runner.long_steps is not None
        found[longest] = (ledger.activation_bytes, runner.long_steps.host_bytes)
        rows, tokens = largest_shapes(runner)[0]
        assert rows * tokens <= (NUM_BUFFERS + 2) * 16
    plain = MemoryLedger()
    measure_num_blocks(InProcessRank(make_config(llama[0], max_num_batched_tokens=256), 8).runner, plain)
    assert found[64][0] == found[256][0] < plain.activation_bytes / 4
    assert 4 * found[64][1] == found[256][1] == 256 * 64 * 4


def test_steps_no_longer_than_a_slice_need_nothing(llama: tuple[Path, list[list[int]]]) -> None:
    """Then there is nothing to park, and no memory is taken."""
    config = make_config(llama[0], max_num_batched_tokens=64, activation_offload_gb="auto")
    assert InProcessRank(config, 8).runner.long_steps is None


# ----------------------------------------------------------------------------------------------------------- refusals


def test_too_little_for_the_longest_step_is_refused_with_what_would_fit(llama: tuple[Path, list[list[int]]]) -> None:
    """The line has the setting, its value, and both ways out."""
    little = 32 * 64 * 4 / 2**30
    with pytest.raises(ConfigError, match=r"activation_offload_gb=.*lower max_num_batched_tokens to 32"):
        InProcessRank(make_config(llama[0], **{**LONG, "activation_offload_gb": little}), 8)


def test_a_host_without_room_refuses(llama: tuple[Path, list[list[int]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded."""

    class Little:
        available = host_memory.KEPT_FREE

    monkeypatch.setattr(host_memory.psutil, "virtual_memory", Little)
    with pytest.raises(PlacementImpossible, match="lower --max-num-batched-tokens"):
        InProcessRank(make_config(llama[0], **LONG), 8)
