"""Products of one token with weights of 4 bits, for Hopper: as few programs as multiprocessors, no warp waits.

Meaning: `packed_reference.linear`. A program brings its inputs to shared memory once, for all tiles of 16 rows that it
has; TILES tiles stand side by side, and SPLIT warps share the inputs of each. A warp takes words from memory right into
the registers that the tensor cores read, DEPTH blocks of 128 inputs ahead, the first of them while the kernel before
still runs. Warps meet twice: when the inputs are there (normed on the way, if asked for), and to add up at the end.
(BASE + zero) times the sum of a block's inputs goes off its product, by a product with ones.

Weights of 8 bits, and several tokens, were no faster so than by `packed_few` on any shape of 8B (H200).
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.packed_parts import HALF_SUMS, SUMS_BF16, SUMS_FP16, SUMS_OPERANDS
from argosy.kernels.packed_reference import PackedWeight
from argosy.kernels.stream_parts import add, ask, bring, bring_half, finish, inputs, two

GROUP = 128
SHARED_BYTES = 200_000  # of inputs, at most
REGISTERS = 65536  # of a multiprocessor


@gluon.jit
def stream_kernel(
    x_ptr, norm_ptr, words_ptr, pairs_ptr, bias_ptr, residual_ptr, out_ptr, num_tiles, num_outputs, eps,
    W: gl.constexpr, SPLIT: gl.constexpr, STEPS: gl.constexpr, DEPTH: gl.constexpr, X_IN: gl.constexpr,
    HALF_SCALES: gl.constexpr, FP16: gl.constexpr, HALF: gl.constexpr, NORM: gl.constexpr, BIAS: gl.constexpr,
    GATED: gl.constexpr, RESIDUAL: gl.constexpr, EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """`x_ptr`: int32, a pair of inputs each; `num_tiles`, `num_outputs`: of the result, which with a gate has half the
    weight's rows. A program's tiles are as far apart as there are programs.
    """
    TILES: gl.constexpr = W // SPLIT
    BLOCKS: gl.constexpr = SPLIT * STEPS  # of a row of tiles
    AHEAD: gl.constexpr = min(DEPTH, STEPS)
    words_in: gl.constexpr = gl.BlockedLayout([2, 4], [1, 32], [W, 1], [1, 0])
    lanes_in: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [W, 1], [1, 0])
    wide: gl.constexpr = gl.BlockedLayout([1, 2, 1, 4], [1, 1, 8, 4], [W // SPLIT, SPLIT, 1, 1], [3, 2, 1, 0])
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    if EARLY == 2 and PDL:
        gdc_launch_dependents()
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    x_smem = gl.allocate_shared_memory(gl.int32, [STEPS, 2 * SPLIT, 32], flat)
    unit = gl.arange(0, 2 * W, gl.SliceLayout(1, words_in))
    own_tile = unit // (2 * SPLIT) * programs + program
    first = (own_tile.to(gl.int64) * BLOCKS + unit // 2 % SPLIT) * 256
    place = gl.arange(0, 128, gl.SliceLayout(0, words_in))
    words_ptrs = words_ptr + (first + unit % 2 * 128)[:, None] + place[None, :]
    there = (own_tile < num_tiles)[:, None] & (place >= 0)[None, :]
    warp = gl.arange(0, W, gl.SliceLayout(1, lanes_in))
    lane = gl.arange(0, 32, gl.SliceLayout(0, lanes_in))
    tile = warp // SPLIT * programs + program
    first_pairs = (tile.to(gl.int64) * BLOCKS + warp % SPLIT) * 16
    row = lane // 4 + 8 * (lane % 2)
    is_lower = (lane % 2 == 1)[None, :]
    pairs_ptrs = pairs_ptr + first_pairs[:, None] + row[None, :]
    has_pairs = (tile < num_tiles)[:, None] & (lane >= 0)[None, :]
    up_words, up_pairs = words_ptrs, pairs_ptrs
    if GATED:
        up_words += num_tiles.to(gl.int64) * (BLOCKS * 256)
        up_pairs += num_tiles.to(gl.int64) * (BLOCKS * 16)
    ring = ()
    for ahead in gl.static_range(AHEAD):
        ring = ring + (ask(words_ptrs, pairs_ptrs, ahead, there, has_pairs, SPLIT),)  # type: ignore[assignment]  # noqa: RUF005  # Gluon unpacks no tuples
        if GATED:
            ring = ring + (ask(up_words, up_pairs, ahead, there, has_pairs, SPLIT),)  # type: ignore[assignment]  # noqa: RUF005  # Gluon unpacks no tuples
    if PDL:
        gdc_wait()
        if EARLY == 1:
            gdc_launch_dependents()
    back = 1.0
    if HALF:
        back = bring_half(x_ptr, norm_ptr, x_smem, eps, W, SPLIT, STEPS, NORM, FP16)
    else:
        bring(x_ptr, norm_ptr, x_smem, eps, W, SPLIT, STEPS, NORM, FP16)
    sums = gl.zeros([W, 32], gl.float32, lanes_in)
    up_sums = sums
    TURNS: gl.constexpr = (STEPS - AHEAD) // AHEAD
    for turn in range(TURNS):
        for n in gl.static_range(AHEAD):
            step = turn * AHEAD + n
            ring, sums, up_sums = _step(
                ring, sums, up_sums, x_smem, step, words_ptrs, pairs_ptrs, up_words, up_pairs, there, has_pairs,
                is_lower, True, AHEAD, X_IN, words_in, wide, lanes_in, W, SPLIT, FP16, HALF, HALF_SCALES, GATED,
            )  # fmt: skip
    for n in gl.static_range(TURNS * AHEAD, STEPS):
        ring, sums, up_sums = _step(
            ring, sums, up_sums, x_smem, n, words_ptrs, pairs_ptrs, up_words, up_pairs, there, has_pairs, is_lower,
            n + AHEAD < STEPS, AHEAD, X_IN, words_in, wide, lanes_in, W, SPLIT, FP16, HALF, HALF_SCALES, GATED,
        )  # fmt: skip
    if PDL:  # noqa: SIM102 - known when compiling
        if EARLY == 0:
            gdc_launch_dependents()
    y = gl.sum(gl.reshape(sums, [TILES, SPLIT, 32]), 1) * back
    up = y
    if GATED:
        up = gl.sum(gl.reshape(up_sums, [TILES, SPLIT, 32]), 1) * back
    here_in: gl.constexpr = y.type.layout
    at = gl.arange(0, TILES, gl.SliceLayout(1, here_in))
    place = gl.arange(0, 32, gl.SliceLayout(0, here_in))
    finish(
        y, up, at * programs + program, place // 4 + 8 * (place % 2), place % 4 < 2, bias_ptr, residual_ptr, out_ptr,
        num_outputs, BIAS, GATED, RESIDUAL,
    )  # fmt: skip


@gluon.jit
def _step(
    ring, sums, up_sums, x_smem, step, words_ptrs, pairs_ptrs, up_words, up_pairs, there, has_pairs, is_lower,
    ASKS: gl.constexpr, AHEAD: gl.constexpr, X_IN: gl.constexpr, words_in: gl.constexpr, wide: gl.constexpr,
    lanes_in: gl.constexpr, W: gl.constexpr, SPLIT: gl.constexpr, FP16: gl.constexpr, HALF: gl.constexpr,
    HALF_SCALES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The ring's first block multiplied, and one asked for in its place; (ring, sums, sums of the ups)."""
    xa, xb = inputs(x_smem, step, X_IN, words_in, wide, W, SPLIT)
    ones: gl.constexpr = HALF_SUMS if HALF else SUMS_FP16 if FP16 else SUMS_BF16
    total = gl.inline_asm_elementwise(ones, SUMS_OPERANDS, [xa, xb], dtype=gl.float32, is_pure=True, pack=4)
    based, total = two(total, W, lanes_in)
    sums = add(sums, ring[0], xa, xb, total, based, is_lower, W, FP16, HALF, HALF_SCALES, lanes_in)
    ring = ring[1:]
    if ASKS:
        ring = ring + (ask(words_ptrs, pairs_ptrs, step + AHEAD, there, has_pairs, SPLIT),)  # noqa: RUF005  # Gluon unpacks no tuples
    if GATED:
        up_sums = add(up_sums, ring[0], xa, xb, total, based, is_lower, W, FP16, HALF, HALF_SCALES, lanes_in)
        ring = ring[1:]
        if ASKS:
            ring = ring + (ask(up_words, up_pairs, step + AHEAD, there, has_pairs, SPLIT),)  # noqa: RUF005  # Gluon unpacks no tuples
    return ring, sums, up_sums


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(x_TI: Tensor, weight: PackedWeight) -> bool:
    """Whether these can be multiplied here: one token of whole 16 bytes, 4 bits in groups of 128 inputs."""
    return (
        x_TI.is_cuda
        and x_TI.shape[0] == 1
        and x_TI.element_size() == 2
        and x_TI.data_ptr() % 16 == 0
        and weight.planes == 1
        and weight.group == GROUP
        and weight.num_inputs % GROUP == 0
        and _is_hopper(x_TI.device)
    )


def fits(weight: PackedWeight, sizes: tuning.Sizes) -> bool:
    """Whether blocks can be shared out like that, and inputs find room."""
    return weight.num_inputs // GROUP % sizes["split"] == 0 and weight.num_inputs * 2 <= SHARED_BYTES


def norms(norm_weight_I: Tensor, x_TI: Tensor, sizes: tuning.Sizes) -> bool:
    """Whether the inputs' norm can be made in the same launch, and was measured to be faster there."""
    return bool(sizes.get("norm", 0)) and norm_weight_I.dtype == x_TI.dtype and norm_weight_I.data_ptr() % 16 == 0


def _inputs_in(warps: int, split: int) -> gl.DistributedLinearLayout:
    """Of a step's inputs when they are read: a lane's eight pairs of each of two units."""
    shares, tiles = split.bit_length() - 1, (warps // split).bit_length() - 1
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [1, 0]], [[0, 8], [0, 16], [0, 0], [0, 0], [0, 0]],
        [[2 << i, 0] for i in range(shares)] + [[0, 0]] * tiles, [], [2 * split, 32],
    )  # fmt: skip


def programs_of(num_tiles: int, sizes: tuning.Sizes, num_sms: int) -> int:
    """How many programs: all have as many tiles, or as many as there is room for."""
    room = sizes["warps"] // sizes["split"]
    return -(-num_tiles // min(room, -(-num_tiles // (num_sms * sizes.get("per_sm", 1)))))


def linear(
    x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, residual_TO: Tensor | None, gated: bool, out_TO: Tensor,
    sizes: tuning.Sizes, norm_weight_I: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """x W^T + bias of one token, gated, added to the residual, into `out_TO`; with a norm's weight, of x normed. Ask
    `takes` and `fits` first, and with a norm `norms`.

    `sizes`: warps (4, 8 or 16), split (of them that share a tile's inputs), depth (blocks a warp asks for ahead),
    per_sm (programs of a multiprocessor, which its registers are shared out to; 1 without), early (when the successor
    may start: 0 when all is multiplied, 1 when its own predecessor is done, 2 at once), half (multiply by float16, see
    `bring_half`), norm (make the norm of the inputs as well, where `norms` finds it can).
    """
    words, pairs, split = weight.words_MUW, weight.pairs_MKR2, sizes["split"]
    assert x_TI.shape[0] == 1
    assert fits(weight, sizes)
    tiles = words.shape[0] // 2 if gated else words.shape[0]
    programs = programs_of(tiles, sizes, tuning.device_facts(x_TI.device).num_sms)
    per_sm = sizes.get("per_sm", 1)
    most = {"maxnreg": REGISTERS // (32 * sizes["warps"] * per_sm) // 8 * 8} if per_sm > 1 else {}
    norm_I = x_TI if norm_weight_I is None else norm_weight_I
    stream_kernel[(programs,)](
        x_TI.view(torch.int32), norm_I.view(torch.int32), words, pairs.view(torch.int32),
        out_TO if bias_O is None else bias_O, out_TO, out_TO, tiles, out_TO.shape[1], eps,
        W=sizes["warps"], SPLIT=split, STEPS=weight.num_inputs // GROUP // split, DEPTH=sizes["depth"],
        X_IN=_inputs_in(sizes["warps"], split), HALF_SCALES=pairs.dtype == torch.float16,
        FP16=x_TI.dtype == torch.float16, HALF=bool(sizes.get("half", 0)), NORM=norm_weight_I is not None,
        BIAS=bias_O is not None, GATED=gated, RESIDUAL=residual_TO is not None, EARLY=sizes.get("early", 0),
        num_warps=sizes["warps"], **most, **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO
