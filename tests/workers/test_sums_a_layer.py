"""What a layer costs a tensor-parallel group: two sums over it, one where attention and MLP stand side by side.

No other rank is there: a sum is counted, and what it would bring is left out.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import CASES, make_checkpoint, num_layers_of
from family_harness import CPU, Harness, sum_in_one

from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.workers.models.blocks import PARALLEL_BLOCKS

EMBEDDING = 1  # the vocabulary is split as well
FUSED = ("llama", "qwen3", "phi3", "mixtral", "gpt-oss", "deepseek v3")


class Counted(ParallelContext):
    """How many sums of hidden states there were; a number a token (norms over all heads) is none."""

    num_sums = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """Nobody else is there."""
        self.num_sums += x.shape[-1] > 1
        return x

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        """Logits, of rows that sample."""
        return torch.cat([x] * self.tp_size, -1)

    gather_rows = scatter_sum = all_to_all = broadcast = None  # type: ignore[assignment]  # a layer has no use for them


def sums_of_a_step(harness: Harness, parallel: Counted, num_tokens: int) -> int:
    """A prompt's, or of one token behind it."""
    row = harness.sequence([3, 1, 4, 1, 5, 9, 2, 6], 12)
    if num_tokens == 1:
        harness.step([(row, 7)])
    parallel.num_sums = 0
    harness.step([(row, num_tokens)])
    return parallel.num_sums


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_a_layer_sums_twice_over_its_group(name: str, tmp_path: Path) -> None:
    """Prompts and decode steps alike, in every family."""
    make_checkpoint(tmp_path, name)
    rank = make_plan(num_layers_of(name), 2, 1).ranks[0]
    parallel = Counted(rank, CPU, 1.0)
    harness = Harness(tmp_path, rank, parallel, max_model_len=CASES[name].max_model_len)
    a_layer = 1 if harness.spec.block in PARALLEL_BLOCKS else 2
    for num_tokens in (8, 1):
        assert sums_of_a_step(harness, parallel, num_tokens) == EMBEDDING + a_layer * harness.spec.num_layers


@pytest.mark.parametrize("name", FUSED)
@torch.inference_mode()
def test_so_it_is_where_a_sum_is_one_launch_with_the_norm(name: str, tmp_path: Path) -> None:
    """As on cards that address each other's memory: the same sums, each in one kernel with what follows."""
    make_checkpoint(tmp_path, name)
    rank = make_plan(num_layers_of(name), 2, 1).ranks[0]
    parallel = Counted(rank, CPU, 1.0)
    harness = Harness(tmp_path, rank, parallel)
    sum_in_one(harness)
    for num_tokens in (8, 1):
        assert sums_of_a_step(harness, parallel, num_tokens) == EMBEDDING + 2 * harness.spec.num_layers
