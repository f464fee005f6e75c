"""The first tokens that many rows of a decode step have in common (a system prompt), read once for many rows.

Rows that share a prefix have the same blocks at the front of their tables. A program takes BLOCK_Q rows with the G
query heads of one key/value head, as the rows of one matrix, and one piece of the prefix; what it leaves (unnormalised
sums in float32, the largest logit, the weight) is where `paged_attention` then begins with each row's own tokens. 256
rows with 2048 shared tokens read 2 GB a layer from the second-level cache one by one, and 17 to 70 MB so.

Whose prefix it is and how long stands on the device, so that a recorded step serves any. One prefix at a time: the
rows that have it say its length, the others 0. (These are computed with the others, and nobody reads the outcome.)
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.attention_parts import check_caches, for_cache
from argosy.kernels.kv_scale_parts import codes_at
from argosy.kernels.kv_scales import has_scales
from argosy.kernels.prefill_attention import _walk

MIN_PIECE = 256  # tokens: a shorter piece costs more to join than to walk
MAX_PIECES = 16


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """What the rows' queries saw of the prefix, in pieces that are each a multiple of `block_l` tokens."""

    length_R: Tensor  # int32: tokens; 0 for rows without it
    part: Tensor  # [pieces, R, N, H], float32
    stats: Tensor  # [pieces, 2, R, N], float32: largest logit (base 2), sum
    pieces: int
    block_l: int


# as in `prefill_attention`
@triton.jit(
    do_not_specialize=["stride_table", "num_rows", "num_pieces"],
    do_not_specialize_on_alignment=["length_ptr", "table_ptr"],
)
def _shared_prefix_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, table_ptr, length_ptr, part_ptr, stats_ptr,
    stride_q, stride_table, scale, soft_cap, num_rows, num_pieces,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_L: tl.constexpr, SOFT_CAP: tl.constexpr, KV_SCALES: tl.constexpr,
    NATIVE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    piece = tl.program_id(2)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length = 0
    owner = num_rows
    for first in range(0, num_rows, 128):
        other = first + tl.arange(0, 128)
        its_length = tl.load(length_ptr + other, other < num_rows, other=0)
        owner = tl.minimum(owner, tl.min(tl.where(its_length > 0, other, num_rows), 0))
        length = tl.maximum(length, tl.max(its_length, 0))
    step = tl.cdiv(tl.cdiv(length, num_pieces), BLOCK_L) * BLOCK_L
    begin = piece * step
    end = tl.minimum(begin + step, length)
    if begin >= end:
        return
    line = tl.arange(0, BLOCK_M)
    row = (tl.program_id(1) * BLOCK_Q + line // G).to(tl.int64)
    head = kv_head * G + line % G
    dim = tl.arange(0, WIDTH)
    present = (line < BLOCK_Q * G) & (row < num_rows)
    in_tile = present[:, None] & (dim < H)[None, :]
    q = tl.load(q_ptr + (row * stride_q + head * H)[:, None] + dim[None, :], in_tile, other=0.0)
    q = for_cache(q, k_cache_ptr)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    table_row = table_ptr + owner.to(tl.int64) * stride_table
    k_base = k_cache_ptr + kv_head * H
    v_base = v_cache_ptr + kv_head * H
    k_codes = codes_at(k_cache_ptr) + kv_head * S
    v_codes = codes_at(v_cache_ptr) + kv_head * S
    middle = begin + (end - begin) // BLOCK_L * BLOCK_L
    position = tl.zeros((BLOCK_M,), tl.int32) + (end - 1)
    acc, largest, total = _walk(
        q, acc, largest, total, begin, middle, position, end - 1, 0, 0.0, scale, soft_cap, k_base, v_base, k_codes,
        v_codes, table_row, K, H, S, WIDTH, BLOCK_L, False, False, SOFT_CAP, False, KV_SCALES, NATIVE, STAGES,
        PRECISION,
    )  # fmt: skip
    acc, largest, total = _walk(
        q, acc, largest, total, middle, end, position, end - 1, 0, 0.0, scale, soft_cap, k_base, v_base, k_codes,
        v_codes, table_row, K, H, S, WIDTH, BLOCK_L, True, False, SOFT_CAP, False, KV_SCALES, NATIVE, 1, PRECISION,
    )  # fmt: skip
    stats = stats_ptr + (piece * 2 * num_rows + row) * K * G + head
    tl.store(stats, largest, present)
    tl.store(stats + num_rows.to(tl.int64) * K * G, total, present)
    part = part_ptr + ((piece * num_rows + row) * K * G + head)[:, None] * H + dim[None, :]
    tl.store(part, acc, in_tile)


@triton.jit
def begin_with_prefix(
    part_ptr, stats_ptr, length, num_pieces, row, num_rows, first_head, in_group, in_tile,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The state of an online softmax after the prefix, for the G heads from `first_head`: acc, largest, total."""
    head = first_head + tl.arange(0, GROUP)
    dim = tl.arange(0, WIDTH)
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, WIDTH), tl.float32)
    step = tl.maximum(tl.cdiv(tl.cdiv(length, num_pieces), BLOCK_L) * BLOCK_L, 1)
    for piece in range(tl.cdiv(length, step)):
        stats = stats_ptr + (piece * 2 * num_rows + row) * K * G + head
        its_largest = tl.load(stats, in_group, other=-1e30)
        its_total = tl.load(stats + num_rows * K * G, in_group, other=0.0)
        part = part_ptr + ((piece * num_rows + row) * K * G + head)[:, None] * H + dim[None, :]
        its_acc = tl.load(part, in_tile, other=0.0)
        higher = tl.maximum(largest, its_largest)
        shrink = tl.exp2(largest - higher)
        its_shrink = tl.exp2(its_largest - higher)
        total = total * shrink + its_total * its_shrink
        acc = acc * shrink[:, None] + its_acc * its_shrink[:, None]
        largest = higher
    return acc, largest, total


def attend_prefix(
    q_RNH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    block_table_RB: Tensor,
    length_R: Tensor,
    *,
    scale: float,
    max_length: int,
    soft_cap: float | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> SharedPrefix:
    """One launch. `max_length` bounds the length on the host."""
    num_rows, num_heads, head_size = q_RNH.shape
    block_size, num_kv_heads = k_cache_BSKH.shape[1:3]
    group = num_heads // num_kv_heads
    device = q_RNH.device
    scale *= check_caches(k_cache_BSKH, v_cache_BSKH, kv_scales)[0]
    assert q_RNH.stride()[1:] == (head_size, 1)
    assert block_table_RB.stride(1) == 1
    facts = tuning.device_facts(device)
    width = tuning.next_power_of_two(head_size)
    sizes = tuning.pick("shared_prefix", f"h{head_size}", device) if q_RNH.element_size() == 2 else None
    sizes = sizes or _default_sizes(width, num_rows * group, q_RNH.dtype)
    block_m = max(sizes["block_m"], tuning.next_power_of_two(group))
    block_q = block_m // group
    row_blocks = triton.cdiv(num_rows, block_q)
    wanted = facts.num_sms // (row_blocks * num_kv_heads)
    pieces = max(1, min(wanted, -(-max_length // MIN_PIECE), MAX_PIECES))
    part = torch.empty((pieces, num_rows, num_heads, head_size), dtype=torch.float32, device=device)
    stats = torch.empty((pieces, 2, num_rows, num_heads), dtype=torch.float32, device=device)
    _shared_prefix_kernel[(num_kv_heads, row_blocks, pieces)](
        q_RNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, length_R, part, stats, q_RNH.stride(0),
        block_table_RB.stride(0), scale, soft_cap or 0.0, num_rows, pieces, K=num_kv_heads, G=group, H=head_size,
        S=block_size, WIDTH=width, BLOCK_M=block_m, BLOCK_Q=block_q, BLOCK_L=sizes["block_l"],
        SOFT_CAP=soft_cap is not None, KV_SCALES=has_scales(k_cache_BSKH), NATIVE=facts.knows_ptx,
        STAGES=sizes["stages"],
        PRECISION="ieee" if q_RNH.dtype == torch.float32 else "tf32", num_warps=sizes["warps"],
        **tuning.overlap(device),
    )  # fmt: skip
    return SharedPrefix(length_R, part, stats, pieces, sizes["block_l"])


def _default_sizes(width: int, lines: int, dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:  # as in `prefill_attention`
        return {"block_m": 16, "block_l": 32, "warps": 4, "stages": 1}
    if lines < 128 or width > 128:
        return {"block_m": 64, "block_l": 64 if width <= 128 else 32, "warps": 4, "stages": 3}
    return {"block_m": 128, "block_l": 64, "warps": 8, "stages": 3}
