"""Latent attention in plain torch: the path of the CPU engine, of prompts everywhere, and the judge of the kernels.

The cache of a layer is the latent [B, S, 1, C] and the rotated key [B, S, 1, P] that all heads share. T tokens, R rows,
N heads, C latent width, P rotated width, L keys of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from argosy.kernels import kv_scales
from argosy.kernels.reference import as_bytes, pick, to_cache


def store_latent(latent_TC: Tensor, key_TP: Tensor, latent_cache: Tensor, key_cache: Tensor, slots_T: Tensor) -> None:
    """Write token t to slot slots_T[t] of both caches; -1 is padding and is not written."""
    if slots_T.numel() and int(slots_T.min()) < 0:
        (kept,) = torch.where(slots_T >= 0)
        latent_TC, key_TP, slots_T = latent_TC[kept], key_TP[kept], slots_T[kept]
    for x, cache in ((latent_TC, latent_cache), (key_TP, key_cache)):
        if kv_scales.has_scales(cache):
            kv_scales.store(x[:, None], cache, slots_T.long())
        else:
            kept = as_bytes(to_cache(x, cache.dtype, 1.0))
            as_bytes(cache).view(-1, cache.shape[-1]).index_copy_(0, slots_T.long(), kept)


def decode(
    q_latent_RNC: Tensor,
    q_rotated_RNP: Tensor,
    latent_cache: Tensor,
    key_cache: Tensor,
    block_table_RB: Tensor,
    context_len_R: Tensor,
    *,
    scale: float,
) -> Tensor:
    """What each head sees of the latents, [R, N, C]: softmax((q_latent · latent + q_rotated · key) · scale) · latent.

    One query token a row, the last of its context; rows of context 0 (padding) give zeros.
    """
    out_RNC = torch.zeros_like(q_latent_RNC)
    for row, length in enumerate(context_len_R.tolist()):
        if length == 0:
            continue
        latent_LC, key_LP = gather(latent_cache, key_cache, block_table_RB[row], length)
        logits_NL = q_latent_RNC[row].float() @ latent_LC.float().t() + q_rotated_RNP[row].float() @ key_LP.float().t()
        weights_NL = torch.softmax(logits_NL * scale, dim=-1)
        out_RNC[row] = (weights_NL @ latent_LC.float()).to(out_RNC.dtype)
    return out_RNC


def gather(latent_cache: Tensor, key_cache: Tensor, blocks_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` tokens of a row: latent [L, C] and key [L, P]; from caches with scales, in float32."""
    ids = blocks_B[: -(-length // latent_cache.shape[1])]
    latent_LC, key_LP = (pick(cache, ids).view(-1, cache.shape[-1])[:length] for cache in (latent_cache, key_cache))
    return latent_LC, key_LP


def attend_expanded(q_QNH: Tensor, k_LNH: Tensor, v_LNV: Tensor, *, scale: float) -> Tensor:
    """Causal attention of the last Q of L positions with keys and values of each head, [Q, N, V]."""
    num_queries, length = len(q_QNH), len(k_LNH)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_QNH, k_LNH, v_LNV))
    if num_queries == length:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        query_Q1 = torch.arange(length - num_queries, length, device=q.device)[:, None]
        seen_QL = torch.arange(length, device=q.device) <= query_Q1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_QL, scale=scale)
    return out[0].transpose(0, 1)
