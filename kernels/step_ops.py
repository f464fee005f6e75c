"""The door of the room for what ends a step and begins the next: tokens drawn, kept, and made the inputs of a decode.

As in `ops`: Triton on CUDA tensors, plain torch elsewhere (`sampling_reference`, `tables_reference`), chosen by the
tensor, and to be captured in a CUDA graph. Letters: R rows, N handles, V vocabulary, B blocks.
"""

from collections.abc import Sequence

from torch import Tensor

from argosy.kernels import ops, sampling_reference, tables_reference


def sample_rows(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    position_R: Tensor,
    *,
    any_random: bool = True,
    any_filter: bool = True,
) -> Tensor:
    """One token id (int64) a row: argmax at temperature 0, else a draw that is a function of the row alone.

    Filters in the order temperature, min_p (0: off), top_k (0: off), top_p (1: off). `seed_R` is int64, `position_R`
    counts the tokens of the row. False for `any_random` or `any_filter` promises that no row needs that work.
    """
    if logits_RV.is_cuda:
        from argosy.kernels import sampling

        run = sampling.sample_rows
    else:
        run = sampling_reference.sample_rows
    return run(
        logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R, any_random=any_random,
        any_filter=any_filter,
    )  # fmt: skip


def prepare_decode(
    rows_R: Tensor,
    new_block_R: Tensor,
    token_R: Tensor,
    last_token_N: Tensor,
    num_computed_N: Tensor,
    block_table_NB: Tensor,
    token_ids_R: Tensor,
    positions_R: Tensor,
    slots_R: Tensor,
    context_len_R: Tensor,
    block_table_RB: Tensor,
    *,
    block_size: int,
    reach_blocks: int = 0,
    advances: bool = True,
) -> None:
    """The inputs of a decode step from tables by handle (N, remembered on the device) for rows (R).

    In: `rows_R` int32 handles (-1: padding), `new_block_R` int32 block that the row's token opens (-1: none),
    `token_R` int32 the row's token where the host knows it (-1: take the one last sampled). Out: token ids, positions,
    slots (int64), context lengths and block table (int32). The tables take over the new block, and each row's computed
    count grows by one.

    Layers with a sliding window have tables of their own: `reach_blocks` of them, up to the last, are then enough (0:
    all). Called for each of several tables, the last call `advances` the counts.
    """
    if rows_R.is_cuda:
        from argosy.kernels import decode_inputs

        implementation = decode_inputs.prepare_decode
    else:
        implementation = tables_reference.prepare_decode
    implementation(
        rows_R, new_block_R, token_R, last_token_N, num_computed_N, block_table_NB, token_ids_R, positions_R, slots_R,
        context_len_R, block_table_RB, block_size=block_size, reach_blocks=reach_blocks, advances=advances,
    )  # fmt: skip


def remember_tokens(
    rows_R: Tensor, token_ids_R: Tensor, logits_RV: Tensor, last_token_N: Tensor, out_R: Tensor
) -> None:
    """Keep each row's sampled token for its next step, and judge it by its logit.

    `out_R` gets the token id, -1 where the logit is not a finite number, -2 where it is -inf (nothing was allowed).
    Rows of handle -1 are padding and are not kept. `logits_RV` may be [R]: only the logits of the tokens.
    """
    if rows_R.is_cuda:
        from argosy.kernels import decode_inputs

        decode_inputs.remember_tokens(rows_R, token_ids_R, logits_RV, last_token_N, out_R)
        return
    tables_reference.remember_tokens(rows_R, token_ids_R, logits_RV, last_token_N, out_R)


def argmax_rows(logits_RV: Tensor) -> Tensor:
    """The most likely token of each row (int64), the first of equals. Rows may be strided."""
    if logits_RV.is_cuda:
        from argosy.kernels import sampling

        unused = logits_RV
        return sampling.sample_rows(
            logits_RV, unused, unused, unused, unused, unused, unused, any_random=False, any_filter=False
        )
    return sampling_reference.argmax_rows(logits_RV)


def part_of_sum(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_TO: Tensor) -> Tensor:
    """x W^T + bias written to `out_TO`, or what adds up to it: float32 [P, T, O] (`GroupSum.add_norm` takes either)."""
    if x_TI.is_cuda and bias_O is None:
        from argosy.kernels import gemv

        pieces_PTO = gemv.left_in_pieces(x_TI, weight_OI)
        if pieces_PTO is not None:
            return pieces_PTO
    return ops.fused_linear(x_TI, weight_OI, bias_O, out_TO=out_TO)


def even_pays(num_rows: int, k_cache_BSKH: Tensor) -> bool:
    """Whether `ops.decode_attention` of so many rows is faster where it may count on contexts of about one length."""
    if not k_cache_BSKH.is_cuda:
        return False
    from argosy.kernels import paged_attention as kernel

    return kernel.even_sizes(num_rows, k_cache_BSKH) is not None


def rows_of_each_kind(num_kv_heads: int, most_rows: int, num_sms: int, known: Sequence[int]) -> list[int]:
    """Numbers of decode rows for which attention has kernels that none of the `known` numbers needs."""
    from argosy.kernels import paged_attention as kernel

    return kernel.rows_of_each_kind(num_kv_heads, most_rows, num_sms, known)
