"""Parts of the decode kernel that make sense alone: norm and rotation of heads, asking ahead, joining pieces."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from argosy.kernels import tuning
from argosy.kernels.kv_scales import has_scales


def is_scaled(cache: Tensor, kv_scales: tuple[float, float]) -> bool:
    """Whether keys and values are divided by one scale for all on the way to this cache, or cut off."""
    return not has_scales(cache) and (cache.dtype == torch.float8_e4m3fn or kv_scales != (1.0, 1.0))


def cache_suffix(cache: Tensor) -> str:
    """What sizes measured for a cache in 8 bits have at the end of their key."""
    if cache.element_size() > 1:
        return ""
    return "_int8" if cache.dtype == torch.int8 else "_e4m3_scaled" if has_scales(cache) else "_e4m3"


def check_caches(k_cache: Tensor, v_cache: Tensor, kv_scales: tuple[float, float]) -> tuple[float, float]:
    """Asserts that they lie as kernels read them; returns the scales for all, 1 where each head has its own."""
    scales = has_scales(k_cache)
    assert scales == has_scales(v_cache)
    for cache in (k_cache, v_cache):
        heads, size = cache.shape[2:]
        assert cache.stride()[1:] == (heads * size, size, 1)
        assert cache.dtype != torch.int8 or scales
        assert not scales or cache.shape[1] % 4 == 0  # codes are read by four
    return (1.0, 1.0) if scales else kv_scales


@triton.jit
def for_cache(q, cache_ptr):
    """Queries in the numbers that they are multiplied in: with keys of 8 bits float16, cut off where it ends, because
    e4m3 becomes that in one instruction and bfloat16 in several."""
    EIGHT_BITS: tl.constexpr = cache_ptr.dtype.element_ty == tl.float8e4nv or cache_ptr.dtype.element_ty == tl.int8
    if EIGHT_BITS and q.dtype == tl.bfloat16:
        q = tl.minimum(tl.maximum(q.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    return q


@triton.jit
def scaled(x, inverse):
    """Keys or values as a cache keeps them: over their scale, cut off at the largest e4m3."""
    return tl.minimum(tl.maximum(x.to(tl.float32) * inverse, -448.0), 448.0)


@triton.jit
def angles(
    position_ptr, rotation_ptr, dim, WIDTH: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """For each dimension [W] of a head: the other one of its pair, the cosine, and the sine with the pair's sign."""
    partner = dim
    cos = tl.full((WIDTH,), 1.0, tl.float32)
    sin = tl.zeros((WIDTH,), tl.float32)
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        turns = dim < ROTARY
        if INTERLEAVED:
            partner = tl.where(turns, dim ^ 1, dim)
            pair = dim // 2
        else:
            partner = tl.where(turns, tl.where(dim < HALF, dim + HALF, dim - HALF), dim)
            pair = dim % HALF
        row = rotation_ptr + tl.load(position_ptr).to(tl.int64) * ROTARY
        cos = tl.load(row + pair, turns, other=1.0)
        sin = tl.load(row + HALF + pair, turns, other=0.0)
        sin = tl.where(partner > dim, -sin, sin)
    return partner, cos, sin


@triton.jit
def turn(x, other, weight, other_weight, cos, sin, eps, H: tl.constexpr, NORM: tl.constexpr):
    """Norm and rotate heads: x [X, W], and the other dimension of each one's pair."""
    x = x.to(tl.float32)
    other = other.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / H + eps)
        x *= scale[:, None] * weight[None, :]
        other *= scale[:, None] * other_weight[None, :]
    return x * cos[None, :] + other * sin[None, :]


@triton.jit
def prefetch(row_ptr, BYTES: tl.constexpr):
    """Ask for BYTES at each address into the second-level cache."""
    LINES: tl.constexpr = (BYTES + 127) // 128
    line = tl.arange(0, 1 if LINES <= 1 else (2 if LINES <= 2 else 4)) * 128
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [row_ptr.to(tl.int64)[:, None] + line[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def join(
    part_ptr, stats_ptr, out_ptr, sinks_ptr, pieces,
    G: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, JOIN: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Join the pieces of one row and key/value head, JOIN of them a load, so that few loads wait for each other."""
    head = tl.arange(0, HEADS)
    dim = tl.arange(0, WIDTH)
    in_tile = (head < G)[:, None] & (dim < H)[None, :]
    largest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, WIDTH), tl.float32)
    for start in range(0, pieces, JOIN):
        piece = start + tl.arange(0, JOIN)
        # what is not there weighs nothing; .cg: past the first-level cache, which does not see others' stores
        there = (piece < pieces)[:, None] & (head < G)[None, :]
        stat = stats_ptr + piece[:, None] * 2 * G + head[None, :]
        its_largest = tl.load(stat, there, other=-1e30, cache_modifier=".cg")
        its_total = tl.load(stat + G, there, other=0.0, cache_modifier=".cg")
        its_part = part_ptr + piece[:, None, None] * G * H + head[None, :, None] * H + dim[None, None, :]
        its_acc = tl.load(its_part, there[:, :, None] & (dim < H)[None, None, :], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(largest, tl.max(its_largest, 0))
        shrink = tl.exp2(largest - higher)
        its_shrink = tl.exp2(its_largest - higher[None, :])
        total = total * shrink + tl.sum(its_total * its_shrink, 0)
        acc = acc * shrink[:, None] + tl.sum(its_acc * its_shrink[:, :, None], 0)
        largest = higher
    if SINKS:
        sink = tl.load(sinks_ptr + head, head < G, other=0.0).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(largest, sink)
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.exp2(sink - higher)
        acc *= shrink[:, None]
    total = tl.where(head < G, total, 1.0)
    tl.store(out_ptr + head[:, None] * H + dim[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), in_tile)


def choose_splits(num_groups: int, max_context: int, min_piece: int, num_sms: int, per_sm: int) -> int:
    """Pieces a context may be cut into, so that `per_sm` programs a multiprocessor have work worth a piece each."""
    wanted = max(1, num_sms * per_sm // num_groups)
    return max(1, min(wanted, -(-max_context // min_piece), 64))


def fusing_pays(num_groups: int, device: torch.device) -> bool:
    """Whether `decode_attention` beats its two parts: not where many programs each turn heads for a tile mostly empty.

    Measured on an H200: 64 rows gain 2 %; 144 rows of Llama 8B the same both ways, 200 and 256 rows lose 3 and 4 %.
    """
    return num_groups <= 8 * tuning.device_facts(device).num_sms
