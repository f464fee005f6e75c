"""What all grouped products of experts begin and end with: which block and tile is whose, whose rows, and the way out.

Meaning and grouping: `moe_gemm`. A program has a block of ROWS sorted rows, all of one expert, and a tile of outputs.
"""

import triton
import triton.language as tl


@triton.jit
def own_tile(num_blocks, num_tiles, BAND: tl.constexpr):
    """(block of rows, tile of outputs): programs that follow each other take the same tile of weights for up to BAND
    blocks of rows, which the cache shares.
    """
    band = tl.program_id(0) // (BAND * num_tiles)
    in_band = tl.minimum(num_blocks - band * BAND, BAND)
    inside_band = tl.program_id(0) % (BAND * num_tiles)
    return band * BAND + inside_band % in_band, inside_band // in_band


@triton.jit
def own_rows(places_ptr, block, num_choices, shared, ROWS: tl.constexpr):
    """(place of each row among the choices, whether it is one, the row of x that it comes from)."""
    place = tl.load(places_ptr + block * ROWS + tl.arange(0, ROWS))
    is_row = place < num_choices
    return place, is_row, (tl.where(is_row, place, 0) // shared).to(tl.int64)


@triton.jit
def store_turned(
    acc, bias_ptr, weight_ptr, out_ptr, expert, output, place, is_row, num_outputs,
    HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """[outputs, rows] with the expert's bias and the router's weights to where the choices are."""
    is_output = output < num_outputs
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * num_outputs + output, is_output, other=0.0).to(tl.float32)[:, None]
    if WEIGHTED:
        acc *= tl.load(weight_ptr + place, is_row, other=0.0)[None, :]
    where = out_ptr + place.to(tl.int64)[:, None] * num_outputs + output[None, :]
    tl.store(where, tl.trans(acc).to(out_ptr.dtype.element_ty), is_row[:, None] & is_output[None, :])
