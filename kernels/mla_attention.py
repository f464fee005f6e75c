"""Latent attention of decode rows on a GPU. Meaning: `mla_reference`.

A head's query is 512 + 64 numbers against the 512 + 64 that all heads share: a tile of keys is read once for 16 heads,
for the logits and again, from where it lies on chip, for the sum. A context is split over programs, as many as the card
has room for, and a second launch joins what they found. Launch shapes follow from shapes and host bounds alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from argosy.kernels import tuning
from argosy.kernels.attention_parts import check_caches, scaled
from argosy.kernels.kv_scale_parts import (
    code_of,
    code_place,
    codes_at,
    inverse_of,
    load_codes,
    magnitude,
    number_place,
    rounded,
    scale_of,
)
from argosy.kernels.kv_scales import has_scales

HEADS = 16  # of a program: the rows of a tensor core's tile
MAX_SPLITS = 64
WIDE_BYTES = 112 << 10  # on chip, that tiles of 32 keys take in float32


@triton.jit
def _store_kernel(
    latent_ptr, key_ptr, latent_cache_ptr, key_cache_ptr, slots_ptr, stride_latent, stride_key,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, S: tl.constexpr,
    KV_SCALES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        _store_vector(latent_ptr + token * stride_latent, latent_cache_ptr, slot, C, BLOCK_C, S, KV_SCALES)
        _store_vector(key_ptr + token * stride_key, key_cache_ptr, slot, P, BLOCK_P, S, KV_SCALES)


@triton.jit
def _store_vector(
    x_ptr, cache_ptr, slot, SIZE: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr, KV_SCALES: tl.constexpr
):
    at = tl.arange(0, WIDTH)
    x = tl.load(x_ptr + at, at < SIZE, other=0.0)
    if KV_SCALES:
        x = x.to(tl.float32)
        code = code_of(tl.max(magnitude(x), 0), cache_ptr)
        tl.store(codes_at(cache_ptr) + code_place(slot // S, slot % S, 0, 1, SIZE, S), code.to(tl.uint8))
        x = rounded(x, inverse_of(code), cache_ptr)
        place = number_place(slot // S, slot % S, 1, SIZE, S)
    else:
        if cache_ptr.dtype.element_ty == tl.float8e4nv:
            x = scaled(x, 1.0)
        x = x.to(cache_ptr.dtype.element_ty)
        place = slot * SIZE
    tl.store(cache_ptr + place + at, x, at < SIZE)


def store_latent(latent_TC: Tensor, key_TP: Tensor, latent_cache: Tensor, key_cache: Tensor, slots_T: Tensor) -> None:
    """See `mla_reference.store_latent`."""
    num_tokens, c = latent_TC.shape
    p = key_TP.shape[1]
    assert latent_TC.stride(1) == key_TP.stride(1) == 1
    check_caches(latent_cache, key_cache, (1.0, 1.0))
    if num_tokens:
        _store_kernel[(num_tokens,)](
            latent_TC, key_TP, latent_cache, key_cache, slots_T, latent_TC.stride(0), key_TP.stride(0), C=c, P=p,
            BLOCK_C=tuning.next_power_of_two(c), BLOCK_P=tuning.next_power_of_two(p), S=latent_cache.shape[1],
            KV_SCALES=has_scales(latent_cache), num_warps=4,
        )  # fmt: skip


@triton.jit
def _decode_kernel(
    q_latent_ptr, q_rotated_ptr, latent_ptr, key_ptr, table_ptr, length_ptr, out_ptr, peak_ptr, total_ptr, scale,
    num_heads, num_splits, stride_table,
    C: tl.constexpr, P: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    KV_SCALES: tl.constexpr,
):  # fmt: skip
    row, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    head = group * HEADS + tl.arange(0, HEADS)
    is_head = head < num_heads
    length = tl.load(length_ptr + row)
    share = tl.cdiv(tl.cdiv(length, num_splits), KEYS) * KEYS
    first, last = split * share, tl.minimum((split + 1) * share, length)
    c, p = tl.arange(0, C), tl.arange(0, P)
    here = row * num_heads + head
    q_latent = tl.load(q_latent_ptr + here[:, None] * C + c[None, :], is_head[:, None], other=0.0)
    q_rotated = tl.load(q_rotated_ptr + here[:, None] * P + p[None, :], is_head[:, None], other=0.0)
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, C), tl.float32)
    for start in range(first, last, KEYS):
        token = start + tl.arange(0, KEYS)
        is_key = token < last
        block = tl.load(table_ptr + row * stride_table + token // S, is_key, other=0).to(tl.int64)
        if KV_SCALES:
            latent_at = number_place(block, token % S, 1, C, S)
            key_at = number_place(block, token % S, 1, P, S)
        else:
            latent_at = (block * S + token % S) * C
            key_at = (block * S + token % S) * P
        latent = tl.load(latent_ptr + latent_at[:, None] + c[None, :], is_key[:, None], other=0.0).to(q_latent.dtype)
        key = tl.load(key_ptr + key_at[:, None] + p[None, :], is_key[:, None], other=0.0).to(q_latent.dtype)
        logits = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        if KV_SCALES:
            latent_scale = scale_of(load_codes(latent_ptr, block, token % S, 0, is_key, 1, C, S))
            key_scale = scale_of(load_codes(key_ptr, block, token % S, 0, is_key, 1, P, S))
            logits *= latent_scale[None, :]
            logits += tl.dot(q_rotated, tl.trans(key), input_precision="ieee") * key_scale[None, :]
            logits *= scale
        else:
            logits = tl.dot(q_rotated, tl.trans(key), logits, input_precision="ieee") * scale
        logits = tl.where(is_key[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        weights = tl.exp(logits - new_peak[:, None])
        decay = tl.exp(peak - new_peak)
        total = total * decay + tl.sum(weights, axis=1)
        if KV_SCALES:  # the latent is normed, so its scales are near each other
            weights *= latent_scale[None, :]
        acc = tl.dot(weights.to(latent.dtype), latent, acc * decay[:, None], input_precision="ieee")
        peak = new_peak
    place = (row * num_splits + split) * num_heads + head
    tl.store(peak_ptr + place, peak, is_head)
    tl.store(total_ptr + place, total, is_head)
    tl.store(out_ptr + place[:, None] * C + c[None, :], acc, is_head[:, None])


@triton.jit
def _join_kernel(part_ptr, peak_ptr, total_ptr, out_ptr, num_heads, num_splits, C: tl.constexpr, SPLITS: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, c = tl.arange(0, SPLITS), tl.arange(0, C)
    place = (row * num_splits + split) * num_heads + head
    is_split = split < num_splits
    peak = tl.load(peak_ptr + place, is_split, other=float("-inf"))
    total = tl.load(total_ptr + place, is_split, other=0.0)
    best = tl.max(peak, axis=0)
    weight = tl.where(total > 0.0, tl.exp(peak - best), 0.0)
    whole = tl.sum(weight * total, axis=0)
    joined = tl.zeros((C,), tl.float32)
    for at in range(num_splits):
        mine = tl.sum(tl.where(split == at, weight, 0.0), axis=0)
        part = tl.load(part_ptr + ((row * num_splits + at) * num_heads + head) * C + c)
        joined += tl.where(mine > 0.0, part * mine, 0.0)
    joined = tl.where(whole > 0.0, joined / whole, 0.0)  # a row of padding has no keys
    tl.store(out_ptr + (row * num_heads + head) * C + c, joined.to(out_ptr.dtype.element_ty))


def num_splits_for(num_programs: int, max_context: int, num_sms: int) -> int:
    """As many as fill the card twice, but none of less than 64 keys."""
    return max(1, min(MAX_SPLITS, 2 * num_sms // max(1, num_programs), -(-max_context // 64)))


def decode(
    q_latent_RNC: Tensor,
    q_rotated_RNP: Tensor,
    latent_cache: Tensor,
    key_cache: Tensor,
    block_table_RB: Tensor,
    context_len_R: Tensor,
    *,
    scale: float,
    max_context: int | None = None,
) -> Tensor:
    """See `mla_reference.decode`. `max_context` bounds the lengths on the host; it sizes the launch, not the result."""
    num_rows, num_heads, c = q_latent_RNC.shape
    p, block_size = q_rotated_RNP.shape[2], latent_cache.shape[1]
    assert c == tuning.next_power_of_two(c)
    assert p == tuning.next_power_of_two(p)
    assert block_table_RB.stride(1) == 1
    q_latent_RNC, q_rotated_RNP = q_latent_RNC.contiguous(), q_rotated_RNP.contiguous()
    out_RNC = torch.empty_like(q_latent_RNC)
    if num_rows == 0:
        return out_RNC
    longest = min(max_context or block_table_RB.shape[1] * block_size, block_table_RB.shape[1] * block_size)
    groups = triton.cdiv(num_heads, HEADS)
    facts = tuning.device_facts(q_latent_RNC.device)
    splits = num_splits_for(num_rows * groups, longest, facts.num_sms)
    keys = 32 if q_latent_RNC.element_size() == 2 or facts.shared_bytes >= WIDE_BYTES else 16
    part = torch.empty((num_rows, splits, num_heads, c), dtype=torch.float32, device=q_latent_RNC.device)
    peak, total = torch.empty((2, num_rows, splits, num_heads), dtype=torch.float32, device=q_latent_RNC.device)
    _decode_kernel[(num_rows, groups, splits)](
        q_latent_RNC, q_rotated_RNP, latent_cache, key_cache, block_table_RB, context_len_R, part, peak, total, scale,
        num_heads, splits, block_table_RB.stride(0), C=c, P=p, S=block_size, HEADS=HEADS, KEYS=keys,
        KV_SCALES=has_scales(latent_cache), num_warps=4, num_stages=2,
    )  # fmt: skip
    _join_kernel[(num_rows, num_heads)](
        part, peak, total, out_RNC, num_heads, splits, C=c, SPLITS=tuning.next_power_of_two(splits), num_warps=4
    )
    return out_RNC
