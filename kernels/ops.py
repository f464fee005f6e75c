"""The door of the room: each operation once. Triton on CUDA tensors, plain torch elsewhere, chosen by the tensor.

What ends a step and begins the next has its own door, `step_ops`. Shapes and meanings stand at the functions of the
same names in `reference` and `tables_reference`. Letters in names give the axes: T tokens of a step, R rows (requests),
N query heads, K key/value heads, H head size, B blocks, S tokens in a block, V vocabulary. A layer's cache is two
contiguous tensors [B, S, K, H]; slot = block id · S + offset.

Every operation may be captured in a CUDA graph: launch shapes follow from tensor shapes and host arguments alone, and
no value of a device tensor is read on the host (`swap_blocks` and `copy_blocks` take host lists and are not captured).
Triton files are imported when a CUDA tensor first needs them, so that a CPU host needs no Triton.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from argosy.kernels import reference, tables_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis. x: [..., D], weight: [D]. Returns a new tensor."""
    if x.is_cuda:
        from argosy.kernels import rms_norm as kernel

        return kernel.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`residual += x` in place, then its norm. Returns (normed, residual)."""
    if x.is_cuda:
        from argosy.kernels import rms_norm as kernel

        return kernel.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) · up for x = [..., gate | up]. Returns half the width."""
    if x.is_cuda:
        from argosy.kernels import activation

        return activation.silu_and_mul(x)
    return reference.silu_and_mul(x)


def gelu_and_mul(x: Tensor) -> Tensor:
    """gelu(gate) · up, tanh approximation, for x = [..., gate | up]. Returns half the width."""
    if x.is_cuda:
        from argosy.kernels import activation

        return activation.gelu_and_mul(x)
    return reference.gelu_and_mul(x)


def fused_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    out_TO: Tensor | None = None,
) -> Tensor:
    """RMS norm of the input (if given a weight), x W^T + bias, silu(gate) · up (if `gated`), added to the residual.

    `out_TO`: where to, if there is no residual. One launch for a few tokens on a GPU, where the product is bound by
    reading W; cuBLAS and separate kernels above, and the gate inside for many, where that was measured to be faster.
    """
    if x_TI.is_cuda:
        from argosy.kernels import gemv, tuning

        if gemv.suits(x_TI, weight_OI):
            return gemv.fused_linear(
                x_TI, weight_OI, bias_O, norm_weight_I=norm_weight_I, eps=eps, residual_TO=residual_TO, gated=gated,
                out_TO=out_TO,
            )  # fmt: skip
        if norm_weight_I is not None:
            x_TI = rms_norm(x_TI, norm_weight_I, eps)
        if gated and bias_O is None and residual_TO is None and tuning.knows("hopper_gate", x_TI.device):
            from argosy.kernels import hopper_gate

            if hopper_gate.suits(x_TI, weight_OI):
                return hopper_gate.gated_linear(x_TI, weight_OI, out_TX=out_TO)
        if residual_TO is not None and bias_O is None and not gated:
            return residual_TO.addmm_(x_TI, weight_OI.t())  # cuBLAS adds to what stands there: no launch of its own
        if out_TO is not None and not gated:
            return linear_into(x_TI, weight_OI, bias_O, out_TO)
        y_TO = F.linear(x_TI, weight_OI, bias_O)
        if gated:
            y_TO = silu_and_mul(y_TO)
        if out_TO is not None:
            return out_TO.copy_(y_TO)
        return y_TO if residual_TO is None else residual_TO.add_(y_TO)
    y_TO = reference.fused_linear(
        x_TI, weight_OI, bias_O, norm_weight_I=norm_weight_I, eps=eps, residual_TO=residual_TO, gated=gated
    )
    return y_TO if out_TO is None else out_TO.copy_(y_TO)


def measured_linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T by a product of ours where one was measured to be faster for this shape here, else by the library."""
    if x_TI.is_cuda:
        from argosy.kernels import gemv

        if gemv.is_measured(x_TI, weight_OI) and gemv.suits(x_TI, weight_OI):
            return gemv.fused_linear(x_TI, weight_OI)
    return F.linear(x_TI, weight_OI)


def linear_into(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_TO: Tensor) -> Tensor:
    """x W^T + bias, written to `out_TO`."""
    if bias_O is None:
        return torch.mm(x_TI, weight_OI.t(), out=out_TO)
    return torch.addmm(bias_O, x_TI, weight_OI.t(), out=out_TO)


def embed_share(token_ids_T: Tensor, weight_WD: Tensor, first_id: int, out_TD: Tensor) -> Tensor:
    """Rows of a table that holds the tokens from `first_id` on; zeros for tokens of other ranks. Into `out_TD`."""
    if token_ids_T.is_cuda:
        from argosy.kernels import embedding

        return embedding.embed_share(token_ids_T, weight_WD, first_id, out_TD)
    return reference.embed_share(token_ids_T, weight_WD, first_id, out_TD)


def apply_rotary(
    q_TNH: Tensor, k_TKH: Tensor, positions_T: Tensor, cos_sin_PD: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q and k in place. `cos_sin_PD`: row p is [cos | sin], float32, D the rotary dimension (may be < H)."""
    if q_TNH.is_cuda:
        from argosy.kernels import rotary

        return rotary.apply_rotary(q_TNH, k_TKH, positions_T, cos_sin_PD, interleaved=interleaved)
    return reference.apply_rotary(q_TNH, k_TKH, positions_T, cos_sin_PD, interleaved=interleaved)


def store_kv(
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    slots_T: Tensor,
    *,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Write token t's key and value, over their scales, to slot slots_T[t] of the caches; slot -1 is not written."""
    if k_TKH.is_cuda:
        from argosy.kernels import kv_cache

        kv_cache.store_kv(k_TKH, v_TKH, k_cache_BSKH, v_cache_BSKH, slots_T, kv_scales=kv_scales)
        return
    reference.store_kv(k_TKH, v_TKH, k_cache_BSKH, v_cache_BSKH, slots_T, kv_scales=kv_scales)


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
    """From the fused projection [T, (N + 2K) · H] to q [T, N, H] (a view, normed and rotated) and k, v in the cache.

    The norms per head are done where weights are given, the rotation where a table is. The k part of qkv is spent.
    """
    if qkv_TD.is_cuda:
        from argosy.kernels import rotary

        run = rotary.rope_and_store
    else:
        run = reference.rope_and_store
    return run(
        qkv_TD, positions_T, cos_sin_PD, k_cache_BSKH, v_cache_BSKH, slots_T, num_heads=num_heads,
        interleaved=interleaved, q_norm_weight_H=q_norm_weight_H, k_norm_weight_H=k_norm_weight_H, eps=eps,
        kv_scales=kv_scales,
    )  # fmt: skip


def copy_blocks(caches: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy block a to block b in every cache tensor [B, ...], for each (a, b); as if all pairs were done at once."""
    swap_blocks(caches, caches, pairs)


def swap_blocks(sources: Sequence[Tensor], destinations: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy block a of sources[i] to block b of destinations[i] for each (a, b), between device and (pinned) host."""
    if any(x.is_cuda for x in (*sources[:1], *destinations[:1])):
        from argosy.kernels import kv_cache

        kv_cache.copy_blocks(sources, destinations, pairs)
        return
    tables_reference.copy_blocks(sources, destinations, pairs)


def gather_blocks(caches: Sequence[Tensor], block_ids: Sequence[int] | Tensor, staged_MB: Tensor) -> None:
    """Lay whole blocks side by side: row i of `staged_MB` [M, bytes of a block] becomes block `block_ids[i]`.

    Caches are contiguous [B, ...] of any type. Ids may be on the device already. On the current stream;
    nothing waits.
    """
    if staged_MB.is_cuda:
        from argosy.kernels import block_transfer

        block_transfer.gather_blocks(caches, block_ids, staged_MB)
        return
    tables_reference.gather_blocks(caches, block_ids, staged_MB)


def scatter_blocks(staged_MB: Tensor, caches: Sequence[Tensor], block_ids: Sequence[int] | Tensor) -> None:
    """The way back of `gather_blocks`. No id may be there twice."""
    if staged_MB.is_cuda:
        from argosy.kernels import block_transfer

        block_transfer.scatter_blocks(staged_MB, caches, block_ids)
        return
    tables_reference.scatter_blocks(staged_MB, caches, block_ids)


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
    order_R: Tensor | None = None,
    likely_rows: int | None = None,
) -> Tensor:
    """Decode: one query token a row, the last of its context, against the paged cache. Returns [R, N, H].

    `context_len_R` (int32) counts this step's token; 0 marks a padding row, which gives zeros. `max_context` bounds the
    lengths on the host (default: what the block table can hold); it sizes the launch, never the result. `out_RNH`:
    where to write, contiguous (part of the output of a mixed step). `order_R` (int32): the rows, those with long
    contexts first, so that none of them begins when the others are done; it changes no result. Where most rows are
    padding, `likely_rows` says for how many the contexts are cut into pieces.
    """
    if q_RNH.is_cuda:
        from argosy.kernels import paged_attention as kernel

        return kernel.paged_attention(
            q_RNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R, scale=scale, max_context=max_context,
            sliding_window=sliding_window, soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N, sinks_N=sinks_N,
            kv_scales=kv_scales, out_RNH=out_RNH, order_R=order_R, likely_rows=likely_rows,
        )  # fmt: skip
    attended = reference.paged_attention(
        q_RNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R, scale=scale, sliding_window=sliding_window,
        soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N, sinks_N=sinks_N, kv_scales=kv_scales,
    )  # fmt: skip
    return attended if out_RNH is None else out_RNH.copy_(attended)


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
    shared_len_R: Tensor | None = None,
    inputs_early: bool = False,
    order_R: Tensor | None = None,
    even: bool = False,
    lean: bool = False,
    rings: bool = False,
) -> Tensor:
    """A decode step from the fused projection to the heads' outputs: `rope_and_store`, then `paged_attention`.

    One launch on a GPU, or two with many rows. `shared_len_R` (int32) says how many tokens at the front, in whole
    blocks, a row has in the same blocks as others that say so too; 0 for rows without, one length for all that have it,
    fewer tokens than any of them has. They are read once for many rows, in a launch of its own. A caller without such
    rows leaves it out. What qkv holds afterwards is undefined.

    `inputs_early` promises that on the device nothing but `qkv_RD` comes from the kernel launched just before:
    positions, slots, table, lengths and the cache's older tokens were written before that one, and may be read while it
    still runs. True for any layer of a captured step. `order_R`: as in `paged_attention`. `even`: contexts are about
    equally long, which another division of the work may suit (`step_ops.even_pays`); it changes no result. Nor does
    `lean`: the products around are of packed weights, beside which few rows do better by small programs; or `rings`:
    they bring their weights before they wait (`fp8_one`).
    """
    if qkv_RD.is_cuda:
        from argosy.kernels import paged_attention as kernel

        num_groups = qkv_RD.shape[0] * k_cache_BSKH.shape[2]
        sizes = None
        if (even or lean or rings) and shared_len_R is None:
            found = kernel.even_sizes if even else kernel.lean_sizes if lean else kernel.ring_sizes
            sizes = found(len(qkv_RD), k_cache_BSKH)
        plain = sliding_window is None and soft_cap is None and alibi_slopes_N is None and sinks_N is None
        apart = sizes is None and (shared_len_R is not None or not kernel.fusing_pays(num_groups, qkv_RD.device))
        if apart or (plain and kernel.alone_sizes(len(qkv_RD), num_heads, k_cache_BSKH, qkv_RD.dtype) is not None):
            q_RNH = rope_and_store(
                qkv_RD, positions_R, cos_sin_PD, k_cache_BSKH, v_cache_BSKH, slots_R, num_heads=num_heads,
                interleaved=interleaved, q_norm_weight_H=q_norm_weight_H, k_norm_weight_H=k_norm_weight_H, eps=eps,
                kv_scales=kv_scales,
            )  # fmt: skip
            return kernel.paged_attention(
                q_RNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R, scale=scale, max_context=max_context,
                sliding_window=sliding_window, soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N, sinks_N=sinks_N,
                kv_scales=kv_scales, shared_len_R=shared_len_R, order_R=order_R,
            )  # fmt: skip
        return kernel.decode_attention(
            qkv_RD, positions_R, cos_sin_PD, k_cache_BSKH, v_cache_BSKH, slots_R, block_table_RB, context_len_R,
            num_heads=num_heads, scale=scale, interleaved=interleaved, q_norm_weight_H=q_norm_weight_H,
            k_norm_weight_H=k_norm_weight_H, eps=eps, max_context=max_context, sliding_window=sliding_window,
            soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N, sinks_N=sinks_N, kv_scales=kv_scales,
            inputs_early=inputs_early, order_R=order_R, sizes=sizes,
        )  # fmt: skip
    return reference.decode_attention(
        qkv_RD, positions_R, cos_sin_PD, k_cache_BSKH, v_cache_BSKH, slots_R, block_table_RB, context_len_R,
        num_heads=num_heads, scale=scale, interleaved=interleaved, q_norm_weight_H=q_norm_weight_H,
        k_norm_weight_H=k_norm_weight_H, eps=eps, sliding_window=sliding_window, soft_cap=soft_cap,
        alibi_slopes_N=alibi_slopes_N, sinks_N=sinks_N, kv_scales=kv_scales,
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
    out_TNH: Tensor | None = None,
    scratch: dict[Any, Any] | None = None,
    num_queries: int | None = None,
    num_context_tokens: int = 0,
) -> Tensor:
    """Causal attention of ragged rows (any mix of prompts, chunks and single tokens) over the paged cache. [T, N, H].

    Row r has the tokens query_start_R1[r] .. query_start_R1[r+1] - 1, the last of its context_len_R[r] (both int32).
    Tokens past the last row are undefined. Many single tokens with long contexts are faster in `paged_attention`, which
    splits a context over the card; `out_TNH` (contiguous) lets both write into one output. `scratch` keeps what is the
    same for all layers of a step that have the same rows. `num_context_tokens`, the sum of `context_len_R` where the
    host knows it, lets rows of a cache in 8 bits be unpacked once for all who read them (`kv_unpack`). The first row
    may begin behind some tokens, which are left alone, and any row may be empty; `num_queries` is then what a row may
    have, where the mean says nothing.
    """
    if q_TNH.is_cuda:
        from argosy.kernels import prefill_attention as kernel

        return kernel.prefill_attention(
            q_TNH, k_cache_BSKH, v_cache_BSKH, query_start_R1, context_len_R, block_table_RB, scale=scale,
            sliding_window=sliding_window, soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N, sinks_N=sinks_N,
            kv_scales=kv_scales, out_TNH=out_TNH, scratch=scratch, num_context_tokens=num_context_tokens,
            num_queries=num_queries,
        )  # fmt: skip
    attended = reference.prefill_attention(
        q_TNH, k_cache_BSKH, v_cache_BSKH, query_start_R1, context_len_R, block_table_RB, scale=scale,
        sliding_window=sliding_window, soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N, sinks_N=sinks_N,
        kv_scales=kv_scales,
    )  # fmt: skip
    if out_TNH is None:
        return attended
    tokens = slice(int(query_start_R1[0]), int(query_start_R1[-1]))
    out_TNH[tokens] = attended[tokens]
    return out_TNH
