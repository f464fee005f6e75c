"""silu(x W_gate^T) · (x W_up^T) of many tokens in one launch, for Hopper's tensor cores.

Meaning: `reference.fused_linear` with `gated`. A tile has the gate rows and the up rows of the same outputs, so that
one thread holds both sums of a number: what is written is half as wide, and nobody reads it again to multiply it. Each
multiprocessor keeps one program of three groups of warps that walks over tiles of 128 tokens and 128 outputs:

    fetch         asks the copy engine for tiles of x and of W as far ahead as the ring has room, also of the next tile
    multiply x2   64 tokens by 256 weight rows each; one product is always under way while the next one's operands are
                  waited for

T = tokens, I = inputs, O = weight rows. Written in Triton's lower language (Gluon): Triton waits for each product.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning

# Triton 3.9 calls it otherwise than 3.6
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
TOKENS = 128  # of a tile
OUTPUTS = 128  # of a tile, each of two weight rows
DEPTH = 64  # inputs of a step: a line of 128 bytes
DEFAULT_SIZES = {"stages": 4, "grouped": 32, "fetch_warps": 1}


@gluon.jit
def _place(item, token_tiles, output_tiles, GROUPED: gl.constexpr):
    """(tile of tokens, tile of outputs): so many tiles of tokens go side by side through W, and both stay in the
    second-level cache."""
    band = item // (GROUPED * output_tiles)
    first = band * GROUPED
    size = gl.minimum(token_tiles - first, GROUPED)
    rest = item - first * output_tiles
    return first + rest % size, rest // size


@gluon.jit
def _fetch(
    x_desc, w_desc, x_smem, w_smem, full, empty, steps, token_tiles, output_tiles, num_outputs,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUPED: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
    n = 0
    for item in range(gl.program_id(0), token_tiles * output_tiles, gl.num_programs(0)):
        token_tile, output_tile = _place(item, token_tiles, output_tiles, GROUPED)
        for i in range(steps):
            slot = n % STAGES
            mbarrier.wait(empty.index(slot), ((n // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), (BM + 2 * BN) * BK * 2)
            copy_in(x_desc, [token_tile * BM, i * BK], full.index(slot), x_smem.index(slot))
            gate, up = w_smem.index(slot).slice(0, BN, 0), w_smem.index(slot).slice(BN, BN, 0)
            copy_in(w_desc, [output_tile * BN, i * BK], full.index(slot), gate)
            copy_in(w_desc, [output_tile * BN + num_outputs, i * BK], full.index(slot), up)
            n += 1


@gluon.jit
def _multiply(
    out_ptr, x_smem, w_smem, out_smem, full, empty, steps, token_tiles, output_tiles, num_tokens, stride_out,
    HALF: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUPED: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    T: gl.constexpr = out_ptr.dtype.element_ty
    acc_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BN, 16])
    leaving: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
    line = HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, leaving))
    column = gl.arange(0, BN, gl.SliceLayout(0, leaving))
    n = 0
    for item in range(gl.program_id(0), token_tiles * output_tiles, gl.num_programs(0)):
        token_tile, output_tile = _place(item, token_tiles, output_tiles, GROUPED)
        acc = gl.zeros([64, 2 * BN], gl.float32, acc_in)
        for i in range(steps):
            slot = n % STAGES
            mbarrier.wait(full.index(slot), (n // STAGES) & 1)
            x = x_smem.index(slot).slice(HALF * 64, 64, 0)
            acc = warpgroup_mma(x, w_smem.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES), pred=i > 0)
            n += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES))
        gate, up = gl.split(gl.permute(gl.reshape(acc, [64, 2, BN]), [0, 2, 1]))
        y = gate / (1.0 + gl.exp2(gate * -1.4426950408889634)) * up
        own = out_smem.index(HALF)  # on its way out, so that whole lines are written
        own.store(y.to(T))
        token = token_tile * BM + line
        to = out_ptr + token.to(gl.int64)[:, None] * stride_out + (output_tile * BN + column)[None, :]
        gl.store(to, own.load(leaving), (token < num_tokens)[:, None])
    if PDL:
        gdc_launch_dependents()


@gluon.jit(do_not_specialize=["num_tokens", "token_tiles"])
def _hopper_gate_kernel(
    x_desc, w_desc, out_ptr, steps, token_tiles, output_tiles, num_tokens, num_outputs, stride_out,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUPED: gl.constexpr,
    REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr, FETCH_WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    T: gl.constexpr = out_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_smem = gl.allocate_shared_memory(T, [STAGES, BM, BK], swizzled)
    w_smem = gl.allocate_shared_memory(T, [STAGES, 2 * BN, BK], swizzled)
    out_smem = gl.allocate_shared_memory(T, [2, 64, BN], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_multiply, (
                out_ptr, x_smem, w_smem, out_smem, full, empty, steps, token_tiles, output_tiles, num_tokens,
                stride_out, 0, BM, BN, STAGES, GROUPED, PDL,
            )),
            (_multiply, (
                out_ptr, x_smem, w_smem, out_smem, full, empty, steps, token_tiles, output_tiles, num_tokens,
                stride_out, 1, BM, BN, STAGES, GROUPED, PDL,
            )),
            (_fetch, (
                x_desc, w_desc, x_smem, w_smem, full, empty, steps, token_tiles, output_tiles, num_outputs, BM, BN, BK,
                STAGES, GROUPED, PDL,
            )),
        ],
        [4, FETCH_WARPS],
        [REGISTERS, FETCH_REGISTERS],
    )  # fmt: skip


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether these can be multiplied here: 16 bits, rows that the copy engine can fetch, whole steps and tiles."""
    return (
        x_TI.is_cuda
        and x_TI.dtype in (torch.bfloat16, torch.float16)
        and x_TI.dtype == weight_OI.dtype
        and x_TI.stride(1) == weight_OI.stride(1) == 1
        and x_TI.stride(0) % 8 == weight_OI.stride(0) % 8 == 0
        and x_TI.data_ptr() % 16 == weight_OI.data_ptr() % 16 == 0
        and x_TI.shape[1] % DEPTH == 0
        and weight_OI.shape[0] % (2 * OUTPUTS) == 0
        and _is_hopper(x_TI.device)
    )


def suits(x_TI: Tensor, weight_OI: Tensor) -> bool:
    """Whether these are multiplied here: as many tokens as it was measured to be faster for than the library."""
    sizes, num_tokens = _tuned(weight_OI), x_TI.shape[0]
    if sizes is None:
        return False
    is_window = sizes.get("window_least", num_tokens + 1) <= num_tokens <= sizes.get("window_most", num_tokens)
    return (is_window or num_tokens >= sizes["least"]) and takes(x_TI, weight_OI)


def _tuned(weight_OI: Tensor) -> tuning.Sizes | None:
    num_rows, num_inputs = weight_OI.shape
    return tuning.pick("hopper_gate", f"{num_inputs}x{num_rows}", weight_OI.device)


def gated_linear(
    x_TI: Tensor, weight_OI: Tensor, *, out_TX: Tensor | None = None, sizes: tuning.Sizes | None = None
) -> Tensor:
    """silu(gate) · up of x W^T, [T, O / 2]. Ask `takes` first.

    `sizes`: stages of the ring, tiles of tokens `grouped` side by side, warps that fetch.
    """
    num_tokens, num_inputs = x_TI.shape
    num_outputs = weight_OI.shape[0] // 2
    if out_TX is None:
        out_TX = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    assert out_TX.shape == (num_tokens, num_outputs)
    assert out_TX.stride(1) == 1
    sizes = {**DEFAULT_SIZES, **(sizes or _tuned(weight_OI) or {})}
    token_tiles, output_tiles = triton.cdiv(num_tokens, TOKENS), num_outputs // OUTPUTS
    programs = min(tuning.device_facts(x_TI.device).num_sms, token_tiles * output_tiles)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    _hopper_gate_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_TI, [TOKENS, DEPTH], layout),
        TensorDescriptor.from_tensor(weight_OI, [OUTPUTS, DEPTH], layout),
        out_TX, num_inputs // DEPTH, token_tiles, output_tiles, num_tokens, num_outputs, out_TX.stride(0),
        BM=TOKENS, BN=OUTPUTS, BK=DEPTH, STAGES=sizes["stages"], GROUPED=sizes["grouped"], REGISTERS=232,
        FETCH_REGISTERS=40, FETCH_WARPS=sizes["fetch_warps"], num_warps=4, **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TX
