"""What products for a few tokens share: asking for weights ahead, which rows a tile has, and how sums are stored."""

import triton
import triton.language as tl


@triton.jit
def prefetch_rows(row_ptr, BYTES: tl.constexpr):
    """Ask for the first BYTES of each row into the second-level cache, 128 of them a request."""
    line = tl.arange(0, BYTES // 128) * 128
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [row_ptr.to(tl.int64)[:, None] + line[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def weight_rows(tile, num_outputs, ROWS: tl.constexpr, GATED: tl.constexpr):
    """The weight rows of a tile: its outputs, or in turn the gate and the up row of half as many."""
    row = tile * ROWS + tl.arange(0, ROWS)
    half = tl.minimum(row // 2, num_outputs - 1) + row % 2 * num_outputs
    return (half if GATED else tl.minimum(row, num_outputs - 1)).to(tl.int64)


@triton.jit
def finish(
    y, row, tile, token, num_tokens, num_outputs, bias_ptr, residual_ptr, out_ptr, stride_out,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y: [TOKENS, ROWS] sums in float32; adds the bias, gates, adds to the residual in place or stores."""
    if BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(y, (TOKENS, ROWS // 2, 2)))
        y = gate * tl.sigmoid(gate) * up
        out = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
    else:
        out = tile * ROWS + tl.arange(0, ROWS)
    inside = (token < num_tokens)[:, None] & (out < num_outputs)[None, :]
    place = token.to(tl.int64)[:, None] * stride_out + out[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + place, inside, other=0.0).to(tl.float32)
        tl.store(residual_ptr + place, y.to(residual_ptr.dtype.element_ty), inside)
    else:
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def let_next_start(x):
    """x; from here on the kernel behind may start. For within a loop, whose loads `gdc_launch_dependents` would keep
    from being asked for ahead: to the compiler this is arithmetic, so its result must be used."""
    return tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
    )
