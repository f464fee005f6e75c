"""Causal attention of prompts for Hopper's tensor cores: one group of warps fetches, two multiply and weigh.

Meaning: `reference.prefill_attention` without window, soft cap, slopes or sinks, over a cache of the queries' own type;
for bfloat16 also over one in 8 bits, whose numbers the group that fetches unpacks on their way (`hopper_unpack`).
Each multiprocessor keeps one program, which asks a counter for tiles of 128 lines (BLOCK_Q positions of the G heads of
one key/value head, as in `prefill_attention`) until there are none. Its three groups of four warps:

    fetch      takes a tile of the step's plan (`prompt_tiles`), copies queries, then keys and values from the edge of
               the triangle backwards, as far ahead as the rings have room; of the next tile while the last one is
               still being multiplied
    attend x2  64 lines each: logits of a tile of keys, and the products of the weights before them with their values
               while these are being weighed. Two of them side by side: one multiplies while the other weighs

Barriers count how often a ring's slot was filled and read: `*_full` is waited for by readers, `*_empty` by the fetcher.
Written in Triton's lower language (Gluon), since Triton waits for each product at once.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from argosy.kernels import tuning
from argosy.kernels.hopper_parts import (
    ask_for_work,
    block_of,
    copy_async,
    fact,
    hand_out_end,
    hand_out_queries,
)
from argosy.kernels.hopper_unpack import fetch_keys, fetch_values
from argosy.kernels.kv_scales import has_scales

LINES = 128  # of a tile: 64 for each of the two groups that multiply
HEAD_SIZES = (64, 128)
LOG2E = 1.4426950408889634
UNPACKED_SIZES = {"block_l": 64, "stages": 4, "registers": 184, "fetch_registers": 72}  # caches in 8 bits
DEFAULT_SIZES = {"block_l": 128, "stages": 2, "registers": 200, "fetch_registers": 104}


@gluon.jit
def _fetch(
    q_ptr, k_cache_ptr, v_cache_ptr, table_ptr, tiles_ptr, counter_ptr, stride_q, stride_table, num_tiles,
    q_smem, k_smem, v_smem, facts_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    K: gl.constexpr, G: gl.constexpr, H: gl.constexpr, S: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_L: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    PER_ROW: gl.constexpr = H // 8
    copying: gl.constexpr = gl.BlockedLayout([1, 8], [32 // PER_ROW, PER_ROW], [4, 1], [1, 0])
    few: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dim = gl.arange(0, H, gl.SliceLayout(0, copying))
    within = gl.arange(0, BLOCK_L, gl.SliceLayout(1, copying))
    place = gl.arange(0, 8, few)
    total = gl.load(tiles_ptr + num_tiles * 8) * K  # the line behind the last tile says how many there are
    turn = 0
    step = 0
    work = gl.program_id(0)
    facts = gl.load(tiles_ptr + work // K * 8 + place)
    while work < total:
        kv_head = work % K
        num_keys = fact(facts, 0, few)
        row = fact(facts, 4, few)
        num_steps = (num_keys + BLOCK_L - 1) // BLOCK_L
        table_row = table_ptr + row.to(gl.int64) * stride_table
        start = (num_steps - 1) * BLOCK_L
        block = block_of(table_row, start, within, num_keys, S, BLOCK_L, WIDE)
        hand_out_queries(
            q_ptr, stride_q, facts, place, kv_head, turn, q_smem, facts_smem, q_full, q_empty, copying, few, G, H,
            BLOCK_M,
        )  # fmt: skip
        turn += 1
        for i in range(num_steps):
            slot = step % STAGES
            phase = (step // STAGES) & 1
            step += 1
            inside = within % S if BLOCK_L % S == 0 else (start + within) % S
            offset = (block * S + inside) * (K * H) + kv_head * H
            there = (start + within < num_keys)[:, None]  # what is not there is zero
            start = gl.maximum(start - BLOCK_L, 0)
            block = block_of(table_row, start, within, num_keys, S, BLOCK_L, WIDE)
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            copy_async(k_smem.index(slot), k_cache_ptr + (offset[:, None] + dim[None, :]), there)
            async_copy.mbarrier_arrive(k_full.index(slot), increment_count=False)
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            copy_async(v_smem.index(slot), v_cache_ptr + (offset[:, None] + dim[None, :]), there)
            async_copy.mbarrier_arrive(v_full.index(slot), increment_count=False)
            if i == 0:  # while the first keys are under way
                work = ask_for_work(counter_ptr, total)
                facts = gl.load(tiles_ptr + gl.minimum(work // K, num_tiles) * 8 + place)
    hand_out_end(turn, facts_smem, q_full, q_empty, few)


@gluon.jit
def _weigh(
    logit, largest, total, position, start, factor, MASKED: gl.constexpr, BLOCK_L: gl.constexpr, logits_in: gl.constexpr
):
    """Weights of a tile of keys, and how much all before them shrinks."""
    if MASKED:
        key = start + gl.arange(0, BLOCK_L, gl.SliceLayout(0, logits_in))
        logit = gl.where(key[None, :] <= position[:, None], logit, float("-inf"))
    higher = gl.maximum(largest, gl.max(logit, 1) * factor)
    pivot = gl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    weight = gl.exp2(logit * factor - pivot[:, None])
    shrink = gl.exp2(largest - pivot)
    total = total * shrink + gl.sum(weight, 1)
    return weight, shrink, total, higher


@gluon.jit
def _walk(
    begin, end, num_steps, step, q_half, k_smem, v_smem, k_full, k_empty, v_full, v_empty, acc, weight, largest, total,
    position, factor,
    BLOCK_L: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, logits_in: gl.constexpr, acc_in: gl.constexpr,
):  # fmt: skip
    weights_in: gl.constexpr = gl.DotOperandLayout(0, acc_in, 2)
    dtype: gl.constexpr = q_half.dtype
    empty = gl.zeros([64, BLOCK_L], gl.float32, logits_in)
    for i in range(begin, end):
        now = step + i
        slot = now % STAGES
        before = now - 1
        slot_before = before % STAGES
        mbarrier.wait(k_full.index(slot), (now // STAGES) & 1)
        fence_async_shared()
        logit = warpgroup_mma(q_half, k_smem.index(slot).permute((1, 0)), empty, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(slot_before), (before // STAGES) & 1)
        fence_async_shared()
        acc = warpgroup_mma(weight, v_smem.index(slot_before), acc, is_async=True)
        logit, acc = warpgroup_mma_wait(1, deps=[logit, acc])
        mbarrier.arrive(k_empty.index(slot))
        start = (num_steps - 1 - i) * BLOCK_L
        soft, shrink, total, largest = _weigh(
            logit, largest, total, position, start, factor, MASKED, BLOCK_L, logits_in
        )
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(slot_before))
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_in))[:, None]
        weight = gl.convert_layout(soft.to(dtype), weights_in)
    return acc, weight, largest, total


@gluon.jit
def _attend(
    out_ptr, factor, v_scale, q_smem, k_smem, v_smem, facts_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    HALF: gl.constexpr, K: gl.constexpr, G: gl.constexpr, H: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_L: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    logits_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_L, 16])
    acc_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    weights_in: gl.constexpr = gl.DotOperandLayout(0, acc_in, 2)
    few: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    leaving: gl.constexpr = gl.BlockedLayout([1, 8], [256 // H, H // 8], [4, 1], [1, 0])
    by_logit: gl.constexpr = gl.SliceLayout(1, logits_in)
    dtype: gl.constexpr = q_smem.dtype
    line = HALF * 64 + gl.arange(0, 64, by_logit)
    out_line = HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, leaving))
    dim = gl.arange(0, H, gl.SliceLayout(0, leaving))
    turn = 0
    step = 0
    mbarrier.wait(q_full.index(0), 0)
    facts = facts_smem.index(0).load(few)
    num_keys = fact(facts, 0, few)
    while num_keys > 0:
        first_position = fact(facts, 1, few)
        num_steps = (num_keys + BLOCK_L - 1) // BLOCK_L
        q_half = q_smem.index(turn & 1).slice(HALF * 64, 64, 0)
        position = first_position + line // G
        acc = gl.zeros([64, H], gl.float32, acc_in)
        largest = gl.full([64], float("-inf"), gl.float32, by_logit)
        total = gl.zeros([64], gl.float32, by_logit)
        slot = step % STAGES
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        fence_async_shared()
        empty = gl.zeros([64, BLOCK_L], gl.float32, logits_in)
        logit = warpgroup_mma(q_half, k_smem.index(slot).permute((1, 0)), empty, use_acc=False, is_async=True)
        logit = warpgroup_mma_wait(0, deps=[logit])
        mbarrier.arrive(k_empty.index(slot))
        soft, _, total, largest = _weigh(
            logit, largest, total, position, (num_steps - 1) * BLOCK_L, factor, True, BLOCK_L, logits_in
        )
        weight = gl.convert_layout(soft.to(dtype), weights_in)
        edge = gl.maximum(num_steps - (first_position + 1) // BLOCK_L, 1)
        acc, weight, largest, total = _walk(
            1, edge, num_steps, step, q_half, k_smem, v_smem, k_full, k_empty, v_full, v_empty, acc, weight, largest,
            total, position, factor, BLOCK_L, STAGES, True, logits_in, acc_in,
        )  # fmt: skip
        acc, weight, largest, total = _walk(
            edge, num_steps, num_steps, step, q_half, k_smem, v_smem, k_full, k_empty, v_full, v_empty, acc, weight,
            largest, total, position, factor, BLOCK_L, STAGES, False, logits_in, acc_in,
        )  # fmt: skip
        step += num_steps
        last = step - 1
        mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
        fence_async_shared()
        acc = warpgroup_mma(weight, v_smem.index(last % STAGES), acc, is_async=True)
        token = fact(facts, 2, few)
        num_queries = fact(facts, 3, few)
        kv_head = fact(facts, 5, few)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(last % STAGES))
        share = v_scale / gl.convert_layout(total, gl.SliceLayout(1, acc_in))
        q_half.store((acc * share[:, None]).to(dtype))  # on its way out through the place of its queries
        query = out_line // G
        present = (query < num_queries) & (out_line < BLOCK_Q * G)
        where = (token + query).to(gl.int64) * (K * G * H) + (kv_head * G + out_line % G) * H
        gl.store(out_ptr + (where[:, None] + dim[None, :]), q_half.load(leaving), present[:, None])
        mbarrier.arrive(q_empty.index(turn & 1))
        turn += 1
        mbarrier.wait(q_full.index(turn & 1), (turn >> 1) & 1)
        facts = facts_smem.index(turn & 1).load(few)
        num_keys = fact(facts, 0, few)


@gluon.jit(
    do_not_specialize=["stride_table", "num_tiles"],
    do_not_specialize_on_alignment=["table_ptr", "tiles_ptr"],
)
def _hopper_attention_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, table_ptr, tiles_ptr, out_ptr, counter_ptr, stride_q, stride_table, factor,
    v_scale, num_tiles,
    K: gl.constexpr, G: gl.constexpr, H: gl.constexpr, S: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_L: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, FETCH_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr,
    UNPACKED: gl.constexpr, E4M3: gl.constexpr, SCALES: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = 128
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, H], swizzled)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_L, H], swizzled)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_L, H], swizzled)
    facts_smem = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    flag: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], flag)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], flag)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], flag)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], flag)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], flag)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], flag)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=129)  # each thread's copies, and the facts
        mbarrier.init(q_empty.index(i), count=3 if UNPACKED else 2)
    arrivals: gl.constexpr = 1 if UNPACKED else 128  # of the group once it has stored, of each thread's copies
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=arrivals)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=arrivals)
        mbarrier.init(v_empty.index(i), count=2)
    if UNPACKED:
        gl.warp_specialize(
            [
                (_attend, (
                    out_ptr, factor, v_scale, q_smem, k_smem, v_smem, facts_smem, q_full, q_empty, k_full, k_empty,
                    v_full, v_empty, 0, K, G, H, BLOCK_Q, BLOCK_L, STAGES,
                )),
                (_attend, (
                    out_ptr, factor, v_scale, q_smem, k_smem, v_smem, facts_smem, q_full, q_empty, k_full, k_empty,
                    v_full, v_empty, 1, K, G, H, BLOCK_Q, BLOCK_L, STAGES,
                )),
                (fetch_keys, (
                    q_ptr, k_cache_ptr, table_ptr, tiles_ptr, counter_ptr, stride_q, stride_table, num_tiles, q_smem,
                    k_smem, facts_smem, q_full, q_empty, k_full, k_empty, K, G, H, S, BLOCK_M, BLOCK_L, STAGES, WIDE,
                    E4M3, SCALES,
                )),
                (fetch_values, (
                    v_cache_ptr, table_ptr, stride_table, v_smem, facts_smem, q_full, q_empty, v_full, v_empty, K, H, S,
                    BLOCK_L, STAGES, WIDE, E4M3, SCALES,
                )),
            ],
            [4, 4, 4],
            [REGISTERS, FETCH_REGISTERS, FETCH_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    out_ptr, factor, v_scale, q_smem, k_smem, v_smem, facts_smem, q_full, q_empty, k_full, k_empty,
                    v_full, v_empty, 0, K, G, H, BLOCK_Q, BLOCK_L, STAGES,
                )),
                (_attend, (
                    out_ptr, factor, v_scale, q_smem, k_smem, v_smem, facts_smem, q_full, q_empty, k_full, k_empty,
                    v_full, v_empty, 1, K, G, H, BLOCK_Q, BLOCK_L, STAGES,
                )),
                (_fetch, (
                    q_ptr, k_cache_ptr, v_cache_ptr, table_ptr, tiles_ptr, counter_ptr, stride_q, stride_table,
                    num_tiles, q_smem, k_smem, v_smem, facts_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, K,
                    G, H, S, BLOCK_M, BLOCK_L, STAGES, WIDE,
                )),
            ],
            [4, 4],
            [REGISTERS, FETCH_REGISTERS],
        )  # fmt: skip


def hopper_attention(
    q_TNH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    block_table_RB: Tensor,
    tiles_X8: Tensor,
    out_TNH: Tensor,
    *,
    scale: float,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """`prefill_attention` of the tiles that `prompt_tiles` planned for `block_q_of` these heads. Ask `takes` first."""
    num_heads, head_size = q_TNH.shape[1:]
    block_size, num_kv_heads = k_cache_BSKH.shape[1:3]
    group = num_heads // num_kv_heads
    unpacked, e4m3 = k_cache_BSKH.element_size() == 1, k_cache_BSKH.dtype == torch.float8_e4m3fn
    sizes = sizes or (UNPACKED_SIZES if unpacked else DEFAULT_SIZES)
    num_tiles = tiles_X8.shape[0] - 1
    programs = min(tuning.device_facts(q_TNH.device).num_sms, num_tiles * num_kv_heads)
    _hopper_attention_kernel[(programs,)](
        q_TNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, tiles_X8, out_TNH, tuning.counters(q_TNH.device),
        q_TNH.stride(0), block_table_RB.stride(0), scale * kv_scales[0] * LOG2E, kv_scales[1], num_tiles,
        K=num_kv_heads, G=group, H=head_size, S=block_size, BLOCK_Q=LINES // group, BLOCK_L=sizes["block_l"],
        STAGES=sizes["stages"], WIDE=k_cache_BSKH.shape[0] * k_cache_BSKH.stride(0) >= 1 << 31,
        FETCH_REGISTERS=sizes["fetch_registers"], REGISTERS=sizes["registers"], UNPACKED=unpacked, E4M3=e4m3,
        SCALES=has_scales(k_cache_BSKH), num_warps=4,
    )  # fmt: skip
    return out_TNH


def block_q_of(q_TNH: Tensor, k_cache_BSKH: Tensor) -> int:
    """Positions of a tile, for `plan_tiles`."""
    return LINES // (q_TNH.shape[1] // k_cache_BSKH.shape[2])


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(q_TNH: Tensor, k_cache_BSKH: Tensor) -> bool:
    """Whether these can be attended here: 16 bits, the cache in the same, a head size that tiles are made for."""
    num_heads, head_size = q_TNH.shape[1:]
    return (
        head_size in HEAD_SIZES
        and q_TNH.element_size() == 2
        and (k_cache_BSKH.dtype == q_TNH.dtype or (k_cache_BSKH.element_size() == 1 and q_TNH.dtype == torch.bfloat16))
        and (k_cache_BSKH.is_contiguous() or has_scales(k_cache_BSKH))
        and num_heads // k_cache_BSKH.shape[2] <= LINES
        and _is_hopper(q_TNH.device)
    )
