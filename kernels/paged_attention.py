"""Decode attention: one query token a row against the paged cache. The kernel: `decode_kernel`.

Meaning: `reference.paged_attention`. `decode_attention` also does what `rope_and_store` would have done before.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from argosy.kernels import tuning
from argosy.kernels.attention_parts import cache_suffix, check_caches, choose_splits, fusing_pays, is_scaled
from argosy.kernels.decode_kernel import paged_attention_kernel
from argosy.kernels.kv_scales import has_scales
from argosy.kernels.shared_prefix import SharedPrefix, attend_prefix

__all__ = [
    "alone_sizes",
    "choose_splits",
    "decode_attention",
    "even_sizes",
    "fusing_pays",
    "lean_sizes",
    "paged_attention",
    "ring_sizes",
    "rows_of_each_kind",
]
MOST_KEY_BYTES = 512  # of keys that three stages of tiles of 32 have room for on any card
# A multiprocessor's programs of one warp each: from there to there `even_sizes` are faster, by these sizes.
EVEN_PROGRAMS = {"even_half": (7, 8), "even": (12, 16)}
# Rows times key/value heads: as many as eight rows of 8B have on a rank of two cards, where sizes for `some` were
# measured. A quarter of an H200's multiprocessors is one more.
LEAST_SOME = 32


def _kinds(groups: int, num_sms: int) -> tuple[str, ...]:
    """Names of the sizes for so many rows times key/value heads, the better measured first.

    Wide tiles fill the card where there is hardly more than a wave of programs, but compute up to a tile too much of
    each row: 256 rows of 257 tokens took 15 us a layer more by tiles of 128 than by tiles of 32 (H200).
    """
    if groups < num_sms:
        return ("some", "few") if groups >= LEAST_SOME else ("few",)
    if groups <= 2 * num_sms:
        return ("pair", "many")
    if groups < 8 * num_sms:
        return ("many",)
    if groups < 11 * num_sms:
        return ("crowd",)
    return ("throng", "crowd") if groups < 18 * num_sms else ("flood", "crowd")


def rows_of_each_kind(num_kv_heads: int, most_rows: int, num_sms: int, known: Sequence[int] = ()) -> list[int]:
    """The fewest rows, up to so many, that go by sizes which none of the `known` numbers of rows has: each is another
    kernel to compile. On a card with so many multiprocessors."""
    found = {_kinds(rows * num_kv_heads, num_sms): 0 for rows in known}
    for rows in range(1, most_rows + 1):
        found.setdefault(_kinds(rows * num_kv_heads, num_sms), rows)
    return [rows for rows in found.values() if rows]


def even_sizes(num_rows: int, k_cache_BSKH: Tensor) -> tuning.Sizes | None:
    """Sizes for so many rows with contexts of about one length, rotation and all in one launch; None where those for
    rows of any lengths are as fast.

    Programs of one warp need nothing from each other, but the last of a second wave of them is waited for alone: that
    wave has to be nearly full, and no program may be much longer than the others.
    """
    device = k_cache_BSKH.device
    each = num_rows * k_cache_BSKH.shape[2] / tuning.device_facts(device).num_sms
    kinds = [kind for kind, (least, most) in EVEN_PROGRAMS.items() if least <= each <= most]
    if k_cache_BSKH.element_size() != 2 or not kinds:
        return None
    return tuning.pick("paged_attention", f"h{k_cache_BSKH.shape[3]}_{kinds[0]}", device)


def lean_sizes(num_rows: int, k_cache_BSKH: Tensor) -> tuning.Sizes | None:
    """Sizes for one row or a few whose programs leave most of a multiprocessor's shared memory to the kernel before.

    Beside products of packed weights that is worth 6 us a layer of one row (H200); beside products of plain weights,
    which ask for the next weights themselves, a step was slower.
    """
    device = k_cache_BSKH.device
    groups, num_sms = num_rows * k_cache_BSKH.shape[2], tuning.device_facts(device).num_sms
    if k_cache_BSKH.element_size() != 2 or groups > num_sms:
        return None
    kind = "one" if groups <= num_sms // 4 else "lean"
    return tuning.pick("paged_attention", f"h{k_cache_BSKH.shape[3]}_{kind}", device)


def ring_sizes(num_rows: int, k_cache_BSKH: Tensor) -> tuning.Sizes | None:
    """Sizes for a row or a few between products that bring their weights before they wait."""
    device = k_cache_BSKH.device
    if k_cache_BSKH.element_size() != 2 or num_rows * k_cache_BSKH.shape[2] > tuning.device_facts(device).num_sms // 4:
        return None
    return tuning.pick("paged_attention", f"h{k_cache_BSKH.shape[3]}_few_rings", device)


def alone_sizes(num_rows: int, num_heads: int, k_cache_BSKH: Tensor, dtype: torch.dtype) -> tuning.Sizes | None:
    """Sizes of `warp_decode` where it was measured to be faster for so many rows of queries, and takes these."""
    suffix, device = cache_suffix(k_cache_BSKH), k_cache_BSKH.device
    if not suffix or not triton.__version__.startswith(tuning.GLUON_VERSIONS):
        return None
    kinds = _kinds(num_rows * k_cache_BSKH.shape[2], tuning.device_facts(device).num_sms)
    key = f"h{k_cache_BSKH.shape[3]}_{kinds[-1]}{suffix}"
    sizes = tuning.pick("warp_decode", key, device)
    if sizes is None:
        return None
    from argosy.kernels import warp_decode

    return sizes if warp_decode.takes(num_heads, k_cache_BSKH, dtype) else None


def default_sizes(key_bytes: int) -> tuning.Sizes:
    """By the bytes of a key, so that keys and values of a tile fit on chip."""
    if key_bytes > MOST_KEY_BYTES:
        return {"block_l": 16, "warps": 4, "stages": 2, "per_sm": 2}
    return {"block_l": 64 if key_bytes <= 256 else 32, "warps": 4, "stages": 3, "per_sm": 2}


def _launch(
    q_RD: Tensor,
    num_heads: int,
    k_cache_BSKH: Tensor,
    v_cache_BSKH: Tensor,
    block_table_RB: Tensor,
    context_len_R: Tensor,
    *,
    scale: float,
    max_context: int | None,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes_N: Tensor | None,
    sinks_N: Tensor | None,
    sizes: tuning.Sizes | None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    out_RNH: Tensor | None = None,
    shared: SharedPrefix | None = None,
    order_R: Tensor | None = None,
    likely_rows: int | None = None,
    new: dict[str, object] | None = None,
) -> Tensor:
    """`q_RD`: rows of queries, or with `new` (the kernel's arguments about the last token) of the fused projection."""
    num_rows = q_RD.shape[0]
    block_size, num_kv_heads, head_size = k_cache_BSKH.shape[1:]
    group = num_heads // num_kv_heads
    kv_scales = check_caches(k_cache_BSKH, v_cache_BSKH, kv_scales)
    assert block_table_RB.stride(1) == 1
    device = q_RD.device
    if out_RNH is None:
        out_RNH = torch.empty((num_rows, num_heads, head_size), dtype=q_RD.dtype, device=device)
    assert out_RNH.is_contiguous()
    if num_rows == 0:
        return out_RNH
    bound = block_table_RB.shape[1] * block_size
    bound = bound if max_context is None else min(bound, max_context)
    bound = bound if sliding_window is None else min(bound, sliding_window)
    facts = tuning.device_facts(device)
    width = tuning.next_power_of_two(head_size)
    groups = num_rows * num_kv_heads
    few = groups < facts.num_sms
    if sizes is None and q_RD.element_size() == 2:
        suffix = cache_suffix(k_cache_BSKH)
        for kind in _kinds(groups, facts.num_sms):
            if kind in ("some", "pair"):  # what is best there hangs on the step around it
                kind = f"{kind}_g{group}"
            sizes = sizes or tuning.pick("paged_attention", f"h{head_size}_{kind}{suffix}", device)
        if sizes is None and suffix:
            sizes = {
                "block_l": 64 if width <= 128 else 32, "warps": 4 if few else 2, "stages": 3,
                "per_sm": 2 if few else 1, "staged": 1,
            }  # fmt: skip
    sizes = sizes or default_sizes(width * q_RD.element_size())
    block_l = sizes["block_l"] if facts.slug != "interpreter" else 16
    min_piece = max(block_l, sizes.get("min_piece", 0) if facts.slug != "interpreter" else 0)
    splits = 1
    if groups <= tuning.MAX_COUNTERS:
        splits = sizes.get("splits", 0) or choose_splits(
            groups if likely_rows is None else likely_rows * num_kv_heads, bound, min_piece, facts.num_sms,
            sizes["per_sm"],
        )  # fmt: skip
    limit = {"maxnreg": sizes["maxnreg"]} if "maxnreg" in sizes else {}
    part = stats = counters = out_RNH
    if splits > 1:
        part = torch.empty(groups * splits * group * head_size, dtype=torch.float32, device=device)
        stats = torch.empty(groups * splits * group * 2, dtype=torch.float32, device=device)
        counters = tuning.counters(device)
    about_new = {
        "positions_ptr": context_len_R, "rotation_ptr": out_RNH, "q_norm_ptr": out_RNH, "k_norm_ptr": out_RNH,
        "slots_ptr": context_len_R, "eps": 0.0, "NEW": False, "ROTARY": 0, "INTERLEAVED": False, "NORM_Q": False,
        "NORM_K": False, "EARLY": False, "PREFETCHED": 0, "LATE": False,
    } | (new or {})  # fmt: skip
    about_new["LATE"] = about_new["EARLY"] and bool(sizes.get("late", 0)) and k_cache_BSKH.element_size() > 1
    if few and about_new["EARLY"]:
        about_new["PREFETCHED"] = 512  # not for many rows: their keys push each other out again (139 us instead of 102)
    paged_attention_kernel[(num_kv_heads, num_rows, splits)](
        q_ptr=q_RD, k_cache_ptr=k_cache_BSKH, v_cache_ptr=v_cache_BSKH, table_ptr=block_table_RB,
        context_ptr=context_len_R, out_ptr=out_RNH, slopes_ptr=out_RNH if alibi_slopes_N is None else alibi_slopes_N,
        sinks_ptr=out_RNH if sinks_N is None else sinks_N, part_ptr=part, stats_ptr=stats, counter_ptr=counters,
        stride_q=q_RD.stride(0), stride_table=block_table_RB.stride(0), scale=scale * kv_scales[0],
        soft_cap=soft_cap or 0.0, k_inverse=1.0 / kv_scales[0], v_inverse=1.0 / kv_scales[1], v_scale=kv_scales[1],
        SCALED=is_scaled(k_cache_BSKH, kv_scales), KV_SCALES=has_scales(k_cache_BSKH),
        NATIVE=facts.knows_ptx, STAGED=bool(sizes.get("staged", 0)),
        window=sliding_window or 0, num_splits=splits, K=num_kv_heads, G=group, H=head_size,
        S=block_size,
        GROUP=max(16, tuning.next_power_of_two(group)), WIDTH=width, BLOCK_L=block_l, WINDOW=sliding_window is not None,
        SOFT_CAP=soft_cap is not None, ALIBI=alibi_slopes_N is not None, SINKS=sinks_N is not None, SPLIT=splits > 1,
        min_piece=min_piece, HEADS=tuning.next_power_of_two(group),
        JOIN=max(2, min(16, 4096 // (tuning.next_power_of_two(group) * width))), STAGES=sizes["stages"],
        PRECISION="ieee" if q_RD.dtype == torch.float32 else "tf32",
        order_ptr=context_len_R if order_R is None else order_R, ORDERED=order_R is not None,
        shared_ptr=context_len_R if shared is None else shared.length_R,
        shared_part_ptr=out_RNH if shared is None else shared.part,
        shared_stats_ptr=out_RNH if shared is None else shared.stats,
        shared_pieces=1 if shared is None else shared.pieces, SHARED=0 if shared is None else shared.block_l,
        num_warps=sizes["warps"], **limit, **about_new, **tuning.overlap(device),
    )  # fmt: skip
    return out_RNH


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
    shared_len_R: Tensor | None = None,
    order_R: Tensor | None = None,
    likely_rows: int | None = None,
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """Shapes as in `ops.paged_attention`; tokens of q may be strided (a view of the fused projection).

    Two launches with a shared prefix. Must have run once on a device before it is captured there, and not on two
    streams at the same time. `sizes` overrides what was tuned, for the tuner itself.
    """
    assert q_RNH.stride()[1:] == (q_RNH.shape[2], 1)
    plain = sliding_window is None and soft_cap is None and alibi_slopes_N is None and sinks_N is None
    if sizes is None and shared_len_R is None and plain and q_RNH.shape[0]:
        alone = alone_sizes(q_RNH.shape[0], q_RNH.shape[1], k_cache_BSKH, q_RNH.dtype)
        if alone is not None:
            from argosy.kernels import warp_decode

            bound = block_table_RB.shape[1] * k_cache_BSKH.shape[1]
            return warp_decode.warp_decode(
                q_RNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R,
                torch.empty(q_RNH.shape, dtype=q_RNH.dtype, device=q_RNH.device) if out_RNH is None else out_RNH,
                scale=scale, max_context=bound if max_context is None else min(bound, max_context),
                kv_scales=kv_scales, order_R=order_R, sizes=alone,
            )  # fmt: skip
    shared = None
    if shared_len_R is not None and sliding_window is None and alibi_slopes_N is None and q_RNH.shape[0]:
        bound = block_table_RB.shape[1] * k_cache_BSKH.shape[1]
        shared = attend_prefix(
            q_RNH, k_cache_BSKH, v_cache_BSKH, block_table_RB, shared_len_R, scale=scale, kv_scales=kv_scales,
            max_length=bound if max_context is None else min(bound, max_context), soft_cap=soft_cap,
        )  # fmt: skip
    return _launch(
        q_RNH, q_RNH.shape[1], k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R, scale=scale,
        max_context=max_context, sliding_window=sliding_window, soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N,
        sinks_N=sinks_N, sizes=sizes, kv_scales=kv_scales, out_RNH=out_RNH, shared=shared, order_R=order_R,
        likely_rows=likely_rows,
    )  # fmt: skip


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
    inputs_early: bool = False,
    order_R: Tensor | None = None,
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """`rope_and_store` and `paged_attention` in one launch; see `ops.decode_attention`. qkv is only read."""
    num_kv_heads, head_size = k_cache_BSKH.shape[2:]
    assert qkv_RD.shape[1] == (num_heads + 2 * num_kv_heads) * head_size
    assert qkv_RD.stride(1) == 1
    assert cos_sin_PD is None or cos_sin_PD.is_contiguous()
    new = {
        "positions_ptr": positions_R, "rotation_ptr": qkv_RD if cos_sin_PD is None else cos_sin_PD,
        "q_norm_ptr": qkv_RD if q_norm_weight_H is None else q_norm_weight_H,
        "k_norm_ptr": qkv_RD if k_norm_weight_H is None else k_norm_weight_H, "slots_ptr": slots_R, "eps": eps,
        "NEW": True, "ROTARY": 0 if cos_sin_PD is None else cos_sin_PD.shape[1], "INTERLEAVED": interleaved,
        "NORM_Q": q_norm_weight_H is not None, "NORM_K": k_norm_weight_H is not None, "EARLY": inputs_early,
    }  # fmt: skip
    return _launch(
        qkv_RD, num_heads, k_cache_BSKH, v_cache_BSKH, block_table_RB, context_len_R, scale=scale,
        max_context=max_context, sliding_window=sliding_window, soft_cap=soft_cap, alibi_slopes_N=alibi_slopes_N,
        sinks_N=sinks_N, sizes=sizes, kv_scales=kv_scales, order_R=order_R, new=new,
    )  # fmt: skip
