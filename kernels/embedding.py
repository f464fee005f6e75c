"""Rows of this rank's part of the vocabulary: one program a token. Meaning: `reference.embed_share`."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning


@triton.jit(do_not_specialize=["first_id", "num_ids"])
def _embed_kernel(
    ids_ptr, weight_ptr, out_ptr, first_id, num_ids, stride_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.load(ids_ptr + token).to(tl.int64) - first_id
    ours = (row >= 0) & (row < num_ids)
    x = tl.load(weight_ptr + row * WIDTH + column, column < tl.where(ours, WIDTH, 0), other=0.0)
    tl.store(out_ptr + token * stride_out + column, x, column < WIDTH)


def embed_share(token_ids_T: Tensor, weight_WD: Tensor, first_id: int, out_TD: Tensor) -> Tensor:
    """Shapes as in `ops.embed_share`; the table contiguous."""
    num_ids, width = weight_WD.shape
    assert weight_WD.is_contiguous()
    assert out_TD.stride(1) == 1
    block = tuning.next_power_of_two(width)
    _embed_kernel[(token_ids_T.shape[0],)](
        token_ids_T, weight_WD, out_TD, first_id, num_ids, out_TD.stride(0), WIDTH=width, BLOCK=block,
        num_warps=min(16, max(1, block // 512)), **tuning.overlap(token_ids_T.device),
    )  # fmt: skip
    return out_TD
