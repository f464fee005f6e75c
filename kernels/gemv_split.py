"""A linear layer for 2 to 64 tokens, bound by reading its weight, as tensor core tiles whose rows are weight rows.

Meaning: `reference.fused_linear`, without a norm. The weight is the left side of the product, so that 64 of its rows
fill the tensor cores whatever the tokens are, and both sides go from memory to them without a register in between. A
rank of a group has few rows (8b over four: 1536, which are 24 tiles for 132 multiprocessors), so inputs are cut into
pieces as well; the piece that is done last adds up all of its tile, in order. A program asks for its first weights
while the kernel before still runs: behind a sum over the group that is a wait for the link.

A norm between two products is no launch of its own (`norm_ahead`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import pieces, tuning
from argosy.kernels.gemv_parts import finish, let_next_start, prefetch_rows, weight_rows
from argosy.kernels.norm_ahead import NormAhead

MAX_TOKENS = 64
LEAST_PREFETCH = 128  # bytes, a line


@triton.jit
def _add_and_norm(
    y, tile, token, num_tokens, num_outputs, bias_ptr, residual_ptr, next_ptr, norm_ptr, squares_ptr, stride_out,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Add y [TOKENS, ROWS] to the residual; leave that times the norm's weight, and its squares."""
    out = tile * ROWS + tl.arange(0, ROWS)
    there = out < num_outputs
    if BIAS:
        y += tl.load(bias_ptr + out, there, other=0.0).to(tl.float32)[None, :]
    inside = (token < num_tokens)[:, None] & there[None, :]
    here = residual_ptr + token.to(tl.int64)[:, None] * stride_out + out[None, :]
    total = (y + tl.load(here, inside, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
    tl.store(here, total, inside)
    y = tl.where(inside, total.to(tl.float32), 0.0)  # the norm of what was stored, as the next layer will read it
    norm = tl.load(norm_ptr + out, there, other=0.0).to(tl.float32)
    next_here = next_ptr + token.to(tl.int64)[:, None] * num_outputs + out[None, :]
    tl.store(next_here, (y * norm[None, :]).to(next_ptr.dtype.element_ty), inside)
    tl.store(squares_ptr + tile * TOKENS + token, tl.sum(y * y, 1))


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def _split_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, part_ptr, counter_ptr,
    squares_ptr, next_ptr, next_norm_ptr, next_squares_ptr,
    num_tokens, num_inputs, num_outputs, piece, num_parts, stride_x, stride_weight, stride_out, eps,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    NORMED: tl.constexpr,  # a power of two that holds the parts of the squares of x; 0: x comes as it is
    NEXT: tl.constexpr,  # leaves the norm of what it adds to for the product behind it
    FIRST: tl.constexpr,  # whether the first weights come into registers before the wait
    PREFETCH: tl.constexpr,
    EARLY: tl.constexpr,  # the kernel behind may start: 0 after the loop, 1 at once, 2 with the last weights
    PDL: tl.constexpr,
):  # fmt: skip
    """A program a tile of weight rows and a piece of the inputs; with RESIDUAL it is `out` that is added to."""
    tile, split = tl.program_id(0), tl.program_id(1)
    token, column = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    row = weight_rows(tile, num_outputs, ROWS, GATED)
    begin = split * piece
    end = tl.minimum(begin + piece, num_inputs)
    w_here = weight_ptr + row[:, None] * stride_weight + column[None, :]
    x_here = x_ptr + tl.minimum(token, num_tokens - 1).to(tl.int64)[:, None] * stride_x + column[None, :]
    if FIRST:
        first = tl.load(w_here + begin)
        begin += WIDTH
    if PDL:
        if PREFETCH > 0:
            prefetch_rows(weight_ptr + row * stride_weight + begin, PREFETCH)
        gdc_wait()
        if EARLY == 1:
            gdc_launch_dependents()
    if NORMED > 0:  # added up behind the loop: nothing waits for them here
        part = tl.arange(0, NORMED)[:, None]
        squares = tl.load(squares_ptr + part * TOKENS + token[None, :], part < num_parts, other=0.0)
    if FIRST:
        first_x = tl.load(x_here + begin - WIDTH)
    last_asked = tl.maximum(end - STAGES * WIDTH, begin) // WIDTH * WIDTH
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(begin, end, WIDTH, num_stages=STAGES):
        if PDL and EARLY == 2:  # noqa: SIM102 - known when compiling, the other only when running
            if start == last_asked:
                tile = let_next_start(tile)
        if EVEN:
            x = tl.load(x_here + start)
            w = tl.load(w_here + start)
        else:
            inside = (start + column < end)[None, :]
            x = tl.load(x_here + start, inside, other=0.0)
            w = tl.load(w_here + start, inside, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc)
    if FIRST:
        acc = tl.dot(first, tl.trans(first_x), acc)
    if PDL and EARLY == 0:
        gdc_launch_dependents()
    if SPLIT:
        splits = tl.num_programs(1)
        if pieces.leave(acc, part_ptr, counter_ptr, tile, split, splits, ROWS, TOKENS) < splits - 1:
            return
        acc = pieces.join(part_ptr, counter_ptr, tile, splits, ROWS, TOKENS)
    if NORMED > 0:
        acc *= 1.0 / tl.sqrt(tl.sum(squares, 0) / num_inputs + eps)[None, :]
    if NEXT:
        _add_and_norm(
            tl.trans(acc), tile, token, num_tokens, num_outputs, bias_ptr, out_ptr, next_ptr, next_norm_ptr,
            next_squares_ptr, stride_out, TOKENS, ROWS, BIAS,
        )  # fmt: skip
        return
    finish(
        tl.trans(acc), row, tile, token, num_tokens, num_outputs, bias_ptr, out_ptr, out_ptr, stride_out,
        TOKENS, ROWS, BIAS, GATED, RESIDUAL,
    )  # fmt: skip


def ahead_for(residual_TD: Tensor, weight_D: Tensor, eps: float, sizes: tuning.Sizes) -> NormAhead:
    """Room for what a product of these sizes that adds to the residual leaves for the one behind it."""
    num_tokens, width = residual_TD.shape
    assert weight_D.shape == (width,)
    parts = triton.cdiv(width, sizes["rows"])
    squares_PT = torch.empty((parts, tile_of(num_tokens)), dtype=torch.float32, device=residual_TD.device)
    values_TD = torch.empty((num_tokens, width), dtype=residual_TD.dtype, device=residual_TD.device)
    return NormAhead(values_TD, squares_PT, weight_D, eps)


def tile_of(num_tokens: int) -> int:
    """Tokens that a program computes."""
    return max(16, tuning.next_power_of_two(num_tokens))


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    out_TO: Tensor,
    sizes: tuning.Sizes,
    *,
    gated: bool = False,
    residual: bool = False,
    normed: NormAhead | None = None,
    ahead: NormAhead | None = None,
) -> Tensor:
    """x W^T + bias, gated (`out_TO` is half as wide then), written or (`residual`) added to `out_TO`; one launch.

    `normed`: what the product before left; it stands for x. `ahead`: what to leave for the product behind, besides.
    """
    x_TI = x_TI if normed is None else normed.values_TD
    num_tokens, num_inputs = x_TI.shape
    num_rows = weight_OI.shape[0]
    device = x_TI.device
    tokens = tile_of(num_tokens)
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
    squares, num_parts = (None, 0) if normed is None else (normed.squares_PT, normed.squares_PT.shape[0])
    assert squares is None or squares.shape[1] == tokens
    assert ahead is None or (residual and not gated and ahead.squares_PT.shape == (tiles, tokens))
    prefetch = min(sizes["prefetch"], tuning.next_power_of_two(piece + 1) // 2 * weight_OI.element_size())
    _split_kernel[(tiles, splits)](
        x_TI, weight_OI, out_TO if bias_O is None else bias_O, out_TO, part, counters,
        out_TO if squares is None else squares, out_TO if ahead is None else ahead.values_TD,
        out_TO if ahead is None else ahead.weight_D, out_TO if ahead is None else ahead.squares_PT,
        num_tokens, num_inputs, num_rows // 2 if gated else num_rows, piece, num_parts,
        x_TI.stride(0), weight_OI.stride(0), out_TO.stride(0), 0.0 if normed is None else normed.eps,
        TOKENS=tokens, ROWS=rows, WIDTH=width, STAGES=sizes["stages"], SPLIT=splits > 1,
        EVEN=num_inputs % width == 0, BIAS=bias_O is not None, GATED=gated, RESIDUAL=residual,
        NORMED=tuning.next_power_of_two(num_parts) if num_parts else 0, NEXT=ahead is not None,
        FIRST=bool(sizes.get("first", 0)) and num_inputs % width == 0,
        PREFETCH=prefetch if prefetch >= LEAST_PREFETCH else 0, EARLY=sizes.get("early", 0),
        num_warps=sizes["warps"], **tuning.overlap(device),
    )  # fmt: skip
    return out_TO
