"""The grouped product with experts of 4 or 8 bits and a scale a group of inputs; rows stay in 16 bits.

Weights are arranged as those of linear layers are (`packed_reference`): the left side of the tensor cores' product,
which comes from memory as it is stored and becomes numbers in the registers that the product reads. Meaning:
`moe_reference`, grouping: `moe_gemm`. By what an expert gets on average:

    8 and 16 rows a block   as `packed_few`: warps share out the inputs, no word is unpacked twice
    more                    as `packed_many`, by warp groups: rows come through shared memory, where all warps find them
    from 512 choices on     some experts at a time become 16 bits in memory, and `moe_gemm` multiplies
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import packed_linear, tuning
from argosy.kernels.moe_parts import own_rows, own_tile, store_turned
from argosy.kernels.moe_reference import IntExpertWeight
from argosy.kernels.packed_few import _fragments
from argosy.kernels.packed_many import add_step, in_rows
from argosy.kernels.packed_parts import ASSEMBLES, BASE_BF16, BASE_FP16, adds_pairs, fields, scale_of, zero_of
from argosy.kernels.packed_reference import COLUMNS, block_of
from argosy.kernels.packed_reference import ROWS as TILE_ROWS

FEW, MANY, WARP_GROUPS = 0, 1, 2
MOST_FEW_BYTES = 131 << 10  # on chip, that three stages of FEW with 16 rows take at most
SLICE_BYTES = 64 << 20  # of plain weights at a time
PICKED_FROM = 16  # rows of a block: fewer find the inputs of an expert's own order inside the product
SLICES_FROM = 512  # choices of an expert on average: from so many on experts become plain, a slice at a time


class Tile(NamedTuple):
    """How a launch is cut: `tiles` of 16 outputs a program; FEW: `warps` share the inputs, `wide` groups at once."""

    kernel: int
    tiles: int
    warps: int
    stages: int
    wide: int = 1


@triton.jit
def _columns(order_ptr, expert, k, num_inputs, ORDERED: tl.constexpr):
    """Which inputs stand at places k: those, or the expert's own order (GPTQ's `desc_act`)."""
    if ORDERED:
        return tl.load(order_ptr + expert.to(tl.int64) * num_inputs + tl.minimum(k, num_inputs - 1))
    else:
        return k


@triton.jit(do_not_specialize=["num_choices", "num_tiles", "num_steps", "shared", "num_blocks"])
def _few_kernel(
    x_ptr, words_ptr, pairs_ptr, order_ptr, bias_ptr, weight_ptr, out_ptr, places_ptr, expert_of_block_ptr,
    num_choices, num_inputs, num_outputs, num_tiles, num_steps, stride_x, shared, num_blocks,
    UNITS: tl.constexpr, HALVES: tl.constexpr, PLANES: tl.constexpr, HALF_SCALES: tl.constexpr, ASM: tl.constexpr,
    ROWS: tl.constexpr, BAND: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, ORDERED: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`num_steps` blocks of columns and planes. A turn is WIDE of them of each of SPLIT warps."""
    T: tl.constexpr = x_ptr.dtype.element_ty
    FP16: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    BASE: tl.constexpr = BASE_FP16 if FP16 else BASE_BF16
    WIDTH: tl.constexpr = UNITS * 64
    GROUP: tl.constexpr = WIDTH // HALVES
    PARTS: tl.constexpr = HALVES * WIDE * SPLIT
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block, first = own_tile(num_blocks, tl.cdiv(num_tiles, TILES), BAND)
    expert = tl.load(expert_of_block_ptr + block)
    if expert >= 0:
        place, is_row, source = own_rows(places_ptr, block, num_choices, shared, ROWS)
        tiles_before = expert.to(tl.int64) * num_tiles
        steps = tl.cdiv(num_steps, SPLIT * WIDE)
        piece = tl.arange(0, TILES * WIDE * UNITS)
        row = tl.arange(0, 16 * TILES)
        tile = tiles_before + tl.minimum(first * TILES + piece // (WIDE * UNITS), num_tiles - 1)
        tile_of_row = tiles_before + tl.minimum(first * TILES + row // 16, num_tiles - 1)
        begin = tl.arange(0, SPLIT) * (steps * WIDE)
        end = tl.minimum(begin + steps * WIDE, num_steps)
        unit = tile * (num_steps * UNITS) + piece % (WIDE * UNITS)
        own_unit = begin[:, None, None] + (piece // UNITS % WIDE)[None, :, None]
        words_here = words_ptr + (
            (unit[None, :, None] + (begin * UNITS)[:, None, None]) * 128 + tl.arange(0, 128)[None, None, :]
        )
        part_of = tl.arange(0, PARTS)
        unit_of_part = part_of % SPLIT * (steps * WIDE) + part_of // SPLIT % WIDE
        half = part_of // (SPLIT * WIDE)
        pairs_here = pairs_ptr + ((tile_of_row * (num_steps * HALVES) * 16 + row % 16)[None, :] + (half * 16)[:, None])
        column = (half * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
        x_row = x_ptr + (source * stride_x)[None, None, :]
        present = is_row[None, None, :]
        ones = tl.full((PARTS, 16, GROUP), 1.0, T)
        acc = tl.zeros((PARTS, 16 * TILES, ROWS), tl.float32)
        for i in tl.range(0, steps, num_stages=STAGES):
            at = unit_of_part + i * WIDE
            k = (at // PLANES * WIDTH)[:, None] + column
            if EVEN:
                words = tl.load(words_here + i * (WIDE * UNITS * 128))
                pair = tl.load(pairs_here + (at * (HALVES * 16))[:, None])
                x = tl.load(x_row + _columns(order_ptr, expert, k, num_inputs, ORDERED)[:, :, None], present, other=0.0)
            else:
                left = own_unit + i * WIDE < end[:, None, None]
                words = tl.load(words_here + i * (WIDE * UNITS * 128), left, other=0)
                inside = (at < num_steps)[:, None]
                pair = tl.load(pairs_here + (at * (HALVES * 16))[:, None], inside, other=0)
                kept = (inside & (k < num_inputs))[:, :, None]
                from_column = _columns(order_ptr, expert, k, num_inputs, ORDERED)
                x = tl.load(x_row + from_column[:, :, None], present & kept, other=0.0)
            a, b, c, d, e, f, g, h = fields(words, FP16, ASM)
            # as in `packed_few`: both sides are the same
            if num_inputs > 0:
                v = _fragments(a, b, c, d, e, f, g, h, HALVES, SPLIT, TILES, WIDE, UNITS)
            else:
                v = _fragments(a, b, c, d, e, f, g, h, HALVES, SPLIT, TILES, WIDE, UNITS)
            part = tl.dot(v, x)
            total = tl.dot(ones, x)
            total = tl.broadcast_to(total[:, None, :, :], (PARTS, TILES, 16, ROWS))
            total = tl.reshape(total, (PARTS, 16 * TILES, ROWS))
            scale, zero = scale_of(pair, HALF_SCALES), zero_of(pair, HALF_SCALES)
            acc += scale[:, :, None] * (part - (zero + BASE)[:, :, None] * total)
        output, y = first * (16 * TILES) + row, tl.sum(acc, 0)
        store_turned(y, bias_ptr, weight_ptr, out_ptr, expert, output, place, is_row, num_outputs, HAS_BIAS, WEIGHTED)


@triton.jit(do_not_specialize=["num_choices", "num_tiles", "num_steps", "shared", "num_blocks"])
def _many_kernel(
    x_ptr, words_ptr, pairs_ptr, order_ptr, bias_ptr, weight_ptr, out_ptr, places_ptr, expert_of_block_ptr,
    num_choices, num_inputs, num_outputs, num_tiles, num_steps, stride_x, shared, num_blocks,
    UNITS: tl.constexpr, HALVES: tl.constexpr, PLANES: tl.constexpr, HALF_SCALES: tl.constexpr, ASM: tl.constexpr,
    ROWS: tl.constexpr, BAND: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, SYNC: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, ORDERED: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A step is a group, of one plane. SYNC: products of warp groups, each added by the ordinary units, as there."""
    WIDTH: tl.constexpr = UNITS * 64
    HIGH: tl.constexpr = TILES * 16
    TIMES: tl.constexpr = 4 // HALVES
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block, first = own_tile(num_blocks, tl.cdiv(num_tiles, TILES), BAND)
    expert = tl.load(expert_of_block_ptr + block)
    if expert >= 0:
        place, is_row, source = own_rows(places_ptr, block, num_choices, shared, ROWS)
        tiles_before = expert.to(tl.int64) * num_tiles
        tile = tiles_before + tl.minimum(first * TILES + tl.arange(0, TILES), num_tiles - 1)
        unit = tl.arange(0, UNITS)
        words_here = words_ptr + (
            ((tile * (num_steps * UNITS))[:, None, None] + unit[None, :, None]) * 128 + tl.arange(0, 128)[None, None, :]
        )
        word = tl.arange(0, 128 // TIMES)
        pairs_here = pairs_ptr + (
            (tile * (num_steps * HALVES * 16))[:, None, None]
            + unit[None, :, None] * 0  # units of a group share its scale
            + (word % HALVES * 16 + word // (4 * HALVES))[None, None, :]
        )
        column = tl.arange(0, WIDTH)
        x_row = x_ptr + (source * stride_x)[:, None]
        row = tl.arange(0, HIGH)
        tile_of_row = tiles_before + tl.minimum(first * TILES + row // 16, num_tiles - 1)
        scales_here = pairs_ptr + (tile_of_row * (num_steps * HALVES * 16) + row % 16)
        one = tl.where(num_inputs > 0, 1.0, 0.0)  # not known to be one when this is compiled
        acc = tl.zeros((HIGH, ROWS) if SYNC else (WARPS, HIGH // WARPS, ROWS), tl.float32)
        for at in tl.range(0, num_steps, num_stages=STAGES):
            words = tl.load(words_here + at * (UNITS * 128))
            upper = tl.load(pairs_here + at * (HALVES * 16))
            lower = tl.load(pairs_here + at * (HALVES * 16) + 8)
            k = at // PLANES * WIDTH + column
            from_column = _columns(order_ptr, expert, k, num_inputs, ORDERED)
            kept = is_row[:, None] if EVEN else is_row[:, None] & (k < num_inputs)[None, :]
            x = tl.load(x_row + from_column[None, :], kept, other=0.0)
            acc = add_step(
                acc, words, upper, lower, x, scales_here + at * 16, one, num_inputs,
                TILES, UNITS, HALVES, HALF_SCALES, WARPS, ROWS, SYNC, ASM,
            )  # fmt: skip
        acc = in_rows(acc, TILES, WARPS, ROWS, SYNC)
        output = first * HIGH + row
        store_turned(acc, bias_ptr, weight_ptr, out_ptr, expert, output, place, is_row, num_outputs, HAS_BIAS, WEIGHTED)


def grouped_gemm(
    x: Tensor,
    weight: IntExpertWeight,
    places: Tensor,
    expert_of_block: Tensor,
    num_choices: int,
    *,
    shared: int,
    bias_EO: Tensor | None = None,
    weights: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """See `moe_gemm.grouped_gemm`."""
    packed, order_EJ, _ = weight
    num_tiles, units = packed.words_MUW.shape[1:3]
    block = block_of(packed.group)
    num_steps = units * COLUMNS // block
    num_blocks = expert_of_block.shape[0]
    rows = places.shape[0] // num_blocks
    out = torch.empty((num_choices, packed.num_outputs), dtype=x.dtype, device=x.device)
    assert x.stride(1) == 1
    assert packed.words_MUW.is_contiguous()
    assert packed.pairs_MKR2.is_contiguous()
    assert order_EJ is None or order_EJ.is_contiguous()
    if tile is None:
        facts = tuning.device_facts(x.device)
        tile = default_tile(rows, num_blocks * triton.cdiv(num_tiles, 4), facts.num_sms, facts.shared_bytes)
    is_few = tile.kernel == FEW
    grid = (num_blocks * triton.cdiv(num_tiles, tile.tiles),)
    even = packed.num_inputs % block == 0 and (not is_few or num_steps % (tile.warps * tile.wide) == 0)
    own = {"SPLIT": tile.warps, "WIDE": tile.wide} if is_few else {"WARPS": tile.warps, "SYNC": tile.kernel != MANY}
    own["ASM"] = ASSEMBLES if is_few else adds_pairs(x.dtype, x.device)
    (_few_kernel if is_few else _many_kernel)[grid](
        x, packed.words_MUW, packed.pairs_MKR2.view(torch.int32), x if order_EJ is None else order_EJ,
        x if bias_EO is None else bias_EO, x if weights is None else weights, out, places, expert_of_block,
        num_choices, packed.num_inputs, packed.num_outputs, num_tiles, num_steps, x.stride(0), shared, num_blocks,
        UNITS=block // COLUMNS, HALVES=block // packed.group, PLANES=packed.planes,
        HALF_SCALES=packed.pairs_MKR2.dtype == torch.float16, ROWS=rows, BAND=8, TILES=tile.tiles, **own,
        STAGES=tile.stages, EVEN=even, ORDERED=order_EJ is not None, HAS_BIAS=bias_EO is not None,
        WEIGHTED=weights is not None, num_warps=tile.warps, **tuning.overlap(x.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_choices", "shared"])
def _pick_kernel(
    x_ptr, order_ptr, out_ptr, places_ptr, expert_of_block_ptr, num_choices, num_inputs, stride_x, shared,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(expert_of_block_ptr + row // ROWS)
    if expert >= 0:  # what stands in the places of nobody's blocks may be anything
        place = tl.load(places_ptr + row)
        if place < num_choices:
            inside = column < num_inputs
            from_column = tl.load(order_ptr + expert.to(tl.int64) * num_inputs + column, inside, other=0)
            x = tl.load(x_ptr + (place // shared).to(tl.int64) * stride_x + from_column, inside, other=0.0)
            tl.store(out_ptr + place.to(tl.int64) * num_inputs + column, x, inside)


def pick(
    x: Tensor, weight: IntExpertWeight, places: Tensor, expert_of_block: Tensor, num_choices: int, *, shared: int
) -> tuple[Tensor, IntExpertWeight]:
    """A row for each choice, [C, J], with the inputs in its expert's order, and the weight without one.

    Inside a product the inputs of an order come one by one, for every tile of outputs again.
    """
    order_EJ = weight.order_EJ
    assert order_EJ is not None
    assert order_EJ.is_contiguous()
    num_inputs = order_EJ.shape[1]
    out = torch.empty((num_choices, num_inputs), dtype=x.dtype, device=x.device)
    block = min(1024, tuning.next_power_of_two(num_inputs))
    _pick_kernel[(places.shape[0], triton.cdiv(num_inputs, block))](
        x, order_EJ, out, places, expert_of_block, num_choices, num_inputs, x.stride(0), shared,
        ROWS=places.shape[0] // expert_of_block.shape[0], BLOCK=block, num_warps=4, **tuning.overlap(x.device),
    )  # fmt: skip
    return out, weight._replace(order_EJ=None)


def can_slice(weight: IntExpertWeight) -> bool:
    """Whether tiles of its rows have no others between them."""
    return weight.packed.num_outputs % TILE_ROWS == 0


def slices(
    weight: IntExpertWeight, dtype: torch.dtype, *, slice_bytes: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(number of the first expert, some experts' plain weights [N, O, I]), in the same memory one after the other."""
    packed = weight.packed
    count, num_out, num_in = packed.words_MUW.shape[0], packed.num_outputs, packed.num_inputs
    words, pairs = packed.words_MUW.flatten(0, 1), packed.pairs_MKR2.flatten(0, 1)
    flat = packed._replace(words_MUW=words, pairs_MKR2=pairs, num_outputs=count * num_out)
    at_once = min(count, max(1, (slice_bytes or SLICE_BYTES) // (num_out * num_in * dtype.itemsize)))
    plain_NOI = torch.empty((at_once, num_out, num_in), dtype=dtype, device=words.device)
    for first in range(0, count, at_once):
        some_NOI = plain_NOI[: min(at_once, count - first)]
        packed_linear.unpack_rows(flat, first * num_out, some_NOI.view(-1, num_in))
        yield first, some_NOI


def default_tile(rows: int, programs: int, num_sms: int, shared_bytes: int = tuning.HOPPER_SHARED_BYTES) -> Tile:
    """By the rows of a block and how many programs of four tiles there are, as measured on an H200 for Mixtral's and
    Qwen3-30B's experts: few programs share the inputs among more warps. Less is asked for ahead where a program has
    less room on chip.
    """
    if rows == 8:
        if programs >= 8 * num_sms:
            return Tile(FEW, 4, 2, 3)
        return Tile(FEW, 2, 4, 3) if programs < 2 * num_sms else Tile(FEW, 2, 2, 4)
    if rows == 16:
        return Tile(FEW, 4, 4 if programs < 16 * num_sms else 1, 3 if shared_bytes >= MOST_FEW_BYTES else 2)
    return Tile(WARP_GROUPS, 8, 8, 3)


def block_rows(average: int) -> int:
    """Rows of a block by what an expert gets on average."""
    return 8 if average <= 8 else 16 if average <= 64 else 128
