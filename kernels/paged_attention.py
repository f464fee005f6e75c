"""Decode attention: one query token a row against the paged cache, split over the context ("flash decoding").

Meaning: `reference.paged_attention`. A program takes one row, one key/value head with all its G query heads (as the
rows of a matrix of 16 or more, so that the tensor cores multiply it), and one piece of the context. Online softmax:
Milakov and Gimelshein 2018. The piece that finishes last joins the pieces of its row and head, so that there is no
second launch. How many pieces there may be follows from host facts; how long each is, from the length on the device.

`decode_attention` also does what `rope_and_store` would have done before: every program rotates its own queries, and
the first of a row writes the new key and value and attends to them from registers, so that no program waits for the
cache of the token that this step adds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.attention_parts import (
    angles,
    cache_suffix,
    check_caches,
    choose_splits,
    for_cache,
    fusing_pays,
    is_scaled,
    join,
    prefetch,
    scaled,
    turn,
)
from argosy.kernels.kv_scale_parts import (
    code_of,
    code_place,
    codes_at,
    inverse_of,
    key_factor,
    load_codes,
    magnitude,
    number_place,
    numbers,
    raw_scales,
    rounded,
    scale_of,
    value_inverse,
    value_log,
)
from argosy.kernels.kv_scales import has_scales
from argosy.kernels.shared_prefix import SharedPrefix, attend_prefix, begin_with_prefix

__all__ = ["choose_splits", "decode_attention", "fusing_pays", "paged_attention"]


# Lengths, and addresses inside a packed buffer, differ from step to step: a compiled variant for each divisibility by
# 16 would be a stall of half a second in the middle of serving.
@triton.jit(
    do_not_specialize=["stride_table", "window", "num_splits", "min_piece", "shared_pieces"],
    do_not_specialize_on_alignment=["context_ptr", "table_ptr", "positions_ptr", "slots_ptr", "shared_ptr"],
)
def _paged_attention_kernel(
    q_ptr,  # queries, or when NEW the fused projection [q | k | v]
    positions_ptr, rotation_ptr, q_norm_ptr, k_norm_ptr, slots_ptr,
    k_cache_ptr, v_cache_ptr, table_ptr, context_ptr, out_ptr, slopes_ptr, sinks_ptr,
    part_ptr,  # [R, K, splits, G, H] unnormalised outputs, float32
    stats_ptr,  # [R, K, splits, 2, G]: largest logit (base 2), sum
    counter_ptr,  # [R · K] pieces done; zero between launches
    shared_ptr,  # when SHARED: tokens of each row's prefix, and what `shared_prefix` left of it
    shared_part_ptr, shared_stats_ptr, shared_pieces,
    stride_q, stride_table, scale, soft_cap, window, eps, k_inverse, v_inverse, v_scale, num_splits,
    min_piece,  # tokens, a multiple of BLOCK_L: below it a piece costs more to join than to walk
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, S: tl.constexpr,
    GROUP: tl.constexpr,  # power of two >= 16 and >= G
    WIDTH: tl.constexpr,  # power of two >= H
    BLOCK_L: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    NEW: tl.constexpr,  # the last token comes from the projection and goes to the cache
    ROTARY: tl.constexpr,  # dimensions that are rotated when NEW
    INTERLEAVED: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    EARLY: tl.constexpr,  # only the projection comes from the kernel before
    SCALED: tl.constexpr,  # the cache holds keys and values over their scales; that of keys is in `scale`
    KV_SCALES: tl.constexpr,  # a scale for each token and head lies in the cache: see `kv_scales`
    NATIVE: tl.constexpr,  # PTX may be used
    STAGED: tl.constexpr,  # how values of 8 bits become 16: see `numbers`
    PREFETCHED: tl.constexpr,  # tokens of a piece to ask for while that one runs
    HEADS: tl.constexpr,  # power of two >= G
    JOIN: tl.constexpr,  # pieces that are joined at once
    SHARED: tl.constexpr,  # the multiple of a piece's tokens; 0: no prefix
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    kv_head = tl.program_id(0)  # heads beside each other: their keys lie beside each other
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    head = tl.arange(0, GROUP)
    dim = tl.arange(0, WIDTH)
    in_group = head < G
    in_tile = in_group[:, None] & (dim < H)[None, :]
    if PDL and not EARLY:
        gdc_wait()
        gdc_launch_dependents()

    context = tl.load(context_ptr + row)
    first = tl.maximum(context - window, 0) if WINDOW else 0
    if SHARED > 0:
        shared = tl.maximum(tl.load(shared_ptr + row), 0)
        first = tl.minimum(shared, context)
    cached = context - 1 if NEW else context  # how many tokens are read from the cache
    length = tl.maximum(cached - first, 0)
    # Pieces of whole tiles, of equal length; the last may be short and some of the grid may have none.
    piece = tl.maximum(tl.cdiv(tl.cdiv(length, num_splits), BLOCK_L) * BLOCK_L, min_piece)
    pieces = tl.cdiv(length, tl.maximum(piece, 1))
    if NEW or SHARED > 0:
        pieces = tl.maximum(pieces, tl.minimum(context, 1))  # a new token, a prefix: work even with nothing beside it
    begin = first + split * piece
    end = tl.minimum(begin + piece, cached)
    if NEW:  # all that does not hang on the projection
        partner, cos, sin = angles(positions_ptr + row, rotation_ptr, dim, WIDTH, ROTARY, INTERLEAVED)
        slot = tl.load(slots_ptr + row).to(tl.int64)
        q_weight = tl.zeros((WIDTH,), tl.float32)
        q_other = q_weight
        k_weight = q_weight
        k_other = q_weight
        if NORM_Q:
            q_weight = tl.load(q_norm_ptr + dim, dim < H, other=0.0).to(tl.float32)
            q_other = tl.load(q_norm_ptr + partner, dim < H, other=0.0).to(tl.float32)
        if NORM_K:
            k_weight = tl.load(k_norm_ptr + dim, dim < H, other=0.0).to(tl.float32)
            k_other = tl.load(k_norm_ptr + partner, dim < H, other=0.0).to(tl.float32)
    if PDL and EARLY:
        if PREFETCHED > 0:
            for start in range(begin, tl.minimum(end, begin + PREFETCHED), BLOCK_L):
                token = start + tl.arange(0, BLOCK_L)
                block = tl.load(table_ptr + row * stride_table + token // S, token < end, other=0).to(tl.int64)
                if KV_SCALES:
                    place = number_place(block, token % S, K, H, S) + kv_head * H
                else:
                    place = ((block * S + token % S) * K + kv_head) * H
                prefetch(k_cache_ptr + place, H * k_cache_ptr.dtype.element_ty.primitive_bitwidth // 8)
                prefetch(v_cache_ptr + place, H * v_cache_ptr.dtype.element_ty.primitive_bitwidth // 8)
        gdc_wait()
        gdc_launch_dependents()
    out_head = out_ptr + (row * K + kv_head) * G * H + head[:, None] * H + dim[None, :]
    if split >= pieces:
        if (split == 0) & (context <= 0):  # padding
            tl.store(out_head, tl.zeros((GROUP, WIDTH), out_ptr.dtype.element_ty), in_tile)
        return

    q_head = q_ptr + row * stride_q + (kv_head * G + head[:, None]) * H
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, WIDTH), tl.float32)
    if NEW:
        q = turn(q_head, in_tile, dim, partner, q_weight, q_other, cos, sin, eps, H, NORM_Q)
        q = q.to(out_ptr.dtype.element_ty)
        if split == 0:
            one = tl.zeros((1, 1), tl.int64)
            new_k = q_ptr + row * stride_q + (K * G + kv_head) * H + one
            k_row = turn(new_k, (dim < H)[None, :], dim, partner, k_weight, k_other, cos, sin, eps, H, NORM_K)
            v_row = tl.load(new_k + K * H + dim[None, :], (dim < H)[None, :], other=0.0)
            if KV_SCALES:
                v_row = v_row.to(tl.float32)
                k_code = code_of(tl.max(magnitude(k_row)), k_cache_ptr)
                v_code = code_of(tl.max(magnitude(v_row)), v_cache_ptr)
                k_row = rounded(k_row, inverse_of(k_code), k_cache_ptr)
                v_row = rounded(v_row, inverse_of(v_code), v_cache_ptr)
                here = number_place(slot // S, slot % S, K, H, S) + kv_head * H + dim[None, :] + one
                code_here = code_place(slot // S, slot % S, kv_head, K, H, S)
                tl.store(codes_at(k_cache_ptr) + code_here, k_code.to(tl.uint8), slot >= 0)
                tl.store(codes_at(v_cache_ptr) + code_here, v_code.to(tl.uint8), slot >= 0)
            else:
                if SCALED:
                    k_row = scaled(k_row, k_inverse)
                    v_row = scaled(v_row, v_inverse)
                k_row = k_row.to(k_cache_ptr.dtype.element_ty)
                v_row = v_row.to(v_cache_ptr.dtype.element_ty)
                here = (slot * K + kv_head) * H + dim[None, :] + one
            tl.store(k_cache_ptr + here, k_row, (dim < tl.where(slot >= 0, H, 0))[None, :])
            tl.store(v_cache_ptr + here, v_row, (dim < tl.where(slot >= 0, H, 0))[None, :])
            largest = tl.sum(q.to(tl.float32) * k_row.to(tl.float32), 1)
            if KV_SCALES:
                largest *= scale_of(k_code)
            if SOFT_CAP:
                largest = (2.0 * tl.sigmoid(2.0 * (largest * scale / soft_cap)) - 1.0) * (soft_cap * LOG2E)
            else:
                largest *= scale * LOG2E
            if KV_SCALES:
                largest += tl.log2(scale_of(v_code))
                total += 1.0 / scale_of(v_code)
            else:
                total += 1.0
            acc += v_row.to(tl.float32)
    else:
        q = tl.load(q_head + dim[None, :], in_tile, other=0.0)
        if SHARED > 0:  # noqa: SIM102 - known when compiling, the other only when running
            if split == 0:
                acc, largest, total = begin_with_prefix(
                    shared_part_ptr, shared_stats_ptr, shared, shared_pieces, row, tl.num_programs(1), kv_head * G,
                    in_group, in_tile, K, G, H, GROUP, WIDTH, SHARED,
                )  # fmt: skip
    q = for_cache(q, k_cache_ptr)
    if ALIBI:
        slope = tl.load(slopes_ptr + kv_head * G + head, in_group, other=0.0).to(tl.float32) * LOG2E
    if KV_SCALES:
        table_row = table_ptr + row * stride_table
        coming = begin + tl.arange(0, BLOCK_L)
        next_block = tl.load(table_row + coming // S, coming < end, other=0).to(tl.int64)
        k_code_L = load_codes(k_cache_ptr, next_block, coming % S, kv_head, coming < end, K, H, S)
        v_code_L = load_codes(v_cache_ptr, next_block, coming % S, kv_head, coming < end, K, H, S)
        coming += BLOCK_L
        next_block = tl.load(table_row + coming // S, coming < end, other=0).to(tl.int64)
    for start in tl.range(begin, end, BLOCK_L, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_L)
        inside = token < end
        block = tl.load(table_ptr + row * stride_table + token // S, inside, other=0).to(tl.int64)
        if KV_SCALES:
            place = number_place(block, token % S, K, H, S) + kv_head * H
            k_factor = key_factor(raw_scales(k_code_L), scale if SOFT_CAP else scale * LOG2E, NATIVE)
            v_log = value_log(raw_scales(v_code_L), NATIVE, False)
            v_inverse_L = value_inverse(v_log, NATIVE)
            coming = token + BLOCK_L
            k_code_L = load_codes(k_cache_ptr, next_block, coming % S, kv_head, coming < end, K, H, S)
            v_code_L = load_codes(v_cache_ptr, next_block, coming % S, kv_head, coming < end, K, H, S)
            coming += BLOCK_L
            next_block = tl.load(table_row + coming // S, coming < end, other=0).to(tl.int64)
        else:
            place = ((block * S + token % S) * K + kv_head) * H
        here = inside[:, None] if WIDTH == H else inside[:, None] & (dim < H)[None, :]
        k = numbers(tl.load(k_cache_ptr + place[:, None] + dim[None, :], here, other=0.0), q.dtype, NATIVE, False)
        v = numbers(tl.load(v_cache_ptr + place[:, None] + dim[None, :], here, other=0.0), q.dtype, NATIVE, STAGED)
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logit = logit * (k_factor[None, :] if KV_SCALES else scale if SOFT_CAP else scale * LOG2E)
        if SOFT_CAP:
            logit = (2.0 * tl.sigmoid(2.0 * (logit / soft_cap)) - 1.0) * (soft_cap * LOG2E)
        if ALIBI:
            logit += slope[:, None] * (token - context + 1).to(tl.float32)[None, :]
        if KV_SCALES:
            logit += v_log[None, :]
        logit = tl.where(inside[None, :], logit, float("-inf"))
        higher = tl.maximum(largest, tl.max(logit, 1))
        weight = tl.exp2(logit - higher[:, None])
        shrink = tl.exp2(largest - higher)
        if KV_SCALES:
            total = total * shrink + tl.sum(weight * v_inverse_L[None, :], 1)
        else:
            total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(q.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = higher

    if SCALED:
        acc *= v_scale
    if SPLIT:  # noqa: SIM102 - known when compiling, pieces only when running
        if pieces > 1:
            group_index = row * K + kv_head
            part = part_ptr + group_index * num_splits * G * H
            stats = stats_ptr + group_index * num_splits * 2 * G
            tl.store(part + split * G * H + head[:, None] * H + dim[None, :], acc, in_tile)
            tl.store(stats + split * 2 * G + head, largest, in_group)
            tl.store(stats + split * 2 * G + G + head, total, in_group)
            tl.debug_barrier()  # every thread's stores come before the one thread's release below
            done = tl.atomic_add(counter_ptr + group_index, 1, sem="acq_rel")
            if done == pieces - 1:
                tl.atomic_xchg(counter_ptr + group_index, 0, sem="relaxed")  # ready for the next launch
                join(
                    part, stats, out_ptr + group_index * G * H, sinks_ptr + kv_head * G, pieces, G, H, HEADS, WIDTH,
                    JOIN, SINKS,
                )  # fmt: skip
            return
    if SINKS:
        sink = tl.load(sinks_ptr + kv_head * G + head, in_group, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(largest, sink)
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.exp2(sink - higher)
        acc *= shrink[:, None]
    tl.store(out_head, (acc / total[:, None]).to(out_ptr.dtype.element_ty), in_tile)


def _launch(
    q_RD: Tensor,
    num_heads: int,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    block_table_RB: Tensor,
    context_len_R: Tensor,
    *,
    scale: float,
    max_context: int | None,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes_N: Tensor | None,
    sinks_N: Tensor | None,
    sizes: tuning.Sizes | None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    out_RNH: Tensor | None = None,
    shared: SharedPrefix | None = None,
    new: dict[str, object] | None = None,
) -> Tensor:
    """`q_RD`: rows of queries, or with `new` (the kernel's arguments about the last token) of the fused projection."""
    num_rows = q_RD.shape[0]
    block_size, num_kv_heads, head_size = k_cache_BSKH.shape[1:]
    group = num_heads // num_kv_heads
    kv_scales = check_caches(k_cache_BSKH, v_cache_BSKH, kv_scales)
    assert block_table_RB.stride(1) == 1
    device = q_RD.device
    if out_RNH is None:
        out_RNH = torch.empty((num_rows, num_heads, head_size), dtype=q_RD.dtype, device=device)
    assert out_RNH.is_contiguous()
    if num_rows == 0:
        return out_RNH
    bound = block_table_RB.shape[1] * block_size
    bound = bound if max_context is None else min(bound, max_context)
    bound = bound if sliding_window is None else min(bound, sliding_window)
    facts = tuning.device_facts(device)
    width = tuning.next_power_of_two(head_size)
    groups = num_rows * num_kv_heads
    few = groups < facts.num_sms
    if sizes is None and q_RD.element_size() == 2:
        kind = "few" if few else "many" if groups < 8 * facts.num_sms else "crowd"
        suffix = cache_suffix(k_cache_BSKH)
        sizes = tuning.pick("paged_attention", f"h{head_size}_{kind}{suffix}", device)
        if sizes is None and suffix:
            sizes = {
                "block_l": 64 if width <= 128 else 32, "warps": 4 if few else 2, "stages": 3,
                "per_sm": 2 if few else 1, "staged": 1,
            }  # fmt: skip
    sizes = sizes or {
        "block_l": 64 if width * q_RD.element_size() <= 256 else 32, "warps": 4, "stages": 3, "per_sm": 2,
    }  # fmt: skip
    block_l = sizes["block_l"] if facts.slug != "interpreter" else 16
    min_piece = max(block_l, sizes.get("min_piece", 0) if facts.slug != "interpreter" else 0)
    splits = 1
    if groups <= tuning.MAX_COUNTERS:
        splits = choose_splits(groups, bound, min_piece, facts.num_sms, sizes["per_sm"])
    limit = {"maxnreg": sizes["maxnreg"]} if "maxnreg" in sizes else {}
    part = stats = counters = out_RNH
    if splits > 1:
        part = torch.empty(groups * splits * group * head_size, dtype=torch.float32, device=device)
        stats = torch.empty(groups * splits * group * 2, dtype=torch.float32, device=device)
        counters = tuning.counters(device)
    about_new = {
        "positions_ptr": context_len_R, "rotation_ptr": out_RNH, "q_norm_ptr": out_RNH, "k_norm_ptr": out_RNH,
        "slots_ptr": context_len_R, "eps": 0.0, "NEW": False, "ROTARY": 0, "INTERLEAVED": False, "NORM_Q": False,
        "NORM_K": False, "EARLY": False, "PREFETCHED": 0,
    } | (new or {})  # fmt: skip
    if few and about_new["EARLY"]:
        about_new["PREFETCHED"] = 512  # not for many rows: their keys push each other out again (139 us instead of 102)
    _paged_attention_kernel[(num_kv_heads, num_rows, splits)](
        q_ptr=q_RD, k_cache_ptr=k_cache_BSKH, v_cache_ptr=v_cache_BSKH, table_ptr=block_table_RB,
        context_ptr=context_len_R, out_ptr=out_RNH, slopes_ptr=out_RNH if alibi_slopes_N is None else alibi_slopes_N,
        sinks_ptr=out_RNH if sinks_N is None else sinks_N, part_ptr=part, stats_ptr=stats, counter_ptr=counters,
        stride_q=q_RD.stride(0), stride_table=block_table_RB.stride(0), scale=scale * kv_scales[0],
        soft_cap=soft_cap or 0.0, k_inverse=1.0 / kv_scales[0], v_inverse=1.0 / kv_scales[1], v_scale=kv_scales[1],
        SCALED=is_scaled(k_cache_BSKH, kv_scales), KV_SCALES=has_scales(k_cache_BSKH),
        NATIVE=facts.knows_ptx, STAGED=bool(sizes.get("staged", 0)),
        window=sliding_window or 0, num_splits=splits, K=num_kv_heads, G=group, H=head_size,
        S=block_size,
        GROUP=max(16, tuning.next_power_of_two(group)), WIDTH=width, BLOCK_L=block_l, WINDOW=sliding_window is not None,
        SOFT_CAP=soft_cap is not None, ALIBI=alibi_slopes_N is not None, SINKS=sinks_N is not None, SPLIT=splits > 1,
        min_piece=min_piece, HEADS=tuning.next_power_of_two(group),
        JOIN=max(2, min(16, 4096 // (tuning.next_power_of_two(group) * width))), STAGES=sizes["stages"],
        PRECISION="ieee" if q_RD.dtype == torch.float32 else "tf32",
        shared_ptr=context_len_R if shared is None else shared.length_R,
        shared_part_ptr=out_RNH if shared is None else shared.part,
        shared_stats_ptr=out_RNH if shared is None else shared.stats,
        shared_pieces=1 if shared is None else shared.pieces, SHARED=0 if shared is None else shared.block_l,
        num_warps=sizes["warps"], **limit, **about_new, **tuning.overlap(device),
    )  # fmt: skip
    return out_RNH


def paged_attention(
    q_RNH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    block_table_RB: Tensor,
    context_len_R: Tensor,
    *,
    scale: float,
    max_context: int | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes_N: Tensor | None = None,
    sinks_N: Tensor | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    out_RNH: Tensor | None = None,
    shared_len_R: Tensor | None = None,
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """Shapes as in `ops.paged_attention`; tokens of q may be strided (a view of the fused projection).

    Two launches with a shared prefix. Must have run once on a device before it is captured there, and not on two
    streams at the same time. `sizes` overrides what was tuned, for the tuner itself.
    """
    assert q_RNH.stride()[1:] == (q_RNH.shape[2], 1)
    shared = None
    if shared_len_R is not None and sliding_window is None and alibi_slopes_N is None and q_RNH.shape[0]:
        bound = block_table_RB.shape[1] * k_cache_BSKH.shape[1]
        shared = attend_prefix(
            q_RNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, shared_len_R, scale=scale, kv_scales=kv_scales,
            max_length=bound if max_context is None else min(bound, max_context), soft_cap=soft_cap,
        )  # fmt: skip
    return _launch(
        q_RNH, q_RNH.shape[1], k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R, scale=scale,
        max_context=max_context, sliding_window=sliding_window, soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N,
        sinks_N=sinks_N, sizes=sizes, kv_scales=kv_scales, out_RNH=out_RNH, shared=shared,
    )  # fmt: skip


def decode_attention(
    qkv_RD: Tensor,
    positions_R: Tensor,
    cos_sin_PD: Tensor | None,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    slots_R: Tensor,
    block_table_RB: Tensor,
    context_len_R: Tensor,
    *,
    num_heads: int,
    scale: float,
    interleaved: bool = False,
    q_norm_weight_H: Tensor | None = None,
    k_norm_weight_H: Tensor | None = None,
    eps: float = 1e-6,
    max_context: int | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes_N: Tensor | None = None,
    sinks_N: Tensor | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    inputs_early: bool = False,
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """`rope_and_store` and `paged_attention` in one launch; see `ops.decode_attention`. qkv is only read."""
    num_kv_heads, head_size = k_cache_BSKH.shape[2:]
    assert qkv_RD.shape[1] == (num_heads + 2 * num_kv_heads) * head_size
    assert qkv_RD.stride(1) == 1
    assert cos_sin_PD is None or cos_sin_PD.is_contiguous()
    new = {
        "positions_ptr": positions_R, "rotation_ptr": qkv_RD if cos_sin_PD is None else cos_sin_PD,
        "q_norm_ptr": qkv_RD if q_norm_weight_H is None else q_norm_weight_H,
        "k_norm_ptr": qkv_RD if k_norm_weight_H is None else k_norm_weight_H, "slots_ptr": slots_R, "eps": eps,
        "NEW": True, "ROTARY": 0 if cos_sin_PD is None else cos_sin_PD.shape[1], "INTERLEAVED": interleaved,
        "NORM_Q": q_norm_weight_H is not None, "NORM_K": k_norm_weight_H is not None, "EARLY": inputs_early,
    }  # fmt: skip
    return _launch(
        qkv_RD, num_heads, k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R, scale=scale,
        max_context=max_context, sliding_window=sliding_window, soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N,
        sinks_N=sinks_N, sizes=sizes, kv_scales=kv_scales, new=new,
    )  # fmt: skip
