"""Keys and values of a step's prompts out of a cache in 8 bits, once, for all tiles that read them.

A prompt's attention reads a key for every tile of some thirty positions behind it, and unpacks it each time. Where that
is often, the rows' blocks are first written as bfloat16, one row's after the other's, into memory that the step gives
back after the layer: three bytes of traffic a number, where each tile would spend instructions. Numbers are those that
`hopper_unpack` makes: kept times scale, rounded once. So an answer depends on what the cache keeps and on nothing else.

Memory is bounded: where rows take more than `UNPACKED_BYTES` they are unpacked on the way, as short ones are.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from argosy.kernels import tuning
from argosy.kernels.attention_parts import cache_suffix
from argosy.kernels.kv_scale_parts import code_place, codes_at, number_place, scale_of
from argosy.kernels.kv_scales import has_scales

UNPACKED_BYTES = 2**28  # 65,536 tokens of Llama 8B; as the calibration says of a GPU where it is used
BLOCK_T = 32  # tokens of a program


class Room(NamedTuple):
    """Where the rows' blocks are written, in blocks: the same for all layers of a step."""

    first_R: Tensor  # int32
    table_RB: Tensor  # int32, instead of the cache's
    num_blocks: int


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["table_ptr", "context_ptr"])
def _unpack_kernel(
    k_ptr, v_ptr, table_ptr, context_ptr, lowest_ptr, first_ptr, out_ptr, stride_table, half,
    K: tl.constexpr, H: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr, SCALES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    chunk, row, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_ptr + row)
    token = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    lowest = tl.load(lowest_ptr + row)
    if (chunk * BLOCK_T >= context) | ((chunk + 1) * BLOCK_T <= lowest):
        return
    there = (token < context) & (token >= lowest)  # blocks before a window may be another's by now
    block = tl.load(table_ptr + row.to(tl.int64) * stride_table + token // S, there, other=0)
    block = block.to(tl.int64) if WIDE else block
    offset = token % S
    slot = tl.load(first_ptr + row).to(tl.int64) * S + token
    dim = tl.arange(0, WIDTH)
    inside = there[:, None] & (dim < H)[None, :]
    which, head = part // K, part % K
    cache_ptr = v_ptr if which == 1 else k_ptr
    if SCALES:
        place = number_place(block, offset, K, H, S)
        code = tl.load(codes_at(cache_ptr) + code_place(block, offset, head, K, H, S), there, other=0)
        scale = scale_of(code)
    else:
        place = (block * S + offset) * (K * H)
        scale = tl.full((BLOCK_T,), 1.0, tl.float32)
    x = tl.load(cache_ptr + (place + head * H)[:, None] + dim[None, :], inside, other=0.0)
    x = x.to(tl.float32) * scale[:, None]
    out = out_ptr + which * half + ((slot * K + head) * H)[:, None] + dim[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), inside)


def make_room(context_len_R: Tensor, block_table_RB: Tensor, block_size: int, num_tokens: int) -> Room:
    """For rows with `num_tokens` tokens in the cache in all (a bound that the host knows)."""
    blocks_R = (context_len_R + (block_size - 1)) // block_size
    first_R = (blocks_R.cumsum(0) - blocks_R).int()
    beside_B = torch.arange(block_table_RB.shape[1], device=context_len_R.device, dtype=torch.int32)
    # each row's last block may be of one token
    return Room(first_R, first_R[:, None] + beside_B, num_tokens // block_size + context_len_R.shape[0])


def unpack(
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    block_table_RB: Tensor,
    context_len_R: Tensor,
    lowest_R: Tensor,
    room: Room,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Keys and values in `dtype`: [room's blocks, S, K, H] each.

    Nothing is written for tokens before `lowest_R` and from `context_len_R` on (both int32).
    """
    _, block_size, num_kv_heads, head_size = k_cache_BSKH.shape
    shape = (room.num_blocks, block_size, num_kv_heads, head_size)
    # always as many bytes, so that the step from which a rank learns its memory has asked for them
    num_numbers = UNPACKED_BYTES // dtype.itemsize
    half = num_numbers // 2
    space = torch.empty(num_numbers, dtype=dtype, device=k_cache_BSKH.device)
    num_chunks = triton.cdiv(block_table_RB.shape[1] * block_size, BLOCK_T)
    _unpack_kernel[(num_chunks, context_len_R.shape[0], 2 * num_kv_heads)](
        k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R, lowest_R, room.first_R, space,
        block_table_RB.stride(0), half,
        K=num_kv_heads, H=head_size, S=block_size, WIDTH=tuning.next_power_of_two(head_size),
        BLOCK_T=BLOCK_T, SCALES=has_scales(k_cache_BSKH),
        WIDE=k_cache_BSKH.shape[0] * k_cache_BSKH.stride(0) >= 1 << 31, num_warps=4,
    )  # fmt: skip
    taken = math.prod(shape)
    return space[:taken].view(shape), space[half : half + taken].view(shape)


def pays(
    q_TNH: Tensor, k_cache_BSKH: Tensor, num_rows: int, num_context_tokens: int, *, window: int | None, special: bool
) -> bool:
    """Whether keys are read often enough, by what was measured on this GPU, and there is room.

    `num_context_tokens`: of all rows, 0 where the host does not know; `special`: Hopper's kernel would attend.
    """
    if k_cache_BSKH.element_size() > 1 or not num_context_tokens or q_TNH.dtype != torch.bfloat16:
        return False
    kind = f"{'hopper' if special else 'any'}{cache_suffix(k_cache_BSKH)}"
    found = tuning.pick("kv_unpack", kind, q_TNH.device)
    if found is None or torch.cuda.is_current_stream_capturing():  # lengths of a recorded step change
        return False
    queries, keys = q_TNH.shape[0] / num_rows, num_context_tokens / num_rows
    if window is not None:
        keys = min(keys, queries + window)
    _, block_size, num_kv_heads, head_size = k_cache_BSKH.shape
    most = (num_context_tokens + num_rows * block_size) * 2 * num_kv_heads * head_size * q_TNH.element_size()
    return most <= UNPACKED_BYTES and queries * (1 - queries / (2 * max(keys, queries))) >= found["queries"]


def attend(
    attention: Callable[..., Tensor],
    q_TNH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    query_start_R1: Tensor,
    context_len_R: Tensor,
    block_table_RB: Tensor,
    *,
    num_context_tokens: int,
    scratch: dict[Any, Any],
    sliding_window: int | None = None,
    **options: Any,
) -> Tensor:
    """`attention` over unpacked keys and values; `options` are handed on to it."""
    if "room" not in scratch:
        scratch["room"] = make_room(context_len_R, block_table_RB, k_cache_BSKH.shape[1], num_context_tokens)
    room: Room = scratch["room"]
    if ("lowest", sliding_window) not in scratch:
        far = context_len_R if sliding_window is None else query_start_R1.diff() + (sliding_window - 1)
        scratch["lowest", sliding_window] = (context_len_R - far).clamp_(min=0).int()
    lowest_R = scratch["lowest", sliding_window]
    caches = unpack(k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R, lowest_R, room, q_TNH.dtype)
    return attention(
        q_TNH, *caches, query_start_R1, context_len_R, room.table_RB, sliding_window=sliding_window, scratch=scratch,
        **options,
    )  # fmt: skip
