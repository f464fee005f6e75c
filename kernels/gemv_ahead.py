"""A linear layer for one token whose first weights are on their way to the chip while the kernel before still runs.

Meaning: `reference.fused_linear`. As with `gemv`'s kernel for one token, programs that stay walk over tiles of whole
weight rows, through a ring in shared memory. The ring's first places are asked for before anything is waited for:
weights depend on nobody. Behind a kernel that leaves most of the card idle (attention of one row, a sum that waits for
the link) that saves the time it takes; behind a product, the time in which its last programs end. Asking for lines into
the second-level cache instead gained nothing (`benchmarks/notes.md`). Written in Triton's lower language (Gluon):
Triton begins its own rings behind the wait.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning

# Triton 3.9 calls it otherwise than 3.6
copy_in = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _ask(
    w_smem, slot, weight_ptr, tile, num_tiles, num_outputs, num_inputs, stride_weight, row, column,
    ROWS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Ask for the weights of a tile, if there is one: of its outputs' rows, or of their gate rows and up rows."""
    output = gl.minimum(tile * ROWS + row, num_outputs - 1).to(gl.int64)
    here = weight_ptr + output[:, None] * stride_weight + column[None, :]
    width = gl.where(tile < num_tiles, num_inputs, 0)
    inside = (row >= 0)[:, None] & (column < width)[None, :]
    if GATED:
        copy_in(w_smem.index(2 * slot), here, mask=inside)
        copy_in(w_smem.index(2 * slot + 1), here + num_outputs.to(gl.int64) * stride_weight, mask=inside)
    else:
        copy_in(w_smem.index(slot), here, mask=inside)
    async_copy.commit_group()


@gluon.jit
def _each(gate, up, other_gate, other_up):
    return gate + other_gate, up + other_up


@gluon.jit
def _ahead_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, out_ptr, num_inputs, num_outputs, stride_weight, eps,
    WIDTH: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
    NORM: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr, RESIDUAL: gl.constexpr,
    EARLY: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """With RESIDUAL it is `out` that is added to. `num_outputs`: after the gate."""
    EACH: gl.constexpr = 16 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    tile_in: gl.constexpr = gl.BlockedLayout([1, EACH], [1, 32], [1, num_warps], [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PARTS: gl.constexpr = 2 if GATED else 1
    row = gl.arange(0, ROWS, gl.SliceLayout(1, tile_in))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, tile_in))
    w_smem = gl.allocate_shared_memory(weight_ptr.dtype.element_ty, [STAGES * PARTS, ROWS, WIDTH], flat)
    num_tiles = (num_outputs + ROWS - 1) // ROWS
    first, step = gl.program_id(0), gl.num_programs(0)
    for stage in gl.static_range(STAGES - 1):
        _ask(
            w_smem, stage, weight_ptr, first + stage * step, num_tiles, num_outputs, num_inputs, stride_weight, row,
            column, ROWS, GATED,
        )  # fmt: skip
    inside = column < num_inputs
    if NORM:  # weights as well
        norm = gl.load(norm_ptr + column, mask=inside, other=0.0).to(gl.float32)
    if PDL:
        gdc_wait()
        if EARLY == 1:
            gdc_launch_dependents()
    x = gl.load(x_ptr + column, mask=inside, other=0.0).to(gl.float32)
    if NORM:
        x *= norm * (1.0 / gl.sqrt(gl.sum(x * x, 0) / num_inputs + eps))
    n = 0
    for tile in range(first, num_tiles, step):
        output = tile * ROWS + row
        there = output < num_outputs
        if RESIDUAL:
            before = gl.load(out_ptr + output, mask=there, other=0.0).to(gl.float32)
        _ask(
            w_smem, (n + STAGES - 1) % STAGES, weight_ptr, tile + (STAGES - 1) * step, num_tiles, num_outputs,
            num_inputs, stride_weight, row, column, ROWS, GATED,
        )  # fmt: skip
        if PDL and EARLY == 2:  # noqa: SIM102 - known when compiling, the other only when running
            if tile + STAGES * step >= num_tiles:
                gdc_launch_dependents()  # this program has asked for its last weights
        async_copy.wait_group(STAGES - 1)
        slot = n % STAGES * PARTS
        y = w_smem.index(slot).load(tile_in).to(gl.float32) * x[None, :]
        if GATED:  # both at once: warps wait for each other in every sum
            up = w_smem.index(slot + 1).load(tile_in).to(gl.float32) * x[None, :]
            y, up = gl.reduce((y, up), 1, _each)
        else:
            y = gl.sum(y, 1)
        if BIAS:
            y += gl.load(bias_ptr + output, mask=there, other=0.0).to(gl.float32)
        if GATED:
            if BIAS:
                up += gl.load(bias_ptr + num_outputs + output, mask=there, other=0.0).to(gl.float32)
            y = y / (1.0 + gl.exp2(y * -1.4426950408889634)) * up
        if RESIDUAL:
            y += before
        gl.store(out_ptr + output, y.to(out_ptr.dtype.element_ty), mask=there)
        n += 1  # noqa: SIM113 - Gluon knows no `enumerate`
    if PDL and EARLY == 0:
        gdc_launch_dependents()


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    out_TO: Tensor,
    sizes: tuning.Sizes,
    *,
    norm_weight_I: Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    residual: bool = False,
) -> Tensor:
    """x W^T + bias of one token, normed before, gated, written or (`residual`) added to `out_TO`; one launch.

    `sizes`: rows of a tile, its width (a power of two that holds a row), places of the ring (`stages`), `warps`,
    programs a multiprocessor (`per_sm`), when its successor may start (`early`: 0 when it is done, 1 at once, 2 when
    its last weights are asked for).
    """
    num_tokens, num_inputs = x_TI.shape
    num_outputs = weight_OI.shape[0] // 2 if gated else weight_OI.shape[0]
    assert num_tokens == 1
    assert x_TI.stride(1) == weight_OI.stride(1) == out_TO.stride(1) == 1
    assert num_inputs % 16 == 0  # what the copies are compiled for
    assert num_inputs <= sizes["width"]
    rows = max(1, sizes["rows"] // 2) if gated else sizes["rows"]  # of the output: a gate has two weight rows for each
    programs = min(-(-num_outputs // rows), tuning.device_facts(x_TI.device).num_sms * sizes["per_sm"])
    _ahead_kernel[(programs,)](
        x_TI, weight_OI, out_TO if bias_O is None else bias_O, out_TO if norm_weight_I is None else norm_weight_I,
        out_TO, num_inputs, num_outputs, weight_OI.stride(0), eps,
        WIDTH=sizes["width"], ROWS=rows, STAGES=sizes["stages"], NORM=norm_weight_I is not None,
        BIAS=bias_O is not None, GATED=gated, RESIDUAL=residual, EARLY=sizes.get("early", 0), num_warps=sizes["warps"],
        **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO
