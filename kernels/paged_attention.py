"""Decode attention: one query token a row against the paged cache, split over the context ("flash decoding").

Meaning: `reference.paged_attention`. A program takes one row, one key/value head with all its G query heads (as the
rows of a matrix of 16 or more, so that the tensor cores multiply it), and one piece of the context. Online softmax:
Milakov and Gimelshein 2018. The piece that finishes last joins the pieces of its row and head, so that there is no
second launch. How many pieces there may be follows from host facts; how long each is, from the length on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning


@triton.jit
def _paged_attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    context_ptr,
    out_ptr,
    slopes_ptr,
    sinks_ptr,
    part_ptr,  # [R, K, splits, G, H] unnormalised outputs, float32
    stats_ptr,  # [R, K, splits, 2, G]: largest logit (base 2), sum
    counter_ptr,  # [R · K] pieces done; zero between launches
    stride_q,
    stride_table,
    scale,
    soft_cap,
    window,
    num_splits,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    GROUP: tl.constexpr,  # power of two >= 16 and >= G
    WIDTH: tl.constexpr,  # power of two >= H
    BLOCK_L: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    head = tl.arange(0, GROUP)
    dim = tl.arange(0, WIDTH)
    in_group = head < G
    in_tile = in_group[:, None] & (dim < H)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    context = tl.load(context_ptr + row)
    first = tl.maximum(context - window, 0) if WINDOW else 0
    length = context - first
    # Pieces of whole tiles, of equal length; the last may be short and some of the grid may have none.
    piece = tl.cdiv(tl.cdiv(length, num_splits), BLOCK_L) * BLOCK_L
    pieces = tl.cdiv(length, tl.maximum(piece, 1))
    begin = first + split * piece
    end = tl.minimum(begin + piece, context)
    out_head = out_ptr + (row * K + kv_head) * G * H + head[:, None] * H + dim[None, :]
    if split >= pieces:
        if (split == 0) & (context <= 0):  # padding
            tl.store(out_head, tl.zeros((GROUP, WIDTH), out_ptr.dtype.element_ty), in_tile)
        return

    q = tl.load(q_ptr + row * stride_q + (kv_head * G + head[:, None]) * H + dim[None, :], in_tile, other=0.0)
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, WIDTH), tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + kv_head * G + head, in_group, other=0.0).to(tl.float32) * LOG2E
    for start in tl.range(begin, end, BLOCK_L, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_L)
        inside = token < end
        block = tl.load(table_ptr + row * stride_table + token // S, inside, other=0).to(tl.int64)
        place = ((block * S + token % S) * K + kv_head) * H
        here = inside[:, None] if WIDTH == H else inside[:, None] & (dim < H)[None, :]
        k = tl.load(k_cache_ptr + place[:, None] + dim[None, :], here, other=0.0).to(q.dtype)
        v = tl.load(v_cache_ptr + place[:, None] + dim[None, :], here, other=0.0).to(q.dtype)
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFT_CAP:
            tanh = 2.0 * tl.sigmoid(2.0 * (logit * scale / soft_cap)) - 1.0
            logit = tanh * (soft_cap * LOG2E)
        else:
            logit *= scale * LOG2E
        if ALIBI:
            logit += slope[:, None] * (token - context + 1).to(tl.float32)[None, :]
        logit = tl.where(inside[None, :], logit, float("-inf"))
        higher = tl.maximum(largest, tl.max(logit, 1))
        weight = tl.exp2(logit - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(q.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = higher

    if SPLIT:  # noqa: SIM102 - known when compiling, pieces only when running
        if pieces > 1:
            group_index = row * K + kv_head
            part = part_ptr + group_index * num_splits * G * H + head[:, None] * H + dim[None, :]
            stats = stats_ptr + group_index * num_splits * 2 * G + head
            tl.store(part + split * G * H, acc, in_tile)
            tl.store(stats + split * 2 * G, largest, in_group)
            tl.store(stats + split * 2 * G + G, total, in_group)
            tl.debug_barrier()  # every thread's stores come before the one thread's release below
            done = tl.atomic_add(counter_ptr + group_index, 1, sem="acq_rel")
            if done < pieces - 1:
                return
            tl.atomic_xchg(counter_ptr + group_index, 0, sem="relaxed")  # ready for the next launch
            largest = tl.full((GROUP,), float("-inf"), tl.float32)
            total = tl.zeros((GROUP,), tl.float32)
            acc = tl.zeros((GROUP, WIDTH), tl.float32)
            for other in range(pieces):
                # .cg: past the first-level cache, which does not see what other processors wrote
                its_largest = tl.load(stats + other * 2 * G, in_group, other=0.0, cache_modifier=".cg")
                its_total = tl.load(stats + other * 2 * G + G, in_group, other=1.0, cache_modifier=".cg")
                its_acc = tl.load(part + other * G * H, in_tile, other=0.0, cache_modifier=".cg")
                higher = tl.maximum(largest, its_largest)
                shrink = tl.exp2(largest - higher)
                its_shrink = tl.exp2(its_largest - higher)
                total = total * shrink + its_total * its_shrink
                acc = acc * shrink[:, None] + its_acc * its_shrink[:, None]
                largest = higher
    if SINKS:
        sink = tl.load(sinks_ptr + kv_head * G + head, in_group, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(largest, sink)
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.exp2(sink - higher)
        acc *= shrink[:, None]
    tl.store(out_head, (acc / total[:, None]).to(out_ptr.dtype.element_ty), in_tile)


def choose_splits(num_groups: int, max_context: int, block_l: int, num_sms: int, per_sm: int) -> int:
    """Pieces a context may be cut into, so that `per_sm` programs a multiprocessor have work, each a tile at least."""
    wanted = max(1, num_sms * per_sm // num_groups)
    return max(1, min(wanted, -(-max_context // block_l), 64))


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
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """Shapes as in `ops.paged_attention`; tokens of q may be strided (a view of the fused projection).

    Must have run once on a device before it is captured there, and not on two streams at the same time. `sizes`
    overrides what was tuned, for the tuner itself.
    """
    num_rows, num_heads, head_size = q_RNH.shape
    block_size, num_kv_heads = k_cache_BSKH.shape[1:3]
    group = num_heads // num_kv_heads
    assert q_RNH.stride()[1:] == (head_size, 1)
    assert block_table_RB.stride(1) == 1
    assert k_cache_BSKH.is_contiguous()
    assert v_cache_BSKH.is_contiguous()
    device = q_RNH.device
    out_RNH = torch.empty((num_rows, num_heads, head_size), dtype=q_RNH.dtype, device=device)
    if num_rows == 0:
        return out_RNH
    bound = block_table_RB.shape[1] * block_size
    bound = bound if max_context is None else min(bound, max_context)
    bound = bound if sliding_window is None else min(bound, sliding_window)
    facts = tuning.device_facts(device)
    width = tuning.next_power_of_two(head_size)
    if sizes is None and q_RNH.element_size() == 2:
        sizes = tuning.pick("paged_attention", f"h{head_size}", device)
    sizes = sizes or {
        "block_l": 64 if width * q_RNH.element_size() <= 256 else 32, "warps": 4, "stages": 3, "per_sm": 4,
    }  # fmt: skip
    block_l = sizes["block_l"] if facts.slug != "interpreter" else 16
    groups = num_rows * num_kv_heads
    splits = 1
    if groups <= tuning.MAX_COUNTERS:
        splits = choose_splits(groups, bound, block_l, facts.num_sms, sizes["per_sm"])
    part = stats = counters = out_RNH
    if splits > 1:
        part = torch.empty(groups * splits * group * head_size, dtype=torch.float32, device=device)
        stats = torch.empty(groups * splits * group * 2, dtype=torch.float32, device=device)
        counters = tuning.counters(device)
    _paged_attention_kernel[(num_rows, num_kv_heads, splits)](
        q_RNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R, out_RNH,
        out_RNH if alibi_slopes_N is None else alibi_slopes_N, out_RNH if sinks_N is None else sinks_N,
        part, stats, counters, q_RNH.stride(0), block_table_RB.stride(0),
        scale, soft_cap or 0.0, sliding_window or 0, splits,
        K=num_kv_heads, G=group, H=head_size, S=block_size, GROUP=max(16, tuning.next_power_of_two(group)), WIDTH=width,
        BLOCK_L=block_l, WINDOW=sliding_window is not None, SOFT_CAP=soft_cap is not None,
        ALIBI=alibi_slopes_N is not None, SINKS=sinks_N is not None, SPLIT=splits > 1, STAGES=sizes["stages"],
        PRECISION="ieee" if q_RNH.dtype == torch.float32 else "tf32",
        num_warps=sizes["warps"], **tuning.overlap(device),
    )  # fmt: skip
    return out_RNH
