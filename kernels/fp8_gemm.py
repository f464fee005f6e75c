"""Products of e4m3 activations and weights for many tokens: cuBLAS where it takes the scales, Triton for the rest.

Meaning: `fp8_reference.linear`. cuBLAS takes scales by row of both sides, and on Hopper by block. `_gemm_kernel` takes
what cuBLAS does not: other blocks, widths that 16 does not divide. Scales by block change along the inputs, so that it
rescales sums on the way, one group of columns after the other. Few tokens are the affair of `fp8_split` and `fp8_ring`.
"""

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import fp8_ring, fp8_split, tuning
from argosy.kernels.fp8_reference import Fp8Rows, Fp8Weight


@triton.jit(do_not_specialize=["num_tokens", "stride_xg"])
def _gemm_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr,
    num_tokens, num_outputs, num_inputs, stride_x, stride_w, stride_out, stride_xg, stride_ws,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr,
    BLOCKS: tl.constexpr, ROW_BLOCK: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # BAND tiles of tokens share the weights they read: programs that follow each other walk down a band first
    tiles_t = tl.cdiv(num_tokens, TOKENS)
    tiles_o = tl.cdiv(num_outputs, ROWS)
    band = tl.program_id(0) // (BAND * tiles_o)
    in_band = tl.minimum(tiles_t - band * BAND, BAND)
    place = tl.program_id(0) % (BAND * tiles_o)
    token = (band * BAND + place % in_band) * TOKENS + tl.arange(0, TOKENS)
    row = place // in_band * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    safe_token = tl.minimum(token, num_tokens - 1).to(tl.int64)
    safe_row = tl.minimum(row, num_outputs - 1).to(tl.int64)
    x_here = x_ptr + safe_token[:, None] * stride_x + column[None, :]
    w_here = w_ptr + safe_row[:, None] * stride_w + column[None, :]
    if PDL:
        gdc_wait()
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in tl.range(0, num_inputs, WIDTH, num_stages=STAGES):
        if EVEN:
            x = tl.load(x_here + start)
            w = tl.load(w_here + start)
        else:
            inside = (start + column < num_inputs)[None, :]
            x = tl.load(x_here + start, inside, other=0.0)
            w = tl.load(w_here + start, inside, other=0.0)
        if BLOCKS:
            group = start // WIDTH
            x_scale = tl.load(x_scale_ptr + group * stride_xg + safe_token)
            w_scale = tl.load(w_scale_ptr + safe_row // ROW_BLOCK * stride_ws + group)
            acc += tl.dot(x, tl.trans(w)) * x_scale[:, None] * w_scale[None, :]
        else:
            acc = tl.dot(x, tl.trans(w), acc)
    if PDL:
        gdc_launch_dependents()
    if not BLOCKS:
        acc *= tl.load(x_scale_ptr + safe_token)[:, None] * tl.load(w_scale_ptr + safe_row)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + safe_row).to(tl.float32)[None, :]
    out = out_ptr + token.to(tl.int64)[:, None] * stride_out + row[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), (token < num_tokens)[:, None] & (row < num_outputs)[None, :])


def _default_sizes(num_tokens: int, num_outputs: int, num_sms: int) -> dict[str, int]:
    """Tiles of 128 x 128 of Hopper's tensor cores for many tokens; narrower ones while weights are all the work."""
    tokens = max(16, min(128, tuning.next_power_of_two(num_tokens)))
    rows = 128 if num_outputs >= 128 * num_sms // 2 or tokens == 128 else 64
    return {"tokens": tokens, "rows": rows, "band": 8, "stages": 4, "warps": 8 if tokens == 128 else 4}


def bucket(num_tokens: int) -> int:
    """Sizes are tuned for powers of two of tokens from 16 to 4096."""
    return max(16, min(4096, tuning.next_power_of_two(num_tokens)))


def triton_linear(
    rows: Fp8Rows, weight: Fp8Weight, bias_O: Tensor | None, dtype: torch.dtype, sizes: tuning.Sizes | None = None
) -> Tensor:
    """Any shapes and scales. Groups of the activations must be as wide as the blocks of the weight."""
    x_TI, w_OI = rows.values_TI, weight.values_OI
    num_tokens, num_inputs = x_TI.shape
    num_outputs = w_OI.shape[0]
    block = weight.block
    assert w_OI.shape[1] == num_inputs
    assert x_TI.stride(1) == w_OI.stride(1) == weight.scale.stride(-1) == 1
    assert rows.group == (block[1] if block else 0)
    assert rows.scale_TG.stride(0) == 1 or num_tokens == 1
    out = torch.empty((num_tokens, num_outputs), dtype=dtype, device=x_TI.device)
    if num_tokens == 0:
        return out
    sizes = sizes or _default_sizes(num_tokens, num_outputs, tuning.device_facts(x_TI.device).num_sms)
    width = block[1] if block else sizes.get("width", 128)
    grid = triton.cdiv(num_tokens, sizes["tokens"]) * triton.cdiv(num_outputs, sizes["rows"])
    _gemm_kernel[(grid,)](
        x_TI, rows.scale_TG, w_OI, weight.scale, out if bias_O is None else bias_O, out,
        num_tokens, num_outputs, num_inputs, x_TI.stride(0), w_OI.stride(0), out.stride(0),
        rows.scale_TG.stride(1), weight.scale.stride(0),
        TOKENS=sizes["tokens"], ROWS=sizes["rows"], WIDTH=width, BAND=sizes["band"], STAGES=sizes["stages"],
        BLOCKS=block is not None, ROW_BLOCK=block[0] if block else 1, EVEN=num_inputs % width == 0,
        BIAS=bias_O is not None, num_warps=sizes["warps"], **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out


def library_takes(rows: Fp8Rows, weight: Fp8Weight, dtype: torch.dtype) -> bool:
    """Whether cuBLAS multiplies these: scales by row, and widths that 16 divides; or by blocks of 128 x 128, and widths
    of whole blocks, by fours of the inputs, whose scales it reads so."""
    num_outputs, num_inputs = weight.values_OI.shape
    if dtype != torch.bfloat16 or not rows.shape[0]:
        return False
    if weight.block is None:
        return num_inputs % 16 == 0 and num_outputs % 16 == 0
    fits = num_inputs % 512 == 0 and num_outputs % 128 == 0
    return weight.block == (128, 128) and fits and _library_has_blocks(weight.scale.device)


@cache
def _library_has_blocks(device: torch.device) -> bool:
    """cuBLAS has them from CUDA 12.9 on, for Hopper."""
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return version >= (12, 9) and torch.cuda.get_device_capability(device)[0] == 9


def library_linear(rows: Fp8Rows, weight: Fp8Weight, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """cuBLAS by way of torch."""
    by_block = weight.block is not None
    if by_block and rows.shape[0] % 4:  # it reads the groups' scales of four tokens at once
        return library_linear(_padded(rows, -rows.shape[0] % 4), weight, bias_O, dtype)[: rows.shape[0]]
    product: Tensor = torch._scaled_mm(
        rows.values_TI, weight.values_OI.t(),
        scale_a=rows.scale_TG if by_block else rows.scale_TG.reshape(-1, 1),
        scale_b=weight.scale.t() if by_block else weight.scale.view(1, -1),
        out_dtype=dtype, use_fast_accum=not by_block,
    )  # fmt: skip
    return product if bias_O is None else product.add_(bias_O)


def _padded(rows: Fp8Rows, count: int) -> Fp8Rows:
    """So many tokens of zeros behind the others."""
    values_TI = F.pad(rows.values_TI.view(torch.uint8), (0, 0, 0, count)).view(rows.values_TI.dtype)
    return Fp8Rows(values_TI, F.pad(rows.scale_TG.t(), (0, count)).t(), rows.group)


@triton.jit
def _rescale_kernel(
    y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, num_outputs, BLOCK: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_outputs
    w_scale = tl.load(w_scale_ptr + row, inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    here = y_ptr + token * num_outputs + row
    y = tl.load(here, inside, other=0.0).to(tl.float32) * w_scale * tl.load(x_scale_ptr + token)
    if BIAS:
        y += tl.load(bias_ptr + row, inside, other=0.0).to(tl.float32)
    tl.store(here, y.to(y_ptr.dtype.element_ty), inside)


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)


def rescaled_linear(rows: Fp8Rows, weight: Fp8Weight, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """cuBLAS with one scale a side, which it cuts into pieces as it does not by row; scales by row after it.

    The product is stored without scales in between, which changes no digit of a floating-point number: e4m3 ends at
    448, and 448 x 448 x inputs is far from the end of bfloat16.
    """
    one = _one(rows.values_TI.device)
    product: Tensor = torch._scaled_mm(
        rows.values_TI, weight.values_OI.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True
    )
    num_tokens, num_outputs = product.shape
    _rescale_kernel[(num_tokens, triton.cdiv(num_outputs, 2048))](
        product, rows.scale_TG, weight.scale, product if bias_O is None else bias_O, num_outputs,
        BLOCK=2048, BIAS=bias_O is not None, num_warps=4, **tuning.overlap(product.device),
    )  # fmt: skip
    return product


# as `kernel` in the tuned sizes counts them; the first two take what `library_takes`
LIBRARY, RESCALED, TILES, SPLIT, RING = range(5)
MAX_SPLIT_TOKENS, MAX_RESCALED_TOKENS = 64, 384  # where nothing was measured


def _tuned(rows: Fp8Rows, weight: Fp8Weight) -> tuning.Sizes | None:
    num_outputs, num_inputs = weight.values_OI.shape
    key = f"{num_inputs}x{num_outputs}x{bucket(rows.shape[0])}{'b' if weight.block is not None else ''}"
    return tuning.pick("fp8_gemm", key, rows.values_TI.device)


def gated_linear(
    rows: Fp8Rows, weight: Fp8Weight, bias_O: Tensor | None, dtype: torch.dtype, sizes: tuning.Sizes | None = None
) -> Tensor | None:
    """silu(gate) times up of x W^T + bias = [gate | up], where it was measured to be better than a launch more."""
    sizes = sizes or _tuned(rows, weight)
    if not sizes or sizes["kernel"] != RING or not sizes.get("gated") or not fp8_ring.takes(rows, weight, dtype):
        return None
    if weight.values_OI.shape[0] // 2 % sizes["rows"]:
        return None  # a tile of gates would hold ups
    return fp8_ring.linear(rows, weight, bias_O, dtype, sizes, gated=True)


def _default_kernel(num_tokens: int, blocks: bool) -> int:
    if num_tokens <= MAX_SPLIT_TOKENS:
        return SPLIT
    return RESCALED if num_tokens <= MAX_RESCALED_TOKENS and not blocks else LIBRARY


def linear(
    rows: Fp8Rows,
    weight: Fp8Weight,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    sizes: tuning.Sizes | None = None,
    *,
    pieces: bool = False,
) -> Tensor:
    """x W^T + bias by whichever was measured to be fastest. `sizes` overrides that, for the tuner itself.

    `pieces`: it may come as the pieces of a sum, float32 [P, T, O], which `fp8_quantize.quantize` adds up.
    """
    num_tokens = rows.shape[0]
    blocks = weight.block is not None
    sizes = sizes or _tuned(rows, weight)
    kernel = sizes["kernel"] if sizes else _default_kernel(num_tokens, blocks)
    if kernel in (LIBRARY, RESCALED) and not library_takes(rows, weight, dtype):
        kernel, sizes = SPLIT if num_tokens <= MAX_SPLIT_TOKENS else TILES, None
    if kernel == RING:
        if sizes is not None and fp8_ring.takes(rows, weight, dtype):
            return fp8_ring.linear(rows, weight, bias_O, dtype, sizes, pieces=pieces)
        kernel, sizes = _default_kernel(num_tokens, blocks), None
    if kernel == LIBRARY:
        return library_linear(rows, weight, bias_O, dtype)
    if kernel == RESCALED:
        return rescaled_linear(rows, weight, bias_O, dtype)
    run = fp8_split.linear if kernel == SPLIT else triton_linear
    return run(rows, weight, bias_O, dtype, sizes)
