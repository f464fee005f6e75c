"""A linear layer for 2 to 64 tokens, bound by reading its weight, as tensor core tiles whose rows are weight rows.

Meaning: `reference.fused_linear`, without a norm. The weight is the left side of the product, so that 64 of its rows
fill the tensor cores whatever the tokens are, and both sides go from memory to them without a register in between. A
rank of a group has few rows (8b over four: 1536, which are 24 tiles for 132 multiprocessors), so inputs are cut into
pieces as well; the piece that is done last adds up all of its tile, in order. A program asks for its first weights
while the kernel before still runs: behind a sum over the group that is a wait for the link.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import pieces, tuning
from argosy.kernels.gemv_parts import finish, prefetch_rows, weight_rows

MAX_TOKENS = 64
LEAST_PREFETCH = 128  # bytes, a line


@triton.jit(do_not_specialize=["num_tokens"])
def _split_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, part_ptr, counter_ptr,
    num_tokens, num_inputs, num_outputs, piece, stride_x, stride_weight, stride_out,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    PREFETCH: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program a tile of weight rows and a piece of the inputs; with RESIDUAL it is `out` that is added to."""
    tile, split = tl.program_id(0), tl.program_id(1)
    token, column = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    row = weight_rows(tile, num_outputs, ROWS, GATED)
    begin = split * piece
    end = tl.minimum(begin + piece, num_inputs)
    w_here = weight_ptr + row[:, None] * stride_weight + column[None, :]
    x_here = x_ptr + tl.minimum(token, num_tokens - 1).to(tl.int64)[:, None] * stride_x + column[None, :]
    if PDL:
        if PREFETCH > 0:
            prefetch_rows(weight_ptr + row * stride_weight + begin, PREFETCH)
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(begin, end, WIDTH, num_stages=STAGES):
        if EVEN:
            x = tl.load(x_here + start)
            w = tl.load(w_here + start)
        else:
            inside = (start + column < end)[None, :]
            x = tl.load(x_here + start, inside, other=0.0)
            w = tl.load(w_here + start, inside, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc)
    if PDL and not EARLY:
        gdc_launch_dependents()
    if SPLIT:
        splits = tl.num_programs(1)
        if pieces.leave(acc, part_ptr, counter_ptr, tile, split, splits, ROWS, TOKENS) < splits - 1:
            return
        acc = pieces.join(part_ptr, counter_ptr, tile, splits, ROWS, TOKENS)
    finish(
        tl.trans(acc), row, tile, token, num_tokens, num_outputs, bias_ptr, out_ptr, out_ptr, stride_out,
        TOKENS, ROWS, BIAS, GATED, RESIDUAL,
    )  # fmt: skip


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    out_TO: Tensor,
    sizes: tuning.Sizes,
    *,
    gated: bool = False,
    residual: bool = False,
) -> Tensor:
    """x W^T + bias, gated (`out_TO` is half as wide then), written or (`residual`) added to `out_TO`; one launch."""
    num_tokens, num_inputs = x_TI.shape
    num_rows = weight_OI.shape[0]
    device = x_TI.device
    tokens = max(16, tuning.next_power_of_two(num_tokens))
    assert tokens <= MAX_TOKENS
    rows, width = sizes["rows"], sizes["width"]
    tiles = triton.cdiv(num_rows, rows)
    piece = -(-num_inputs // (sizes["splits"] * width)) * width
    splits = -(-num_inputs // piece) if tiles <= tuning.MAX_COUNTERS else 1
    if splits == 1:
        piece = -(-num_inputs // width) * width
    part, counters = out_TO, out_TO
    if splits > 1:
        part = torch.empty(tiles * splits * rows * tokens, dtype=torch.float32, device=device)
        counters = tuning.counters(device)
    prefetch = min(sizes["prefetch"], tuning.next_power_of_two(piece + 1) // 2 * weight_OI.element_size())
    _split_kernel[(tiles, splits)](
        x_TI, weight_OI, out_TO if bias_O is None else bias_O, out_TO, part, counters,
        num_tokens, num_inputs, num_rows // 2 if gated else num_rows, piece,
        x_TI.stride(0), weight_OI.stride(0), out_TO.stride(0),
        TOKENS=tokens, ROWS=rows, WIDTH=width, STAGES=sizes["stages"], SPLIT=splits > 1,
        EVEN=num_inputs % width == 0, BIAS=bias_O is not None, GATED=gated, RESIDUAL=residual,
        PREFETCH=prefetch if prefetch >= LEAST_PREFETCH else 0, EARLY=bool(sizes.get("early", 0)),
        num_warps=sizes["warps"], **tuning.overlap(device),
    )  # fmt: skip
    return out_TO
