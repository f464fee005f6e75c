"""Attention of a recorded step with prompts, whose rows have fixed places."""

import pytest
import torch
from torch import Tensor

from argosy.workers.attention.base import AttentionMetadata, AttentionShape
from argosy.workers.attention.torch_backend import TorchBackend
from argosy.workers.attention.triton_backend import TritonBackend


@pytest.mark.parametrize("window", [None, 5])
def test_both_attention_kernels_find_their_rows_in_fixed_places(window: int | None) -> None:
    """What the backend for cards gives of a padded step is what it gives of the same rows without padding, and zeros
    where there is no token: two decode rows in five places, three prompts in four, 20 tokens in 30."""
    torch.manual_seed(2)
    counts, contexts = [1, 1, 7, 1, 10], [13, 3, 7, 9, 21]
    num_decodes, places, total = 2, 5, 20
    caches = (torch.randn(40, 4, 2, 16), torch.randn(40, 4, 2, 16))
    table = torch.randperm(40)[: 5 * 6].view(5, 6).int()
    shape = AttentionShape(num_heads=4, num_kv_heads=2, head_size=16, scale=0.25, sliding_window=window)
    q = torch.randn(30, 4, 16)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    plain = AttentionMetadata(
        num_rows=5, num_decode_rows=num_decodes, query_start_R1=starts, max_query_len=10, max_context_len=21,
        context_len_R=torch.tensor(contexts, dtype=torch.int32), block_table_RB=table,
        slot_mapping_T=torch.zeros(total, dtype=torch.int64),
    )  # fmt: skip

    def placed(values: Tensor, filler: int) -> Tensor:
        rows = torch.full((places + 4, *values.shape[1:]), filler, dtype=torch.int32)
        rows[:num_decodes], rows[places : places + 3] = values[:num_decodes], values[num_decodes:]
        return rows

    padded_starts = torch.full((places + 5,), total, dtype=torch.int32)
    padded_starts[:places] = torch.tensor([0, 1, 2, 2, 2])
    padded_starts[places : places + 4] = starts[num_decodes:]
    padded = AttentionMetadata(
        num_rows=places + 4, num_decode_rows=places, query_start_R1=padded_starts, max_query_len=30, max_context_len=24,
        context_len_R=placed(plain.context_len_R, 0), block_table_RB=placed(table, 0),
        slot_mapping_T=torch.zeros(30, dtype=torch.int64), is_padded=True,
    )  # fmt: skip
    for backend in (TritonBackend(), TorchBackend()):
        want = backend.attend(q[:total], caches, plain, shape)
        for _ in range(2):  # layers write to the same output
            got = backend.attend(q, caches, padded, shape)
            assert torch.allclose(got[:total], want, atol=1e-6)
            assert not got[total:].any()
