"""A linear layer for 2 to 64 tokens with 16-bit weights, whose weights are on their way before the tokens are there.

Meaning: `reference.fused_linear`, without a norm but one that the product before left (`norm_ahead`). As in `fp8_ring`,
a warp fetches by the copy engine as far ahead as a ring in shared memory has places, before the kernel before this one
is done; four others multiply from there by the tensor cores, weights as the left side, several times faster than memory
fills the ring. So what came while a sum over the group waited for the link, or attention for its keys, costs next to
nothing when its turn comes.

Inputs may be cut into pieces, where a rank has few weight rows: the program that is done last adds up a tile's pieces,
in order, or (`in_pieces`) they are left for the sum over the group to add up (`group_push`).
Written in Triton's lower language.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from argosy.kernels import tuning
from argosy.kernels.fp8_ring import RING_BYTES, fetch, is_hopper, multiply_place, next_place, ring_of, wait_for_all
from argosy.kernels.norm_ahead import NormAhead

MAX_TOKENS = 64


@gluon.jit
def _finish(
    acc, up, squares, out_ptr, bias_ptr, next_ptr, next_norm_ptr, next_squares_ptr, tile, piece, num_tokens, num_inputs,
    num_outputs, stride_out, stride_squares, eps,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, LEFT: gl.constexpr,
    HALVES: gl.constexpr, NORMED: gl.constexpr, NEXT: gl.constexpr,
):  # fmt: skip
    """Norm, bias, gate and residual, and out it goes. LEFT: as one of several pieces. NEXT: what is added to leaves its
    norm, but for the length of its rows, as well."""
    if NORMED > 0:
        length_T = 1.0 / gl.sqrt(gl.sum(squares, 0) / num_inputs + eps)
        length_T = gl.convert_layout(length_T, gl.SliceLayout(0, acc.type.layout))
        acc *= length_T[None, :]
        up *= length_T[None, :]
    out_in: gl.constexpr = gl.BlockedLayout([ROWS // 16, 2], [16, 2], [1, 4], [0, 1])  # a token's outputs side by side
    here = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, out_in))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, out_in))
    if HALVES == 2:
        if BIAS:
            own = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
            acc += gl.load(bias_ptr + own).to(gl.float32)[:, None]
            up += gl.load(bias_ptr + num_outputs + own).to(gl.float32)[:, None]
        acc = acc / (1.0 + gl.exp(-acc)) * up
    y = gl.convert_layout(acc, out_in)
    if BIAS and HALVES == 1:
        y += gl.load(bias_ptr + here).to(gl.float32)[:, None]
    to = out_ptr + (token.to(gl.int64) * stride_out)[None, :] + here[:, None]
    if LEFT:
        to += piece.to(gl.int64) * (num_tokens * stride_out)
    kept = (token < num_tokens)[None, :] & (here >= 0)[:, None]
    if RESIDUAL:
        y += gl.load(to, mask=kept, other=0.0).to(gl.float32)
    made = y.to(out_ptr.dtype.element_ty)
    gl.store(to, made, kept)
    if NEXT:  # of what was stored, as the next layer will read it
        y = gl.where(kept, made.to(gl.float32), 0.0)
        weighed = y * gl.load(next_norm_ptr + here).to(gl.float32)[:, None]
        to = next_ptr + (token.to(gl.int64) * num_outputs)[None, :] + here[:, None]
        gl.store(to, weighed.to(next_ptr.dtype.element_ty), kept)
        gl.store(next_squares_ptr + tile * stride_squares + token, gl.sum(y * y, 0))


@gluon.jit
def _multiply(
    out_ptr, bias_ptr, part_ptr, counter_ptr, squares_ptr, next_ptr, next_norm_ptr, next_squares_ptr, x_smem, w_smem,
    full, empty, per, num_blocks, num_tokens, num_inputs, num_outputs, num_parts, stride_out, stride_squares, eps,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
    PIECES: gl.constexpr, JOINED: gl.constexpr, HALVES: gl.constexpr, NORMED: gl.constexpr, NEXT: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """NORMED: a power of two that holds the parts of the squares of x; 0: it comes as it is."""
    acc_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    program = gl.program_id(0)
    tile = program // PIECES
    piece = program % PIECES
    acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_in)
    up = gl.zeros([ROWS, TOKENS], gl.float32, acc_in)
    if PDL:
        gdc_wait()
    squares = up
    if NORMED > 0:  # added up behind the loop: nothing waits for them here
        squares_in: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
        part = gl.arange(0, NORMED, gl.SliceLayout(1, squares_in))[:, None]
        column = gl.arange(0, TOKENS, gl.SliceLayout(0, squares_in))[None, :]
        squares = gl.load(squares_ptr + part * stride_squares + column, part < num_parts, other=0.0)
    slot = 0
    phase = 0
    for _ in range(gl.minimum(per, num_blocks - piece * per)):
        acc, up = multiply_place(acc, up, x_smem, w_smem, full, empty, slot, slot, phase, HALVES)
        slot, phase = next_place(slot, phase, STAGES)
    last = program >= 0
    if JOINED:
        row = gl.arange(0, ROWS, gl.SliceLayout(1, acc_in))
        column = gl.arange(0, TOKENS, gl.SliceLayout(0, acc_in))
        place = part_ptr + tile.to(gl.int64) * (PIECES * ROWS * TOKENS) + row[:, None] * TOKENS + column[None, :]
        gl.store(place + piece * (ROWS * TOKENS), acc)
        wait_for_all()  # every thread's stores come before the one thread's release below
        last = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == PIECES - 1
        if last:
            gl.atomic_xchg(counter_ptr + tile, 0, sem="relaxed")  # ready for the next launch
            acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_in)
            for other in gl.static_range(PIECES):  # .cg: past the first-level cache
                acc += gl.load(place + other * (ROWS * TOKENS), cache_modifier=".cg")
    if last:
        _finish(
            acc, up, squares, out_ptr, bias_ptr, next_ptr, next_norm_ptr, next_squares_ptr, tile, piece, num_tokens,
            num_inputs, num_outputs, stride_out, stride_squares, eps, ROWS, TOKENS, BIAS, RESIDUAL,
            PIECES > 1 and not JOINED, HALVES, NORMED, NEXT,
        )  # fmt: skip


COUNTS = ("per", "total", "num_blocks", "num_tokens", "num_inputs", "num_outputs", "num_parts", "stride_out")


@gluon.jit(do_not_specialize=COUNTS)
def _ring_kernel(
    x_desc, w_desc, out_ptr, bias_ptr, part_ptr, counter_ptr, squares_ptr, next_ptr, next_norm_ptr, next_squares_ptr,
    per, total, num_blocks, num_tokens, num_inputs, num_outputs, num_parts, stride_out, stride_squares, eps,
    ROWS: gl.constexpr, WIDTH: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr, PIECES: gl.constexpr, JOINED: gl.constexpr, HALVES: gl.constexpr, NORMED: gl.constexpr,
    NEXT: gl.constexpr, EARLY: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A program a tile of ROWS outputs and a piece of the inputs: `per` blocks of WIDTH. With RESIDUAL it is `out` that
    is added to."""
    BYTES: gl.constexpr = (HALVES * ROWS + TOKENS) * WIDTH * 2
    x_smem, w_smem, full, empty = ring_of(x_desc, w_desc, ROWS, WIDTH, TOKENS, STAGES, HALVES)
    gl.warp_specialize([
        (_multiply, (
            out_ptr, bias_ptr, part_ptr, counter_ptr, squares_ptr, next_ptr, next_norm_ptr, next_squares_ptr, x_smem,
            w_smem, full, empty, per, num_blocks, num_tokens, num_inputs, num_outputs, num_parts, stride_out,
            stride_squares, eps, ROWS, TOKENS, STAGES, BIAS, RESIDUAL, PIECES, JOINED, HALVES, NORMED, NEXT, PDL,
        )),
        (fetch, (
            x_desc, w_desc, x_smem, w_smem, full, empty, per, total, num_blocks, num_outputs, ROWS, WIDTH, STAGES,
            HALVES, BYTES, EARLY, PDL,
        )),
    ], [1], [32])  # fmt: skip


def takes(x_TI: Tensor, weight_OI: Tensor, sizes: tuning.Sizes, *, gated: bool) -> bool:
    """Whether these can be multiplied here: a card with such tensor cores, addresses that the copy engine can fetch,
    whole tiles and pieces."""
    blocks, rest = divmod(x_TI.shape[1], sizes["width"])
    outputs = weight_OI.shape[0] // (1 + gated)
    return (
        x_TI.is_cuda
        and 0 < x_TI.shape[0] <= MAX_TOKENS
        and rest == 0
        and blocks % sizes["pieces"] == 0
        and outputs % sizes["rows"] == 0
        and not (gated and sizes["pieces"] > 1)
        and outputs // sizes["rows"] <= tuning.MAX_COUNTERS
        and all(v.stride(1) == 1 and v.stride(0) % 8 == 0 and v.data_ptr() % 16 == 0 for v in (x_TI, weight_OI))
        and is_hopper(x_TI.device)
    )


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    out_TO: Tensor | None,
    sizes: tuning.Sizes,
    *,
    gated: bool = False,
    residual: bool = False,
    in_pieces: bool = False,
    normed: NormAhead | None = None,
    ahead: NormAhead | None = None,
) -> Tensor:
    """x W^T + bias, gated, written or (`residual`) added to `out_TO`. Ask `takes` first. `normed`: what the product
    before left; it stands for x. `ahead`: what to leave for the product behind, besides.

    `sizes`: rows (64 or 128) and width (64 to 256) of a place in the ring, stages, pieces of the inputs, early (when
    the kernel behind may start: 0 with this one's tokens, 1 at once, 2 with the last weights). `in_pieces`: float32
    [pieces, T, O], to be added up, of no bias.
    """
    x_TI = x_TI if normed is None else normed.values_TD
    num_tokens, num_inputs = x_TI.shape
    halves, height, width, pieces = 1 + gated, sizes["rows"], sizes["width"], sizes["pieces"]
    num_outputs = weight_OI.shape[0] // halves
    tokens = max(8, tuning.next_power_of_two(num_tokens))
    blocks, tiles = num_inputs // width, num_outputs // height
    early = sizes.get("early", 2)
    if (out_TO is not None and not residual) or in_pieces:  # a sum behind it reads before its wait what others left
        early = 2 if early == 1 else early
    in_pieces = in_pieces and pieces > 1
    assert not in_pieces or (bias_O is None and not residual)
    if in_pieces:
        out_TO = torch.empty((pieces, num_tokens, num_outputs), dtype=torch.float32, device=x_TI.device)
    elif out_TO is None:
        out_TO = torch.empty((num_tokens, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
    joined = pieces > 1 and not in_pieces
    part, counters = out_TO, out_TO
    if joined:
        part = torch.empty(tiles * pieces * height * tokens, dtype=torch.float32, device=x_TI.device)
        counters = tuning.counters(x_TI.device)
    squares, num_parts = (out_TO, 0) if normed is None else (normed.squares_PT, normed.squares_PT.shape[0])
    of_next = squares if ahead is None else ahead.squares_PT
    assert normed is None or ahead is None
    assert ahead is None or (residual and not gated and of_next.shape[0] == tiles)
    place = (halves * height + tokens) * width * 2
    # what is left turns a tile around on its way out
    stages = min(sizes["stages"], (RING_BYTES - 3 * height * tokens) // place, blocks // pieces)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    _ring_kernel[(tiles * pieces,)](
        TensorDescriptor.from_tensor(x_TI, [tokens, width], layout),
        TensorDescriptor.from_tensor(weight_OI, [height, width], layout),
        out_TO, out_TO if bias_O is None else bias_O, part, counters, squares,
        out_TO if ahead is None else ahead.values_TD, out_TO if ahead is None else ahead.weight_D, of_next,
        blocks // pieces, tiles * blocks, blocks, num_tokens, num_inputs, num_outputs, num_parts, out_TO.stride(-2),
        of_next.stride(0), 0.0 if normed is None else normed.eps,
        ROWS=height, WIDTH=width, TOKENS=tokens, STAGES=stages, BIAS=bias_O is not None, RESIDUAL=residual,
        PIECES=pieces, JOINED=joined, HALVES=halves,
        NORMED=tuning.next_power_of_two(num_parts) if num_parts else 0, NEXT=ahead is not None, EARLY=early,
        num_warps=4,
        maxnreg=sizes.get("registers", 80 if tokens <= 16 else 128), **tuning.overlap(x_TI.device),
    )  # fmt: skip
    return out_TO
