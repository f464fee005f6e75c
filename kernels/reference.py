"""What each operation means, in plain torch: the path of the CPU engine, and the judge of every kernel.

Letters in names give the axes: T tokens of a step, R rows (requests) of a step, N query heads, K key/value heads,
G = N / K query heads that share one key/value head, H head size, S tokens in a block, B blocks, V vocabulary.
Arithmetic that is sensitive (norms, rotations, softmax, sampling) is float32 whatever the inputs are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from argosy.kernels import kv_scales as own_scales

# Keys gathered at once by `paged_attention`. Larger pieces leave the cache, and glibc hands their memory back to the
# system after each one, to be mapped again page by page for the next.
GATHER_BYTES = 1 << 20


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang and Sennrich 2019). x: [..., D], weight: [D]."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`residual += x` in place, then its norm. Returns (normed, residual); the sum is rounded to its dtype first."""
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) · up for x = [..., gate | up], both of width I (SwiGLU, Shazeer 2020). Returns [..., I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_and_mul(x: Tensor) -> Tensor:
    """gelu(gate) · up with the tanh approximation, for x = [..., gate | up] (GEGLU, Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def fused_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    residual_TO: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x W^T + bias, with what stands before and after it in a decoder block.

    `norm_weight_I`: the input is RMS-normed first. `gated`: the output is [gate | up] and silu(gate) · up is returned,
    [T, O / 2]. `residual_TO`: the result is added to it in place and it is returned.
    """
    if norm_weight_I is not None:
        x_TI = rms_norm(x_TI, norm_weight_I, eps)
    y_TO = F.linear(x_TI, weight_OI, bias_O)
    if gated:
        y_TO = silu_and_mul(y_TO)
    return y_TO if residual_TO is None else residual_TO.add_(y_TO)


def linear_into(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_TO: Tensor) -> Tensor:
    """x W^T + bias, written to `out_TO`."""
    return out_TO.copy_(F.linear(x_TI, weight_OI, bias_O))


def apply_rotary(
    q_TNH: Tensor, k_TKH: Tensor, positions_T: Tensor, cos_sin_PD: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q and k in place by their positions (RoPE, Su et al. 2021) and return them.

    Row p of `cos_sin_PD` is [cos(p·θ_0) .. cos(p·θ_(D/2-1)) | sin(...) ..] in float32; its width D is the rotary
    dimension, and dimensions from D up of each head are left alone. Pair i is (x_i, x_(i+D/2)), the half-split
    of GPT-NeoX and Llama, or (x_2i, x_(2i+1)) when `interleaved`, as in GPT-J.
    """
    cos_T1D, sin_T1D = cos_sin_PD[positions_T].unsqueeze(1).chunk(2, dim=-1)
    for x_TNH in (q_TNH, k_TKH):
        _rotate(x_TNH, cos_T1D, sin_T1D, interleaved)
    return q_TNH, k_TKH


def _rotate(x_TNH: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, interleaved: bool) -> None:
    half = cos_T1D.shape[-1]
    if interleaved:
        first, second = x_TNH[..., 0 : 2 * half : 2], x_TNH[..., 1 : 2 * half : 2]
    else:
        first, second = x_TNH[..., :half], x_TNH[..., half : 2 * half]
    # float32 cos and sin promote bf16 products to float32; one rounding happens in copy_
    rotated_first = (first * cos_T1D).addcmul_(second, sin_T1D, value=-1)
    rotated_second = (second * cos_T1D).addcmul_(first, sin_T1D)
    first.copy_(rotated_first)
    second.copy_(rotated_second)


def store_kv(
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    slots_T: Tensor,
    *,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Write token t to slot slots_T[t] = block_id · S + offset of both caches. A slot of -1 is padding: not written.

    What is written is the key or value divided by its scale; in an e4m3 cache, cut off at the largest number. A cache
    with a scale for each token and head (`kernels.kv_scales`) gets those, and `kv_scales` says nothing about it.
    """
    if slots_T.numel() and int(slots_T.min()) < 0:
        (kept,) = torch.where(slots_T >= 0)
        k_TKH, v_TKH, slots_T = k_TKH[kept], v_TKH[kept], slots_T[kept]
    for x_TKH, cache_BSKH, scale in zip((k_TKH, v_TKH), (k_cache_BSKH, v_cache_BSKH), kv_scales, strict=True):
        if own_scales.has_scales(cache_BSKH):
            own_scales.store(x_TKH, cache_BSKH, slots_T.long())
            continue
        kept_TKH = to_cache(x_TKH, cache_BSKH.dtype, scale)
        as_bytes(cache_BSKH).view(-1, *cache_BSKH.shape[2:]).index_copy_(0, slots_T.long(), as_bytes(kept_TKH))


def pick(cache_BSKH: Tensor, ids: Tensor) -> Tensor:
    """These blocks of a cache; from one with scales, float32."""
    if own_scales.has_scales(cache_BSKH):
        return own_scales.gather(cache_BSKH, ids)
    return as_bytes(cache_BSKH).index_select(0, ids).view(cache_BSKH.dtype)


def as_bytes(x: Tensor) -> Tensor:
    """e4m3 as bytes, for operations that torch has for bytes alone; anything else as it is."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def to_cache(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Keys or values in the numbers of a cache: divided by their scale, and cut off where e4m3 ends."""
    if dtype == torch.float8_e4m3fn:
        return (x.float() / scale).clamp(-448.0, 448.0).to(dtype)
    return (x if scale == 1.0 else x / scale).to(dtype)


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
    """Norm q and k per head if weights are given, rotate them, store k and v. Returns q: [T, N, H], a view of qkv.

    `qkv_TD` is [q | k | v], D = (N + 2K) · H; K and H are those of the cache. What its k part holds afterwards is
    undefined. Without `cos_sin_PD` nothing is rotated.
    """
    num_kv_heads, head_size = k_cache_BSKH.shape[2:]
    qkv = qkv_TD.view(-1, num_heads + 2 * num_kv_heads, head_size)
    q_TNH, k_TKH, v_TKH = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm_weight_H is not None:
        q_TNH.copy_(rms_norm(q_TNH, q_norm_weight_H, eps))
    if k_norm_weight_H is not None:
        k_TKH.copy_(rms_norm(k_TKH, k_norm_weight_H, eps))
    if cos_sin_PD is not None:
        cos_T1D, sin_T1D = cos_sin_PD[positions_T].unsqueeze(1).chunk(2, dim=-1)
        _rotate(qkv[:, : num_heads + num_kv_heads], cos_T1D, sin_T1D, interleaved)  # q and k lie side by side
    store_kv(k_TKH, v_TKH, k_cache_BSKH, v_cache_BSKH, slots_T, kv_scales=kv_scales)
    queries: Tensor = q_TNH
    return queries


def paged_attention(
    q_RNH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    block_table_RB: Tensor,
    context_len_R: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes_N: Tensor | None = None,
    sinks_N: Tensor | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Attention of one query token a row, the last of its context. Rows of context 0 (padding) give zeros.

    All rows of a piece at once: their blocks are gathered, and the G query heads of a key/value head stand in the
    place of query positions, so that keys are not repeated. Options as in `prefill_attention`.
    """
    if own_scales.has_scales(k_cache_BSKH):
        q_RNH, given, kv_scales = q_RNH.float(), q_RNH.dtype, (1.0, 1.0)
    else:
        given = q_RNH.dtype
    scale *= kv_scales[0]
    num_rows, num_heads, head_size = q_RNH.shape
    block_size, num_kv_heads = k_cache_BSKH.shape[1:3]
    heads = (num_kv_heads, num_heads // num_kv_heads)
    lengths = context_len_R.tolist()
    longest = max(lengths, default=0)
    token_bytes = num_kv_heads * head_size * k_cache_BSKH.element_size()
    rows_at_once = max(1, GATHER_BYTES // max(1, token_bytes * longest))
    pieces = []
    for start in range(0, num_rows, rows_at_once):
        rows = slice(start, min(start + rows_at_once, num_rows))
        length = max(1, *lengths[rows]) if num_rows > 1 else max(1, longest)
        num_blocks = -(-length // block_size)
        ids = block_table_RB[rows, :num_blocks].reshape(-1)
        k_RKLH, v_RKLH = (
            pick(cache, ids).view(-1, num_blocks * block_size, num_kv_heads, head_size)[:, :length]
            .to(q_RNH.dtype).transpose(1, 2)
            for cache in (k_cache_BSKH, v_cache_BSKH)
        )  # fmt: skip
        seen = bias = None
        if sliding_window is not None or alibi_slopes_N is not None or min(lengths[rows]) < length:
            key_L = torch.arange(length, device=q_RNH.device)
            last_R111 = context_len_R[rows].view(-1, 1, 1, 1) - 1
            seen = key_L <= last_R111
            if sliding_window is not None:
                seen &= key_L > last_R111 - sliding_window
            if alibi_slopes_N is not None:
                bias = alibi_slopes_N.view(1, *heads, 1) * (key_L - last_R111)
        out = _attend(
            q_RNH[rows].reshape(-1, *heads, head_size), k_RKLH, v_RKLH, seen, scale=scale, soft_cap=soft_cap,
            bias=bias, sinks=None if sinks_N is None else sinks_N.view(1, *heads, 1),
        ).reshape(-1, num_heads, head_size)  # fmt: skip
        if min(lengths[rows]) == 0:
            out = out.masked_fill((context_len_R[rows] == 0)[:, None, None], 0.0)
        pieces.append((out if kv_scales[1] == 1.0 else out * kv_scales[1]).to(given))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces or [torch.empty_like(q_RNH, dtype=given)])


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
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes_N: Tensor | None = None,
    sinks_N: Tensor | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """`rope_and_store`, then `paged_attention`."""
    q_RNH = rope_and_store(
        qkv_RD, positions_R, cos_sin_PD, k_cache_BSKH, v_cache_BSKH, slots_R, num_heads=num_heads,
        interleaved=interleaved, q_norm_weight_H=q_norm_weight_H, k_norm_weight_H=k_norm_weight_H, eps=eps,
        kv_scales=kv_scales,
    )  # fmt: skip
    return paged_attention(
        q_RNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R, scale=scale, sliding_window=sliding_window,
        soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N, sinks_N=sinks_N, kv_scales=kv_scales,
    )  # fmt: skip


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
) -> Tensor:
    """Causal attention of ragged rows over the paged cache, which already holds this step's keys and values.

    Row r has queries query_start_R1[r] .. query_start_R1[r+1] - 1, the last of its context_len_R[r] tokens. The query
    at position i of its row sees position j when j <= i and, with `sliding_window` W, j > i - W. Logits are
    q·k·scale, then soft_cap · tanh(logit / soft_cap) (Gemma 2), then + slope · (j - i) (ALiBi, Press et al. 2021).
    `sinks_N` are logits per head that take part in the softmax but carry no value. Tokens past the last row: zeros.
    `kv_scales`: what keys and values of the cache are to be multiplied by.
    """
    if own_scales.has_scales(k_cache_BSKH):
        if q_TNH.dtype != torch.float32:
            return prefill_attention(
                q_TNH.float(), k_cache_BSKH, v_cache_BSKH, query_start_R1, context_len_R, block_table_RB, scale=scale,
                sliding_window=sliding_window, soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N, sinks_N=sinks_N,
            ).to(q_TNH.dtype)  # fmt: skip
        kv_scales = (1.0, 1.0)
    starts, lengths = query_start_R1.tolist(), context_len_R.tolist()
    num_heads, head_size = q_TNH.shape[1:]
    block_size, num_kv_heads = k_cache_BSKH.shape[1:3]
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap}
    out_TNH = torch.zeros((q_TNH.shape[0], num_heads, head_size), dtype=q_TNH.dtype, device=q_TNH.device)
    singles = [r for r in range(len(lengths)) if starts[r + 1] - starts[r] == 1]
    if singles:
        rows = torch.tensor(singles, device=q_TNH.device)
        tokens = query_start_R1[rows].long()
        attended = paged_attention(
            q_TNH[tokens], k_cache_BSKH, v_cache_BSKH, block_table_RB[rows], context_len_R[rows],
            sliding_window=sliding_window, alibi_slopes_N=alibi_slopes_N, sinks_N=sinks_N, kv_scales=kv_scales,
            **options,
        )  # fmt: skip
        out_TNH[tokens] = attended
    options["scale"] = scale = scale * kv_scales[0]
    for row, length in enumerate(lengths):
        num_queries = starts[row + 1] - starts[row]
        if num_queries < 2:
            continue
        ids = block_table_RB[row, : -(-length // block_size)]
        k_1KLH, v_1KLH = (
            pick(cache, ids).view(-1, num_kv_heads, head_size)[:length].to(q_TNH.dtype).transpose(0, 1)[None]
            for cache in (k_cache_BSKH, v_cache_BSKH)
        )
        tokens_of_row = slice(starts[row], starts[row + 1])
        q_1NLH = q_TNH[tokens_of_row].transpose(0, 1)[None]
        plain = sliding_window is None and soft_cap is None and alibi_slopes_N is None and sinks_N is None
        if plain and num_queries == length:
            out_1NLH = F.scaled_dot_product_attention(
                q_1NLH, k_1KLH, v_1KLH, is_causal=True, scale=scale, enable_gqa=num_heads != num_kv_heads
            )
        else:
            query_Q1 = torch.arange(length - num_queries, length, device=q_TNH.device)[:, None]
            key_L = torch.arange(length, device=q_TNH.device)
            seen_QL = key_L <= query_Q1
            if sliding_window is not None:
                seen_QL &= key_L > query_Q1 - sliding_window
            group = num_heads // num_kv_heads
            if group > 1:
                k_1KLH, v_1KLH = (x.repeat_interleave(group, dim=1) for x in (k_1KLH, v_1KLH))
            out_1NLH = _attend(
                q_1NLH, k_1KLH, v_1KLH, seen_QL[None, None],
                bias=None if alibi_slopes_N is None else alibi_slopes_N.view(1, -1, 1, 1) * (key_L - query_Q1),
                sinks=None if sinks_N is None else sinks_N.view(1, -1, 1, 1), **options,
            )  # fmt: skip
        if kv_scales[1] != 1.0:
            out_1NLH = out_1NLH * kv_scales[1]
        out_TNH[tokens_of_row] = out_1NLH[0].transpose(0, 1)
    return out_TNH


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    *,
    scale: float,
    soft_cap: float | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of q [X, K, Q, H] over k, v [X, K, L, H]; `seen`, `bias` and `sinks` broadcast to [X, K, Q, L]."""
    # on CUDA, torch takes no float32 mask for a 16-bit query
    if soft_cap is None and sinks is None and (bias is None or q.device.type == "cpu"):
        mask = seen
        if bias is not None:
            # ALiBi stays float32 whatever q is: in bf16 a distance of 1000 would be off by 4
            mask = bias.float() if seen is None else bias.float().masked_fill(~seen, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    logits = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + bias
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        logits = torch.cat((logits, sinks.float().expand(*logits.shape[:-1], 1)), dim=-1)
    weights = logits.softmax(dim=-1)[..., : k.shape[-2]]
    return torch.matmul(weights.to(v.dtype), v)


def measured_linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T."""
    return F.linear(x_TI, weight_OI)


def embed_share(token_ids_T: Tensor, weight_WD: Tensor, first_id: int, out_TD: Tensor) -> Tensor:
    """See `ops.embed_share`."""
    local_T = token_ids_T - first_id
    foreign_T = (local_T < 0) | (local_T >= weight_WD.shape[0])
    return out_TD.copy_(weight_WD[local_T.masked_fill(foreign_T, 0)].masked_fill(foreign_T[:, None], 0.0))
