"""Weights of 4 or 8 bits with a scale and a zero a group, activations in 16 bits: what they mean, in plain torch.

A word (int32) holds PER = 32 / bits numbers. Within a group the numbers lie strided, so that one position of all words
of a group is a run of neighbouring inputs: with U = group / PER words a group, position j of word c of group g is input
g * group + j * U + c. A kernel unpacks a position at a time and needs no shuffling.

T = tokens, I = inputs, O = outputs, W = words a row = I / PER, G = groups = I / group.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PackedWeight(NamedTuple):
    """w = (q - zero) * scale."""

    words_OW: Tensor  # int32
    scale_zero_OG2: Tensor  # 16-bit float: [scale, zero] of each group, neighbours in one 32-bit word
    bits: int
    group: int

    @property
    def num_inputs(self) -> int:
        """Inputs of the product."""
        return self.words_OW.shape[1] * (32 // self.bits)

    @property
    def num_bytes(self) -> int:
        """Memory of the weight with its scales."""
        return self.words_OW.nbytes + self.scale_zero_OG2.nbytes


def pack(numbers_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, *, bits: int, group: int) -> PackedWeight:
    """From unsigned numbers (any integer type, below 2^bits) to words. Scales and zeros in the activations' dtype."""
    per = 32 // bits
    num_out, num_in = numbers_OI.shape
    assert num_in % group == 0, (num_in, group)
    assert group % per == 0, (group, bits)
    run = group // per
    parts = numbers_OI.view(num_out, num_in // group, per, run)
    words = torch.zeros(num_out, num_in // group, run, dtype=torch.int32, device=numbers_OI.device)
    for position in range(per):
        words |= parts[:, :, position].to(torch.int32) << (bits * position)
    both = torch.stack((scale_OG, zero_OG.to(scale_OG.dtype)), -1).contiguous()
    return PackedWeight(words.view(num_out, num_in // per), both, bits, group)


def unpack(weight: PackedWeight) -> Tensor:
    """The unsigned numbers, int32 [O, I]."""
    per, num_out = 32 // weight.bits, weight.words_OW.shape[0]
    run = weight.group // per
    words = weight.words_OW.view(num_out, -1, 1, run)
    shifts = (torch.arange(per, dtype=torch.int32, device=words.device) * weight.bits).view(1, 1, per, 1)
    return ((words >> shifts) & ((1 << weight.bits) - 1)).reshape(num_out, weight.num_inputs)


def dequantize(weight: PackedWeight) -> Tensor:
    """(q - zero) * scale, [O, I] in the scales' dtype; the product is rounded once."""
    return scaled(unpack(weight), weight.scale_zero_OG2[..., 0], weight.scale_zero_OG2[..., 1], weight.group)


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
    num_out, num_in = weight_OI.shape
    size = num_in if group == -1 else group
    parts = weight_OI.float().view(num_out, num_in // size, size)
    top = (1 << bits) - 1
    if symmetric:
        scale = parts.abs().amax(-1).clamp(min=1e-10) * 2 / top  # the largest is half a step beyond the last number
        zero = torch.full_like(scale, float(1 << (bits - 1)))
    else:
        low, high = parts.amin(-1).clamp(max=0.0), parts.amax(-1).clamp(min=0.0)
        scale = ((high - low) / top).clamp(min=1e-10)
        zero = torch.round(-low / scale).clamp(0, top)
    scale = scale.to(weight_OI.dtype)
    numbers = torch.round(parts / scale.float()[..., None] + zero[..., None]).clamp(0, top).to(torch.int32)
    return regroup(numbers.view(num_out, num_in), scale, zero.to(weight_OI.dtype), bits=bits, group=size)


def regroup(numbers_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, *, bits: int, group: int) -> PackedWeight:
    """`pack`, with groups that are too long for a kernel's steps cut into pieces of the same scale."""
    largest = 128
    if group > largest:
        piece = next(size for size in (128, 64, 32, 16, 8) if group % size == 0)
        scale_OG, zero_OG = (x.repeat_interleave(group // piece, 1) for x in (scale_OG, zero_OG))
        group = piece
    return pack(numbers_OI, scale_OG, zero_OG, bits=bits, group=group)
