"""Latent attention on the card against plain torch, and its two forms against each other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from argosy.kernels import kv_scales, mla_attention, mla_reference

Near = Callable[[Tensor, Tensor], None]
BLOCK_SIZE, NUM_BLOCKS = 16, 40
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def make_caches(c: int, p: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    latent = torch.randn(NUM_BLOCKS, BLOCK_SIZE, 1, c, device=device).to(dtype)
    return latent, torch.randn(NUM_BLOCKS, BLOCK_SIZE, 1, p, device=device).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "c", "p"), [(16, 32, 16), (5, 16, 16), (24, 64, 32)])
def test_decode(num_heads: int, c: int, p: int, dtype: torch.dtype, device: torch.device, assert_near: Near) -> None:
    """Rows of one token, of a full block, of several splits, and one of padding."""
    lengths = [1, 16, 150, 0, 97]
    caches = make_caches(c, p, dtype, device)
    q_latent = torch.randn(len(lengths), num_heads, c, device=device).to(dtype)
    q_rotated = torch.randn(len(lengths), num_heads, p, device=device).to(dtype)
    table = torch.randint(0, NUM_BLOCKS, (len(lengths), 12), dtype=torch.int32, device=device)
    context = torch.tensor(lengths, dtype=torch.int32, device=device)
    got = mla_attention.decode(q_latent, q_rotated, *caches, table, context, scale=0.1)
    exact = [x.double() for x in (q_latent, q_rotated, *caches)]
    assert_near(got, mla_reference.decode(*exact, table, context, scale=0.1))
    assert not got[3].any()


def test_store_leaves_padding_out(device: torch.device) -> None:
    """Slots of -1 are padding; all others get their token, and no other slot changes."""
    latent_cache, key_cache = make_caches(24, 8, torch.float32, device)
    before = latent_cache.clone()
    latent, key = torch.randn(3, 40, device=device)[:, :24], torch.randn(3, 8, device=device)
    slots = torch.tensor([17, -1, 80], device=device)
    mla_attention.store_latent(latent, key, latent_cache, key_cache, slots)
    changed = (latent_cache != before).flatten(2).any(-1).flatten()
    assert torch.where(changed)[0].tolist() == [17, 80]
    torch.testing.assert_close(latent_cache[5, 0, 0], latent[2])
    torch.testing.assert_close(key_cache[1, 1, 0], key[0])


def test_the_absorbed_form_gives_the_numbers_of_the_expanded_one() -> None:
    """What a prompt's last token sees must not depend on which form computed it."""
    heads, c, p, nope, value, length = 4, 16, 8, 12, 10, 37
    torch.manual_seed(1)
    key_weight, value_weight = torch.randn(heads, nope, c), torch.randn(heads, c, value)
    latent_cache, key_cache = make_caches(c, p, torch.float32, torch.device("cpu"))
    blocks = torch.tensor([7, 3, 30], dtype=torch.int32)
    latent, key = mla_reference.gather(latent_cache, key_cache, blocks, length)
    q_nope, q_rotated = torch.randn(5, heads, nope), torch.randn(5, heads, p)
    k = torch.cat((torch.einsum("lc,nqc->lnq", latent, key_weight), key[:, None].expand(-1, heads, -1)), -1)
    v = torch.einsum("lc,ncv->lnv", latent, value_weight)
    expanded = mla_reference.attend_expanded(torch.cat((q_nope, q_rotated), -1), k, v, scale=0.2)
    q_latent = torch.einsum("nq,nqc->nc", q_nope[-1], key_weight)
    context = torch.tensor([length], dtype=torch.int32)
    seen = mla_reference.decode(
        q_latent[None], q_rotated[-1:], latent_cache, key_cache, blocks[None], context, scale=0.2
    )
    torch.testing.assert_close(torch.einsum("nc,ncv->nv", seen[0], value_weight), expanded[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
def test_caches_with_scales(dtype: torch.dtype, kind: torch.dtype, device: torch.device, assert_near: Near) -> None:
    """A scale for each token's latent and one for its key; slots beyond a row's end hold what a failed row left."""
    c, p, num_heads, lengths = 32, 16, 5, [1, 16, 150, 0, 97]
    caches = []
    for size in (c, p):
        shape = (NUM_BLOCKS, kv_scales.block_bytes(BLOCK_SIZE, 1, size))
        raw = torch.zeros(shape, dtype=torch.uint8, device=device)
        caches.append(kv_scales.as_scaled_cache(raw, BLOCK_SIZE, 1, size, kind))
        kv_scales.scales_of(caches[-1]).fill_(kv_scales.NAN_CODE)
    table = torch.randperm(NUM_BLOCKS, device=device).int()
    rows = table.new_zeros(len(lengths), 12)
    for row, (start, length) in enumerate(zip([0, 1, 2, 0, 12], lengths, strict=True)):
        blocks = table[start : start + -(-length // BLOCK_SIZE)]
        rows[row, : len(blocks)] = blocks
        where = torch.arange(length, device=device)
        slots = blocks.long()[where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE
        latent, key = torch.randn(length, c, device=device), 9 * torch.randn(length, p, device=device)
        padded = torch.cat((slots, slots.new_full((1,), -1)))
        latent, key = (torch.cat((x, x.new_zeros(1, x.shape[1]))) for x in (latent, key))
        mla_attention.store_latent(latent.to(dtype), key.to(dtype), *caches, padded)
        if length and kind == torch.int8:
            seen = mla_reference.gather(*caches, rows[row], length)[0]
            assert float((seen - latent[:-1]).abs().max()) < 0.04
    context = torch.tensor(lengths, dtype=torch.int32, device=device)
    q_latent = torch.randn(len(lengths), num_heads, c, device=device).to(dtype)
    q_rotated = torch.randn(len(lengths), num_heads, p, device=device).to(dtype)
    got = mla_attention.decode(q_latent, q_rotated, *caches, rows, context, scale=0.1)
    assert_near(got, mla_reference.decode(q_latent, q_rotated, *caches, rows, context, scale=0.1))
    assert not got[3].any()
