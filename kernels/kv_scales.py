"""A cache in 8 bits with a scale for each token and key/value head: how it lies, and what rounding means. Plain torch.

A block of a layer's keys (or values) is one run of bytes: S · K · H numbers, then K · S scales of a byte each. So
copies and swaps move scales with their block and know nothing of them, and a cache is still one tensor [B, S, K, H], of
int8 or e4m3, whose blocks lie S · K · (H + 1) bytes apart: that distance is how everybody tells that there are scales.

A scale is the code c of the float32 whose upper bits are c + 766, over 2^108: two bits of mantissa, so neighbours are
at most 1.25 apart, and 63 octaves from 1.5 · 2^-44. Codes are taken upwards: a head's largest number never overflows.

    int8    |x - kept| <= scale / 2             <= max|x| / 203    (max|x|: of that token and head)
    e4m3    |x - kept| <= |x| / 16 + scale / 1024   <= max|x| / 22

Two things lie outside. Heads whose largest number is below 4e-11 are kept with the smallest scale (an error of 2e-12 at
most); above 10^8, which only bfloat16 and float32 reach, numbers are cut off. A head with nan or inf gets the code of
nan, so whoever reads it fails as with a cache in 16 bits, and is not answered with rubbish.
"""

import torch
from torch import Tensor

FIRST_CODE = 766
MANTISSA_BITS = 2
SHIFT = 23 - MANTISSA_BITS
UNIT = 2.0**-108
LAST_CODE, NAN_CODE = 253, 255
INT8_TOP, E4M3_TOP = 127.0, 448.0  # the largest number in each
SMALLEST_SCALE = 1.5 * 2.0**-44
LARGEST_SCALE = 1.75 * 2.0**19


def block_bytes(block_size: int, num_kv_heads: int, head_size: int) -> int:
    """Bytes of one block of keys, or of values: numbers and scales."""
    return block_size * num_kv_heads * (head_size + 1)


def as_scaled_cache(raw_BX: Tensor, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> Tensor:
    """The cache [B, S, K, H] that lies in `raw_BX`, uint8 [blocks, `block_bytes`]."""
    stride = block_bytes(block_size, num_kv_heads, head_size)
    assert raw_BX.dtype == torch.uint8
    assert raw_BX.is_contiguous()
    assert raw_BX.shape[1] == stride
    shape = (raw_BX.shape[0], block_size, num_kv_heads, head_size)
    return raw_BX.view(dtype).as_strided(shape, (stride, num_kv_heads * head_size, head_size, 1))


def has_scales(cache_BSKH: Tensor) -> bool:
    """Whether a scale for each token and head lies behind the numbers of each block."""
    _, block_size, num_kv_heads, head_size = cache_BSKH.shape
    return cache_BSKH.stride(0) != block_size * num_kv_heads * head_size


def top_of(dtype: torch.dtype) -> float:
    """The largest number of a cache's dtype."""
    return INT8_TOP if dtype == torch.int8 else E4M3_TOP


def scales_of(cache_BSKH: Tensor) -> Tensor:
    """The codes, a view: uint8 [B, K, S]."""
    num_blocks, block_size, num_kv_heads, head_size = cache_BSKH.shape
    offset = cache_BSKH.storage_offset() + block_size * num_kv_heads * head_size
    shape, strides = (num_blocks, num_kv_heads, block_size), (cache_BSKH.stride(0), block_size, 1)
    return cache_BSKH.view(torch.uint8).as_strided(shape, strides, offset)


def encode(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The code (uint8) of the smallest scale with which a head's largest magnitude fits `dtype`."""
    bits = (largest.float() * (1.0 / (UNIT * top_of(dtype)))).view(torch.int32)
    code = (((bits + (1 << SHIFT) - 1) >> SHIFT) - FIRST_CODE).clamp_(0, LAST_CODE)
    return code.masked_fill_(~torch.isfinite(largest), NAN_CODE).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """The scales, float32."""
    return ((codes.to(torch.int32) + FIRST_CODE) << SHIFT).view(torch.float32) * UNIT


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Heads [..., H] in `dtype`, and the codes of their scales [...]."""
    x = x.float()
    codes = encode(x.abs().amax(-1), dtype)
    top = top_of(dtype)
    scaled = (x * (1.0 / decode(codes))[..., None]).nan_to_num_(0.0).clamp_(-top, top)
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), codes


def dequantise(kept: Tensor, codes: Tensor) -> Tensor:
    """Heads [..., H] in float32."""
    return kept.float() * decode(codes)[..., None]


def store(x_TKH: Tensor, cache_BSKH: Tensor, slots_T: Tensor) -> None:
    """Write token t to slot slots_T[t] of a cache with scales. No padding among the slots."""
    kept_TKH, codes_TK = quantise(x_TKH, cache_BSKH.dtype)
    block_T, offset_T = slots_T // cache_BSKH.shape[1], slots_T % cache_BSKH.shape[1]
    cache_BSKH.view(torch.uint8)[block_T, offset_T] = kept_TKH.view(torch.uint8)
    scales_of(cache_BSKH)[block_T, :, offset_T] = codes_TK


def gather(cache_BSKH: Tensor, block_ids: Tensor) -> Tensor:
    """These blocks of a cache with scales, in float32: [ids, S, K, H]."""
    kept = cache_BSKH.view(torch.uint8).index_select(0, block_ids).view(cache_BSKH.dtype)
    return dequantise(kept, scales_of(cache_BSKH).index_select(0, block_ids).transpose(1, 2))
