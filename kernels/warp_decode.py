"""Decode attention over caches in 8 bits where every warp works alone: no barrier, few registers, many under way.

Meaning: `reference.paged_attention` without window, soft cap, slopes or sinks, for up to eight query heads of 128 a
key/value head. A program is one warp: a row, a key/value head, a piece of its context, 16 keys at a time. Keys are the
first operand of a product with the queries (columns: heads), values the first operand of one with the weights, both
straight from memory into registers: since numbers may be multiplied in any order, a lane takes 16 bytes beside each
other. The next keys are asked for before these are weighed, the next values once these are multiplied. `decode_kernel`
says how pieces are joined, `kv_scale_parts` how scales take part.

lane g · 4 + t holds   of keys     tokens g and g + 8, numbers 16 t .. and 64 + 16 t ..
                       of values   tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9, numbers 16 g ..
                       of sums     numbers 16 g .. 16 g + 15 of heads 2 t and 2 t + 1
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from argosy.kernels import tuning
from argosy.kernels.attention_parts import check_caches, choose_splits
from argosy.kernels.kv_scales import has_scales
from argosy.kernels.warp_parts import add, all_stored, attend, sum_over_keys, weigh

LOG2E = 1.4426950408889634
TILE = gl.constexpr(16)  # keys
HEADS = gl.constexpr(8)  # columns of a product
DEFAULT_SIZES = {"per_sm": 16, "min_piece": 256, "maxnreg": 168}


@gluon.jit
def _wait_for_inputs(x):
    """What `gdc_wait` and `gdc_launch_dependents` do; returns `x`, so that nobody runs ahead of it."""
    return gl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _keys(cache_ptr, at, token: gl.constexpr, STRIDE: gl.constexpr):
    """Words [32, 8] of a lane's token g + `token` of a block of keys at word `at`."""
    tile: gl.constexpr = gl.BlockedLayout([1, 2, 4], [32, 1, 1], [1, 1, 1], [2, 1, 0])
    by_lane: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, tile))
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, tile))) * 16
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, tile)))
    lane = gl.arange(0, 32, by_lane)
    first = at + ((lane // 4 + token) * STRIDE + lane % 4 * 4)
    places = (first[:, None, None] + half[None, :, None]) + word[None, None, :]
    return gl.load(cache_ptr + places, cache_modifier=".cg").reshape([32, 8])


@gluon.jit
def _values(cache_ptr, at, token: gl.constexpr, left, STRIDE: gl.constexpr):
    """Words [32, 4] of a lane's token 2 t + `token` of a block of values at word `at`; zeros from token `left` on."""
    tile: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [1, 1], [1, 0])
    lane = gl.arange(0, 32, gl.SliceLayout(1, tile))
    word = gl.arange(0, 4, gl.SliceLayout(0, tile))
    inside = lane % 4 * 2 + token
    places = (at + (inside * STRIDE + lane // 4 * 4))[:, None] + word[None, :]
    return gl.load(cache_ptr + places, (inside < left)[:, None], other=0, cache_modifier=".cg")


@gluon.jit
def _codes(cache_ptr, at, lane, left):
    """The codes of a lane's two tokens, from word `at` on; those from token `left` on may hold that of nan."""
    codes_ptr = cache_ptr.to(gl.pointer_type(gl.uint8), bitcast=True) + at * 4 + lane // 4
    here = gl.load(codes_ptr, lane // 4 < left, other=0)
    return here.to(gl.int32), gl.load(codes_ptr + 8, lane // 4 + 8 < left, other=0).to(gl.int32)


@gluon.jit
def _raw(code):
    """The scale times 2^108, as `kv_scale_parts.raw_scales`."""
    return ((code + 766) << 21).to(gl.float32, bitcast=True)


@gluon.jit
def _scales(k_codes, v_codes, factor, SCALES: gl.constexpr):
    """What logits are multiplied with, the logarithm of the scale of values, and one over it; of two tokens each."""
    if SCALES:
        log0 = gl.log2(_raw(v_codes[0])) - 108.0
        log1 = gl.log2(_raw(v_codes[1])) - 108.0
        unit = factor * 3.0814879110195774e-33
        return (_raw(k_codes[0]) * unit, _raw(k_codes[1]) * unit), (log0, log1), (gl.exp2(-log0), gl.exp2(-log1))
    else:
        same = k_codes[0].to(gl.float32) * 0.0
        return (same + factor, same + factor), (same, same), (same + 1.0, same + 1.0)


@gluon.jit
def _queries(q_ptr, G: gl.constexpr, H: gl.constexpr):
    """Words [32, 8] of two float16 each, those of even and of odd places: the second operand of `attend`."""
    tile: gl.constexpr = gl.BlockedLayout([1, 2, 4, 2, 2], [32, 1, 1, 1, 1], [1, 1, 1, 1, 1], [4, 3, 2, 1, 0])
    lane = gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, tile)))))
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, tile)))))
    step = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, tile)))))
    pair = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, tile)))))
    one = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, tile)))))
    head = lane // 4
    place = (head * H + lane % 4 * 16)[:, None, None, None, None] + (half * 64)[None, :, None, None, None]
    place += (step * 4)[None, None, :, None, None] + (pair * 2)[None, None, None, :, None]
    place += one[None, None, None, None, :]
    q = gl.load(q_ptr + place, (head < G)[:, None, None, None, None], other=0.0).to(gl.float32)
    q = gl.minimum(gl.maximum(q, -65504.0), 65504.0)  # where float16 ends
    low, high = gl.split(q)
    words = gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip
    even, odd = gl.split(words)
    return even.reshape([32, 8]), odd.reshape([32, 8])


@gluon.jit
def _join(part, stats, out_ptr, pieces, G: gl.constexpr, H: gl.constexpr):
    """As `attention_parts.join`."""
    tile: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 1], [1, 0])
    head = gl.arange(0, HEADS, gl.SliceLayout(1, tile))
    number = gl.arange(0, H, gl.SliceLayout(0, tile))
    there = head < G
    places = head[:, None] * H + number[None, :]
    largest = gl.full([HEADS], -1e30, gl.float32, gl.SliceLayout(1, tile))
    total = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, tile))
    acc = gl.zeros([HEADS, H], gl.float32, tile)
    for piece in range(pieces):
        stat = stats + piece * 2 * G + head
        its_largest = gl.load(stat, there, other=-1e30, cache_modifier=".cg")
        its_total = gl.load(stat + G, there, other=0.0, cache_modifier=".cg")
        its_acc = gl.load(part + piece * G * H + places, there[:, None], other=0.0, cache_modifier=".cg")
        higher = gl.maximum(largest, its_largest)
        shrink = gl.exp2(largest - higher)
        its_shrink = gl.exp2(its_largest - higher)
        total = total * shrink + its_total * its_shrink
        acc = acc * shrink[:, None] + its_acc * its_shrink[:, None]
        largest = higher
    share = 1.0 / gl.where(total > 0.0, total, 1.0)
    gl.store(out_ptr + places, (acc * share[:, None]).to(out_ptr.dtype.element_ty), there[:, None])


@gluon.jit(
    do_not_specialize=["stride_table", "num_splits", "min_piece"],
    do_not_specialize_on_alignment=["table_ptr", "context_ptr", "order_ptr"],
)
def _warp_decode_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, table_ptr, context_ptr, order_ptr, out_ptr, part_ptr, stats_ptr,
    counter_ptr, stride_q, stride_table, factor, v_scale, num_splits, min_piece,
    K: gl.constexpr, G: gl.constexpr, H: gl.constexpr, S: gl.constexpr, E4M3: gl.constexpr, SCALES: gl.constexpr,
    SPLIT: gl.constexpr, ORDERED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    sums: gl.constexpr = gl.BlockedLayout([1, 8, 4], [32, 1, 1], [1, 1, 1], [2, 1, 0])
    BLOCK: gl.constexpr = (S * K * (H + 1) if SCALES else S * K * H) // 4  # words
    STRIDE: gl.constexpr = K * H // 4
    kv_head = gl.program_id(0)
    row = gl.program_id(1).to(gl.int64)
    split = gl.program_id(2)
    lane = gl.arange(0, 32, one)
    k_cache_ptr = k_cache_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    v_cache_ptr = v_cache_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    if PDL:
        kv_head = _wait_for_inputs(kv_head)
    if ORDERED:
        row = gl.load(order_ptr + row).to(gl.int64)
    context = gl.load(context_ptr + row)
    tiles = (context + TILE - 1) // TILE
    piece = gl.maximum((tiles + num_splits - 1) // num_splits, min_piece // TILE)  # tiles
    pieces = gl.maximum((tiles + piece - 1) // piece, 1)
    if split < pieces:
        tile = split * piece
        end = gl.minimum(tile + piece, tiles)
        table_row = table_ptr + row * stride_table
        acc = gl.zeros([32, 8, 4], gl.float32, sums)
        largest0 = gl.full([32], -1e30, gl.float32, one)
        largest1 = largest0
        total0 = gl.zeros([32], gl.float32, one)
        total1 = total0
        q_even, q_odd = _queries(q_ptr + row * stride_q + kv_head * (G * H), G, H)
        last = gl.maximum(tiles - 1, 0)
        block = gl.load(table_row + gl.minimum(tile, last) * TILE // S).to(gl.int64) * BLOCK
        inside = tile * TILE % S
        left = context - tile * TILE
        at = block + (inside * STRIDE + kv_head * (H // 4))
        code_at = block + (S * STRIDE + kv_head * (S // 4) + inside // 4)
        k_here = _keys(k_cache_ptr, at, 0, STRIDE)
        k_there = _keys(k_cache_ptr, at, 8, STRIDE)
        v0 = _values(v_cache_ptr, at, 0, left, STRIDE)
        v1 = _values(v_cache_ptr, at, 1, left, STRIDE)
        v2 = _values(v_cache_ptr, at, 8, left, STRIDE)
        v3 = _values(v_cache_ptr, at, 9, left, STRIDE)
        k_code0 = lane
        k_code1 = lane
        v_code0 = lane
        v_code1 = lane
        if SCALES:
            k_code0, k_code1 = _codes(k_cache_ptr, code_at, lane, left)
            v_code0, v_code1 = _codes(v_cache_ptr, code_at, lane, left)
        next_block = gl.load(table_row + gl.minimum(tile + 1, last) * TILE // S).to(gl.int64) * BLOCK
        for now in range(tile, end):
            c0, c1, c2, c3 = attend(k_here, k_there, q_even, q_odd, E4M3)
            factors, logs, inverses = _scales((k_code0, k_code1), (v_code0, v_code1), factor, SCALES)
            left = context - now * TILE
            limit0 = gl.where(lane // 4 < left, float("inf"), float("-inf"))
            limit1 = gl.where(lane // 4 + 8 < left, float("inf"), float("-inf"))
            # what is behind the last tile is its own again
            after = gl.minimum(now + 1, last)
            inside = after * TILE % S
            at = next_block + (inside * STRIDE + kv_head * (H // 4))
            code_at = next_block + (S * STRIDE + kv_head * (S // 4) + inside // 4)
            next_block = gl.load(table_row + gl.minimum(now + 2, last) * TILE // S).to(gl.int64) * BLOCK
            k_here = _keys(k_cache_ptr, at, 0, STRIDE)
            k_there = _keys(k_cache_ptr, at, 8, STRIDE)
            left = context - after * TILE
            if SCALES:
                k_code0, k_code1 = _codes(k_cache_ptr, code_at, lane, left)
                v_code0, v_code1 = _codes(v_cache_ptr, code_at, lane, left)
            largest0, largest1, shrink0, shrink1, total0, total1, b0, b1 = weigh(
                c0, c1, c2, c3, factors, logs, inverses, (limit0, limit1), (largest0, largest1), (total0, total1)
            )
            acc = add(acc, v0, v1, v2, v3, b0, b1, shrink0, shrink1, E4M3)
            v0 = _values(v_cache_ptr, at, 0, left, STRIDE)
            v1 = _values(v_cache_ptr, at, 1, left, STRIDE)
            v2 = _values(v_cache_ptr, at, 8, left, STRIDE)
            v3 = _values(v_cache_ptr, at, 9, left, STRIDE)
        total0 = sum_over_keys(total0)
        total1 = sum_over_keys(total1)
        leaving: gl.constexpr = gl.BlockedLayout([1, 2, 16], [32, 1, 1], [1, 1, 1], [2, 1, 0])
        by_lane: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, leaving))
        its_lane = gl.arange(0, 32, by_lane)
        other = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, leaving)))
        number = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, leaving)))
        head = (its_lane % 4 * 2)[:, None, None] + other[None, :, None]
        places = head * H + (its_lane // 4 * 16)[:, None, None] + number[None, None, :]
        acc = gl.convert_layout(acc.reshape([32, 8, 2, 2]).permute((0, 3, 1, 2)).reshape([32, 2, 16]), leaving)
        group = row * K + kv_head
        if pieces == 1:
            totals = gl.convert_layout(gl.join(total0, total1), gl.SliceLayout(2, leaving))[:, :, None]
            acc *= v_scale / gl.where(totals > 0.0, totals, 1.0)
            gl.store(out_ptr + group * G * H + places, acc.to(out_ptr.dtype.element_ty), head < G)
        elif SPLIT:
            part = part_ptr + group * num_splits * G * H
            stats = stats_ptr + group * num_splits * 2 * G
            gl.store(part + split * G * H + places, acc * v_scale, head < G)
            stat = stats + split * 2 * G + lane % 4 * 2
            first = (lane < 4) & (lane * 2 < G)
            second = (lane < 4) & (lane * 2 + 1 < G)
            gl.store(stat, largest0, first)
            gl.store(stat + 1, largest1, second)
            gl.store(stat + G, total0, first)
            gl.store(stat + G + 1, total1, second)
            ready = all_stored(1)
            done = gl.atomic_add(counter_ptr + group, ready, sem="acq_rel")
            if done == pieces - 1:
                gl.atomic_xchg(counter_ptr + group, 0, sem="relaxed")  # ready for the next launch
                _join(part, stats, out_ptr + group * G * H, pieces, G, H)


def warp_decode(
    q_RNH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    block_table_RB: Tensor,
    context_len_R: Tensor,
    out_RNH: Tensor,
    *,
    scale: float,
    max_context: int,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    order_R: Tensor | None = None,
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """`paged_attention` of what `takes` takes. `max_context` bounds the lengths on the host."""
    num_rows, num_heads, head_size = q_RNH.shape
    block_size, num_kv_heads = k_cache_BSKH.shape[1:3]
    kv_scales = check_caches(k_cache_BSKH, v_cache_BSKH, kv_scales)
    sizes = sizes or DEFAULT_SIZES
    device, group = q_RNH.device, num_heads // num_kv_heads
    groups, splits = num_rows * num_kv_heads, 1
    if groups <= tuning.MAX_COUNTERS:
        facts = tuning.device_facts(device)
        splits = choose_splits(groups, max_context, sizes["min_piece"], facts.num_sms, sizes["per_sm"])
    part = stats = counters = out_RNH
    if splits > 1:
        part = torch.empty(groups * splits * group * head_size, dtype=torch.float32, device=device)
        stats = torch.empty(groups * splits * group * 2, dtype=torch.float32, device=device)
        counters = tuning.counters(device)
    _warp_decode_kernel[(num_kv_heads, num_rows, splits)](
        q_RNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R,
        context_len_R if order_R is None else order_R, out_RNH, part, stats, counters, q_RNH.stride(0),
        block_table_RB.stride(0), scale * kv_scales[0] * LOG2E, kv_scales[1], splits, sizes["min_piece"],
        K=num_kv_heads, G=group, H=head_size, S=block_size, E4M3=k_cache_BSKH.dtype == torch.float8_e4m3fn,
        SCALES=has_scales(k_cache_BSKH), SPLIT=splits > 1, ORDERED=order_R is not None, num_warps=1,
        maxnreg=sizes["maxnreg"], **tuning.overlap(device),
    )  # fmt: skip
    return out_RNH


@cache
def _has_its_instructions(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)


def takes(num_heads: int, k_cache_BSKH: Tensor, dtype: torch.dtype) -> bool:
    """Whether these can be attended here: a cache in 8 bits, whole tiles in a block, heads of 128, up to 8 a group."""
    return (
        k_cache_BSKH.element_size() == 1
        and dtype.itemsize == 2
        and k_cache_BSKH.shape[3] == 128
        and k_cache_BSKH.shape[1] % TILE.value == 0
        and num_heads // k_cache_BSKH.shape[2] <= HEADS.value
        and _has_its_instructions(k_cache_BSKH.device)
    )
