"""A linear layer for a few tokens (1 to 16), bound by reading its weight, fused with what stands before and after it.

Meaning: `reference.fused_linear`. Every program sums over whole weight rows, so bias, gate and residual are its own to
add, and for one token it norms the input itself. With a gate, row i of the first half and row i of the second are
neighbours in a tile. While the kernel before drains, a program already asks for its first weights into the
second-level cache: they depend on nobody. It lets its own successor start only when it is done with its weights: the
programs of an early successor hold shared memory, and those of a kernel that walks over tiles then crowd on the
multiprocessors that are left (8b gate_up took 87 us in a step and 56 alone).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import gemv_split, rms_norm, tuning
from argosy.kernels.gemv_parts import finish, prefetch_rows, weight_rows
from argosy.kernels.norm_ahead import NormAhead

MAX_TOKENS = 16  # the smallest tile of the tensor cores; above it cuBLAS is at the bandwidth of the card
MAX_DEFAULT_INPUTS = 16384  # of one token where nothing was tuned


@triton.jit(do_not_specialize=["num_tokens"])
def _vector_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr,
    num_tokens, num_inputs, num_outputs, stride_x, stride_weight, stride_out, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    PREFETCH: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token, which stays in registers while a program walks over its tiles of whole weight rows."""
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
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / num_inputs + eps)
        x *= scale * tl.load(norm_ptr + column, inside, other=0.0).to(tl.float32)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        row = weight_rows(tile, num_outputs, ROWS, GATED)
        if EVEN:
            w = tl.load(weight_ptr + row[:, None] * stride_weight + column[None, :])
        else:
            w = tl.load(weight_ptr + row[:, None] * stride_weight + column[None, :], inside[None, :], other=0.0)
        y = tl.sum(w.to(tl.float32) * x[None, :], 1)[None, :]
        finish(
            y, row, tile, tl.arange(0, 1), num_tokens, num_outputs, bias_ptr, residual_ptr, out_ptr, stride_out,
            1, ROWS, BIAS, GATED, RESIDUAL,
        )  # fmt: skip
    if PDL and not EARLY:
        gdc_launch_dependents()


@triton.jit(do_not_specialize=["num_tokens"])
def _tiled_vector_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr,
    num_tokens, num_inputs, num_outputs, stride_x, stride_weight, stride_out, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
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
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
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
        acc += w.to(tl.float32) * x[None, :]
    if PDL and not EARLY:
        gdc_launch_dependents()
    y = tl.sum(acc, 1)[None, :]
    if NORM:
        y *= 1.0 / tl.sqrt(tl.sum(squares, 0) / num_inputs + eps)
    finish(
        y, row, tile, tl.arange(0, 1), num_tokens, num_outputs, bias_ptr, residual_ptr, out_ptr, stride_out,
        1, ROWS, BIAS, GATED, RESIDUAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _matrix_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr,
    num_tokens, num_inputs, num_outputs, stride_x, stride_weight, stride_out, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    PREFETCH: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to 16 tokens as the rows of one tensor core tile, a program a tile of weight rows. The input comes normed:
    to norm 16 tokens in every program took longer (28 us) than to read the weight (11), and to scale the sums instead
    was no faster than a launch for the norm."""
    tile = tl.program_id(0)
    token = tl.arange(0, 16)
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
    acc = tl.zeros((16, ROWS), tl.float32)
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
        acc = tl.dot(x, tl.trans(w), acc)
    if PDL and not EARLY:
        gdc_launch_dependents()
    finish(
        acc, row, tile, token, num_tokens, num_outputs, bias_ptr, residual_ptr, out_ptr, stride_out,
        16, ROWS, BIAS, GATED, RESIDUAL,
    )  # fmt: skip


# as `kernel` in the tuned sizes counts them
KERNELS = (_vector_kernel, _matrix_kernel, _tiled_vector_kernel)
MANY_ROWS, MOST_DEFAULT_PIECES = 9216, 4  # of sizes that nobody measured
MOST_DEFAULT_BYTES = 160 << 10  # on chip, that the largest of them need
SPLIT, AHEAD, RING = 3, 4, 5  # in `gemv_split`, in `gemv_ahead`, in `gemv_ring`


def suits(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether `fused_linear` takes these: 16-bit, unit strides, 1 to 16 tokens and not measured slower than cuBLAS, or
    up to 64 and measured faster."""
    num_tokens, num_inputs = x_TI.shape
    if not 0 < num_tokens <= gemv_split.MAX_TOKENS or x_TI.dtype not in (torch.bfloat16, torch.float16):
        return False
    if weight_OI.dtype != x_TI.dtype or weight_OI.stride(1) != 1 or x_TI.stride(1) != 1 or num_inputs % 8:
        return False
    tuned = tuning.pick("gemv", _key(num_tokens, weight_OI), weight_OI.device)
    if tuned is None:  # a row of weights would not fit on chip by the default sizes
        return 1 < num_tokens <= MAX_TOKENS or (num_tokens == 1 and num_inputs <= MAX_DEFAULT_INPUTS)
    return not tuned.get("library", 0)


def is_measured(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether this GPU's file says what is best for this shape."""
    return tuning.pick("gemv", _key(max(1, x_TI.shape[0]), weight_OI), weight_OI.device) is not None


def norm_ahead(
    residual_TD: Tensor, weight_DI: Tensor, next_weight_OD: Tensor, norm_weight_D: Tensor, eps: float
) -> NormAhead | None:
    """`norm_ahead.between`: where `gemv_split` or `gemv_ring` multiplies both. Not in float16: a residual times the
    norm's weight may be more than it holds."""
    num_tokens = residual_TD.shape[0]
    if not 1 < num_tokens <= gemv_split.MAX_TOKENS or residual_TD.dtype != torch.bfloat16:
        return None
    if not suits(residual_TD, next_weight_OD):
        return None
    sizes = [tuning.pick("gemv", _key(num_tokens, w), w.device) for w in (weight_DI, next_weight_OD)]
    if any(s is None or s.get("library", 0) or s["kernel"] not in (SPLIT, RING) for s in sizes):
        return None
    if sizes[0] is None or not sizes[0].get("norm", 0):  # measured to be worth it
        return None
    return gemv_split.ahead_for(residual_TD, norm_weight_D, eps, sizes[0])


def _has_ring(x_TI: Tensor, weight_OI: Tensor, sizes: tuning.Sizes, *, gated: bool) -> bool:
    if not triton.__version__.startswith(tuning.GLUON_VERSIONS):
        return False
    from argosy.kernels import gemv_ring

    return gemv_ring.takes(x_TI, weight_OI, sizes, gated=gated)


def left_in_pieces(x_TI: Tensor, weight_OI: Tensor) -> Tensor | None:
    """x W^T as float32 pieces of a sum, [P, T, O], where that was measured to be better than adding them up here."""
    sizes = tuning.pick("gemv", _key(x_TI.shape[0], weight_OI), x_TI.device) if suits(x_TI, weight_OI) else None
    if not sizes or not sizes.get("left", 0) or not _has_ring(x_TI, weight_OI, sizes, gated=False):
        return None
    from argosy.kernels import gemv_ring

    return gemv_ring.linear(x_TI, weight_OI, None, None, sizes, in_pieces=True)


def _key(num_tokens: int, weight_OI: Tensor) -> str:
    num_outputs, num_inputs = weight_OI.shape
    return f"{num_inputs}x{num_outputs}x{bucket(num_tokens)}"


def bucket(num_tokens: int) -> int:
    """Which number of tokens' sizes are used: 1, or up to 16, 32, 64."""
    return 1 if num_tokens == 1 else max(MAX_TOKENS, tuning.next_power_of_two(num_tokens))


def _default_sizes(num_tokens: int, num_inputs: int, num_rows: int, facts: tuning.DeviceFacts) -> dict[str, int]:
    """Sizes near those that measured best on an H200 over more than ten shapes (`bench_untuned.py`)."""
    if num_tokens == 1:
        width = tuning.next_power_of_two(num_inputs)
        rows = max(2, min(16, 8192 // width))
        stages = 3
        while stages > 1 and (stages - 1) * rows * width * 2 + 512 > facts.shared_bytes:
            stages -= 1
        return {"kernel": 0, "rows": rows, "width": width, "stages": stages, "warps": 8 if width <= 8192 else 16,
                "per_sm": 2, "prefetch": 2048, "early": 0}  # fmt: skip
    # other cards may have 99 KB on chip for a program, of which 80 are asked for; some of these are newer than Hopper
    is_roomy = facts.overlaps and facts.shared_bytes >= MOST_DEFAULT_BYTES
    rows, stages = (64, 4) if not is_roomy else (128, 4) if num_rows >= MANY_ROWS else (64, 6)
    tiles, splits = -(-num_rows // rows), 1
    while 2 * tiles * splits <= facts.num_sms and splits < MOST_DEFAULT_PIECES:
        splits *= 2
    return {"kernel": SPLIT, "rows": rows, "width": 128, "stages": stages, "warps": 4, "splits": splits,
            "prefetch": 512, "early": 0}  # fmt: skip


def fused_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    residual_TO: Tensor | None = None,
    gated: bool = False,
    out_TO: Tensor | None = None,
    normed: NormAhead | None = None,
    ahead: NormAhead | None = None,
    sizes: tuning.Sizes | None = None,
) -> Tensor:
    """One launch for one token, else one more for the norm unless it was `normed`; see `ops.fused_linear`.

    `sizes` overrides what was tuned, for the tuner itself.
    """
    num_tokens, num_inputs = x_TI.shape
    num_rows = weight_OI.shape[0]
    num_outputs = num_rows // 2 if gated else num_rows
    assert weight_OI.shape[1] == num_inputs
    assert residual_TO is None or residual_TO.shape == (num_tokens, num_outputs)
    facts = tuning.device_facts(x_TI.device)
    sizes = sizes or tuning.pick("gemv", _key(num_tokens, weight_OI), x_TI.device)
    sizes = sizes or _default_sizes(num_tokens, num_inputs, num_rows, facts)
    if sizes["kernel"] == AHEAD and not triton.__version__.startswith(tuning.GLUON_VERSIONS):
        sizes = _default_sizes(num_tokens, num_inputs, num_rows, facts)
    if sizes["kernel"] == RING and not _has_ring(x_TI, weight_OI, sizes, gated=gated):
        sizes = _default_sizes(num_tokens, num_inputs, num_rows, facts)
        sizes = sizes if ahead is None else {**sizes, "rows": num_outputs // len(ahead.squares_PT)}  # as it was made
    in_pieces = sizes["kernel"] in (SPLIT, RING)
    rows = max(sizes["rows"], 2) if gated else sizes["rows"]  # a gate needs the row beside it, also where one was best
    assert in_pieces or (normed is None and ahead is None)
    if norm_weight_I is not None and normed is None and (num_tokens > 1 or in_pieces):
        x_TI, norm_weight_I = rms_norm.rms_norm(x_TI, norm_weight_I, eps), None
    assert residual_TO is None or out_TO is None
    out_TO = residual_TO if out_TO is None else out_TO
    if sizes["kernel"] == RING:
        from argosy.kernels import gemv_ring

        return gemv_ring.linear(
            x_TI, weight_OI, bias_O, out_TO, sizes, gated=gated, residual=residual_TO is not None, normed=normed,
            ahead=ahead,
        )  # fmt: skip
    if out_TO is None:
        out_TO = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    assert out_TO.stride(1) == 1
    if in_pieces:
        return gemv_split.linear(
            x_TI, weight_OI, bias_O, out_TO, sizes, gated=gated, residual=residual_TO is not None, normed=normed,
            ahead=ahead,
        )  # fmt: skip
    if sizes["kernel"] == AHEAD:
        from argosy.kernels import gemv_ahead

        return gemv_ahead.linear(
            x_TI, weight_OI, bias_O, out_TO, sizes, norm_weight_I=norm_weight_I, eps=eps, gated=gated,
            residual=residual_TO is not None,
        )  # fmt: skip
    kernel, width, programs = KERNELS[sizes["kernel"]], sizes["width"], triton.cdiv(num_rows, rows)
    if sizes["kernel"] == 0:
        programs = min(programs, facts.num_sms * sizes["per_sm"])
    prefetch = min(sizes["prefetch"], tuning.next_power_of_two(num_inputs + 1) // 2 * weight_OI.element_size())
    prefetch = prefetch if prefetch >= gemv_split.LEAST_PREFETCH else 0
    kernel[(programs,)](
        x_TI, weight_OI, out_TO if bias_O is None else bias_O, out_TO if norm_weight_I is None else norm_weight_I,
        out_TO, out_TO, num_tokens, num_inputs, num_outputs, x_TI.stride(0), weight_OI.stride(0), out_TO.stride(0), eps,
        WIDTH=width, ROWS=rows, STAGES=sizes["stages"], EVEN=num_inputs % width == 0, NORM=norm_weight_I is not None,
        BIAS=bias_O is not None, GATED=gated, RESIDUAL=residual_TO is not None,
        PREFETCH=prefetch, AHEAD=sizes.get("ahead", 1), EARLY=bool(sizes["early"]),
        num_warps=sizes["warps"], **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO
