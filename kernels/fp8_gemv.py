"""A linear layer with an e4m3 weight for a few tokens, bound by reading it: half the bytes of `gemv`, the same fusions.

Meaning: `fp8_reference.fused_linear`. Activations stay in 16 bits: rounding them costs a launch and gains nothing where
the tensor cores wait for memory. Weights become 16 or 32 bits in registers; scales by row are multiplied to the sums,
scales by block to the partial sums of each block's columns. What `gemv` says of prefetching and of when a successor may
start holds here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import rms_norm, tuning
from argosy.kernels.fp8_reference import Fp8Weight
from argosy.kernels.gemv_parts import finish, prefetch_rows, weight_rows

MAX_TOKENS = 16


@triton.jit(do_not_specialize=["num_tokens"])
def _vector_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr,
    num_tokens, num_inputs, num_outputs, stride_x, stride_weight, stride_scale, stride_out, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    ROW_BLOCK: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, SWAP: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    PREFETCH: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token in registers; a program walks over tiles of whole weight rows. Scales by row only."""
    column = tl.arange(0, WIDTH)
    inside = column < num_inputs
    num_tiles = tl.cdiv(num_outputs * (2 if GATED else 1), ROWS)
    if PDL:
        if PREFETCH > 0:
            for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
                if tile < tl.num_programs(0) * AHEAD:
                    row = weight_rows(tile, num_outputs, ROWS, GATED)
                    prefetch_rows(weight_ptr + row * stride_weight, PREFETCH)
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    x = tl.load(x_ptr + column, inside, other=0.0).to(tl.float32)
    if NORM:
        length = 1.0 / tl.sqrt(tl.sum(x * x, 0) / num_inputs + eps)
        x *= length * tl.load(norm_ptr + column, inside, other=0.0).to(tl.float32)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        row = weight_rows(tile, num_outputs, ROWS, GATED)
        if EVEN:
            w = tl.load(weight_ptr + row[:, None] * stride_weight + column[None, :])
        else:
            w = tl.load(weight_ptr + row[:, None] * stride_weight + column[None, :], inside[None, :], other=0.0)
        y = tl.sum(w.to(tl.float32) * x[None, :], 1) * tl.load(scale_ptr + row)
        finish(
            y[None, :], row, tile, tl.arange(0, 1), num_tokens, num_outputs, bias_ptr, residual_ptr, out_ptr,
            stride_out, 1, ROWS, BIAS, GATED, RESIDUAL,
        )  # fmt: skip
    if PDL and not EARLY:
        gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_tokens"])
def _matrix_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr,
    num_tokens, num_inputs, num_outputs, stride_x, stride_weight, stride_scale, stride_out, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    ROW_BLOCK: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, SWAP: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    PREFETCH: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to TOKENS tokens, normed before, as one side of a tensor core tile; a program a tile of weight rows.

    SWAP: the weight is the left side, taken from registers, where it was converted; otherwise the tokens are.
    """
    tile = tl.program_id(0)
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, WIDTH)
    row = weight_rows(tile, num_outputs, ROWS, GATED)
    x_row = x_ptr + token.to(tl.int64) * stride_x
    present = (token < num_tokens)[:, None]
    if PDL:
        if PREFETCH > 0:
            prefetch_rows(weight_ptr + row * stride_weight, PREFETCH)
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    acc = tl.zeros((ROWS, TOKENS) if SWAP else (TOKENS, ROWS), tl.float32)
    for start in tl.range(0, num_inputs, WIDTH, num_stages=STAGES):
        if EVEN:
            x = tl.load(x_row[:, None] + (start + column)[None, :], present, other=0.0)
            w = tl.load(weight_ptr + row[:, None] * stride_weight + (start + column)[None, :])
        else:
            inside = start + column < num_inputs
            x = tl.load(x_row[:, None] + (start + column)[None, :], present & inside[None, :], other=0.0)
            w = tl.load(
                weight_ptr + row[:, None] * stride_weight + (start + column)[None, :], inside[None, :], other=0.0
            )  # fmt: skip
        w = w.to(x.dtype)
        if GROUP > 0:  # one group a turn
            scale = tl.load(scale_ptr + row // ROW_BLOCK * stride_scale + start // GROUP)
            if SWAP:
                acc += tl.dot(w, tl.trans(x)) * scale[:, None]
            else:
                acc += tl.dot(x, tl.trans(w)) * scale[None, :]
        elif SWAP:
            acc = tl.dot(w, tl.trans(x), acc)
        else:
            acc = tl.dot(x, tl.trans(w), acc)
    if PDL and not EARLY:
        gdc_launch_dependents()
    if SWAP:
        acc = tl.trans(acc)
    if GROUP == 0:
        acc *= tl.load(scale_ptr + row)[None, :]
    finish(
        acc, row, tile, token, num_tokens, num_outputs, bias_ptr, residual_ptr, out_ptr, stride_out,
        TOKENS, ROWS, BIAS, GATED, RESIDUAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _tiled_vector_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr,
    num_tokens, num_inputs, num_outputs, stride_x, stride_weight, stride_scale, stride_out, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    ROW_BLOCK: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, SWAP: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    PREFETCH: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token, a program a tile, walking along its rows in steps of WIDTH."""
    tile = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    row = weight_rows(tile, num_outputs, ROWS, GATED)
    if PDL:
        if PREFETCH > 0:
            prefetch_rows(weight_ptr + row * stride_weight, PREFETCH)
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    COUNT: tl.constexpr = WIDTH // GROUP if GROUP > 0 else 1
    acc = tl.zeros((ROWS, COUNT, WIDTH // COUNT), tl.float32)
    squares = tl.zeros((WIDTH,), tl.float32)
    for start in tl.range(0, num_inputs, WIDTH, num_stages=STAGES):
        inside = start + column < num_inputs
        if EVEN:
            x = tl.load(x_ptr + start + column).to(tl.float32)
            w = tl.load(weight_ptr + row[:, None] * stride_weight + (start + column)[None, :])
        else:
            x = tl.load(x_ptr + start + column, inside, other=0.0).to(tl.float32)
            w = tl.load(
                weight_ptr + row[:, None] * stride_weight + (start + column)[None, :], inside[None, :], other=0.0
            )  # fmt: skip
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + start + column, inside, other=0.0).to(tl.float32)
        product = tl.reshape(w.to(tl.float32) * x[None, :], (ROWS, COUNT, WIDTH // COUNT))
        if GROUP > 0:
            group = start // GROUP + tl.arange(0, COUNT)
            scale = tl.load(
                scale_ptr + (row // ROW_BLOCK * stride_scale)[:, None] + group[None, :],
                (group * GROUP < num_inputs)[None, :], other=0.0,
            )  # fmt: skip
            product *= scale[:, :, None]
        acc += product
    if PDL and not EARLY:
        gdc_launch_dependents()
    y = tl.sum(tl.reshape(acc, (ROWS, WIDTH)), 1)
    if GROUP == 0:
        y *= tl.load(scale_ptr + row)
    if NORM:
        y *= 1.0 / tl.sqrt(tl.sum(squares, 0) / num_inputs + eps)
    finish(
        y[None, :], row, tile, tl.arange(0, 1), num_tokens, num_outputs, bias_ptr, residual_ptr, out_ptr, stride_out,
        1, ROWS, BIAS, GATED, RESIDUAL,
    )  # fmt: skip


# as `kernel` in the tuned sizes counts them
KERNELS = (_vector_kernel, _matrix_kernel, _tiled_vector_kernel)


def suits(x_TI: Tensor, weight: Fp8Weight) -> bool:
    """Whether `fused_linear` takes these: 1 to 16 tokens of 16 bits, unit strides, blocks of at least 32 columns."""
    num_tokens, num_inputs = x_TI.shape
    if not 0 < num_tokens <= MAX_TOKENS or x_TI.dtype not in (torch.bfloat16, torch.float16):
        return False
    if weight.block is not None and weight.block[1] not in (32, 64, 128):
        return False
    return weight.values_OI.stride(1) == 1 and x_TI.stride(1) == 1 and num_inputs % 16 == 0


def prefers_library(num_tokens: int, weight: Fp8Weight) -> bool:
    """Whether rounding the activations and a product for many tokens was measured to be faster here."""
    tuned = _tuned(num_tokens, weight)
    return tuned is not None and bool(tuned.get("library", 0))


def _tuned(num_tokens: int, weight: Fp8Weight) -> tuning.Sizes | None:
    """Measured sizes; of blocks only 128 x 128 were, and others may not divide the tiles."""
    if weight.block not in (None, (128, 128)):
        return None
    num_outputs, num_inputs = weight.values_OI.shape
    blocks = "b" if weight.block else ""
    key = f"{num_inputs}x{num_outputs}x{1 if num_tokens == 1 else MAX_TOKENS}{blocks}"
    return tuning.pick("fp8_gemv", key, weight.values_OI.device)


def _default_sizes(num_tokens: int, num_inputs: int, num_rows: int, num_sms: int, group: int) -> dict[str, int]:
    """Twice the numbers of `gemv` in flight, since they are half as large."""
    rest = {"prefetch": 4096, "early": 0, "swap": 0}
    if num_tokens == 1 and group:
        rows = 16 if num_rows >= 16 * num_sms * 4 else 8
        return {"kernel": 2, "rows": rows, "width": 1024, "stages": 3, "warps": 8, "per_sm": 0, **rest}
    if num_tokens == 1:
        width = tuning.next_power_of_two(num_inputs)
        rows = max(2, min(16, 16384 // width))
        warps = 8 if width <= 8192 else 16
        return {"kernel": 0, "rows": rows, "width": width, "stages": 3, "warps": warps, "per_sm": 2, **rest}
    rows = 32
    while rows > 8 and num_rows < rows * num_sms * 2:
        rows //= 2
    return {"kernel": 1, "rows": rows, "width": group or 256, "stages": 5, "warps": 4, "per_sm": 0, **rest}


def fused_linear(
    x_TI: Tensor,
    weight: Fp8Weight,
    bias_O: Tensor | None = None,
    *,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    out_TO: Tensor | None = None,
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """One launch for one token, else one more for the norm; arguments as in `ops.fused_linear`."""
    num_tokens, num_inputs = x_TI.shape
    weight_OI, scale, block = weight
    num_rows = weight_OI.shape[0]
    num_outputs = num_rows // 2 if gated else num_rows
    group = block[1] if block else 0
    assert weight_OI.shape[1] == num_inputs
    assert scale.dtype == torch.float32
    assert scale.is_contiguous()
    assert residual_TO is None or residual_TO.shape == (num_tokens, num_outputs)
    facts = tuning.device_facts(x_TI.device)
    sizes = sizes or _tuned(num_tokens, weight)
    sizes = sizes or _default_sizes(num_tokens, num_inputs, num_rows, facts.num_sms, group)
    kernel, rows, width = KERNELS[sizes["kernel"]], sizes["rows"], sizes["width"]
    assert not group or kernel is not _vector_kernel
    assert not group or width % group == 0
    assert not group or kernel is not _matrix_kernel or width == group
    if kernel is _matrix_kernel and norm_weight_I is not None:
        x_TI, norm_weight_I = rms_norm.rms_norm(x_TI, norm_weight_I, eps), None
    assert residual_TO is None or out_TO is None
    out_TO = residual_TO if out_TO is None else out_TO
    if out_TO is None:
        out_TO = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    assert out_TO.stride(1) == 1
    programs = triton.cdiv(num_rows, rows)
    if kernel is _vector_kernel:
        programs = min(programs, facts.num_sms * sizes["per_sm"])
    prefetch = min(sizes["prefetch"], tuning.next_power_of_two(num_inputs + 1) // 2)
    kernel[(programs,)](
        x_TI, weight_OI, scale, out_TO if bias_O is None else bias_O,
        out_TO if norm_weight_I is None else norm_weight_I, out_TO, out_TO,
        num_tokens, num_inputs, num_outputs, x_TI.stride(0), weight_OI.stride(0), scale.stride(0), out_TO.stride(0),
        eps, WIDTH=width, ROWS=rows, STAGES=sizes["stages"], EVEN=num_inputs % width == 0,
        ROW_BLOCK=block[0] if block else 1, GROUP=group, TOKENS=max(16, tuning.next_power_of_two(num_tokens)),
        SWAP=bool(sizes.get("swap", 0)), NORM=norm_weight_I is not None, BIAS=bias_O is not None, GATED=gated,
        RESIDUAL=residual_TO is not None, PREFETCH=prefetch, AHEAD=sizes.get("ahead", 1), EARLY=bool(sizes["early"]),
        num_warps=sizes["warps"], **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO
