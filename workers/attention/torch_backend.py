"""Attention by torch over gathered blocks: for CPUs, and for doubt. Letters as in `attention.base`; L = keys of a row.

What is the same for all layers of a step (rotations, slots, which blocks to gather, masks) is worked out once and kept
in the metadata's `scratch`.
"""

import dataclasses
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from argosy.kernels import kv_scales
from argosy.kernels.reference import as_bytes, to_cache
from argosy.workers.attention.base import AttentionMetadata, AttentionShape, QKNorm

# Decode rows are gathered together while they are of similar length and the copy stays in the cache: above 32 MiB
# glibc maps and unmaps each copy, which took 8 times as long.
GATHER_TOKENS = 8192
CHUNK_LOGITS = 1 << 18  # of a prompt's queries taken together: 1 MiB, which stays in a core's cache
NO_SCALES = (1.0, 1.0)
MIN_CHUNK, MAX_CHUNK = 16, 256
# A group's shortest row has at least this share of the blocks of its longest. 32 rows of 40 to 380 tokens (4 heads of
# 32, float32), a step of 4 layers: 0.8 10.8 ms, 0.6 11.1, 0.3 14.9, all in one 46: padding costs more than a group.
SIMILAR = 0.8


class _DecodeGroup(NamedTuple):
    rows: Tensor | None  # None: all tokens of the step in order
    block_ids: Tensor
    num_rows: int
    num_keys: int  # after gathering
    mask_R11L: dict[int | None, Tensor | None]  # by sliding window; bool, filled when first asked for
    last_R1: Tensor  # place of each row's last token among its gathered keys
    length: int | None  # how many of the gathered keys all rows have, if all have the same


class _PrefillRow(NamedTuple):
    first: int
    last: int
    length: int  # keys from the first gathered one on
    block_ids: Tensor


class _Plan:
    """What one step's layers of the same window share. Blocks before a window are not read: they may be others'."""

    def __init__(self, metadata: AttentionMetadata, block_size: int, window: int | None):
        slots_T = metadata.slot_mapping_T
        self.kept_T: Tensor | None = None
        if slots_T.numel() and int(slots_T.min()) < 0:
            self.kept_T = torch.nonzero(slots_T >= 0).squeeze(1)
            slots_T = slots_T[self.kept_T]
        self.slots_T = slots_T
        lengths: list[int] = metadata.context_len_R[: metadata.num_rows].tolist()
        starts: list[int] = metadata.query_start_R1[: metadata.num_rows + 1].tolist()
        self.block_size = block_size
        self.num_tokens = metadata.slot_mapping_T.shape[0]
        reach = [max(0, length - window) if window is not None else 0 for length in lengths]
        self.decodes = self._group_decodes(metadata, lengths, [first // block_size for first in reach])
        self.prefills = []
        for row in range(metadata.num_decode_rows, metadata.num_rows):
            if num_queries := starts[row + 1] - starts[row]:
                skipped = max(0, reach[row] - num_queries + 1) // block_size
                block_ids = metadata.block_table_RB[row, skipped : -(-lengths[row] // block_size)]
                length = lengths[row] - skipped * block_size
                self.prefills.append(_PrefillRow(starts[row], starts[row + 1], length, block_ids))
        covered = sum(group.num_rows for group in self.decodes)
        covered += sum(row.last - row.first for row in self.prefills)
        self.has_padding = covered < self.num_tokens
        self.rotations: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _group_decodes(self, metadata: AttentionMetadata, lengths: list[int], skipped: list[int]) -> list[_DecodeGroup]:
        size = self.block_size
        rows = [row for row in range(metadata.num_decode_rows) if lengths[row] > 0]
        rows.sort(key=lambda row: -(lengths[row] - skipped[row] * size))
        groups: list[list[int]] = []
        widest = 0
        for row in rows:
            blocks = -(-lengths[row] // size) - skipped[row]
            if not groups or blocks < SIMILAR * widest or (len(groups[-1]) + 1) * widest * size > GATHER_TOKENS:
                groups.append([])
                widest = blocks
            groups[-1].append(row)
        alone = len(groups) == 1 and len(rows) == self.num_tokens
        return [self._decode_group(metadata, sorted(group), lengths, skipped, all_rows=alone) for group in groups]

    def _decode_group(
        self,
        metadata: AttentionMetadata,
        rows: list[int],
        lengths: list[int],
        skipped: list[int],
        *,
        all_rows: bool,
    ) -> _DecodeGroup:
        own = [lengths[row] - skipped[row] * self.block_size for row in rows]
        longest = max(own)
        num_blocks = -(-longest // self.block_size)
        picked = None if all_rows else torch.tensor(rows)
        table = metadata.block_table_RB[: len(rows)] if picked is None else metadata.block_table_RB[picked]
        if any(skipped[row] for row in rows):
            place_RB = torch.tensor([skipped[row] for row in rows])[:, None] + torch.arange(num_blocks)
            block_ids = table.gather(1, place_RB.clamp_(max=table.shape[1] - 1))
        else:
            block_ids = table[:, :num_blocks]
        return _DecodeGroup(
            picked,
            block_ids.reshape(-1),
            len(rows),
            num_blocks * self.block_size,
            {},
            torch.tensor(own)[:, None] - 1,
            longest if all(length == longest for length in own) else None,
        )


class TorchBackend:
    """Rows of one token together, longer rows one by one."""

    def forward(
        self,
        qkv_TD: Tensor,
        positions_T: Tensor,
        cos_sin_PH: Tensor | None,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        shape: AttentionShape,
        norm: QKNorm | None,
    ) -> Tensor:
        """The one after the other."""
        q_TNH = self.rotate_and_store(qkv_TD, positions_T, cos_sin_PH, kv_cache, metadata, shape, norm)
        return self.attend(q_TNH, kv_cache, metadata, shape)

    def rotate_and_store(
        self,
        qkv_TD: Tensor,
        positions_T: Tensor,
        cos_sin_PH: Tensor | None,
        kv_cache: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        shape: AttentionShape,
        norm: QKNorm | None,
    ) -> Tensor:
        """q and k lie side by side in the projection and are rotated together."""
        plan = _plan(metadata, kv_cache, shape)
        num_heads, num_kv_heads, size = shape.num_heads, shape.num_kv_heads, shape.head_size
        num_rotated = num_heads + num_kv_heads
        qkv = qkv_TD.view(-1, num_rotated + num_kv_heads, size)
        qk = qkv[:, :num_rotated]
        if norm is not None:
            qk = _norm_heads(qk, norm)
        rotated = (
            qk if cos_sin_PH is None else _rotate(qk, plan, positions_T, cos_sin_PH, interleaved=shape.interleaved)
        )
        k_TKH, v_TKH = rotated[:, num_heads:], qkv[:, num_rotated:]
        if plan.kept_T is not None:
            k_TKH, v_TKH = k_TKH[plan.kept_T], v_TKH[plan.kept_T]
        k_cache, v_cache = kv_cache
        if kv_scales.has_scales(k_cache):
            kv_scales.store(k_TKH, k_cache, plan.slots_T)
            kv_scales.store(v_TKH, v_cache, plan.slots_T)
            return rotated[:, :num_heads]
        if k_TKH.dtype != k_cache.dtype or shape.kv_scales != NO_SCALES:
            k_TKH = to_cache(k_TKH, k_cache.dtype, shape.kv_scales[0])
            v_TKH = to_cache(v_TKH, v_cache.dtype, shape.kv_scales[1])
        as_bytes(k_cache).view(-1, num_kv_heads, size).index_copy_(0, plan.slots_T, as_bytes(k_TKH))
        as_bytes(v_cache).view(-1, num_kv_heads, size).index_copy_(0, plan.slots_T, as_bytes(v_TKH))
        return rotated[:, :num_heads]

    def attend(
        self, q_TNH: Tensor, kv_cache: tuple[Tensor, Tensor], metadata: AttentionMetadata, shape: AttentionShape
    ) -> Tensor:
        """Padding tokens give zeros."""
        if shape.kv_scales != NO_SCALES and not kv_scales.has_scales(kv_cache[0]):
            # the keys' scale is one of the logits, the values' one of the outcome
            k_scale, v_scale = shape.kv_scales
            shape = dataclasses.replace(shape, scale=shape.scale * k_scale, kv_scales=NO_SCALES)
            return self.attend(q_TNH, kv_cache, metadata, shape).mul_(v_scale)
        plan = _plan(metadata, kv_cache, shape)
        if len(plan.decodes) == 1 and plan.decodes[0].rows is None:
            return _decode(q_TNH, kv_cache, plan.decodes[0], shape)
        make = q_TNH.new_zeros if plan.has_padding else q_TNH.new_empty
        out_TD = make((q_TNH.shape[0], shape.num_heads * shape.head_size))
        for group in plan.decodes:
            assert group.rows is not None
            out_TD[group.rows] = _decode(q_TNH[group.rows], kv_cache, group, shape)
        for row in plan.prefills:
            out_TD[row.first : row.last] = _prefill(q_TNH[row.first : row.last], kv_cache, row, shape)
        return out_TD


def _rotate(qk_TXH: Tensor, plan: _Plan, positions_T: Tensor, cos_sin_PH: Tensor, *, interleaved: bool) -> Tensor:
    """A new tensor. What lies beyond the table's width in each head is copied as it is."""
    width = cos_sin_PH.shape[-1]
    cos, minus_sin, sin = _rotation(plan, positions_T, cos_sin_PH, qk_TXH.dtype)
    if width == qk_TXH.shape[-1] and not interleaved:
        rotated = qk_TXH * cos
        first, second = qk_TXH.chunk(2, -1)
        rotated_first, rotated_second = rotated.chunk(2, -1)
    else:
        rotated, cos = qk_TXH.clone(), cos[..., : width // 2]
        if interleaved:
            first, second = qk_TXH[..., 0:width:2], qk_TXH[..., 1:width:2]
            rotated_first, rotated_second = rotated[..., 0:width:2], rotated[..., 1:width:2]
        else:
            first, second = qk_TXH[..., :width].chunk(2, -1)
            rotated_first, rotated_second = rotated[..., :width].chunk(2, -1)
        rotated_first.mul_(cos)
        rotated_second.mul_(cos)
    rotated_first.addcmul_(second, minus_sin)
    rotated_second.addcmul_(first, sin)
    return rotated


def _norm_heads(qk_TXH: Tensor, norm: QKNorm) -> Tensor:
    """RMS norm of each head. In float32 by length, which is half of the operations that torch's `rms_norm` takes."""
    size = qk_TXH.shape[-1]
    if qk_TXH.dtype == torch.float32:
        length = torch.linalg.vector_norm(qk_TXH, 2, -1, True)
        scale = length.square_().mul_(1.0 / size).add_(norm.eps).rsqrt_()
        normed: Tensor = qk_TXH * scale
        return normed.mul_(norm.weight_XH)
    normed = F.rms_norm(qk_TXH, (size,), None, norm.eps)
    return normed.mul_(norm.weight_XH)


def _plan(metadata: AttentionMetadata, kv_cache: tuple[Tensor, Tensor], shape: AttentionShape) -> _Plan:
    plan: _Plan | None = metadata.scratch.get(shape.sliding_window)
    if plan is None:
        plan = _Plan(metadata, kv_cache[0].shape[1], shape.sliding_window)
        metadata.scratch[shape.sliding_window] = plan
    return plan


def _rotation(
    plan: _Plan, positions_T: Tensor, cos_sin_PH: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """cos [T, 1, H] for both halves, -sin and sin [T, 1, H / 2], in the dtype of q and k as transformers has them."""
    key = id(cos_sin_PH)
    found = plan.rotations.get(key)
    if found is None:
        cos, sin = cos_sin_PH[positions_T].to(dtype).unsqueeze(1).chunk(2, dim=-1)
        found = plan.rotations[key] = (torch.cat((cos, cos), dim=-1), -sin, sin.contiguous())
    return found


def _gather(cache_BSKH: Tensor, block_ids: Tensor) -> Tensor:
    """These blocks; from a cache with scales, what they mean in float32."""
    if kv_scales.has_scales(cache_BSKH):
        return kv_scales.gather(cache_BSKH, block_ids)
    return cache_BSKH.index_select(0, block_ids)


def _decode(q_RNH: Tensor, kv_cache: tuple[Tensor, Tensor], group: _DecodeGroup, shape: AttentionShape) -> Tensor:
    """One token a row. The query heads of a key/value head stand in the place of query positions."""
    num_kv_heads, size = shape.num_kv_heads, shape.head_size
    if kv_scales.has_scales(kv_cache[0]) and q_RNH.dtype != torch.float32:
        return _decode(q_RNH.float(), kv_cache, group, shape).to(q_RNH.dtype)
    k_RLKH, v_RLKH = (
        _gather(cache, group.block_ids).view(group.num_rows, group.num_keys, num_kv_heads, size) for cache in kv_cache
    )
    window = shape.sliding_window
    if not shape.is_plain:
        return _decode_special(q_RNH, k_RLKH, v_RLKH, group, shape)
    if group.length is not None and (window is None or group.length <= window):
        mask = None
        if group.length < group.num_keys:
            k_RLKH, v_RLKH = k_RLKH[:, : group.length], v_RLKH[:, : group.length]
    else:
        mask = group.mask_R11L.get(window)
        if mask is None:
            key_L = torch.arange(group.num_keys)
            seen_RL = key_L <= group.last_R1
            if window is not None:
                seen_RL &= key_L > group.last_R1 - window
            mask = group.mask_R11L[window] = _as_bias(seen_RL, q_RNH.dtype)[:, None, None, :]
    if k_RLKH.dtype != q_RNH.dtype:
        k_RLKH, v_RLKH = k_RLKH.to(q_RNH.dtype), v_RLKH.to(q_RNH.dtype)
    out_RKGH = F.scaled_dot_product_attention(
        q_RNH.reshape(group.num_rows, num_kv_heads, -1, size),
        k_RLKH.transpose(1, 2),
        v_RLKH.transpose(1, 2),
        attn_mask=mask,
        scale=shape.scale,
    )
    return out_RKGH.reshape(group.num_rows, -1)


def _decode_special(
    q_RNH: Tensor, k_RLKH: Tensor, v_RLKH: Tensor, group: _DecodeGroup, shape: AttentionShape
) -> Tensor:
    """One token a row, where logits are capped, biased or joined by a sink. float32."""
    q_RKGH = (q_RNH.float() * shape.scale).reshape(group.num_rows, shape.num_kv_heads, -1, shape.head_size)
    logits_RKGL = q_RKGH @ k_RLKH.permute(0, 2, 3, 1).float()
    behind_RL = torch.arange(group.num_keys) - group.last_R1
    seen_RL = behind_RL <= 0
    if shape.sliding_window is not None:
        seen_RL &= behind_RL > -shape.sliding_window
    _cap_and_bias(logits_RKGL, shape, behind_RL[:, None, None], (shape.num_kv_heads, -1, 1))
    logits_RKGL.masked_fill_(~seen_RL[:, None, None], float("-inf"))
    weights_RKGL = _softmax(logits_RKGL, shape.sinks_N, (shape.num_kv_heads, -1, 1))
    out_RKGH = weights_RKGL @ v_RLKH.transpose(1, 2).float()
    return out_RKGH.reshape(group.num_rows, -1).to(q_RNH.dtype)


def _cap_and_bias(logits: Tensor, shape: AttentionShape, behind: Tensor, by_head: tuple[int, ...]) -> None:
    """In place. `behind`: key position - query position; `by_head`: the shape that spreads numbers over heads."""
    if shape.soft_cap is not None:
        logits.mul_(1.0 / shape.soft_cap).tanh_().mul_(shape.soft_cap)
    if shape.alibi_slopes_N is not None:
        logits.add_(shape.alibi_slopes_N.view(by_head) * behind)


def _softmax(logits: Tensor, sinks_N: Tensor | None, by_head: tuple[int, ...]) -> Tensor:
    """Over the keys, which may share it with one sink a head."""
    if sinks_N is None:
        return torch.softmax(logits, -1)
    sinks = sinks_N.float().view(by_head).expand(*logits.shape[:-1], 1)
    return torch.softmax(torch.cat((logits, sinks), -1), -1)[..., :-1]


def _prefill(q_QNH: Tensor, kv_cache: tuple[Tensor, Tensor], row: _PrefillRow, shape: AttentionShape) -> Tensor:
    """One row of several tokens."""
    num_kv_heads, size = shape.num_kv_heads, shape.head_size
    k_LKH, v_LKH = (_gather(cache, row.block_ids).view(-1, num_kv_heads, size)[: row.length] for cache in kv_cache)
    window = shape.sliding_window
    if window is not None and window >= row.length:
        window = None
    special = None if shape.is_plain else shape
    return _attend_in_chunks(q_QNH, k_LKH, v_LKH, scale=shape.scale, window=window, special=special)


def _attend_in_chunks(
    q_QNH: Tensor,
    k_LKH: Tensor,
    v_LKH: Tensor,
    *,
    scale: float,
    window: int | None,
    special: AttentionShape | None = None,
) -> Tensor:
    """Causal attention of the last Q of L positions, some queries at a time and each only to the keys it may see.

    Logits and softmax are float32, and stay in the cache. One core of a Zen 4, 512 queries and keys, torch's fused
    attention -> this, ms: 14 heads of 64, float32 69 -> 8, bfloat16 36 -> 9; 8 heads of 32, 4.0 -> 2.9 and 4.5 -> 3.0.
    """
    num_queries, num_heads, size = q_QNH.shape
    length, num_kv_heads = k_LKH.shape[:2]
    group, first = num_heads // num_kv_heads, length - num_queries
    k_KLH = k_LKH.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    v_KLH = v_LKH.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    q_QKGH = (q_QNH.float() * scale).reshape(num_queries, num_kv_heads, group, size)
    out_QKGH = q_QNH.new_empty(q_QKGH.shape)
    chunk = max(MIN_CHUNK, min(MAX_CHUNK, CHUNK_LOGITS // (num_heads * length)))
    for start in range(0, num_queries, chunk):
        stop = min(start + chunk, num_queries)
        count, end = stop - start, first + stop
        begin = 0 if window is None else max(0, first + start - window + 1)
        q_KXH = q_QKGH[start:stop].permute(1, 2, 0, 3).reshape(num_kv_heads, group * count, size)
        logits_KXL = torch.bmm(q_KXH, k_KLH[:, begin:end].transpose(1, 2))
        logits_KGCL = logits_KXL.view(num_kv_heads, group, count, end - begin)
        if special is not None:
            behind_CL = torch.arange(begin, end) - torch.arange(first + start, end)[:, None]
            _cap_and_bias(logits_KGCL, special, behind_CL, (num_kv_heads, -1, 1, 1))
        logits_KGCL[..., first + start - begin :] += _above_diagonal()[:count, :count]
        if window is not None and first + stop - 1 - window >= begin:
            query_C1 = torch.arange(first + start, end)[:, None]
            logits_KGCL.masked_fill_(torch.arange(begin, end) <= query_C1 - window, float("-inf"))
        if special is None:
            weights_KXL = torch.softmax(logits_KXL, -1)
        else:
            weights_KXL = _softmax(logits_KGCL, special.sinks_N, (num_kv_heads, -1, 1, 1)).reshape(logits_KXL.shape)
        out_KXH = torch.bmm(weights_KXL, v_KLH[:, begin:end])
        out_QKGH[start:stop] = out_KXH.view(num_kv_heads, group, count, size).permute(2, 0, 1, 3)
    return out_QKGH.view(num_queries, -1)


@cache
def _above_diagonal() -> Tensor:
    """-inf where keys come after the query."""
    return torch.full((MAX_CHUNK, MAX_CHUNK), float("-inf")).triu_(1)


def _as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, -inf elsewhere: made once a step, where a bool mask would be turned into this in every layer."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
