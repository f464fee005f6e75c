"""Causal attention of ragged rows over the paged cache: prompts, chunks after a cached prefix, single tokens, mixed.

Meaning: `reference.prefill_attention`. A program takes BLOCK_Q query positions of one row with all G query heads of one
key/value head, as the rows of one matrix: keys are read once for the group, and a row of one token still fills G rows.
It walks the keys in tiles with an online softmax (Dao et al. 2022), first those that every query sees, then the few at
the edge that need a mask.

    keys    0 ........................ context - queries ...... context
            | every query sees these            | edge of the triangle
            |<--- tiles without a mask -------->|<- masked ->|
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import kv_unpack, tuning
from argosy.kernels.attention_parts import cache_suffix, check_caches, for_cache
from argosy.kernels.kv_scale_parts import (
    code_place,
    codes_at,
    codes_of,
    load_words,
    number_place,
    numbers,
    raw_scales,
    value_log,
)
from argosy.kernels.kv_scales import has_scales


@triton.jit
def _walk(
    q, acc, largest, total, begin, end, position, last_key, window, slope, scale, soft_cap,
    k_base, v_base,
    k_codes, v_codes,  # when KV_SCALES: the caches by bytes, moved on to the codes of this head
    table_row,
    K: tl.constexpr, H: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, KV_SCALES: tl.constexpr,
    NATIVE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr = True,
):  # fmt: skip
    """Attend to the keys [begin, end) in tiles; `begin` is a multiple of BLOCK_L. WIDE: places need 64 bits."""
    LOG2E: tl.constexpr = 1.4426950408889634
    UNIT: tl.constexpr = 3.0814879110195774e-33  # 2^-108
    dim = tl.arange(0, WIDTH)
    # Scaled where the exponent is taken, one multiply-add, unless something else is done to the logits before.
    PLAIN: tl.constexpr = not SOFT_CAP and not ALIBI and not KV_SCALES
    factor = scale * LOG2E if PLAIN else 1.0
    # blocks before the window of the first query may be another's by now: not even a weight of 0 makes a nan 0
    lowest = tl.min(position, 0) - window + 1 if WINDOW else 0
    for start in tl.range(begin, end, BLOCK_L, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_L)
        known = (key <= last_key) & (key >= lowest) if WINDOW else key <= last_key
        if S % BLOCK_L == 0:  # the whole tile lies in one block
            block = tl.load(table_row + start // S)
            block = block.to(tl.int64) if WIDE else block
            offset = start % S + tl.arange(0, BLOCK_L)
        else:
            block = tl.load(table_row + tl.minimum(key, last_key) // S)
            block = block.to(tl.int64) if WIDE else block
            offset = key % S
        if KV_SCALES:
            place = number_place(block, offset, K, H, S)
            fourth = start + 4 * tl.arange(0, BLOCK_L // 4)
            if S % BLOCK_L == 0:
                codes = code_place(block, start % S + 4 * tl.arange(0, BLOCK_L // 4), 0, K, H, S)
            else:
                its_block = tl.load(table_row + tl.minimum(fourth, last_key) // S)
                its_block = its_block.to(tl.int64) if WIDE else its_block
                codes = code_place(its_block, fourth % S, 0, K, H, S)
            k_words = load_words(k_codes, codes, fourth <= last_key)
            v_words = load_words(v_codes, codes, fourth <= last_key)
            k_scales = raw_scales(codes_of(k_words, known, BLOCK_L))
            v_log = value_log(raw_scales(codes_of(v_words, known, BLOCK_L)), NATIVE, True)
        else:
            place = (block * S + offset) * K * H
        if MASKED:
            here = known[:, None] & (dim < H)[None, :]
            k = tl.load(k_base + place[:, None] + dim[None, :], here, other=0.0)
            v = tl.load(v_base + place[:, None] + dim[None, :], here, other=0.0)
        elif WIDTH == H:
            k = tl.load(k_base + place[:, None] + dim[None, :])
            v = tl.load(v_base + place[:, None] + dim[None, :])
        else:
            k = tl.load(k_base + place[:, None] + dim[None, :], (dim < H)[None, :], other=0.0)
            v = tl.load(v_base + place[:, None] + dim[None, :], (dim < H)[None, :], other=0.0)
        k = numbers(k, q.dtype, NATIVE, False)
        v = numbers(v, q.dtype, NATIVE, False)
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if KV_SCALES and SOFT_CAP:
            logit *= (k_scales * UNIT)[None, :]
        if SOFT_CAP:
            tanh = 2.0 * tl.sigmoid(2.0 * (logit * scale / soft_cap)) - 1.0
            logit = tanh * (soft_cap * LOG2E)
        elif KV_SCALES:
            logit *= (k_scales * (scale * (LOG2E * UNIT)))[None, :]
        elif ALIBI:
            logit *= scale * LOG2E
        if ALIBI:
            logit += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        if KV_SCALES:
            logit += v_log[None, :]
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            logit = tl.where(seen, logit, float("-inf"))
        higher = tl.maximum(largest, tl.max(logit, 1) * factor)
        # a query whose window begins after this tile has seen nothing yet: -inf - -inf must not become nan
        pivot = tl.where(higher == float("-inf"), 0.0, higher) if WINDOW else higher
        weight = tl.exp2(logit * factor - pivot[:, None])
        shrink = tl.exp2(largest - pivot)
        if KV_SCALES:
            total = total * shrink + tl.sum(weight * tl.exp2(-v_log)[None, :], 1)
        else:
            total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(q.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = higher
    return acc, largest, total


# Lengths, and addresses inside a packed buffer, differ from step to step: a compiled variant for each divisibility by
# 16 would be a stall of half a second in the middle of serving.
@triton.jit(
    do_not_specialize=["stride_table", "window", "num_rows"],
    do_not_specialize_on_alignment=["query_start_ptr", "context_ptr", "table_ptr"],
)
def _prefill_attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    query_start_ptr,
    context_ptr,
    table_ptr,
    out_ptr,
    slopes_ptr,
    sinks_ptr,
    stride_q,
    stride_table,
    scale,
    soft_cap,
    window,
    num_rows,
    v_scale,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two >= H
    BLOCK_M: tl.constexpr,  # rows of the matrix: BLOCK_Q positions times G heads, and perhaps a few unused
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    KV_SCALES: tl.constexpr,  # a scale for each token and head lies in the cache: see `kv_scales`
    NATIVE: tl.constexpr,  # PTX may be used
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_LOOP: tl.constexpr,  # all tiles masked: less code, where most of them are at the edge
    PDL: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    # Heads run beside each other: their keys lie beside each other. Tiles are handed out backwards: the last of a row
    # sees the most keys, and the longest work should not start last.
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Row r owns tiles [start_r // BLOCK_Q + r, start_(r+1) // BLOCK_Q + r + 1): enough for its queries, maybe one
    # too many, and the beginning of each row's tiles can be computed from query_start alone. Count the rows that begin
    # no later: one load for 64 of them, where halving would be six that wait for each other.
    begun = 0
    for first in range(0, num_rows, 64):
        other = first + tl.arange(0, 64)
        start = tl.load(query_start_ptr + other, other < num_rows, other=1 << 30)
        begun += tl.sum((start // BLOCK_Q + other <= tile).to(tl.int32), 0)
    row = tl.maximum(begun, 1) - 1
    query_start = tl.load(query_start_ptr + row)
    num_queries = tl.load(query_start_ptr + row + 1) - query_start
    first_query = (tile - query_start // BLOCK_Q - row) * BLOCK_Q
    if (first_query >= num_queries) | (first_query < 0):  # the latter lie before the first row
        return
    context = tl.load(context_ptr + row)

    line = tl.arange(0, BLOCK_M)
    query = first_query + line // G
    head = kv_head * G + line % G
    dim = tl.arange(0, WIDTH)
    present = (line < BLOCK_Q * G) & (query < num_queries)
    in_tile = present[:, None] & (dim < H)[None, :]
    position = context - num_queries + query
    token = (query_start + query).to(tl.int64)
    q = tl.load(q_ptr + (token * stride_q + head * H)[:, None] + dim[None, :], in_tile, other=0.0)
    q = for_cache(q, k_cache_ptr)
    slope = tl.zeros((BLOCK_M,), tl.float32)
    if ALIBI:
        slope += tl.load(slopes_ptr + head, present, other=0.0).to(tl.float32) * LOG2E
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)

    first_position = context - num_queries + first_query
    last_key = tl.minimum(first_position + BLOCK_Q, context) - 1
    k_base = k_cache_ptr + kv_head * H
    v_base = v_cache_ptr + kv_head * H
    k_codes = codes_at(k_cache_ptr) + kv_head * S
    v_codes = codes_at(v_cache_ptr) + kv_head * S
    table_row = table_ptr + row.to(tl.int64) * stride_table
    # The window's lower edge cuts through tiles too, so with a window every tile is masked.
    begin = tl.maximum(first_position - window + 1, 0) // BLOCK_L * BLOCK_L if WINDOW else 0
    middle = begin if WINDOW or ONE_LOOP else (first_position + 1) // BLOCK_L * BLOCK_L
    if not WINDOW and not ONE_LOOP:
        acc, largest, total = _walk(
            q, acc, largest, total, begin, middle, position, last_key, window, slope, scale, soft_cap, k_base, v_base,
            k_codes, v_codes, table_row, K, H, S, WIDTH, BLOCK_L, False, WINDOW, SOFT_CAP, ALIBI, KV_SCALES, NATIVE,
            STAGES, PRECISION, WIDE,
        )  # fmt: skip
    acc, largest, total = _walk(
        q, acc, largest, total, middle, last_key + 1, position, last_key, window, slope, scale, soft_cap, k_base,
        v_base, k_codes, v_codes, table_row, K, H, S, WIDTH, BLOCK_L, True, WINDOW, SOFT_CAP, ALIBI, KV_SCALES, NATIVE,
        STAGES, PRECISION, WIDE,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks_ptr + head, present, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(largest, sink)
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.exp2(sink - higher)
        acc *= shrink[:, None]
    acc *= v_scale
    out = out_ptr + ((token * K * G + head) * H)[:, None] + dim[None, :]
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), in_tile)


def _default_sizes(
    width: int, mean_queries: int, group: int, dtype: torch.dtype, shared_bytes: int = tuning.HOPPER_SHARED_BYTES
) -> dict[str, int]:
    """Tiles for the tensor cores of Hopper when queries are many; small ones when most rows have a token or two. With
    wide heads half as many rows where a program has less room on chip."""
    if dtype == torch.float32:  # exact products have no tensor core, and tiles of twice the bytes fill shared memory
        return {"block_m": 16, "block_l": 32, "warps": 4, "stages": 1}
    rows = tuning.next_power_of_two(max(16, mean_queries * group))
    if width > 256:  # sums of a tile of more rows fill the registers
        return {"block_m": min(32, rows), "block_l": 16, "warps": 8, "stages": 2}
    block_m, block_l = min(128, rows), 64 if width <= 128 else 32
    if 2 * width * (block_m + 3 * block_l) > shared_bytes:
        block_m = min(block_m, 64)
    return {"block_m": block_m, "block_l": block_l, "warps": 8 if block_m == 128 else 4, "stages": 3}


def _hopper_sizes(q_TNH: Tensor, k_cache_BSKH: Tensor, kind: str) -> tuning.Sizes | None:
    """Sizes for `hopper_attention` where it was measured to be faster for rows of this kind, and takes these."""
    key = f"h{q_TNH.shape[2]}_{kind}{cache_suffix(k_cache_BSKH)}"
    sizes = tuning.pick("hopper_attention", key, q_TNH.device)
    if sizes is None or not triton.__version__.startswith(tuning.GLUON_VERSIONS):
        return None
    from argosy.kernels import hopper_attention

    return sizes if hopper_attention.takes(q_TNH, k_cache_BSKH) else None


def prefill_attention(
    q_TNH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    query_start_R1: Tensor,
    context_len_R: Tensor,
    block_table_RB: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes_N: Tensor | None = None,
    sinks_N: Tensor | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    out_TNH: Tensor | None = None,
    scratch: dict[Any, Any] | None = None,
    num_context_tokens: int = 0,
    sizes: tuning.Sizes | None = None,
    num_queries: int | None = None,
) -> Tensor:
    """Shapes as in `ops.prefill_attention`; tokens of q may be strided. Tokens past the last row are not written.

    `sizes` overrides what was tuned, for the tuner itself.
    """
    num_tokens, num_heads, head_size = q_TNH.shape
    block_size, num_kv_heads = k_cache_BSKH.shape[1:3]
    num_rows = context_len_R.shape[0]
    group = num_heads // num_kv_heads
    assert q_TNH.stride()[1:] == (head_size, 1)
    assert block_table_RB.stride(1) == 1
    kv_scales = check_caches(k_cache_BSKH, v_cache_BSKH, kv_scales)
    if out_TNH is None:
        out_TNH = torch.empty((num_tokens, num_heads, head_size), dtype=q_TNH.dtype, device=q_TNH.device)
    assert out_TNH.is_contiguous()
    if num_tokens == 0 or num_rows == 0:
        return out_TNH
    width = tuning.next_power_of_two(head_size)
    mean_queries = num_tokens // num_rows if num_queries is None else num_queries
    # how many tiles of a row lie before the edge: contexts much longer than the queries have many
    prefixed = block_table_RB.shape[1] * block_size >= 4 * mean_queries
    many = "prefixed" if prefixed else "many"
    kind = "long" if mean_queries >= 1024 else many if mean_queries * group >= 128 else "few"
    plain = sliding_window is None and soft_cap is None and alibi_slopes_N is None and sinks_N is None
    hopper = _hopper_sizes(q_TNH, k_cache_BSKH, kind) if plain and sizes is None else None
    if sizes is None and kv_unpack.pays(
        q_TNH, k_cache_BSKH, num_rows, num_context_tokens, window=sliding_window, special=hopper is not None
    ):
        return kv_unpack.attend(
            partial(prefill_attention, scale=scale, soft_cap=soft_cap, kv_scales=kv_scales), q_TNH, k_cache_BSKH,
            v_cache_BSKH, query_start_R1, context_len_R, block_table_RB, num_context_tokens=num_context_tokens,
            scratch={} if scratch is None else scratch, sliding_window=sliding_window, alibi_slopes_N=alibi_slopes_N,
            sinks_N=sinks_N, out_TNH=out_TNH,
        )  # fmt: skip
    if hopper is not None:
        from argosy.kernels import hopper_attention as special
        from argosy.kernels import prompt_tiles

        block_q = special.block_q_of(q_TNH, k_cache_BSKH)
        scratch = {} if scratch is None else scratch
        if ("tiles", block_q) not in scratch:
            scratch["tiles", block_q] = prompt_tiles.plan_tiles(query_start_R1, context_len_R, num_tokens, block_q)
        return special.hopper_attention(
            q_TNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, scratch["tiles", block_q], out_TNH, scale=scale,
            kv_scales=kv_scales, sizes=hopper,
        )  # fmt: skip
    if sizes is None and q_TNH.element_size() == 2:
        key = f"h{head_size}_{kind}{cache_suffix(k_cache_BSKH)}"
        sizes = tuning.pick("prefill_attention", key, q_TNH.device)
    shared_bytes = tuning.device_facts(q_TNH.device).shared_bytes
    sizes = sizes or _default_sizes(width, mean_queries, group, q_TNH.dtype, shared_bytes)
    block_m = max(sizes["block_m"], tuning.next_power_of_two(group))
    block_q = block_m // group
    grid = (num_kv_heads, num_tokens // block_q + num_rows)
    _prefill_attention_kernel[grid](
        q_TNH, k_cache_BSKH, v_cache_BSKH, query_start_R1, context_len_R, block_table_RB, out_TNH,
        out_TNH if alibi_slopes_N is None else alibi_slopes_N, out_TNH if sinks_N is None else sinks_N,
        q_TNH.stride(0), block_table_RB.stride(0), scale * kv_scales[0], soft_cap or 0.0, sliding_window or 0,
        num_rows, kv_scales[1],
        K=num_kv_heads, G=group, H=head_size, S=block_size, WIDTH=width, BLOCK_M=block_m, BLOCK_Q=block_q,
        BLOCK_L=sizes["block_l"], WINDOW=sliding_window is not None, SOFT_CAP=soft_cap is not None,
        ALIBI=alibi_slopes_N is not None, SINKS=sinks_N is not None, KV_SCALES=has_scales(k_cache_BSKH),
        NATIVE=tuning.device_facts(q_TNH.device).knows_ptx, STAGES=sizes["stages"],
        PRECISION="ieee" if q_TNH.dtype == torch.float32 else "tf32",
        WIDE=k_cache_BSKH.shape[0] * k_cache_BSKH.stride(0) >= 1 << 31,
        ONE_LOOP=bool(sizes.get("one_loop", 0)),
        num_warps=sizes["warps"], **tuning.overlap(q_TNH.device),
    )  # fmt: skip
    return out_TNH
