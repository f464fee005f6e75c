"""Products of rounded activations with e4m3 weights for up to some hundred tokens, where reading the weight is all.

Meaning: `fp8_reference.linear`. The weight is the left side of the tensor cores' product, so that 64 of its rows fill
them whatever the tokens are, and both sides go from memory to the tensor cores without a register in between. A layer
of 4096 rows has 64 such tiles for 132 multiprocessors: the inputs are cut into pieces as well, and the piece that is
done last adds up all of its tile, in order. A program asks for its first weights while the kernel before still runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import pieces, tuning
from argosy.kernels.fp8_reference import Fp8Rows, Fp8Weight
from argosy.kernels.gemv_parts import let_next_start, prefetch_rows

MAX_TOKENS = 256


@triton.jit(do_not_specialize=["num_tokens", "stride_xg"])
def _split_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr, part_ptr, counter_ptr,
    num_tokens, num_outputs, num_inputs, piece, stride_x, stride_w, stride_out, stride_xg, stride_ws,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr, ROW_BLOCK: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    PREFETCH: tl.constexpr,
    EARLY: tl.constexpr,  # the kernel behind may start: 0 after the loop, 1 at once, 2 with the last weights
    PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    begin = split * piece
    end = tl.minimum(begin + piece, num_inputs)
    safe_token = tl.minimum(token, num_tokens - 1).to(tl.int64)
    safe_row = tl.minimum(row, num_outputs - 1).to(tl.int64)
    if PDL:
        if PREFETCH > 0:
            prefetch_rows(w_ptr + safe_row * stride_w + begin, PREFETCH)
        gdc_wait()
        if EARLY == 1:
            gdc_launch_dependents()
    last_asked, nothing = tl.maximum(end - STAGES * WIDTH, begin) // WIDTH * WIDTH, 0
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    x_here = x_ptr + safe_token[:, None] * stride_x + column[None, :]
    w_here = w_ptr + safe_row[:, None] * stride_w + column[None, :]
    for start in tl.range(begin, end, WIDTH, num_stages=STAGES):
        if PDL and EARLY == 2:  # noqa: SIM102 - known when compiling, the other only when running
            if start == last_asked:
                nothing = let_next_start(nothing)
        if EVEN:
            x = tl.load(x_here + start)
            w = tl.load(w_here + start)
        else:
            inside = (start + column < end)[None, :]
            x = tl.load(x_here + start, inside, other=0.0)
            w = tl.load(w_here + start, inside, other=0.0)
        if BLOCKS:
            group = start // WIDTH
            x_scale = tl.load(x_scale_ptr + group * stride_xg + safe_token)
            w_scale = tl.load(w_scale_ptr + safe_row // ROW_BLOCK * stride_ws + group)
            acc += tl.dot(w, tl.trans(x)) * w_scale[:, None] * x_scale[None, :]
        else:
            acc = tl.dot(w, tl.trans(x), acc)
    if PDL and EARLY == 0:
        gdc_launch_dependents()
    row += nothing
    if SPLITS > 1:
        index = tl.program_id(2) * tl.num_programs(0) + tile
        if pieces.leave(acc, part_ptr, counter_ptr, index, split, SPLITS, ROWS, TOKENS) < SPLITS - 1:
            return
        acc = pieces.join(part_ptr, counter_ptr, index, SPLITS, ROWS, TOKENS)
    if not BLOCKS:
        acc *= tl.load(w_scale_ptr + safe_row)[:, None] * tl.load(x_scale_ptr + safe_token)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + safe_row).to(tl.float32)[:, None]
    y = tl.trans(acc).to(out_ptr.dtype.element_ty)
    out = out_ptr + token.to(tl.int64)[:, None] * stride_out + row[None, :]
    tl.store(out, y, (token < num_tokens)[:, None] & (row < num_outputs)[None, :])


def _default_sizes(num_tokens: int, num_inputs: int, num_outputs: int, num_sms: int, blocks: bool) -> dict[str, int]:
    """Near what measured best on an H200: a multiprocessor reads fast enough alone, and only long rows are cut."""
    tokens = max(16, min(64, tuning.next_power_of_two(num_tokens)))
    tiles = -(-num_outputs // 64) * -(-num_tokens // tokens)
    splits = max(1, min(4, num_sms * 2 // tiles, num_inputs // 4096))
    width, stages = (128, 6) if blocks else (256, 4)
    return {"tokens": tokens, "rows": 64, "width": width, "stages": stages, "warps": 4, "splits": splits,
            "prefetch": 512}  # fmt: skip


def linear(
    rows: Fp8Rows, weight: Fp8Weight, bias_O: Tensor | None, dtype: torch.dtype, sizes: tuning.Sizes | None = None
) -> Tensor:
    """x W^T + bias. Groups of the activations must be as wide as the blocks of the weight."""
    x_TI, w_OI = rows.values_TI, weight.values_OI
    num_tokens, num_inputs = x_TI.shape
    num_outputs, block = w_OI.shape[0], weight.block
    device = x_TI.device
    assert w_OI.shape[1] == num_inputs
    assert x_TI.stride(1) == w_OI.stride(1) == weight.scale.stride(-1) == 1
    assert rows.group == (block[1] if block else 0)
    assert rows.scale_TG.stride(0) == 1 or num_tokens == 1
    out = torch.empty((num_tokens, num_outputs), dtype=dtype, device=device)
    if num_tokens == 0:
        return out
    sizes = sizes or _default_sizes(
        num_tokens, num_inputs, num_outputs, tuning.device_facts(device).num_sms, block is not None
    )
    width = block[1] if block else sizes["width"]
    piece = -(-num_inputs // (sizes["splits"] * width)) * width
    splits = -(-num_inputs // piece)
    tiles = -(-num_outputs // sizes["rows"])
    tiles_t = -(-num_tokens // sizes["tokens"])
    if tiles * tiles_t > tuning.MAX_COUNTERS:
        piece, splits = -(-num_inputs // width) * width, 1
    part, counters = out, out
    if splits > 1:
        size = tiles * tiles_t * splits * sizes["rows"] * sizes["tokens"]
        part, counters = torch.empty(size, dtype=torch.float32, device=device), tuning.counters(device)
    _split_kernel[(tiles, splits, tiles_t)](
        x_TI, rows.scale_TG, w_OI, weight.scale, out if bias_O is None else bias_O, out, part, counters,
        num_tokens, num_outputs, num_inputs, piece, x_TI.stride(0), w_OI.stride(0), out.stride(0),
        rows.scale_TG.stride(1), weight.scale.stride(0),
        TOKENS=sizes["tokens"], ROWS=sizes["rows"], WIDTH=width, STAGES=sizes["stages"], SPLITS=splits,
        BLOCKS=block is not None, ROW_BLOCK=block[0] if block else 1, EVEN=num_inputs % width == 0,
        BIAS=bias_O is not None, PREFETCH=min(sizes["prefetch"], tuning.next_power_of_two(piece + 1) // 2),
        EARLY=sizes.get("early", 0), num_warps=sizes["warps"], **tuning.overlap(device),
    )  # fmt: skip
    return out
