"""All of a layer behind its attention for up to eight tokens, and the next layer's q, k and v, in one launch.

Meaning, `sum` over the ranks of a group (of one rank too):

    residual += sum(o seen);  inner = gate(norm(residual) gate_up);  residual += sum(down inner)
    out = norm(residual) qkv of the next layer, if there is one

As in `layer_chain` programs stay, one a multiprocessor, and walk over tiles of four products through one ring in shared
memory that is asked for far ahead, since weights depend on nobody. Tiles are 16 weight rows, which the tensor cores
multiply with eight tokens at once, each warp a part of the columns; the tokens stay in registers. What is added up has
owners: a program sums a few columns of all ranks' words (a number of 16 bits and the turn it belongs to, written over
the link), and gives what it made, times the norm's weight, to all programs of its card, with what its columns add to
the squares; products of a norm are scaled behind. Numbers that stay on the card are where nobody has written as long as
all their bits are ones, which no result has; there are two places for each, and a launch empties the one that the next
one uses.

Why nobody overwrites what is still read: see `layer_chain`; what stays on the card is read in one launch alone. All
programs must be on the card at once. Numbers of a turn are alike on all ranks, bit by bit. Written in Gluon.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.layer_chain import RENAMED, SHARED_BYTES, _now, _share, _trap_if_late, power_of_two, programs_of
from argosy.kernels.packed_hopper import copy_in

TOKENS = 8  # at most
MOST_INPUTS = 8192  # of 8 tokens, in half of a multiprocessor's registers
ROWS = gl.constexpr(16)  # of a tile
COLUMNS = gl.constexpr(64)  # of a block: 128 bytes, as the copy engine interleaves them
TO_ALL, GATED, PLAIN = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)


@gluon.constexpr_function
def sums_layout(num_warps):
    """A warp a part of the columns: [warps, 16 weight rows, 8 tokens]."""
    return gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def tokens_layout(num_warps, each):
    """[warps, columns, 8 tokens] as the tensor cores' right side, `each` columns side by side in a thread."""
    return gl.DotOperandLayout(1, sums_layout(num_warps), each)


@gluon.constexpr_function
def ceil_of(a, b):
    """a / b, rounded up."""
    return (a + b - 1) // b


@gluon.constexpr_function
def owned(hidden, programs, num_warps):
    """Columns of a sum that one program adds up; each number by one thread."""
    return max(4 * num_warps, power_of_two(ceil_of(hidden, programs)))


@gluon.jit
def _as_tiles(ring, COUNT: gl.constexpr, PAIRS: gl.constexpr):
    """The same memory, block by block, each 16 rows or two times 8."""
    shape: gl.constexpr = [COUNT, 2, ROWS // 2, COLUMNS] if PAIRS else [COUNT, ROWS, COLUMNS]
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3 if PAIRS else 2)
    if RENAMED:
        return ring.reinterpret(ring.dtype, shape, layout)
    else:
        return ring._reinterpret(ring.dtype, shape, layout)


@gluon.jit
def _fetch_product(
    desc, tiles, full, empty, began, first, count, offset,
    INPUTS: gl.constexpr, GATE: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """Ask for the weights of this program's tiles of one product, part by part, as places of the ring become free."""
    PARTS: gl.constexpr = ceil_of(INPUTS, BLOCKS * COLUMNS)
    for i in range(count):
        tile = first + i * PROGRAMS
        for part in range(PARTS):
            number = began + i * PARTS + part
            slot = number % STAGES
            turn = number // STAGES
            if turn > 0:
                mbarrier.wait(empty.index(slot), (turn - 1) & 1)
            here = full.index(slot)
            mbarrier.expect(here, BLOCKS * ROWS * COLUMNS * 2)
            for block in gl.static_range(BLOCKS):
                column = offset + (part * BLOCKS + block) * COLUMNS
                if GATE:
                    copy_in(desc, [0, tile * (ROWS // 2), column], here, tiles.index(slot * BLOCKS + block))
                else:
                    copy_in(desc, [tile * ROWS, column], here, tiles.index(slot * BLOCKS + block))


@gluon.jit
def _fetch(
    o_desc, gate_up_desc, down_desc, qkv_desc, ring, full, empty,
    SEEN: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr, QKV: gl.constexpr, HALVES: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """All weights of this program, one product behind the other: they depend on nobody."""
    WIDTH: gl.constexpr = BLOCKS * COLUMNS
    T: gl.constexpr = HIDDEN // ROWS
    U: gl.constexpr = INNER * 2 // ROWS
    first_o, num_o = _share(T, 0, PROGRAMS)
    first_u, num_u = _share(U, T, PROGRAMS)
    first_d, num_d = _share(T, T + U, PROGRAMS)
    plain = _as_tiles(ring, STAGES * BLOCKS, False)
    pairs = _as_tiles(ring, STAGES * BLOCKS, True)
    _fetch_product(o_desc, plain, full, empty, 0, first_o, num_o, 0, SEEN, False, BLOCKS, STAGES, PROGRAMS)
    began = num_o * ceil_of(SEEN, WIDTH)
    _fetch_product(gate_up_desc, pairs, full, empty, began, first_u, num_u, 0, HIDDEN, True, BLOCKS, STAGES, PROGRAMS)
    began_d = began + num_u * ceil_of(HIDDEN, WIDTH)
    PART: gl.constexpr = INNER // HALVES
    for half in gl.static_range(HALVES):
        _fetch_product(
            down_desc, plain, full, empty, began_d + half * num_d * ceil_of(PART, WIDTH), first_d, num_d, half * PART,
            PART, False, BLOCKS, STAGES, PROGRAMS,
        )  # fmt: skip
    if QKV > 0:
        first_q, num_q = _share(QKV // ROWS, T + U + T, PROGRAMS)
        began_q = began_d + HALVES * num_d * ceil_of(PART, WIDTH)
        _fetch_product(
            qkv_desc, plain, full, empty, began_q, first_q, num_q, 0, HIDDEN, False, BLOCKS, STAGES, PROGRAMS
        )


@gluon.jit
def _multiply(
    ring, full, empty, xs, scale, began, first, count, bias_ptr, peers, out_ptr, inbox, stamp, num_tokens,
    INPUTS: gl.constexpr, KIND: gl.constexpr, BIAS: gl.constexpr, WORLD: gl.constexpr, INNER: gl.constexpr,
    QKV: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, NUM_WARPS: gl.constexpr,
    WORDS: gl.constexpr,
):  # fmt: skip
    """This program's tiles of one product, whose parts are those from `began` on of all of its own. xs: for each part
    of the columns a tensor [warps, columns, 8]."""
    PARTS: gl.constexpr = ceil_of(INPUTS, BLOCKS * COLUMNS)
    sums_in: gl.constexpr = sums_layout(NUM_WARPS)
    rows_in: gl.constexpr = gl.DotOperandLayout(0, sums_in, WORDS)
    made_in: gl.constexpr = gl.SliceLayout(0, sums_in)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, made_in))
    token = gl.arange(0, 8, gl.SliceLayout(0, made_in))
    for i in range(count):
        acc = gl.zeros([BLOCKS, ROWS, 8], gl.float32, sums_in)
        for part in gl.static_range(PARTS):
            number = began + i * PARTS + part
            slot = number % STAGES
            mbarrier.wait(full.index(slot), (number // STAGES) & 1)
            acc = mma_v2(ring.index(slot).load(rows_in), xs[part], acc)
            mbarrier.arrive(empty.index(slot))
        y = gl.sum(acc, 0)
        tile = first + i * PROGRAMS
        if KIND == GATED:
            y = y * scale[None, :]
            gate, up = gl.split(gl.permute(gl.reshape(y, [2, ROWS // 2, 8]), [1, 2, 0]))
            inner = gate / (1.0 + gl.exp2(gate * -1.4426950408889634)) * up
            inner_in: gl.constexpr = inner.type.layout
            column = tile * (ROWS // 2) + gl.arange(0, ROWS // 2, gl.SliceLayout(1, inner_in))[:, None]
            one = gl.arange(0, 8, gl.SliceLayout(0, inner_in))[None, :]
            bits = inner.to(ring.dtype).to(gl.int16, bitcast=True)
            gl.store(out_ptr + one * INNER + column, bits, mask=(one < num_tokens) & (column >= 0))
        else:
            output = (tile * ROWS + row)[:, None]
            there = (token < num_tokens)[None, :] & (output >= 0)
            if KIND == PLAIN:
                y = y * scale[None, :]
                if BIAS:
                    y += gl.load(bias_ptr + tile * ROWS + row).to(gl.float32)[:, None]
                gl.store(out_ptr + token[None, :] * QKV + output, y.to(ring.dtype), mask=there)
            else:
                word = y.to(ring.dtype).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF | stamp
                for peer in gl.static_range(WORLD):
                    gl.store(peers[peer] + inbox + output * 8 + token[None, :], word, mask=there)


@gluon.jit
def _look(box_ptr, place, inside, stamp, SIZE: gl.constexpr, SENDERS: gl.constexpr, DTYPE: gl.constexpr):
    """(sum of what all senders wrote, float32; whether any word is of another turn)."""
    wrong = place * 0
    total = wrong.to(gl.float32)
    for sender in gl.static_range(SENDERS):  # in the same order on all ranks: the same bits
        word = gl.load(box_ptr + sender * SIZE + place, mask=inside, other=0, volatile=True)
        wrong = wrong | gl.where(inside, word ^ stamp, 0)
        total += (word & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)
    return total, gl.max(gl.max(((wrong & -65536) != 0).to(gl.int32), 0), 0)


@gluon.jit
def _own(
    box_ptr, residual_ptr, norm_ptr, made_ptr, squares_ptr, stamp, num_tokens,
    HIDDEN: gl.constexpr, OWN: gl.constexpr, SENDERS: gl.constexpr, DTYPE: gl.constexpr, NORM: gl.constexpr,
    NUM_WARPS: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """Add up this program's columns, if it has any: into the residual and, times the norm's weight, for all programs
    here. NORM 0: nobody reads them here."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [NUM_WARPS, 1], [1, 0])
    program = gl.program_id(0)
    if program * OWN < HIDDEN:
        column = program * OWN + gl.arange(0, OWN, gl.SliceLayout(1, layout))[:, None]
        token = gl.arange(0, 8, gl.SliceLayout(0, layout))[None, :]
        inside = (column < HIDDEN) & (token < num_tokens)
        place = token * HIDDEN + column
        before = gl.load(residual_ptr + place, mask=inside, other=0.0).to(gl.float32)
        norm = gl.load(norm_ptr + column + token * 0, mask=inside, other=0.0).to(gl.float32)
        began = _now(stamp)
        total, late = _look(box_ptr, column * 8 + token, inside, stamp, HIDDEN * 8, SENDERS, DTYPE)
        if WAIT:
            while late > 0:
                total, late = _look(box_ptr, column * 8 + token, inside, stamp, HIDDEN * 8, SENDERS, DTYPE)
                _trap_if_late(began)
        r = (total + before).to(DTYPE)
        if NORM:
            x = r.to(gl.float32)
            gl.store(made_ptr + place, (x * norm).to(DTYPE).to(gl.int16, bitcast=True), mask=inside)
            square = gl.sum(gl.where(inside, x * x, 0.0), 0)
            one = gl.arange(0, 8, gl.SliceLayout(0, layout))
            gl.store(squares_ptr + program * 8 + one, square.to(gl.int32, bitcast=True), mask=one < num_tokens)
        gl.store(residual_ptr + place, r, mask=inside)


@gluon.jit
def _look_at_squares(squares_ptr, num_tokens, OWNERS: gl.constexpr, NUM_WARPS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [NUM_WARPS, 1], [1, 0])
    owner = gl.arange(0, power_of_two(OWNERS), gl.SliceLayout(1, layout))[:, None]
    token = gl.arange(0, 8, gl.SliceLayout(0, layout))[None, :]
    inside = (owner < OWNERS) & (token < num_tokens)
    word = gl.load(squares_ptr + owner * 8 + token, mask=inside, other=0, volatile=True)
    return gl.sum(word.to(gl.float32, bitcast=True), 0), gl.max(gl.max((word == -1).to(gl.int32), 0), 0)


@gluon.jit
def _scale_of(
    squares_ptr, num_tokens, eps, HIDDEN: gl.constexpr, OWNERS: gl.constexpr, NUM_WARPS: gl.constexpr,
    WAIT: gl.constexpr,
):  # fmt: skip
    """What the norm divides each token by, float32 [8], once all owners said their squares."""
    began = _now(num_tokens)
    total, late = _look_at_squares(squares_ptr, num_tokens, OWNERS, NUM_WARPS)
    if WAIT:
        while late > 0:
            total, late = _look_at_squares(squares_ptr, num_tokens, OWNERS, NUM_WARPS)
            _trap_if_late(began)
    return gl.convert_layout(
        1.0 / gl.sqrt(total / HIDDEN + eps), gl.SliceLayout(0, gl.SliceLayout(0, sums_layout(NUM_WARPS)))
    )


@gluon.jit
def _larger(a, b):
    """Of two and two numbers of 16 bits without a sign."""
    return gl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int16, is_pure=True, pack=2)


@gluon.jit
def _read(
    box_ptr, num_tokens, INPUTS: gl.constexpr, STRIDE: gl.constexpr, BLOCKS: gl.constexpr, NUM_WARPS: gl.constexpr,
    WORDS: gl.constexpr, FRESH: gl.constexpr,
):  # fmt: skip
    """(tokens [8, INPUTS], 16-bit words, as a tuple of what each part multiplies; whether one is not there yet)."""
    layout: gl.constexpr = tokens_layout(NUM_WARPS, WORDS)
    PARTS: gl.constexpr = ceil_of(INPUTS, BLOCKS * COLUMNS)
    block = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    token = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    most = ((block + column + token) * 0).to(gl.int16)
    xs = ()
    for part in gl.static_range(PARTS):
        at = (part * BLOCKS + block) * COLUMNS + column
        inside = (at < INPUTS) & (token < num_tokens)
        word = gl.load(box_ptr + token * STRIDE + at, mask=inside, other=0, volatile=FRESH)
        if FRESH:
            most = _larger(most, word)
        xs += (word,)  # type: ignore[assignment]
    late = 0
    if FRESH:
        late = gl.max(gl.reshape((most == -1).to(gl.int32), [BLOCKS * COLUMNS * 8]), 0)
    return xs, late


@gluon.jit
def _as_numbers(words, DTYPE: gl.constexpr, PARTS: gl.constexpr):
    xs = ()
    for part in gl.static_range(PARTS):
        xs += (words[part].to(DTYPE, bitcast=True),)  # type: ignore[assignment]
    return xs


@gluon.jit
def _receive(
    box_ptr, num_tokens, INPUTS: gl.constexpr, STRIDE: gl.constexpr, BLOCKS: gl.constexpr, NUM_WARPS: gl.constexpr,
    WORDS: gl.constexpr, DTYPE: gl.constexpr, PROBE: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """The tokens that programs here left, once all are there. PROBE: of every so many columns one is looked at first:
    to read all again and again would hold up the weights."""
    began = _now(num_tokens)
    if WAIT and PROBE > 0:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
        COUNT: gl.constexpr = INPUTS // PROBE
        probe = gl.arange(0, power_of_two(COUNT), layout)
        late = 1
        while late > 0:
            word = gl.load(box_ptr + probe * PROBE, mask=probe < COUNT, other=0, volatile=True)
            late = gl.max((word == -1).to(gl.int32), 0)
            _trap_if_late(began)
    words, late = _read(box_ptr, num_tokens, INPUTS, STRIDE, BLOCKS, NUM_WARPS, WORDS, True)
    if WAIT:
        while late > 0:
            words, late = _read(box_ptr, num_tokens, INPUTS, STRIDE, BLOCKS, NUM_WARPS, WORDS, True)
            _trap_if_late(began)
    return _as_numbers(words, DTYPE, ceil_of(INPUTS, BLOCKS * COLUMNS))


@gluon.jit
def _work(
    seen_ptr, bias_ptr, norm_ptr, next_norm_ptr, residual_ptr, out_ptr, bases_ptr, boxes_ptr, counter_ptr, inbox, rank,
    num_tokens, eps, next_eps, ring, full, empty,
    SEEN: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr, QKV: gl.constexpr, BIAS: gl.constexpr,
    WORLD: gl.constexpr, HALVES: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    WORDS: gl.constexpr, WAIT: gl.constexpr, PDL: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """All that is done with the weights."""
    DTYPE: gl.constexpr = ring.dtype
    WIDTH: gl.constexpr = BLOCKS * COLUMNS
    OWN: gl.constexpr = owned(HIDDEN, PROGRAMS, NUM_WARPS)
    OWNERS: gl.constexpr = ceil_of(HIDDEN, OWN)
    T: gl.constexpr = HIDDEN // ROWS
    U: gl.constexpr = INNER * 2 // ROWS
    PART: gl.constexpr = INNER // HALVES
    program = gl.program_id(0)
    first_o, num_o = _share(T, 0, PROGRAMS)
    first_u, num_u = _share(U, T, PROGRAMS)
    first_d, num_d = _share(T, T + U, PROGRAMS)
    peers = ()
    for peer in gl.static_range(WORLD):
        peers += (gl.multiple_of(gl.load(bases_ptr + peer).to(gl.pointer_type(gl.int32)), 64),)  # type: ignore[assignment]
    own_box = gl.multiple_of(gl.load(bases_ptr + rank).to(gl.pointer_type(gl.int32)), 64) + inbox
    if PDL:
        gdc_wait()
    turn = gl.load(counter_ptr + program) + 1
    stamp = turn << 16
    # on this card: what `o` made, what `down` made, what the gate made, and squares of the first two
    BOX: gl.constexpr = 8 * (2 * HIDDEN + INNER) + 2 * 16 * OWNERS  # of 16 bits
    o_made = gl.multiple_of(boxes_ptr + (turn & 1) * BOX, 16)
    down_made = o_made + 8 * HIDDEN
    inner_made = o_made + 16 * HIDDEN
    o_squares = (inner_made + 8 * INNER).to(gl.pointer_type(gl.int32))
    down_squares = o_squares + 8 * OWNERS
    # o
    words, _ = _read(seen_ptr.to(gl.pointer_type(gl.int16)), num_tokens, SEEN, SEEN, BLOCKS, NUM_WARPS, WORDS, False)
    xs = _as_numbers(words, DTYPE, ceil_of(SEEN, WIDTH))
    _multiply(
        ring, full, empty, xs, num_tokens, 0, first_o, num_o, bias_ptr, peers, out_ptr, inbox + rank * (HIDDEN * 8),
        stamp, num_tokens, SEEN, TO_ALL, False, WORLD, INNER, QKV, BLOCKS, STAGES, PROGRAMS, NUM_WARPS, WORDS,
    )  # fmt: skip
    # the next launch's places
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    others = (boxes_ptr + ((turn + 1) & 1) * BOX).to(gl.pointer_type(gl.int32))
    for start in range(program * (128 * NUM_WARPS), BOX // 2, PROGRAMS * (128 * NUM_WARPS)):
        place = start + gl.arange(0, 128 * NUM_WARPS, flat)
        gl.store(others + place, place * 0 - 1, mask=place < BOX // 2)
    # gate and up
    _own(
        own_box, residual_ptr, norm_ptr, o_made, o_squares, stamp, num_tokens,
        HIDDEN, OWN, WORLD, DTYPE, True, NUM_WARPS, WAIT,
    )  # fmt: skip
    scale = _scale_of(o_squares, num_tokens, eps, HIDDEN, OWNERS, NUM_WARPS, WAIT)
    normed = _receive(o_made, num_tokens, HIDDEN, HIDDEN, BLOCKS, NUM_WARPS, WORDS, DTYPE, 0, WAIT)
    began_u = num_o * ceil_of(SEEN, WIDTH)
    _multiply(
        ring, full, empty, normed, scale, began_u, first_u, num_u, bias_ptr, peers, inner_made, inbox, stamp,
        num_tokens, HIDDEN, GATED, False, WORLD, INNER, QKV, BLOCKS, STAGES, PROGRAMS, NUM_WARPS, WORDS,
    )  # fmt: skip
    # down
    began_d = began_u + num_u * ceil_of(HIDDEN, WIDTH)
    for half in gl.static_range(HALVES):
        inner = _receive(
            inner_made + half * PART, num_tokens, PART, INNER, BLOCKS, NUM_WARPS, WORDS, DTYPE, ROWS // 2, WAIT
        )  # fmt: skip
        _multiply(
            ring, full, empty, inner, num_tokens, began_d + half * num_d * ceil_of(PART, WIDTH), first_d, num_d,
            bias_ptr, peers, out_ptr, inbox + (WORLD + rank * HALVES + half) * (HIDDEN * 8), stamp, num_tokens,
            PART, TO_ALL, False, WORLD, INNER, QKV, BLOCKS, STAGES, PROGRAMS, NUM_WARPS, WORDS,
        )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    gl.store(counter_ptr + program, turn)
    # the next layer's q, k and v
    _own(
        own_box + WORLD * HIDDEN * 8, residual_ptr, next_norm_ptr, down_made, down_squares, stamp, num_tokens,
        HIDDEN, OWN, WORLD * HALVES, DTYPE, QKV > 0, NUM_WARPS, WAIT,
    )  # fmt: skip
    if QKV > 0:
        first_q, num_q = _share(QKV // ROWS, T + U + T, PROGRAMS)
        if num_q > 0:
            next_scale = _scale_of(down_squares, num_tokens, next_eps, HIDDEN, OWNERS, NUM_WARPS, WAIT)
            after = _receive(down_made, num_tokens, HIDDEN, HIDDEN, BLOCKS, NUM_WARPS, WORDS, DTYPE, 0, WAIT)
            began_q = began_d + HALVES * num_d * ceil_of(PART, WIDTH)
            _multiply(
                ring, full, empty, after, next_scale, began_q, first_q, num_q, bias_ptr, peers, out_ptr, inbox, stamp,
                num_tokens, HIDDEN, PLAIN, BIAS, WORLD, INNER, QKV, BLOCKS, STAGES, PROGRAMS, NUM_WARPS, WORDS,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["rank", "num_tokens"])
def _rows_kernel(
    seen_ptr, o_desc, gate_up_desc, down_desc, qkv_desc, bias_ptr, norm_ptr, next_norm_ptr, residual_ptr, out_ptr,
    bases_ptr, boxes_ptr, counter_ptr, inbox, rank, num_tokens, eps, next_eps,
    SEEN: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr, QKV: gl.constexpr, BIAS: gl.constexpr,
    WORLD: gl.constexpr, HALVES: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    WORDS: gl.constexpr, WAIT: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """QKV 0: nothing but the residual comes out. HALVES: of down's inputs, 2 where registers hold no more. BLOCKS: of
    64 columns of 16 weight rows, in a place of the ring."""
    ring = gl.allocate_shared_memory(
        o_desc.dtype, [STAGES, BLOCKS, ROWS, COLUMNS], gl.NVMMASharedLayout(128, 16, 3)
    )  # fmt: skip
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize([
        (_work, (
            seen_ptr, bias_ptr, norm_ptr, next_norm_ptr, residual_ptr, out_ptr, bases_ptr, boxes_ptr, counter_ptr,
            inbox, rank, num_tokens, eps, next_eps, ring, full, empty, SEEN, HIDDEN, INNER, QKV, BIAS, WORLD, HALVES,
            BLOCKS, STAGES, PROGRAMS, WORDS, WAIT, PDL, num_warps,
        )),
        (_fetch, (
            o_desc, gate_up_desc, down_desc, qkv_desc, ring, full, empty, SEEN, HIDDEN, INNER, QKV, HALVES, BLOCKS,
            STAGES, PROGRAMS,
        )),
    ], [1], [32])  # fmt: skip


def inbox_words(world: int, hidden: int) -> int:
    """Of 4 bytes, of one inbox."""
    return 3 * world * hidden * TOKENS


def box_words(hidden: int, inner: int) -> int:
    """Of 4 bytes, of what programs of a card leave to each other; at first all bits are ones."""
    return TOKENS * (hidden + inner // 2) + 2 * TOKENS * (hidden // 16)


def halves_of(inner: int) -> int:
    """Into how many parts down's inputs go."""
    return 1 if inner <= MOST_INPUTS else 2


def suits(seen: int, hidden: int, inner: int, qkv: int, world: int, sizes: tuning.Sizes, num_programs: int) -> bool:
    """Whether these widths fit the ring and the registers, and over a group every program has a tile of `down`."""
    place = sizes["blocks"] * 16 * 64 * 2
    if sizes["stages"] * place + 8192 > SHARED_BYTES or any(n % 128 for n in (seen, hidden, inner, qkv)):
        return False
    if max(seen, hidden, inner // halves_of(inner)) > MOST_INPUTS or hidden < 128 * sizes["warps"]:
        return False
    return world == 1 or hidden // 16 >= num_programs


def chain(
    seen_TS: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor | None],
    norms: tuple[tuple[Tensor, float], tuple[Tensor, float] | None],
    bias_Q: Tensor | None,
    residual_TD: Tensor,
    out_TX: Tensor | None,
    bases_W: Tensor,
    boxes: Tensor,
    counters: Tensor,
    rank: int,
    sizes: tuning.Sizes,
    *,
    inbox_at: int,
    wait: bool = True,
) -> None:
    """One layer for at most 8 tokens, from behind its attention, into `out_TX`; `residual_TD` is updated in place.

    `weights`: of o [hidden, S], gate and up [2 I, hidden], down [hidden, I], and of the next layer's q, k and v [X,
    hidden] or None. `norms`: (weight, epsilon) before gate and up, and before q, k and v. `bases_W`: int64, the
    addresses of the ranks' shared buffers, where `inbox_words`, zero at first, begin at byte `inbox_at`; `boxes`:
    int32, twice `box_words`, ones at first, `counters`: int32 [programs], zero at first, this rank's own. `sizes`:
    blocks of 64 columns in a place of the ring (`blocks`), places (`stages`), `warps`, multiprocessors left to others
    (`spare`), columns side by side in a register of the tensor cores (`words`: 2 or 8). `wait` false: all words are
    known to be there (tests).
    """
    o_DS, gate_up_UD, down_DI, qkv_XD = weights
    hidden, seen = o_DS.shape
    inner = down_DI.shape[1]
    qkv = 0 if qkv_XD is None else qkv_XD.shape[0]
    num_tokens, world = seen_TS.shape[0], bases_W.shape[0]
    num_programs = programs_of(seen_TS, sizes)
    assert num_tokens <= TOKENS
    assert suits(seen, hidden, inner, qkv, world, sizes, num_programs)
    assert all(w is None or w.is_contiguous() for w in (*weights, seen_TS, residual_TD, out_TX))
    assert gate_up_UD.shape == (2 * inner, hidden)
    assert counters.shape[0] >= num_programs
    assert boxes.shape[0] >= 2 * box_words(hidden, inner)
    (norm_D, eps), (next_norm_D, next_eps) = norms[0], norms[1] or norms[0]
    tile, pair = [16, 64], [2, 8, 64]
    flat, deep = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(128, 16, 3)
    o_desc = TensorDescriptor.from_tensor(o_DS, tile, flat)
    _rows_kernel[(num_programs,)](
        seen_TS, o_desc, TensorDescriptor.from_tensor(gate_up_UD.view(2, inner, hidden), pair, deep),
        TensorDescriptor.from_tensor(down_DI, tile, flat),
        o_desc if qkv_XD is None else TensorDescriptor.from_tensor(qkv_XD, tile, flat),
        norm_D if bias_Q is None else bias_Q, norm_D, next_norm_D, residual_TD, norm_D if out_TX is None else out_TX,
        bases_W, boxes.view(dtype=torch.int16), counters, inbox_at // 4, rank, num_tokens, eps, next_eps,
        SEEN=seen, HIDDEN=hidden, INNER=inner, QKV=qkv, BIAS=bias_Q is not None, WORLD=world, HALVES=halves_of(inner),
        BLOCKS=sizes["blocks"], STAGES=sizes["stages"], PROGRAMS=num_programs, WORDS=sizes["words"], WAIT=wait,
        num_warps=sizes["warps"], **tuning.overlap(seen_TS.device),
    )  # fmt: skip
