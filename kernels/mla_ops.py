"""The door to latent attention: Triton on CUDA tensors, plain torch elsewhere. Meanings: `mla_reference`.

`store_latent` and `decode` may be captured in a CUDA graph; `gather` and `attend_expanded` serve prompts, whose lengths
the host knows.
"""

from torch import Tensor

from argosy.kernels import mla_reference

gather = mla_reference.gather
attend_expanded = mla_reference.attend_expanded


def store_latent(latent_TC: Tensor, key_TP: Tensor, latent_cache: Tensor, key_cache: Tensor, slots_T: Tensor) -> None:
    """Write token t's latent and rotated key to slot slots_T[t]; -1 is padding."""
    if latent_TC.is_cuda:
        from argosy.kernels import mla_attention

        mla_attention.store_latent(latent_TC, key_TP, latent_cache, key_cache, slots_T)
        return
    mla_reference.store_latent(latent_TC, key_TP, latent_cache, key_cache, slots_T)


def decode(
    q_latent_RNC: Tensor,
    q_rotated_RNP: Tensor,
    latent_cache: Tensor,
    key_cache: Tensor,
    block_table_RB: Tensor,
    context_len_R: Tensor,
    *,
    scale: float,
    max_context: int | None = None,
) -> Tensor:
    """What each head sees of the latents of its row's context, [R, N, C]."""
    if q_latent_RNC.is_cuda:
        from argosy.kernels import mla_attention

        return mla_attention.decode(
            q_latent_RNC, q_rotated_RNP, latent_cache, key_cache, block_table_RB, context_len_R, scale=scale,
            max_context=max_context,
        )  # fmt: skip
    return mla_reference.decode(
        q_latent_RNC, q_rotated_RNP, latent_cache, key_cache, block_table_RB, context_len_R, scale=scale
    )
