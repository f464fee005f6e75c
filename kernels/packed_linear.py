"""Products with weights of 4 or 8 bits. Meaning: `packed_reference.linear`.

One token: the weight is read once and multiplied in float32 registers, a number by a shift, an insertion of exponent
bits and a multiply-add. More: the weight is brought to 16 bits a slice at a time, and cuBLAS multiplies.

On an H200 one token takes as long as with a weight of 16 bits (1.0 to 1.2 times as fast: 1 TB/s of 4.4), and two and
more take two to three times as long. A product by tensor cores with the weight unpacked in registers was tried: each
position of the words took its own way through shared memory, and 8 tokens of 4096 x 28672 took 220 us where a slice of
plain weight and cuBLAS move 530 MB (126 us). What is saved is memory, so far, not time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.packed_reference import PackedWeight

SLICE_BYTES = 64 << 20  # of plain weight at a time
DEFAULT_SIZES = {
    "rows": 4,
    "words": 256,
    "warps": 2,
    "stages": 2,
}  # the best or near it for all shapes of 8B on an H200


@triton.jit
def _number(words, POSITION: tl.constexpr, BITS: tl.constexpr):
    """Position POSITION of each word as float32: put below the exponent of 2^15, where one step is 1, then that off."""
    LOWEST: tl.constexpr = POSITION * BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << 8
    moved = words << (8 - LOWEST) if LOWEST <= 8 else words >> (LOWEST - 8)
    return ((moved & MASK) | 0x47000000).to(tl.float32, bitcast=True) - 32768.0


@triton.jit
def _scale_and_zero(scale_zero_ptr, row, word, num_groups, inside, UNIT: tl.constexpr):
    """[rows, words] each, from pairs that are read as one word."""
    pair = scale_zero_ptr + 2 * (row[:, None] * num_groups + (word // UNIT)[None, :])
    return (
        tl.load(pair, inside, other=0.0).to(tl.float32),
        tl.load(pair + 1, inside, other=0.0).to(tl.float32),
    )


@triton.jit
def _vector_kernel(
    x_ptr, words_ptr, scale_zero_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr,
    num_words, num_outputs, num_groups, eps,
    BITS: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token; a program has ROWS rows of the weight, with a gate in turn a gate's row and its up row."""
    PER: tl.constexpr = 32 // BITS
    tile = tl.program_id(0)
    place = tile * ROWS + tl.arange(0, ROWS)
    if GATED:
        row = (tl.minimum(place // 2, num_outputs - 1) + place % 2 * num_outputs).to(tl.int64)
    else:
        row = tl.minimum(place, num_outputs - 1).to(tl.int64)
    column = tl.arange(0, WORDS)
    if PDL:
        gdc_wait()
    acc = tl.zeros((ROWS, WORDS), tl.float32)
    squares = tl.zeros((WORDS,), tl.float32)
    for start in tl.range(0, num_words, WORDS, num_stages=STAGES):
        word = start + column
        there = word < num_words
        inside = (row[:, None] >= 0) & there[None, :]
        words = tl.load(words_ptr + row[:, None] * num_words + word[None, :], inside, other=0)
        scale, zero = _scale_and_zero(scale_zero_ptr, row, word, num_groups, inside, UNIT)
        total = tl.zeros((WORDS,), tl.float32)
        part = tl.zeros((ROWS, WORDS), tl.float32)
        for position in tl.static_range(PER):
            index = word // UNIT * (UNIT * PER) + position * UNIT + word % UNIT
            x = tl.load(x_ptr + index, there, other=0.0).to(tl.float32)
            if NORM:
                squares += x * x
                x *= tl.load(norm_ptr + index, there, other=0.0).to(tl.float32)
            total += x
            part += _number(words, position, BITS) * x[None, :]
        acc += scale * (part - zero * total[None, :])
    if PDL:
        gdc_launch_dependents()
    y = tl.sum(acc, 1)
    if NORM:
        y *= 1.0 / tl.sqrt(tl.sum(squares, 0) / (num_words * PER) + eps)
    if BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.reshape(y, (ROWS // 2, 2)))
        y = gate * tl.sigmoid(gate) * up
        out = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
    else:
        out = place
    kept = out < num_outputs
    if RESIDUAL:
        y += tl.load(residual_ptr + out, kept, other=0.0).to(tl.float32)
        tl.store(residual_ptr + out, y.to(residual_ptr.dtype.element_ty), kept)
    else:
        tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), kept)


@triton.jit
def _unpack_kernel(
    words_ptr, scale_zero_ptr, out_ptr, num_words, num_groups, first_row, BITS: tl.constexpr, UNIT: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """A row of the weight to 16 bits."""
    PER: tl.constexpr = 32 // BITS
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    there = word < num_words
    words = tl.load(words_ptr + (first_row + row) * num_words + word, there, other=0)
    pair = scale_zero_ptr + 2 * ((first_row + row) * num_groups + word // UNIT)
    scale = tl.load(pair, there, other=0.0).to(tl.float32)
    zero = tl.load(pair + 1, there, other=0.0).to(tl.float32)
    for position in tl.static_range(PER):
        index = word // UNIT * (UNIT * PER) + position * UNIT + word % UNIT
        made = (_number(words, position, BITS) - zero) * scale
        tl.store(out_ptr + row * num_words * PER + index, made.to(out_ptr.dtype.element_ty), there)


def linear(
    x_TI: Tensor,
    weight: PackedWeight,
    bias_O: Tensor | None = None,
    *,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """[T, O]. Norm, residual (written in place) and gate only for one token: what `fuses` says."""
    num_tokens, num_in = x_TI.shape
    num_rows = weight.words_OW.shape[0]
    assert num_in == weight.num_inputs
    assert x_TI.stride(1) == 1
    num_outputs = num_rows // 2 if gated else num_rows
    if num_tokens > 1:
        assert norm_weight_I is None
        assert residual_TO is None
        assert not gated
        return _by_slices(x_TI, weight, bias_O)
    out_TO = residual_TO
    if out_TO is None:
        out_TO = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    unit, num_words = weight.group * weight.bits // 32, weight.words_OW.shape[1]
    num_groups = weight.scale_zero_OG2.shape[1]
    unused = weight.words_OW
    sizes = sizes or tuning.pick("packed_vector", f"{num_in}x{num_rows}", x_TI.device) or DEFAULT_SIZES
    words = min(sizes["words"], tuning.next_power_of_two(num_words))
    _vector_kernel[(triton.cdiv(num_rows, sizes["rows"]),)](
        x_TI, weight.words_OW, weight.scale_zero_OG2, unused if bias_O is None else bias_O,
        unused if norm_weight_I is None else norm_weight_I, out_TO, out_TO,
        num_words, num_outputs, num_groups, eps,
        BITS=weight.bits, UNIT=unit, WORDS=words, ROWS=sizes["rows"], STAGES=sizes["stages"],
        NORM=norm_weight_I is not None, BIAS=bias_O is not None, GATED=gated, RESIDUAL=residual_TO is not None,
        num_warps=sizes["warps"], **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO


def unpack_rows(weight: PackedWeight, first: int, out_RI: Tensor) -> Tensor:
    """Rows of the weight from `first` on in 16 bits, as many as `out_RI` has."""
    num_words = weight.words_OW.shape[1]
    words = min(512, tuning.next_power_of_two(num_words))
    _unpack_kernel[(out_RI.shape[0], triton.cdiv(num_words, words))](
        weight.words_OW, weight.scale_zero_OG2, out_RI, num_words, weight.scale_zero_OG2.shape[1], first,
        BITS=weight.bits, UNIT=weight.group * weight.bits // 32, WORDS=words, num_warps=4,
    )  # fmt: skip
    return out_RI


def _by_slices(x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None) -> Tensor:
    num_rows, num_in = weight.words_OW.shape[0], weight.num_inputs
    out_TO = torch.empty((x_TI.shape[0], num_rows), dtype=x_TI.dtype, device=x_TI.device)
    rows = max(1, min(num_rows, SLICE_BYTES // (num_in * x_TI.element_size())))
    plain = torch.empty((rows, num_in), dtype=x_TI.dtype, device=x_TI.device)
    for first in range(0, num_rows, rows):
        some = unpack_rows(weight, first, plain[: min(rows, num_rows - first)])
        last = first + some.shape[0]
        if bias_O is None:
            torch.mm(x_TI, some.t(), out=out_TO[:, first:last])
        else:
            torch.addmm(bias_O[first:last], x_TI, some.t(), out=out_TO[:, first:last])
    return out_TO
