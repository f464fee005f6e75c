"""A linear layer for a few tokens (1 to 16), bound by reading its weight, fused with what stands before and after it.

Meaning: `reference.fused_linear`. A program owns BLOCK_O outputs and walks once along their weight rows; the norm of
the input costs it nothing but arithmetic (every program sums the squares of the few inputs it reads anyway), and so do
bias, gate and residual, whose outputs it owns. While the kernel before drains, the program already asks for its first
weights into the second-level cache: they depend on nobody.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning

MAX_TOKENS = 16  # the smallest tile of the tensor cores; above it cuBLAS is at the bandwidth of the card


@triton.jit
def _prefetch_rows(row_ptr, BYTES: tl.constexpr, PARTS: tl.constexpr):
    """Ask for the first BYTES of each row into the second-level cache, a request of BYTES / PARTS a thread."""
    part = tl.arange(0, PARTS) * (BYTES // PARTS)
    address = row_ptr.to(tl.int64)[:, None] + part[None, :]
    size = tl.full(address.shape, BYTES // PARTS, tl.int32)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [address, size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _finish(
    y, y_up, token, out, num_tokens, num_outputs, bias_ptr, residual_ptr, out_ptr, stride_residual, stride_out,
    BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y, y_up: [tokens, outputs] float32 sums; adds the bias, gates, adds to the residual in place or stores."""
    inside = (token < num_tokens)[:, None] & (out < num_outputs)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + out, out < num_outputs, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if BIAS:
            y_up += tl.load(bias_ptr + num_outputs + out, out < num_outputs, other=0.0).to(tl.float32)[None, :]
        y = y * tl.sigmoid(y) * y_up
    if RESIDUAL:
        here = residual_ptr + token.to(tl.int64)[:, None] * stride_residual + out[None, :]
        y += tl.load(here, inside, other=0.0).to(tl.float32)
        tl.store(here, y.to(residual_ptr.dtype.element_ty), inside)
    else:
        here = out_ptr + token.to(tl.int64)[:, None] * stride_out + out[None, :]
        tl.store(here, y.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _vector_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr,
    num_tokens, num_inputs, num_outputs, stride_x, stride_weight, stride_residual, stride_out, eps,
    TOKENS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token by multiply and add: no tile is padded, and a program may own as few outputs as fill the card."""
    out = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tl.arange(0, BLOCK_I)
    row = weight_ptr + tl.minimum(out, num_outputs - 1).to(tl.int64) * stride_weight
    up = num_outputs.to(tl.int64) * stride_weight
    if PDL:
        if PREFETCH > 0:
            _prefetch_rows(row, PREFETCH, PARTS)
            if GATED:
                _prefetch_rows(row + up, PREFETCH, PARTS)
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    acc_up = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    squares = tl.zeros((BLOCK_I,), tl.float32)
    for start in tl.range(0, num_inputs, BLOCK_I, num_stages=STAGES):
        if EVEN:
            x = tl.load(x_ptr + start + column).to(tl.float32)
            w = tl.load(row[:, None] + (start + column)[None, :])
            if GATED:
                w_up = tl.load(row[:, None] + up + (start + column)[None, :])
            if NORM:
                norm = tl.load(norm_ptr + start + column).to(tl.float32)
        else:
            inside = start + column < num_inputs
            x = tl.load(x_ptr + start + column, inside, other=0.0).to(tl.float32)
            w = tl.load(row[:, None] + (start + column)[None, :], inside[None, :], other=0.0)
            if GATED:
                w_up = tl.load(row[:, None] + up + (start + column)[None, :], inside[None, :], other=0.0)
            if NORM:
                norm = tl.load(norm_ptr + start + column, inside, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= norm
        acc += w.to(tl.float32) * x[None, :]
        if GATED:
            acc_up += w_up.to(tl.float32) * x[None, :]
    y = tl.sum(acc, 1)[None, :]
    y_up = tl.sum(acc_up, 1)[None, :]
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / num_inputs + eps)
        y *= scale
        y_up *= scale
    _finish(
        y, y_up, tl.arange(0, 1), out, num_tokens, num_outputs, bias_ptr, residual_ptr, out_ptr, stride_residual,
        stride_out, BIAS, GATED, RESIDUAL,
    )  # fmt: skip


@triton.jit
def _matrix_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr,
    num_tokens, num_inputs, num_outputs, stride_x, stride_weight, stride_residual, stride_out, eps,
    TOKENS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to 16 tokens as the rows of one tensor core tile."""
    out = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK_I)
    row = weight_ptr + tl.minimum(out, num_outputs - 1).to(tl.int64) * stride_weight
    up = num_outputs.to(tl.int64) * stride_weight
    x_row = x_ptr + token.to(tl.int64) * stride_x
    present = (token < num_tokens)[:, None]
    if PDL:
        if PREFETCH > 0:
            _prefetch_rows(row, PREFETCH, PARTS)
            if GATED:
                _prefetch_rows(row + up, PREFETCH, PARTS)
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((TOKENS, BLOCK_O), tl.float32)
    acc_up = tl.zeros((TOKENS, BLOCK_O), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for start in tl.range(0, num_inputs, BLOCK_I, num_stages=STAGES):
        inside = start + column < num_inputs
        seen = present if EVEN else present & inside[None, :]
        x = tl.load(x_row[:, None] + (start + column)[None, :], seen, other=0.0)
        if EVEN:
            w = tl.load(row[:, None] + (start + column)[None, :])
            if GATED:
                w_up = tl.load(row[:, None] + up + (start + column)[None, :])
        else:
            w = tl.load(row[:, None] + (start + column)[None, :], inside[None, :], other=0.0)
            if GATED:
                w_up = tl.load(row[:, None] + up + (start + column)[None, :], inside[None, :], other=0.0)
        if NORM:
            norm = tl.load(norm_ptr + start + column, inside, other=0.0).to(tl.float32)
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            x = (wide * norm[None, :]).to(x.dtype)
        acc = tl.dot(x, tl.trans(w), acc)
        if GATED:
            acc_up = tl.dot(x, tl.trans(w_up), acc_up)
    if NORM:
        scale = 1.0 / tl.sqrt(squares / num_inputs + eps)
        acc *= scale[:, None]
        acc_up *= scale[:, None]
    _finish(
        acc, acc_up, token, out, num_tokens, num_outputs, bias_ptr, residual_ptr, out_ptr, stride_residual,
        stride_out, BIAS, GATED, RESIDUAL,
    )  # fmt: skip


def suits(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether `fused_linear` takes these: 1 to 16 tokens, 16-bit, unit strides, and not measured slower than cuBLAS."""
    num_tokens, num_inputs = x_TI.shape
    if not 0 < num_tokens <= MAX_TOKENS or x_TI.dtype not in (torch.bfloat16, torch.float16):
        return False
    if weight_OI.dtype != x_TI.dtype or weight_OI.stride(1) != 1 or x_TI.stride(1) != 1 or num_inputs % 8:
        return False
    tuned = tuning.pick("gemv", _key(num_tokens, weight_OI), weight_OI.device)
    return tuned is None or not tuned.get("library", 0)


def _key(num_tokens: int, weight_OI: Tensor) -> str:
    num_outputs, num_inputs = weight_OI.shape
    return f"{num_inputs}x{num_outputs}x{1 if num_tokens == 1 else MAX_TOKENS}"


def _default_sizes(num_tokens: int, num_outputs: int, num_sms: int) -> dict[str, int]:
    """As many outputs a program as leave every multiprocessor three programs, so that loads of some hide others."""
    matrix = num_tokens > 1
    block_o = 32 if matrix else 8
    while block_o > (8 if matrix else 1) and num_outputs < block_o * num_sms * 3:
        block_o //= 2
    return {"matrix": int(matrix), "block_o": block_o, "block_i": 256 if matrix else 1024, "stages": 4 if matrix else 2,
            "warps": 4, "prefetch": 2048}  # fmt: skip


def fused_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """One launch; see `ops.fused_linear`. `sizes` overrides what was tuned, for the tuner itself."""
    num_tokens, num_inputs = x_TI.shape
    rows = weight_OI.shape[0]
    num_outputs = rows // 2 if gated else rows
    assert weight_OI.shape[1] == num_inputs
    assert residual_TO is None or residual_TO.shape == (num_tokens, num_outputs)
    facts = tuning.device_facts(x_TI.device)
    sizes = sizes or tuning.pick("gemv", _key(num_tokens, weight_OI), x_TI.device)
    sizes = sizes or _default_sizes(num_tokens, num_outputs, facts.num_sms)
    out_TO = residual_TO
    if out_TO is None:
        out_TO = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    assert out_TO.stride(1) == 1
    matrix = bool(sizes["matrix"]) or num_tokens > 1
    prefetch = min(sizes["prefetch"], tuning.next_power_of_two(num_inputs + 1) // 2 * weight_OI.element_size())
    kernel = _matrix_kernel if matrix else _vector_kernel
    kernel[(triton.cdiv(num_outputs, sizes["block_o"]),)](
        x_TI, weight_OI, out_TO if bias_O is None else bias_O, out_TO if norm_weight_I is None else norm_weight_I,
        out_TO, out_TO, num_tokens, num_inputs, num_outputs, x_TI.stride(0), weight_OI.stride(0), out_TO.stride(0),
        out_TO.stride(0), eps, TOKENS=MAX_TOKENS if matrix else 1, BLOCK_O=sizes["block_o"], BLOCK_I=sizes["block_i"],
        STAGES=sizes["stages"], EVEN=num_inputs % sizes["block_i"] == 0, NORM=norm_weight_I is not None,
        BIAS=bias_O is not None, GATED=gated, RESIDUAL=residual_TO is not None,
        PARTS=max(1, min(32 * sizes["warps"] // sizes["block_o"], prefetch // 16)), PREFETCH=prefetch,
        num_warps=sizes["warps"], **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO
