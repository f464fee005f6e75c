"""Prompts on Hopper: equal to the reference on ugly rows, and chosen only where it was measured and can be had."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ptx_lanes import brain_halves, run
from torch import Tensor

from argosy.kernels import kv_scales, prefill_attention, reference, tuning
from argosy.kernels.prompt_tiles import plan_tiles

Near = Callable[[Tensor, Tensor], None]
Compiled = Callable[[str], list[str]]
SIZES = [(128, 2, 200, 104), (64, 4, 216, 72)]
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs capability 9.0")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(32, 8, 128), (16, 8, 128), (14, 2, 64), (12, 12, 64), (6, 2, 128)]
)
def test_prompts_and_chunks_are_those_of_the_reference(
    heads: int, kv_heads: int, size: int, block_size: int, sizes: tuple[int, ...], assert_near: Near
) -> None:
    """Rows of one token, of a tile and one more, chunks after a prefix; queries are a view of the product."""
    from argosy.kernels.hopper_attention import block_q_of, hopper_attention, takes

    drawn = random.Random(size + block_size)
    rows = [(1, 1), (1, 300), (33, 33), (128, 128), (129, 400), (256, 256), (64, 1000)]
    rows += [(n, n + drawn.randrange(200)) for n in (drawn.randrange(1, 300) for _ in range(70))]
    per_row = -(-max(context for _, context in rows) // block_size)
    shape = (len(rows) * per_row, block_size, kv_heads, size)
    k_cache, v_cache = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randperm(len(rows) * per_row, device="cuda").int().view(len(rows), per_row)
    starts = torch.tensor([0, *torch.tensor([n for n, _ in rows]).cumsum(0).tolist()], device="cuda", dtype=torch.int32)
    lengths = torch.tensor([context for _, context in rows], device="cuda", dtype=torch.int32)
    q = torch.randn(int(starts[-1]), heads + 2 * kv_heads, size, device="cuda", dtype=torch.bfloat16)[:, :heads]
    assert takes(q, k_cache)
    want = reference.prefill_attention(
        q.float(), k_cache.float(), v_cache.float(), starts, lengths, table, scale=size**-0.5
    )
    tiles = plan_tiles(starts, lengths, len(q), block_q_of(q, k_cache))
    names = ("block_l", "stages", "registers", "fetch_registers")
    for _ in range(2):  # the counter of tiles was left at zero
        out = torch.full((len(q), heads, size), float("nan"), device="cuda", dtype=torch.bfloat16)
        hopper_attention(
            q, k_cache, v_cache, table, tiles, out, scale=size**-0.5,
            sizes=dict(zip(names, sizes, strict=True)),
        )  # fmt: skip
        assert_near(out, want)
    assert int(tuning.counters(q.device)[0]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs capability 9.0")
@pytest.mark.parametrize("block_size", [16, 4, 24])
@pytest.mark.parametrize(
    ("dtype", "scaled"), [(torch.int8, True), (torch.float8_e4m3fn, True), (torch.float8_e4m3fn, False)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 8, 128), (14, 2, 64)])
def test_caches_in_8_bits_are_unpacked_on_the_way(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, scaled: bool, block_size: int, assert_near: Near
) -> None:
    """All numbers there are, in heads of very different sizes; blocks behind a row's end hold scales that are nan."""
    from argosy.kernels.hopper_attention import block_q_of, hopper_attention, takes

    rows = [(1, 1), (1, 300), (33, 33), (128, 128), (129, 400), (256, 256), (64, 1000)]
    per_row = -(-1000 // block_size)
    blocks = len(rows) * per_row
    caches = []
    for _ in range(2):
        x = torch.randn(blocks, block_size, kv_heads, size, device="cuda")
        if scaled:
            raw = torch.zeros(
                blocks, kv_scales.block_bytes(block_size, kv_heads, size), dtype=torch.uint8, device="cuda"
            )
            cache = kv_scales.as_scaled_cache(raw, block_size, kv_heads, size, dtype)
            x *= torch.rand(blocks, block_size, kv_heads, 1, device="cuda") ** 4
            kv_scales.store(x.flatten(0, 1), cache, torch.arange(blocks * block_size, device="cuda"))
        else:
            cache = x.to(dtype)
        caches.append(cache)
    table = torch.randperm(blocks, device="cuda").int().view(len(rows), per_row)
    everything = torch.arange(blocks, device="cuda")
    exact = [kv_scales.gather(x, everything) if scaled else x.float() for x in caches]
    if scaled:
        for row, (_, context) in enumerate(rows):
            last, inside = table[row, (context - 1) // block_size], (context - 1) % block_size
            for cache in caches:
                kv_scales.scales_of(cache)[last, :, inside + 1 :] = kv_scales.NAN_CODE
    starts = torch.tensor([0, *torch.tensor([n for n, _ in rows]).cumsum(0).tolist()], device="cuda", dtype=torch.int32)
    lengths = torch.tensor([context for _, context in rows], device="cuda", dtype=torch.int32)
    q = torch.randn(int(starts[-1]), heads + 2 * kv_heads, size, device="cuda", dtype=torch.bfloat16)[:, :heads]
    assert takes(q, caches[0])
    assert not takes(q.half(), caches[0])
    want = reference.prefill_attention(q.float(), *exact, starts, lengths, table, scale=size**-0.5)
    tiles = plan_tiles(starts, lengths, len(q), block_q_of(q, caches[0]))
    out = torch.full((len(q), heads, size), float("nan"), device="cuda", dtype=torch.bfloat16)
    assert_near(hopper_attention(q, *caches, table, tiles, out, scale=size**-0.5), want)
    assert int(tuning.counters(q.device)[0]) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("scale", [1.0, 1.25 * 2.0**-9, 1.75 * 2.0**19, 1.5 * 2.0**-44])
def test_every_number_of_8_bits_is_unpacked_exactly(dtype: torch.dtype, scale: float) -> None:
    """All 256 bytes, four a word, over the scales at both ends; e4m3's two nan become 480, which no cache holds."""
    from argosy.kernels import hopper_unpack

    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    words = every.numpy().view(np.uint32)
    bits = int(torch.tensor(scale).bfloat16().view(torch.int16)) & 0xFFFF
    text = hopper_unpack.INT8 if dtype == torch.int8 else hopper_unpack.E4M3_BITS
    made = []
    for half in range(2):
        scales = np.full(32, bits * 0x10001, dtype=np.uint32)
        pairs = [brain_halves(x) for x in run(text.value, [words[32 * half : 32 * half + 32], scales], 2)]
        made.append(torch.cat(pairs, 1).flatten())
    want = every.view(dtype).float() * scale
    want = torch.where(want.isnan(), torch.where(every < 128, 480.0, -480.0) * scale, want)
    assert torch.equal(torch.cat(made), want.bfloat16())


def test_it_is_not_chosen_where_nobody_measured_it(device: torch.device) -> None:
    """An unknown GPU, and heads of a size that it has no tiles for, keep to the kernel for any."""
    q, cache = torch.zeros(4, 8, 96), torch.zeros(2, 16, 2, 96)
    assert prefill_attention._hopper_sizes(q, cache, "long") is None


def test_it_compiles_for_a_hopper_card_and_fits(compiled_for_hopper: Compiled) -> None:
    """With tensor core products that don't wait for each other, and few registers spilled."""
    spilled = [int(line.split()[2]) for line in compiled_for_hopper("prompts")]
    assert spilled
    assert max(spilled) < 256
