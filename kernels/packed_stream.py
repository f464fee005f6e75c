"""Products of 1 to 8 tokens with weights of 4 or 8 bits, for Hopper: as few programs as multiprocessors, no warp waits.

Meaning: `packed_reference.linear`. A program brings its inputs to shared memory once, for all tiles of 16 rows that it
has; TILES tiles stand side by side, and SPLIT warps share the inputs of each. A warp takes words from memory right into
the registers that the tensor cores read, DEPTH blocks of 128 inputs ahead, the first of them while the kernel before
still runs. Warps meet twice: when the inputs are there (normed on the way, if asked for), and to add up at the end.
(BASE + zero) times the sum of a block's inputs goes off its product, by a product with ones.

`packed_few` fetches several tokens anew for every 32 rows, which at 8 tokens is as much as the weight itself. Where
inputs don't fit into shared memory, or would be too much for every program, PARTS programs share them; the one that is
done last adds up, in order.
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
from argosy.kernels.stream_parts import add, ask, bring, bring_half, finish, four, inputs, over_warps

# Triton 3.9 calls it otherwise than 3.6
wait_for_all = getattr(gl, "thread_barrier", None) or gl.barrier
GROUP = 128
MOST_TOKENS = 8
SHARED_BYTES = 200_000  # of inputs, at most
REGISTERS = 65536  # of a multiprocessor


@gluon.jit
def stream_kernel(
    x_ptr, norm_ptr, words_ptr, pairs_ptr, bias_ptr, residual_ptr, out_ptr, part_ptr, counter_ptr, num_tokens,
    num_tiles, num_outputs, stride_x, stride_out, eps,
    PLANES: gl.constexpr, W: gl.constexpr, SPLIT: gl.constexpr, STEPS: gl.constexpr, DEPTH: gl.constexpr,
    PARTS: gl.constexpr, TOKENS: gl.constexpr, X_IN: gl.constexpr, HALF_SCALES: gl.constexpr, FP16: gl.constexpr,
    HALF: gl.constexpr, NORM: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr, RESIDUAL: gl.constexpr,
    EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """`x_ptr`: int32, a pair of inputs each; `num_tiles`, `num_outputs`: of the result, which with a gate has half the
    weight's rows. A program's tiles are as far apart as there are groups of PARTS programs.
    """
    TILES: gl.constexpr = W // SPLIT
    ROWS: gl.constexpr = 1 if TOKENS == 1 else 2
    BLOCKS: gl.constexpr = PARTS * SPLIT * STEPS  # of a row of tiles
    AHEAD: gl.constexpr = min(DEPTH, STEPS)
    words_in: gl.constexpr = gl.BlockedLayout([2, 4], [1, 32], [W, 1], [1, 0])
    lanes_in: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [W, 1], [1, 0])
    wide: gl.constexpr = gl.BlockedLayout([1, 2, 1, 4], [1, 1, 8, 4], [W // SPLIT, SPLIT, 1, 1], [3, 2, 1, 0])
    groups = gl.num_programs(0) // PARTS
    group = gl.program_id(0) // PARTS
    part = gl.program_id(0) % PARTS
    if EARLY == 2 and PDL:
        gdc_launch_dependents()
    if TOKENS == 1:
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        x_smem = gl.allocate_shared_memory(gl.int32, [STEPS, 2 * SPLIT, 32], flat)
    else:
        turned: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [2, 1, 0])
        x_smem = gl.allocate_shared_memory(gl.int32, [STEPS, 2 * SPLIT, 8, 32], turned)
    unit = gl.arange(0, 2 * W, gl.SliceLayout(1, words_in))
    own_tile = unit // (2 * SPLIT) * groups + group
    first = (own_tile.to(gl.int64) * BLOCKS + part * (SPLIT * STEPS) + unit // 2 % SPLIT) * (256 * PLANES)
    place = gl.arange(0, 128, gl.SliceLayout(0, words_in))
    words_ptrs = words_ptr + (first + unit % 2 * 128)[:, None] + place[None, :]
    there = (own_tile < num_tiles)[:, None] & (place >= 0)[None, :]
    warp = gl.arange(0, W, gl.SliceLayout(1, lanes_in))
    lane = gl.arange(0, 32, gl.SliceLayout(0, lanes_in))
    tile = warp // SPLIT * groups + group
    first_pairs = (tile.to(gl.int64) * BLOCKS + part * (SPLIT * STEPS) + warp % SPLIT) * (16 * PLANES)
    row = lane // 4 + (8 * (lane % 2) if TOKENS == 1 else 0 * lane)
    is_lower = (lane % 2 == 1)[None, :]
    pairs_ptrs = pairs_ptr + first_pairs[:, None] + row[None, :]
    has_pairs = (tile < num_tiles)[:, None] & (lane >= 0)[None, :]
    up_words, up_pairs = words_ptrs, pairs_ptrs
    if GATED:
        up_words += num_tiles.to(gl.int64) * (BLOCKS * 256 * PLANES)
        up_pairs += num_tiles.to(gl.int64) * (BLOCKS * 16 * PLANES)
    ring = ()
    for ahead in gl.static_range(AHEAD):
        ring = ring + (ask(words_ptrs, pairs_ptrs, ahead, there, has_pairs, SPLIT, PLANES, ROWS),)  # type: ignore[assignment]  # noqa: RUF005
        if GATED:
            ring = ring + (ask(up_words, up_pairs, ahead, there, has_pairs, SPLIT, PLANES, ROWS),)  # type: ignore[assignment]  # noqa: RUF005
    if PDL:
        gdc_wait()
        if EARLY == 1:
            gdc_launch_dependents()
    back = 1.0
    if HALF:
        back = bring_half(x_ptr, norm_ptr, x_smem, part, num_tokens, stride_x, eps, W, SPLIT, STEPS, TOKENS, NORM, FP16)
    else:
        bring(x_ptr, norm_ptr, x_smem, part, num_tokens, stride_x, eps, W, SPLIT, STEPS, TOKENS, NORM, FP16)
    zeros = gl.zeros([W, 32], gl.float32, lanes_in)
    sums = (zeros,) if TOKENS == 1 else (zeros, zeros, zeros, zeros)
    up_sums = sums
    TURNS: gl.constexpr = (STEPS - AHEAD) // AHEAD
    for turn in range(TURNS):
        for n in gl.static_range(AHEAD):
            step = turn * AHEAD + n
            ring, sums, up_sums = _step(
                ring, sums, up_sums, x_smem, step, words_ptrs, pairs_ptrs, up_words, up_pairs, there, has_pairs,
                is_lower, True, AHEAD, X_IN, words_in, wide, lanes_in, W, SPLIT, TOKENS, PLANES, FP16, HALF,
                HALF_SCALES, GATED,
            )  # fmt: skip
    for n in gl.static_range(TURNS * AHEAD, STEPS):
        ring, sums, up_sums = _step(
            ring, sums, up_sums, x_smem, n, words_ptrs, pairs_ptrs, up_words, up_pairs, there, has_pairs, is_lower,
            n + AHEAD < STEPS, AHEAD, X_IN, words_in, wide, lanes_in, W, SPLIT, TOKENS, PLANES, FP16, HALF,
            HALF_SCALES, GATED,
        )  # fmt: skip
    if PDL:  # noqa: SIM102 - known when compiling
        if EARLY == 0:
            gdc_launch_dependents()
    y = over_warps(sums, W, SPLIT, TOKENS) * back
    up = y
    if GATED:
        up = over_warps(up_sums, W, SPLIT, TOKENS) * back
    here_in: gl.constexpr = y.type.layout
    SIZE: gl.constexpr = TILES * (32 if TOKENS == 1 else 128)
    at = gl.arange(0, TILES, gl.SliceLayout(1, here_in))
    place = gl.arange(0, SIZE // TILES, gl.SliceLayout(0, here_in))
    if TOKENS == 1:
        row = place // 4 + 8 * (place % 2)
        token = 0 * place
        one = place % 4 < 2
    else:
        row = place // 16 + place // 2 % 2 * 8
        token = place // 4 % 4 * 2 + place % 2
        one = token < num_tokens
    if PARTS > 1:
        there = at[:, None] * (SIZE // TILES) + place[None, :]
        HALVES: gl.constexpr = 2 if GATED else 1
        mine = part_ptr + (group * PARTS + part).to(gl.int64) * (SIZE * HALVES)
        gl.store(mine + there, y)
        if GATED:
            gl.store(mine + SIZE + there, up)
        wait_for_all()  # every thread's stores come before the one thread's release below
        counter = counter_ptr + group
        if gl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1:
            gl.atomic_xchg(counter, 0, sem="relaxed")  # ready for the next launch
            first_part = part_ptr + group.to(gl.int64) * (PARTS * SIZE * HALVES)
            y = gl.load(first_part + there, cache_modifier=".cg")  # past the first-level cache
            for other in gl.static_range(1, PARTS):
                y += gl.load(first_part + other * (SIZE * HALVES) + there, cache_modifier=".cg")
            if GATED:
                up = gl.load(first_part + SIZE + there, cache_modifier=".cg")
                for other in gl.static_range(1, PARTS):
                    up += gl.load(first_part + (other * HALVES + 1) * SIZE + there, cache_modifier=".cg")
            finish(
                y, up, at * groups + group, row, token, one, num_tiles, bias_ptr, residual_ptr, out_ptr, num_outputs,
                stride_out, BIAS, GATED, RESIDUAL,
            )  # fmt: skip
    else:
        finish(
            y, up, at * groups + group, row, token, one, num_tiles, bias_ptr, residual_ptr, out_ptr, num_outputs,
            stride_out, BIAS, GATED, RESIDUAL,
        )  # fmt: skip


@gluon.jit
def _step(
    ring, sums, up_sums, x_smem, step, words_ptrs, pairs_ptrs, up_words, up_pairs, there, has_pairs, is_lower,
    ASKS: gl.constexpr, AHEAD: gl.constexpr, X_IN: gl.constexpr, words_in: gl.constexpr, wide: gl.constexpr,
    lanes_in: gl.constexpr, W: gl.constexpr, SPLIT: gl.constexpr, TOKENS: gl.constexpr, PLANES: gl.constexpr,
    FP16: gl.constexpr, HALF: gl.constexpr, HALF_SCALES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The ring's first block multiplied, and one asked for in its place; (ring, sums, sums of the ups)."""
    ROWS: gl.constexpr = 1 if TOKENS == 1 else 2
    xa, xb = inputs(x_smem, step, X_IN, words_in, wide, W, SPLIT, TOKENS)
    ones: gl.constexpr = HALF_SUMS if HALF else SUMS_FP16 if FP16 else SUMS_BF16
    total = gl.inline_asm_elementwise(ones, SUMS_OPERANDS, [xa, xb], dtype=gl.float32, is_pure=True, pack=4)
    based, based_after, total, after = four(total, W, lanes_in)
    sums = add(
        sums, ring[0], xa, xb, total, after, based, based_after, is_lower, W, TOKENS, PLANES, FP16, HALF, HALF_SCALES,
        lanes_in,
    )  # fmt: skip
    ring = ring[1:]
    if ASKS:
        ring = ring + (ask(words_ptrs, pairs_ptrs, step + AHEAD, there, has_pairs, SPLIT, PLANES, ROWS),)  # noqa: RUF005
    if GATED:
        up_sums = add(
            up_sums, ring[0], xa, xb, total, after, based, based_after, is_lower, W, TOKENS, PLANES, FP16, HALF,
            HALF_SCALES, lanes_in,
        )  # fmt: skip
        ring = ring[1:]
        if ASKS:
            ring = ring + (ask(up_words, up_pairs, step + AHEAD, there, has_pairs, SPLIT, PLANES, ROWS),)  # noqa: RUF005
    return ring, sums, up_sums


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(x_TI: Tensor, weight: PackedWeight) -> bool:
    """Whether these can be multiplied here: 1 to 8 tokens in rows of whole 16 bytes, groups of 128 inputs."""
    return (
        x_TI.is_cuda
        and x_TI.shape[0] <= MOST_TOKENS
        and x_TI.element_size() == 2
        and x_TI.data_ptr() % 16 == 0
        and x_TI.stride(0) % 8 == 0
        and weight.group == GROUP
        and weight.num_inputs % GROUP == 0
        and _is_hopper(x_TI.device)
    )


def fits(weight: PackedWeight, num_tokens: int, sizes: tuning.Sizes) -> bool:
    """Whether blocks can be shared out like that, and inputs find room."""
    shares = sizes["split"] * sizes.get("parts", 1)
    tokens = 1 if num_tokens == 1 else MOST_TOKENS
    room = weight.num_inputs // sizes.get("parts", 1) * 2 * tokens
    return weight.num_inputs // GROUP % shares == 0 and room <= SHARED_BYTES


def norms(norm_weight_I: Tensor, x_TI: Tensor, sizes: tuning.Sizes) -> bool:
    """Whether the inputs' norm can be made in the same launch, and was measured to be faster there."""
    return (
        bool(sizes.get("norm", 0))
        and sizes.get("parts", 1) == 1
        and norm_weight_I.dtype == x_TI.dtype
        and norm_weight_I.data_ptr() % 16 == 0
    )


def _inputs_in(warps: int, split: int, tokens: int) -> gl.DistributedLinearLayout:
    """Of a step's inputs when they are read: a lane's eight pairs of each of two units."""
    parts, tiles = split.bit_length() - 1, (warps // split).bit_length() - 1
    if tokens == 1:
        return gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [1, 0]], [[0, 8], [0, 16], [0, 0], [0, 0], [0, 0]],
            [[2 << i, 0] for i in range(parts)] + [[0, 0]] * tiles, [], [2 * split, 32],
        )  # fmt: skip
    return gl.DistributedLinearLayout(
        [[0, 0, 4], [0, 0, 8], [0, 0, 16], [1, 0, 0]], [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[2 << i, 0, 0] for i in range(parts)] + [[0, 0, 0]] * tiles, [], [2 * split, 8, 32],
    )  # fmt: skip


def groups_of(num_tiles: int, sizes: tuning.Sizes, num_sms: int) -> int:
    """Programs, or groups of them that share inputs: all have as many tiles, or as many as there is room for."""
    room = sizes["warps"] // sizes["split"]
    at_once = max(1, num_sms * sizes.get("per_sm", 1) // sizes.get("parts", 1))
    return -(-num_tiles // min(room, -(-num_tiles // at_once)))


def linear(
    x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, residual_TO: Tensor | None, gated: bool, out_TO: Tensor,
    sizes: tuning.Sizes, norm_weight_I: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """x W^T + bias, gated, added to the residual, into `out_TO`; with a norm's weight, of x normed. Ask `takes` and
    `fits` first, and with a norm `norms`.

    `sizes`: warps (4, 8 or 16), split (of them that share a tile's inputs), depth (blocks a warp asks for ahead), parts
    (programs that share a tile's inputs; 1 without), per_sm (programs of a multiprocessor; 1 without), room (for how
    many programs there must be registers; `per_sm` without), early (when the successor may start: 0 when all is
    multiplied, 1 when its own predecessor is done, 2 at once), half (4 bits by float16, see `bring_half`), norm (make
    the norm of the inputs as well, where `norms` finds it can).
    """
    words, pairs, num_tokens = weight.words_MUW, weight.pairs_MKR2, x_TI.shape[0]
    split, parts, tokens = sizes["split"], sizes.get("parts", 1), 1 if num_tokens == 1 else MOST_TOKENS
    assert num_tokens <= MOST_TOKENS
    assert fits(weight, num_tokens, sizes)
    tiles = words.shape[0] // 2 if gated else words.shape[0]
    groups = groups_of(tiles, sizes, tuning.device_facts(x_TI.device).num_sms)
    per_sm = sizes.get("room", sizes.get("per_sm", 1))
    most = {"maxnreg": REGISTERS // (32 * sizes["warps"] * per_sm) // 8 * 8} if per_sm > 1 else {}
    part, counters = out_TO, out_TO
    if parts > 1:
        assert groups <= tuning.MAX_COUNTERS
        size = groups * parts * (sizes["warps"] // split) * (32 if tokens == 1 else 128) * (2 if gated else 1)
        part = torch.empty(size, dtype=torch.float32, device=x_TI.device)
        counters = tuning.counters(x_TI.device)
    norm_I = x_TI if norm_weight_I is None else norm_weight_I
    stream_kernel[(groups * parts,)](
        x_TI.view(torch.int32), norm_I.view(torch.int32), words, pairs.view(torch.int32),
        out_TO if bias_O is None else bias_O, out_TO, out_TO, part, counters, num_tokens, tiles, out_TO.shape[1],
        x_TI.stride(0) // 2, out_TO.stride(0), eps,
        PLANES=weight.planes, W=sizes["warps"], SPLIT=split, STEPS=weight.num_inputs // GROUP // (split * parts),
        DEPTH=sizes["depth"], PARTS=parts, TOKENS=tokens, X_IN=_inputs_in(sizes["warps"], split, tokens),
        HALF_SCALES=pairs.dtype == torch.float16, FP16=x_TI.dtype == torch.float16,
        HALF=bool(sizes.get("half", 0)) and weight.planes == 1, NORM=norm_weight_I is not None,
        BIAS=bias_O is not None, GATED=gated, RESIDUAL=residual_TO is not None, EARLY=sizes.get("early", 0),
        num_warps=sizes["warps"], **most, **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO
