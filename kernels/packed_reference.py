"""Weights of 4 or 8 bits with a scale and a zero a group, activations in 16 bits: what they mean, in plain torch.

A word (int32) holds eight numbers of 4 bits; a number of 8 bits is two of them, in two planes: its low half with
(scale, low half of the zero), its high half with (16 scale, high half of the zero). So there is one arrangement, that
of the tensor cores: a unit of 16 rows x 64 columns is 32 lanes of four words, and what a lane reads with one
instruction is, spread out, its part of four tiles of 16 x 16. The bits of a number's place:

    row     = 8 f1 + lane / 4
    column  = 32 w1 + 16 f2 + 8 f0 + 2 (lane % 4) + w0      word 2 w1 + w0 of the lane, its field f0 + 2 f1 + 4 f2

Units of a row of tiles lie one after the other along the inputs, in blocks of a group (at least a unit), the low plane
of a block before its high one. Rows are filled up to 16, columns to a block, with scales of zero.

T = tokens, I = inputs, O = outputs, G = groups = I / group, M = tiles of 16 outputs, U = units along the inputs and
planes, W = 128 words of a unit, K = groups along the inputs and planes, R = 16 rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS, WORDS = 16, 64, 128  # of a unit
LARGEST_GROUP = 128
ROWS_AT_ONCE = 4096  # that are arranged at a time: they are ten times as large in between


class PackedWeight(NamedTuple):
    """w = (q - zero) * scale."""

    words_MUW: Tensor  # int32
    pairs_MKR2: Tensor  # 16-bit float: [scale, zero] of each group and row, neighbours in one 32-bit word
    bits: int
    group: int
    num_inputs: int
    num_outputs: int

    @property
    def num_bytes(self) -> int:
        """Memory of the weight with its scales."""
        return self.words_MUW.nbytes + self.pairs_MKR2.nbytes

    @property
    def planes(self) -> int:
        """Numbers of 4 bits that make one."""
        return self.bits // 4


def block_of(group: int) -> int:
    """Columns of a block: a group, or a unit where groups are smaller."""
    return max(group, COLUMNS)


def shapes(num_out: int, num_in: int, *, bits: int, group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of `words_MUW` and `pairs_MKR2`."""
    tiles, block, planes = -(-num_out // ROWS), block_of(group), bits // 4
    columns = -(-num_in // block) * block * planes
    return (tiles, columns // COLUMNS, WORDS), (tiles, columns // group, ROWS, 2)


def pack(numbers_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, *, bits: int, group: int) -> PackedWeight:
    """From unsigned numbers (any integer type, below 2^bits) to words; zeros are whole numbers below 2^bits, too."""
    num_out, num_in = numbers_OI.shape
    assert group <= LARGEST_GROUP, group
    assert block_of(group) % group == 0, group
    assert num_in % group == 0, (num_in, group)
    words_shape, pairs_shape = shapes(num_out, num_in, bits=bits, group=group)
    words = torch.empty(words_shape, dtype=torch.int32, device=numbers_OI.device)
    pairs = torch.empty(pairs_shape, dtype=scale_OG.dtype, device=scale_OG.device)
    for first in range(0, num_out, ROWS_AT_ONCE):
        rows, tiles = slice(first, first + ROWS_AT_ONCE), slice(first // ROWS, (first + ROWS_AT_ONCE) // ROWS)
        words[tiles] = _words(numbers_OI[rows], bits, block_of(group))
        zero = zero_OG[rows].to(torch.int32)
        per_plane = [
            torch.stack((scale_OG[rows] * 16**plane, (zero >> 4 * plane & 15).to(scale_OG.dtype)), -1)
            for plane in range(bits // 4)
        ]
        pairs[tiles] = _by_block(torch.stack(per_plane, 1), block_of(group) // group)
    return PackedWeight(words, pairs, bits, group, num_in, num_out)


def _by_block(pairs_OPG2: Tensor, groups: int) -> Tensor:
    """From planes of all groups to [M, K, R, 2], with `groups` of them a block."""
    num_out, planes, num_groups, _ = pairs_OPG2.shape
    filled = F.pad(pairs_OPG2, (0, 0, 0, -num_groups % groups, 0, 0, 0, -num_out % ROWS))
    parts = filled.view(-1, ROWS, planes, filled.shape[2] // groups, groups, 2)
    return parts.permute(0, 3, 2, 4, 1, 5).reshape(parts.shape[0], -1, ROWS, 2)


def _words(numbers_OI: Tensor, bits: int, block: int) -> Tensor:
    """[M, U, W] of some rows."""
    num_out, num_in = numbers_OI.shape
    filled = F.pad(numbers_OI.to(torch.int32), (0, -num_in % block, 0, -num_out % ROWS))
    if bits == 8:
        planes = filled.view(filled.shape[0], -1, 1, block)
        filled = torch.cat((planes & 15, planes >> 4), 2).view(filled.shape[0], -1)
    #                     M  f1 row  U  w1 f2 f0 lane w0
    places = filled.view(-1, 2, 8, filled.shape[1] // COLUMNS, 2, 2, 2, 4, 2).permute(0, 3, 2, 7, 4, 8, 5, 1, 6)
    words = torch.zeros(places.shape[:6], dtype=torch.int32, device=filled.device)
    for field in range(8):
        words |= places[..., field // 4, field // 2 % 2, field % 2] << (4 * field)
    return words.view(words.shape[0], words.shape[1], WORDS)


def unpack(weight: PackedWeight) -> Tensor:
    """The unsigned numbers, int32 [O, I]."""
    words = weight.words_MUW
    tiles, units, _ = words.shape
    fields = torch.stack([words >> (4 * field) & 15 for field in range(8)], -1)
    #                     M  U  row lane w1 w0 f2 f1 f0
    places = fields.view(tiles, units, 8, 4, 2, 2, 2, 2, 2).permute(0, 7, 2, 1, 4, 6, 8, 3, 5)
    rows = places.reshape(tiles * ROWS, units * COLUMNS)
    if weight.bits == 8:
        low, high = rows.view(rows.shape[0], -1, 2, block_of(weight.group)).unbind(2)
        rows = (low + 16 * high).reshape(rows.shape[0], -1)
    return rows[: weight.num_outputs, : weight.num_inputs]


def scales_and_zeros(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """[O, G] each, in the dtype of the scales."""
    per_block = block_of(weight.group) // weight.group
    tiles = weight.pairs_MKR2.shape[0]
    parts = weight.pairs_MKR2.view(tiles, -1, weight.planes, per_block, ROWS, 2).permute(0, 4, 2, 1, 3, 5)
    by_plane = parts.reshape(tiles * ROWS, weight.planes, -1, 2)
    by_plane = by_plane[: weight.num_outputs, :, : weight.num_inputs // weight.group]
    zero = sum((by_plane[:, plane, :, 1] * 16**plane for plane in range(1, weight.planes)), by_plane[:, 0, :, 1])
    return by_plane[:, 0, :, 0], zero


def dequantize(weight: PackedWeight) -> Tensor:
    """(q - zero) * scale, [O, I] in the scales' dtype; the product is rounded once."""
    scale_OG, zero_OG = scales_and_zeros(weight)
    return scaled(unpack(weight), scale_OG, zero_OG, weight.group)


def scaled(numbers_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group: int) -> Tensor:
    """(number - zero) * scale, [O, I] in the scales' dtype; the product is rounded once."""
    parts = numbers_OI.reshape(numbers_OI.shape[0], -1, group)
    made = ((parts - zero_OG[..., None].float()) * scale_OG[..., None].float()).to(scale_OG.dtype)
    return made.view(numbers_OI.shape)


def linear(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias with the weight as `dequantize` gives it."""
    return torch.nn.functional.linear(x_TI, dequantize(weight).to(x_TI.dtype), bias_O)


def quantize(weight_OI: Tensor, *, bits: int, group: int, symmetric: bool = True) -> PackedWeight:
    """Round to the nearest: the plain way to make small weights from large ones. `group` -1: a whole row."""
    size = weight_OI.shape[1] if group == -1 else group
    return regroup(*round_to_nearest(weight_OI, bits=bits, group=size, symmetric=symmetric), bits=bits, group=size)


def round_to_nearest(
    weight_OI: Tensor, *, bits: int, group: int, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers [O, I] uint8, scales [O, G], zeros [O, G]), both in the dtype of the weight."""
    num_out, num_in = weight_OI.shape
    parts = weight_OI.float().view(num_out, num_in // group, group)
    top = (1 << bits) - 1
    if symmetric:
        scale = parts.abs().amax(-1).clamp(min=1e-10) * 2 / top  # the largest is half a step beyond the last number
        zero = torch.full_like(scale, float(1 << (bits - 1)))
    else:
        low, high = parts.amin(-1).clamp(max=0.0), parts.amax(-1).clamp(min=0.0)
        scale = ((high - low) / top).clamp(min=1e-10)
        zero = torch.round(-low / scale).clamp(0, top)
    scale = scale.to(weight_OI.dtype)
    numbers = torch.round(parts / scale.float()[..., None] + zero[..., None]).clamp(0, top).to(torch.uint8)
    return numbers.view(num_out, num_in), scale, zero.to(weight_OI.dtype)


def regroup(numbers_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, *, bits: int, group: int) -> PackedWeight:
    """`pack`, with groups that no kernel steps over cut into pieces of the same scale."""
    piece = kernel_group(group)
    scale_OG, zero_OG = (x.repeat_interleave(group // piece, 1) for x in (scale_OG, zero_OG))
    return pack(numbers_OI, scale_OG, zero_OG, bits=bits, group=piece)


def kernel_group(columns: int) -> int:
    """The largest power of two, at most 128, in which `columns` can be cut."""
    return min(LARGEST_GROUP, columns & -columns)
