"""The door to mixtures of experts: Triton on CUDA tensors, plain torch elsewhere. Meanings: `moe_reference`.

May be captured in a CUDA graph: launch shapes follow from tensor shapes alone.
"""

from torch import Tensor

from argosy.kernels import moe_reference
from argosy.kernels.moe_reference import IntExpertWeight


def choose_experts(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalise: bool = False,
    scaling_factor: float = 1.0,
    correction_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    """(ids [T, K] int32, weights [T, K] float32) from a router's logits."""
    if logits_TE.is_cuda:
        from argosy.kernels import moe_route

        run = moe_route.choose_experts
    else:
        run = moe_reference.choose_experts
    return run(
        logits_TE, top_k, scoring=scoring, renormalise=renormalise, scaling_factor=scaling_factor,
        correction_E=correction_E, num_groups=num_groups, top_groups=top_groups, group_score=group_score,
    )  # fmt: skip


def experts(
    x_TD: Tensor,
    gate_up_EID: Tensor | IntExpertWeight,
    down_EDI: Tensor | IntExpertWeight,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    gate_up_bias_EI: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    limit: float = 0.0,
    alpha: float = 1.0,
    average: int | None = None,
    out_TD: Tensor | None = None,
) -> Tensor:
    """The weighted sum of what each token's experts make of it, [T, D]; ids of -1 add nothing.

    With scales, weights are e4m3 in blocks or MXFP4. `average`: about how many tokens each of these experts gets, where
    many ids are -1; a hint for launches. `out_TD`: where it goes, contiguous.
    """
    if x_TD.is_cuda:
        from argosy.kernels import moe_gemm

        return moe_gemm.experts(
            x_TD, gate_up_EID, down_EDI, ids_TK, weights_TK, gate_up_bias_EI=gate_up_bias_EI,
            down_bias_ED=down_bias_ED, gate_up_scale=gate_up_scale, down_scale=down_scale, limit=limit, alpha=alpha,
            average=average, out_TD=out_TD,
        )  # fmt: skip
    made_TD = moe_reference.experts(
        x_TD, gate_up_EID, down_EDI, ids_TK, weights_TK, gate_up_bias_EI=gate_up_bias_EI, down_bias_ED=down_bias_ED,
        gate_up_scale=gate_up_scale, down_scale=down_scale, limit=limit, alpha=alpha,
    )  # fmt: skip
    return made_TD if out_TD is None else out_TD.copy_(made_TD)
