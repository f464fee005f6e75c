"""Decode over caches in 8 bits, a warp a piece: equal to the reference on a card; compiles for one without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from argosy.kernels import kv_scales, reference, tuning

Near = Callable[[Tensor, Tensor], None]
Compiled = Callable[[str], list[str]]
CAN_RUN = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not CAN_RUN, reason="needs capability 8.9")
@pytest.mark.parametrize(
    ("dtype", "scaled"), [(torch.int8, True), (torch.float8_e4m3fn, True), (torch.float8_e4m3fn, False)]
)
@pytest.mark.parametrize(("heads", "block_size", "per_sm"), [(32, 16, 24), (32, 16, 1), (40, 32, 6), (8, 16, 6)])
def test_rows_of_any_length_are_those_of_the_reference(
    heads: int, block_size: int, per_sm: int, dtype: torch.dtype, scaled: bool, assert_near: Near
) -> None:
    """Padding, one token, whole blocks and one more, several pieces; behind a row's end lie scales that are nan."""
    from argosy.kernels.warp_decode import takes, warp_decode

    context = [0, 1, 15, 16, 17, 300, 1000, 1024, 2047, *range(33, 63)]
    per_row = 2048 // block_size
    blocks = len(context) * per_row
    caches = []
    for _ in range(2):
        x = torch.randn(blocks, block_size, 8, 128, device="cuda")
        cache = x.to(dtype)
        if scaled:
            raw = torch.zeros(blocks, kv_scales.block_bytes(block_size, 8, 128), dtype=torch.uint8, device="cuda")
            cache = kv_scales.as_scaled_cache(raw, block_size, 8, 128, dtype)
            x *= torch.rand(blocks, block_size, 8, 1, device="cuda") ** 4
            kv_scales.store(x.flatten(0, 1), cache, torch.arange(blocks * block_size, device="cuda"))
        caches.append(cache)
    table = torch.randperm(blocks, device="cuda").int().view(len(context), per_row)
    every = torch.arange(blocks, device="cuda")
    k, v = (kv_scales.gather(x, every) if scaled else x.float() for x in caches)
    for row, length in enumerate(context):
        if scaled and length % block_size:
            for cache in caches:
                last = table[row, length // block_size]
                kv_scales.scales_of(cache)[last, :, length % block_size :] = kv_scales.NAN_CODE
    lengths = torch.tensor(context, device="cuda", dtype=torch.int32)
    q = torch.randn(len(context), heads + 16, 128, device="cuda", dtype=torch.bfloat16)[:, :heads]
    assert takes(heads, caches[0], q.dtype)
    want = reference.paged_attention(q.float(), k, v, table, lengths, scale=128**-0.5)
    for _ in range(2):  # the counters of pieces were left at zero
        out = torch.full((len(context), heads, 128), float("nan"), device="cuda", dtype=torch.bfloat16)
        sizes = {"maxnreg": 168, "per_sm": per_sm, "min_piece": 256}
        warp_decode(q, *caches, table, lengths, out, scale=128**-0.5, max_context=2048, sizes=sizes)  # type: ignore[misc]  # two of them
        assert_near(out, want)
    assert not tuning.counters(q.device).any()


def test_it_compiles_into_registers_alone(compiled_for_hopper: Compiled) -> None:
    """No numbers go through shared memory, and none are spilled."""
    lines = [line.split() for line in compiled_for_hopper("alone")]
    assert len(lines) == 3
    for registers, _, spilled, _, shared, *_ in lines:
        assert int(registers) <= 168
        assert int(spilled) < 32
        assert int(shared) < 64
