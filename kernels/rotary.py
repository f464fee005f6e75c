"""Rotate q and k by their positions; fused, also norm each head before and write k and v to the cache after.

One kernel for both. Meaning: `reference.apply_rotary`, `reference.rope_and_store`.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.attention_parts import check_caches, is_scaled, scaled
from argosy.kernels.kv_scale_parts import code_of, code_place, codes_at, inverse_of, magnitude, number_place, rounded
from argosy.kernels.kv_scales import has_scales


# Addresses inside a packed buffer, differ from step to step: a compiled variant for each divisibility by 16
# would be a stall of half a second in the middle of serving.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rotate_kernel(
    x_ptr,  # [T, heads, H] with token stride `stride_x`; heads are [q | k | v] when STORE
    positions_ptr,
    table_ptr,  # [positions, cos | sin], float32
    q_norm_ptr,
    k_norm_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    stride_x,
    eps,
    k_inverse,
    v_inverse,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    ROTARY: tl.constexpr,  # dimensions that are rotated; 0: none
    HALF: tl.constexpr,  # power of two >= ROTARY / 2
    REST: tl.constexpr,  # power of two >= H - ROTARY
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    STORE: tl.constexpr,
    SCALED: tl.constexpr,
    S: tl.constexpr,  # tokens in a block, of a cache with a scale for each token and head; 0: of one without
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_q = head < N
    is_k = (head >= N) & (head < N + K)
    is_v = (head >= N + K) & (head < N + 2 * K)
    present = head < (N + 2 * K if STORE else N)
    pair = tl.arange(0, HALF)
    rest = ROTARY + tl.arange(0, REST)
    if INTERLEAVED:
        first_dim = 2 * pair
        second_dim = 2 * pair + 1
    else:
        first_dim = pair
        second_dim = pair + ROTARY // 2
    in_pair = pair < ROTARY // 2
    in_rest = rest < H
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    x_head = x_ptr + token * stride_x + head * H
    mask_pair = present[:, None] & in_pair[None, :]
    mask_rest = present[:, None] & in_rest[None, :]
    first = tl.load(x_head[:, None] + first_dim[None, :], mask_pair, other=0.0).to(tl.float32)
    second = tl.load(x_head[:, None] + second_dim[None, :], mask_pair, other=0.0).to(tl.float32)
    tail = tl.load(x_head[:, None] + rest[None, :], mask_rest, other=0.0).to(tl.float32)

    if NORM_Q or NORM_K:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(tail * tail, 1)
        scale = 1.0 / tl.sqrt(squares / H + eps)
        if NORM_Q:
            q_scale = tl.where(is_q, scale, 0.0)[:, None]
            other = tl.where(is_q, 0.0, 1.0)[:, None]
            first *= q_scale * tl.load(q_norm_ptr + first_dim, in_pair, other=0.0).to(tl.float32)[None, :] + other
            second *= q_scale * tl.load(q_norm_ptr + second_dim, in_pair, other=0.0).to(tl.float32)[None, :] + other
            tail *= q_scale * tl.load(q_norm_ptr + rest, in_rest, other=0.0).to(tl.float32)[None, :] + other
        if NORM_K:
            k_scale = tl.where(is_k, scale, 0.0)[:, None]
            other = tl.where(is_k, 0.0, 1.0)[:, None]
            first *= k_scale * tl.load(k_norm_ptr + first_dim, in_pair, other=0.0).to(tl.float32)[None, :] + other
            second *= k_scale * tl.load(k_norm_ptr + second_dim, in_pair, other=0.0).to(tl.float32)[None, :] + other
            tail *= k_scale * tl.load(k_norm_ptr + rest, in_rest, other=0.0).to(tl.float32)[None, :] + other

    if ROTARY > 0:
        row = table_ptr + tl.load(positions_ptr + token).to(tl.int64) * ROTARY
        cos = tl.load(row + pair, in_pair, other=1.0)[None, :]
        sin = tl.load(row + ROTARY // 2 + pair, in_pair, other=0.0)[None, :]
        turns = ((is_q | is_k) if STORE else is_q)[:, None]
        rotated = tl.where(turns, first * cos - second * sin, first)
        second = tl.where(turns, second * cos + first * sin, second)
        first = rotated

    kind = x_ptr.dtype.element_ty
    tl.store(x_head[:, None] + first_dim[None, :], first.to(kind), mask_pair & is_q[:, None])
    tl.store(x_head[:, None] + second_dim[None, :], second.to(kind), mask_pair & is_q[:, None])
    if NORM_Q:  # otherwise what is not rotated stands there already
        tl.store(x_head[:, None] + rest[None, :], tail.to(kind), mask_rest & is_q[:, None])
    if STORE:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        kept = k_cache_ptr.dtype.element_ty
        end = tl.where(slot >= 0, N + 2 * K, 0)  # no head of a padding token is written
        write_k = (is_k & (head < end))[:, None]
        write_v = (is_v & (head < end))[:, None]
        if S > 0:
            k_head = k_cache_ptr + number_place(slot // S, slot % S, K, H, S) + (head - N) * H
            v_head = v_cache_ptr + number_place(slot // S, slot % S, K, H, S) + (head - N - K) * H
            largest = tl.maximum(tl.max(magnitude(first), 1), tl.max(magnitude(second), 1))
            code = code_of(tl.maximum(largest, tl.max(magnitude(tail), 1)), k_cache_ptr)
            inverse = inverse_of(code)[:, None]
            first = rounded(first, inverse, k_cache_ptr)
            second = rounded(second, inverse, k_cache_ptr)
            tail = rounded(tail, inverse, k_cache_ptr)
            k_code = codes_at(k_cache_ptr) + code_place(slot // S, slot % S, head - N, K, H, S)
            v_code = codes_at(v_cache_ptr) + code_place(slot // S, slot % S, head - N - K, K, H, S)
            tl.store(k_code, code.to(tl.uint8), is_k & (head < end))
            tl.store(v_code, code.to(tl.uint8), is_v & (head < end))
        else:
            k_head = k_cache_ptr + (slot * K + head - N) * H
            v_head = v_cache_ptr + (slot * K + head - N - K) * H
        if SCALED:
            inverse = tl.where(is_k, k_inverse, v_inverse)[:, None]
            first = scaled(first, inverse)
            second = scaled(second, inverse)
            tail = scaled(tail, inverse)
        tl.store(k_head[:, None] + first_dim[None, :], first.to(kept), mask_pair & write_k)
        tl.store(k_head[:, None] + second_dim[None, :], second.to(kept), mask_pair & write_k)
        tl.store(k_head[:, None] + rest[None, :], tail.to(kept), mask_rest & write_k)
        tl.store(v_head[:, None] + first_dim[None, :], first.to(kept), mask_pair & write_v)
        tl.store(v_head[:, None] + second_dim[None, :], second.to(kept), mask_pair & write_v)
        tl.store(v_head[:, None] + rest[None, :], tail.to(kept), mask_rest & write_v)


def _sizes(num_tokens: int, num_heads: int, head_size: int, rotary: int) -> dict[str, int]:
    """A few heads a program while tokens are few, to spread over the card; many when there are tokens enough."""
    heads = min(tuning.next_power_of_two(num_heads), 4 if num_tokens <= 64 else 16)
    return {
        "ROTARY": rotary,
        "HALF": tuning.next_power_of_two(max(1, rotary // 2)),
        "REST": tuning.next_power_of_two(max(1, head_size - rotary)),
        "HEADS": heads,
        "num_warps": max(1, min(8, heads * head_size // 512)),
    }


def apply_rotary(
    q_TNH: Tensor, k_TKH: Tensor, positions_T: Tensor, cos_sin_PD: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q and k in place, a launch each. Heads must be contiguous within a token; tokens may be strided."""
    for x in (q_TNH, k_TKH):
        num_tokens, num_heads, head_size = x.shape
        assert x.stride(2) == 1
        assert x.stride(1) == head_size or num_heads == 1
        assert cos_sin_PD.is_contiguous()
        sizes = _sizes(num_tokens, num_heads, head_size, cos_sin_PD.shape[1])
        if num_tokens == 0:
            continue
        _rotate_kernel[(num_tokens, triton.cdiv(num_heads, sizes["HEADS"]))](
            x, positions_T, cos_sin_PD, x, x, x, x, positions_T, x.stride(0), 0.0, 1.0, 1.0,
            N=num_heads, K=0, H=head_size, INTERLEAVED=interleaved, NORM_Q=False, NORM_K=False, STORE=False,
            SCALED=False, S=0,
            **sizes, **tuning.overlap(x.device),
        )  # fmt: skip
    return q_TNH, k_TKH


def rope_and_store(
    qkv_TD: Tensor,
    positions_T: Tensor,
    cos_sin_PD: Tensor | None,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    slots_T: Tensor,
    *,
    num_heads: int,
    interleaved: bool = False,
    q_norm_weight_H: Tensor | None = None,
    k_norm_weight_H: Tensor | None = None,
    eps: float = 1e-6,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """One launch: norm and rotate q (in place) and k, write k and v to their slots. Returns q: [T, N, H], a view."""
    num_kv_heads, head_size = k_cache_BSKH.shape[2:]
    num_tokens, total_heads = qkv_TD.shape[0], num_heads + 2 * num_kv_heads
    assert qkv_TD.shape[1] == total_heads * head_size
    assert qkv_TD.stride(1) == 1
    kv_scales = check_caches(k_cache_BSKH, v_cache_BSKH, kv_scales)
    assert slots_T.shape == (num_tokens,)
    assert cos_sin_PD is None or cos_sin_PD.is_contiguous()
    sizes = _sizes(num_tokens, total_heads, head_size, 0 if cos_sin_PD is None else cos_sin_PD.shape[1])
    if num_tokens:
        _rotate_kernel[(num_tokens, triton.cdiv(total_heads, sizes["HEADS"]))](
            qkv_TD, positions_T, slots_T if cos_sin_PD is None else cos_sin_PD,
            qkv_TD if q_norm_weight_H is None else q_norm_weight_H,
            qkv_TD if k_norm_weight_H is None else k_norm_weight_H,
            k_cache_BSKH, v_cache_BSKH, slots_T, qkv_TD.stride(0), eps, 1.0 / kv_scales[0], 1.0 / kv_scales[1],
            N=num_heads, K=num_kv_heads, H=head_size, INTERLEAVED=interleaved, STORE=True,
            SCALED=is_scaled(k_cache_BSKH, kv_scales), S=k_cache_BSKH.shape[1] if has_scales(k_cache_BSKH) else 0,
            NORM_Q=q_norm_weight_H is not None, NORM_K=k_norm_weight_H is not None,
            **sizes, **tuning.overlap(qkv_TD.device),
        )  # fmt: skip
    return qkv_TD[:, : num_heads * head_size].view(num_tokens, num_heads, head_size)
