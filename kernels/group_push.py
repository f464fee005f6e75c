"""The sum over a tensor-parallel group for few rows: numbers travel with their flags, one trip over the link.

Meaning: `group_sum.sum_add_norm`, which tells its peers that a part is there and then fetches theirs: two trips, and a
fence between the data and the flag. Here a word of 8 bytes holds two numbers and the turn they belong to; a word is
written and read whole, so that whoever sees the turn has the numbers. That doubles the bytes, which is why it is for
few rows. Two ways:

- every rank sends its part to all and sums for itself (`SCATTER` false);
- row r is summed by rank r % WORLD, which sends the result to all: a second trip, but WORLD / 2 times fewer bytes.

An inbox is written again only after another sum of the group: see `workers/layers/group_sum.py`. All memory begins as
zeros, and turns count from 1. Numbers have 16 bits, rows an even number of them.

Bytes of an inbox: parts [WORLD, rows, width / 2] int64; results [rows, width / 2] int64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.group_sum import MAX_WORLD, PATIENCE_NS

MAX_ROWS = 64  # more are bound by bytes


def inbox_bytes(world: int, width: int) -> int:
    """Of one inbox for up to MAX_ROWS rows."""
    return (world + 1) * MAX_ROWS * width * 4


@triton.jit
def _now(turn):
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l,r", [turn], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _trap_if_late(began):
    """A peer is gone: the card must not hang for ever."""
    tl.inline_asm_elementwise(
        """{
        .reg .u64 now;
        .reg .pred late;
        mov.u64 now, %globaltimer;
        sub.u64 now, now, $1;
        setp.gt.u64 late, now, $2;
        @late trap;
        mov.u32 $0, 0;
        }""",
        "=r,l,l", [began, tl.cast(PATIENCE_NS, tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _receive(place, expected, turn, WAIT: tl.constexpr):
    """The words there, once all of those expected have come. place: pointers; a word of another turn is none."""
    words = tl.load(place, expected, other=0, volatile=True)
    if WAIT:
        came = ((words >> 32).to(tl.int32) == turn) | (expected == 0)
        missing = tl.max(tl.ravel((came == 0).to(tl.int32)), 0)
        if missing > 0:
            began = _now(turn)
            while missing > 0:
                words = tl.load(place, expected, other=0, volatile=True)
                came = ((words >> 32).to(tl.int32) == turn) | (expected == 0)
                missing = tl.max(tl.ravel((came == 0).to(tl.int32)), 0)
                _trap_if_late(began)
    return words


@triton.jit
def _low(word, DTYPE: tl.constexpr):
    return (word & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _high(word, DTYPE: tl.constexpr):
    return ((word >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _low_float(word):
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _high_float(word):
    return (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _pair(low, high, DTYPE: tl.constexpr):
    """Two numbers as the low half of an int64."""
    low_bits = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    return low_bits | ((high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) << 16)


@triton.jit(do_not_specialize=["rank", "stride_piece"])
def _push_kernel(
    bases_ptr, counter_ptr, part_ptr, inbox, residual_ptr, weight_ptr, out_ptr, stride_residual, eps, rank,
    stride_piece,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, WORLD: tl.constexpr, PEERS: tl.constexpr, ROWS: tl.constexpr,
    PIECES: tl.constexpr,  # the part comes as so many float32 pieces of a sum; 0: as numbers of 16 bits
    SCATTER: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program a row. Pointers to numbers of 16 bits count pairs of them, as int32; `inbox` counts words."""
    DTYPE: tl.constexpr = residual_ptr.dtype.element_ty
    row = tl.program_id(0)
    column, peer = tl.arange(0, BLOCK), tl.arange(0, PEERS)
    inside = column < PAIRS
    everywhere = (peer < WORLD)[:, None] & inside[None, :]
    here = (residual_ptr + row.to(tl.int64) * stride_residual).to(tl.pointer_type(tl.int32)) + column
    # before the wait: addresses, weights, and the residual, whose last writer was done before our predecessor began;
    # past the first-level cache (.cg), which may hold what an earlier kernel saw
    base = tl.load(bases_ptr + peer, peer < WORLD, other=0).to(tl.pointer_type(tl.int64))
    all_boxes = tl.multiple_of(base, 16)[:, None] + inbox
    owner = row % WORLD
    owners_box = tl.multiple_of(tl.load(bases_ptr + owner).to(tl.pointer_type(tl.int64)), 16) + inbox
    box = tl.multiple_of(tl.load(bases_ptr + rank).to(tl.pointer_type(tl.int64)), 16) + inbox
    weight = tl.load(weight_ptr.to(tl.pointer_type(tl.int32)) + column, inside, other=0)
    turn = tl.load(counter_ptr + row, cache_modifier=".cg") + 1
    before = tl.load(here, inside, other=0, cache_modifier=".cg") if ADD else weight
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # the next product asks for its weights while we wait for the link
    stamp = turn.to(tl.int64) << 32
    if PIECES > 0:
        first = part_ptr.to(tl.pointer_type(tl.int64)) + row * PAIRS + column
        both = tl.load(first, inside, other=0, cache_modifier=".cg")
        low, high = _low_float(both), _high_float(both)
        for piece in tl.static_range(1, PIECES):
            both = tl.load(first + piece * stride_piece, inside, other=0, cache_modifier=".cg")
            low += _low_float(both)
            high += _high_float(both)
        word = _pair(low, high, DTYPE) | stamp
    else:
        numbers = part_ptr.to(tl.pointer_type(tl.int32)) + row * PAIRS + column
        own = tl.load(numbers, inside, other=0, cache_modifier=".cg")
        word = (own.to(tl.int64) & 0xFFFFFFFF) | stamp
    place = (rank * ROWS + row).to(tl.int64) * PAIRS + column
    if SCATTER:
        tl.store(owners_box + place, word, inside)
    else:  # to ourselves as well: one way of reading for all
        tl.store(all_boxes + place[None, :], tl.broadcast_to(word[None, :], (PEERS, BLOCK)), everywhere)
    result = (WORLD * ROWS + row).to(tl.int64) * PAIRS + column
    if not SCATTER or owner == rank:
        words = _receive(box + (peer * ROWS + row).to(tl.int64)[:, None] * PAIRS + column[None, :], everywhere, turn,
                         WAIT)  # fmt: skip
        low, high = tl.sum(_low(words, DTYPE), 0), tl.sum(_high(words, DTYPE), 0)  # alike on all ranks: the same bits
        if ADD:
            low += _low(before, DTYPE)
            high += _high(before, DTYPE)
        made = _pair(low, high, DTYPE)
        tl.store(here, made.to(tl.int32), inside)
        if NORM:
            low, high = _low(made, DTYPE), _high(made, DTYPE)  # the norm of what was stored
            scale = 1.0 / tl.sqrt(tl.sum(low * low + high * high, 0) / (2 * PAIRS) + eps)
            made = _pair(low * scale * _low(weight, DTYPE), high * scale * _high(weight, DTYPE), DTYPE)
        if SCATTER:
            word = made | stamp
            tl.store(all_boxes + result[None, :], tl.broadcast_to(word[None, :], (PEERS, BLOCK)), everywhere)
        else:
            tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + row * PAIRS + column, made.to(tl.int32), inside)
    if SCATTER:
        made = _receive(box + result, inside, turn, WAIT)
        tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + row * PAIRS + column, made.to(tl.int32), inside)
    tl.store(counter_ptr + row, turn)


def push_add_norm(
    bases_W: Tensor,
    counters: Tensor,
    rank: int,
    part_TD: Tensor,
    residual_TD: Tensor,
    norm_weight_D: Tensor | None,
    eps: float,
    *,
    inbox_at: int,
    scatter: bool = False,
    add: bool = True,
    wait: bool = True,
) -> Tensor:
    """residual (+)= sum over the group of `part_TD`, then its RMS norm: as `group_sum.sum_add_norm`, up to 64 rows.

    The part may be the pieces of a sum, float32 [P, T, D] (`gemv_ring`), which are added up and rounded first.
    `inbox_at`: byte of the shared buffers where `inbox_bytes` belong to this call. `scatter`: each rank keeps only its
    own rows of the residual up to date; the result is whole. `wait` false: all words are known to be there (tests).
    """
    num_rows, width = residual_TD.shape
    world = bases_W.shape[0]
    assert 1 < world <= MAX_WORLD
    assert 0 < num_rows <= MAX_ROWS
    assert suits(num_rows, width, residual_TD.dtype)
    assert residual_TD.stride(1) == 1
    assert residual_TD.stride(0) % 2 == 0
    assert part_TD.is_contiguous()
    out_TD = torch.empty((num_rows, width), dtype=residual_TD.dtype, device=residual_TD.device)
    pieces = part_TD.shape[0] if part_TD.dim() == 3 else 0
    assert part_TD.shape[-2:] == residual_TD.shape
    assert part_TD.dtype == (torch.float32 if pieces else residual_TD.dtype)
    block = tuning.next_power_of_two(width // 2)
    _push_kernel[(num_rows,)](
        bases_W, counters, part_TD, inbox_at // 8, residual_TD, residual_TD if norm_weight_D is None else norm_weight_D,
        out_TD, residual_TD.stride(0), eps, rank, num_rows * width // 2,
        PAIRS=width // 2, BLOCK=block, WORLD=world, PEERS=tuning.next_power_of_two(world), ROWS=MAX_ROWS,
        PIECES=pieces, SCATTER=scatter, ADD=add, NORM=norm_weight_D is not None, WAIT=wait,
        num_warps=min(16, max(4, block // 128)), **tuning.overlap(residual_TD.device),
    )  # fmt: skip
    return out_TD


def suits(num_rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether `push_add_norm` takes these."""
    return num_rows <= MAX_ROWS and width % 2 == 0 and dtype.itemsize == 2
