"""The kernel of decode attention: one query token a row against the paged cache, split over the context.

Meaning: `reference.paged_attention`; launched by `paged_attention`. A program takes one row, one key/value head with
all its G query heads (as the rows of a matrix of 16 or more, so that the tensor cores multiply it), and one piece of
the context ("flash decoding"). Online softmax: Milakov and Gimelshein 2018. The piece that finishes last joins the
pieces of its row and head, so that there is no second launch. How many pieces there may be follows from host facts; how
long each is, from the length on the device.

With NEW every program rotates its own queries, and the first of a row writes the new key and value and attends to them
from registers, so that no program waits for the cache of the token that this step adds.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels.attention_parts import angles, for_cache, join, prefetch, scaled, turn
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
from argosy.kernels.shared_prefix import begin_with_prefix


@triton.jit
def _new_token(
    q_ptr, kv_head, row, split, slot, stride_q, head, in_tile, dim, partner, q_weight, q_other, k_weight, k_other, cos,
    sin, eps, scale, soft_cap, k_inverse, v_inverse, k_cache_ptr, v_cache_ptr, out_ptr,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, S: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    SOFT_CAP: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr, SCALED: tl.constexpr, KV_SCALES: tl.constexpr,
):  # fmt: skip
    """Turned queries [GROUP, WIDTH], and what the row's new token begins the softmax with: largest, sum, outputs. It
    goes to the cache; only the first piece has it."""
    LOG2E: tl.constexpr = 1.4426950408889634
    q_head = q_ptr + row * stride_q + (kv_head * G + head[:, None]) * H
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, WIDTH), tl.float32)
    # all loads first: one trip to memory, not one for each that is waited for
    one = tl.zeros((1, 1), tl.int64)
    new_k = q_ptr + row * stride_q + (K * G + kv_head) * H + one
    in_new = (dim < tl.where(split == 0, H, 0))[None, :]
    q_raw = tl.load(q_head + dim[None, :], in_tile, other=0.0)
    q_pair = tl.load(q_head + partner[None, :], in_tile, other=0.0)
    k_raw = tl.load(new_k + dim[None, :], in_new, other=0.0)
    k_pair = tl.load(new_k + partner[None, :], in_new, other=0.0)
    v_raw = tl.load(new_k + K * H + dim[None, :], in_new, other=0.0)
    q = turn(q_raw, q_pair, q_weight, q_other, cos, sin, eps, H, NORM_Q).to(out_ptr.dtype.element_ty)
    if split == 0:
        k_row = turn(k_raw, k_pair, k_weight, k_other, cos, sin, eps, H, NORM_K)
        v_row = v_raw
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
    return q, largest, total, acc


@triton.jit
def _wait_as(x):
    """x, once the kernel before is done; the next one may start. For within a loop: nothing that it loads is held back
    by this but what hangs on the result, where `gdc_wait` keeps loads of coming turns from being asked for ahead."""
    return tl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip


# Lengths, and addresses inside a packed buffer, differ from step to step: a compiled variant for each divisibility by
# 16 would be a stall of half a second in the middle of serving.
@triton.jit(
    do_not_specialize=["stride_table", "window", "num_splits", "min_piece", "shared_pieces"],
    do_not_specialize_on_alignment=[
        "context_ptr",
        "table_ptr",
        "positions_ptr",
        "slots_ptr",
        "shared_ptr",
        "order_ptr",
    ],
)
def paged_attention_kernel(
    q_ptr,  # queries, or when NEW the fused projection [q | k | v]
    positions_ptr, rotation_ptr, q_norm_ptr, k_norm_ptr, slots_ptr,
    k_cache_ptr, v_cache_ptr, table_ptr, context_ptr, out_ptr, slopes_ptr, sinks_ptr,
    part_ptr,  # [R, K, splits, G, H] unnormalised outputs, float32
    stats_ptr,  # [R, K, splits, 2, G]: largest logit (base 2), sum
    counter_ptr,  # [R · K] pieces done; zero between launches
    order_ptr,  # when ORDERED: which row comes first; long ones, so that none begins when the others are done
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
    LATE: tl.constexpr,  # the first tiles are on their way to the chip before the wait (NEW, EARLY, 16 bits)
    HEADS: tl.constexpr,  # power of two >= G
    JOIN: tl.constexpr,  # pieces that are joined at once
    ORDERED: tl.constexpr,
    SHARED: tl.constexpr,  # the multiple of a piece's tokens; 0: no prefix
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    kv_head = tl.program_id(0)  # heads beside each other: their keys lie beside each other
    row = tl.program_id(1)
    if ORDERED:
        row = tl.load(order_ptr + row)
    row = row.to(tl.int64)
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
        if not LATE:
            gdc_wait()
            gdc_launch_dependents()
    out_head = out_ptr + (row * K + kv_head) * G * H + head[:, None] * H + dim[None, :]
    if split >= pieces:
        if PDL and LATE:  # a kernel whose programs all leave before the one before is done would let the next begin
            gdc_wait()
        if (split == 0) & (context <= 0):  # padding
            tl.store(out_head, tl.zeros((GROUP, WIDTH), out_ptr.dtype.element_ty), in_tile)
        return

    q_head = q_ptr + row * stride_q + (kv_head * G + head[:, None]) * H
    q = tl.zeros((GROUP, WIDTH), out_ptr.dtype.element_ty)
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, WIDTH), tl.float32)
    if NEW:
        if not LATE:
            q, largest, total, acc = _new_token(
                q_ptr, kv_head, row, split, slot, stride_q, head, in_tile, dim, partner, q_weight, q_other, k_weight,
                k_other, cos, sin, eps, scale, soft_cap, k_inverse, v_inverse, k_cache_ptr, v_cache_ptr, out_ptr,
                K, G, H, S, GROUP, WIDTH, SOFT_CAP, NORM_Q, NORM_K, SCALED, KV_SCALES,
            )  # fmt: skip
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
    # with LATE there is a turn also where nothing is cached, since the new token comes within the first
    for start in tl.range(begin, tl.maximum(end, begin + 1) if LATE else end, BLOCK_L, num_stages=STAGES):
        if LATE:  # noqa: SIM102 - known when compiling, the other only when running
            if start == begin:
                kv_own = _wait_as(kv_head) if PDL else kv_head
                q, largest, total, acc = _new_token(
                    q_ptr, kv_own, row, split, slot, stride_q, head, in_tile, dim, partner, q_weight, q_other, k_weight,
                    k_other, cos, sin, eps, scale, soft_cap, k_inverse, v_inverse, k_cache_ptr, v_cache_ptr, out_ptr,
                    K, G, H, S, GROUP, WIDTH, SOFT_CAP, NORM_Q, NORM_K, SCALED, KV_SCALES,
                )  # fmt: skip
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
