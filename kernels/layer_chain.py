"""All of a layer behind its attention for one token, and the next layer's q, k and v, in one launch.

Meaning, `sum` over the ranks of a group (of one rank too):

    residual += sum(o seen);  inner = gate(norm(residual) gate_up);  residual += sum(down inner)
    out = norm(residual) qkv of the next layer, or norm(residual), or residual

One token is bound by reading weights, and a launch that waits for the one before reads none meanwhile. Here programs
stay, one or two a multiprocessor: each walks over tiles of four products, through one ring in shared memory that is
asked for far ahead, across products, since weights depend on nobody. What one product hands to the next is words of 4
bytes, a number of 16 bits and the turn it belongs to, written to all who add up (peers over the link), and every
program waits for all words of a product by reading them: no flag, no fence, no end of a launch in between.

All programs must be on the card at once: they are no more than fit. Nobody overwrites what is still read: a launch
begins when the one before is over on its own card, and a peer's words of the next turn come only after its `down`
heard from all programs here, so each has at least one tile of `down`. Numbers of a turn are alike on all ranks, bit by
bit. Words, [WORLD, hidden] of o and then of down, begin as zeros; turns count from 1. In Triton's lower language.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.gemv_ahead import _each, copy_in

RENAMED = gl.constexpr(not hasattr(gl.shared_memory_descriptor, "_reinterpret"))  # in Triton 3.7
TO_ALL, GATED, PLAIN = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
RUNS_HERE = triton.__version__.startswith(tuning.GLUON_VERSIONS)
SHARED_BYTES = 220 * 1024  # of a multiprocessor, less what sums take


@gluon.constexpr_function
def tile_layout(width, num_warps):
    """Threads of a tile: along a weight row as far as it goes, then over rows."""
    along = min(num_warps, max(1, width // 256))
    return gl.BlockedLayout([1, 8], [1, 32], [num_warps // along, along], [1, 0])


@gluon.constexpr_function
def power_of_two(n):
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()


@gluon.jit
def _as_tiles(ring, PARTS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    if RENAMED:
        return ring.reinterpret(ring.dtype, [STAGES * PARTS, ROWS, WIDTH], flat)
    else:
        return ring._reinterpret(ring.dtype, [STAGES * PARTS, ROWS, WIDTH], flat)


@gluon.jit
def _copy_tile(
    ring, slot, weight_ptr, tile, OUTPUTS: gl.constexpr, INPUTS: gl.constexpr, SLOT: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, NUM_WARPS: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """Ask for the weights of a tile: of its outputs' rows, or of their gate rows and up rows."""
    WIDTH: gl.constexpr = power_of_two(INPUTS)
    ROWS: gl.constexpr = SLOT // WIDTH // (PARTS * CUT)
    layout: gl.constexpr = tile_layout(WIDTH, NUM_WARPS)
    tiles = _as_tiles(ring, PARTS * CUT, STAGES, ROWS, WIDTH)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    output = gl.minimum(tile * ROWS + row, OUTPUTS - 1).to(gl.int64)
    here = weight_ptr + output[:, None] * INPUTS + column[None, :]
    inside = (row >= 0)[:, None] & (column < INPUTS)[None, :]
    for part in gl.static_range(PARTS):
        copy_in(tiles.index(slot * PARTS * CUT + part), here + part * OUTPUTS * INPUTS, mask=inside)


@gluon.jit
def _share(tile_count: gl.constexpr, before: gl.constexpr, PROGRAMS: gl.constexpr):
    """(first tile, number of tiles) of this program; the products before had `before` tiles: the next one is dealt on
    where they ended."""
    first = (gl.program_id(0) + PROGRAMS - before % PROGRAMS) % PROGRAMS
    return first, (tile_count - first + PROGRAMS - 1) // PROGRAMS


@gluon.jit
def _ask(
    ring, number, o_ptr, gate_up_ptr, down_ptr, qkv_ptr,
    SEEN: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr, QKV: gl.constexpr,
    SLOT: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, NUM_WARPS: gl.constexpr, CUT: gl.constexpr,
    FROM: gl.constexpr,
):  # fmt: skip
    """Ask for this program's tile `number`, counted through all products, of those from FROM on; always one group."""
    T: gl.constexpr = count_tiles(HIDDEN, SEEN, SLOT, 1)
    U: gl.constexpr = count_tiles(INNER, HIDDEN, SLOT, 2)
    D: gl.constexpr = count_tiles(HIDDEN, INNER, SLOT, 1)
    first_o, num_o = _share(T, 0, PROGRAMS)
    first_u, num_u = _share(U, T, PROGRAMS)
    first_d, num_d = _share(D, T + U, PROGRAMS)
    slot = number % STAGES
    after_u = num_o + num_u
    after_d = after_u + num_d
    if FROM <= 0 and number < num_o:
        _copy_tile(ring, slot, o_ptr, first_o + number * PROGRAMS, HIDDEN, SEEN, SLOT, STAGES, 1, NUM_WARPS, 1)
    if FROM <= 1:  # noqa: SIM102 - known when compiling, the other only when running
        if (number >= num_o) & (number < after_u):
            tile = first_u + (number - num_o) * PROGRAMS
            _copy_tile(ring, slot, gate_up_ptr, tile, INNER, HIDDEN, SLOT, STAGES, 2, NUM_WARPS, 1)
    if FROM <= 2:  # noqa: SIM102  # as above
        if (number >= after_u) & (number < after_d):
            tile = first_d + (number - after_u) * PROGRAMS
            _copy_tile(ring, slot, down_ptr, tile, HIDDEN, INNER, SLOT, STAGES, 1, NUM_WARPS, 1)
    if QKV > 0:
        Q: gl.constexpr = count_tiles(QKV, HIDDEN, SLOT, CUT)
        first_q, num_q = _share(Q, T + U + D, PROGRAMS)
        if (number >= after_d) & (number < after_d + num_q):
            tile = first_q + (number - after_d) * PROGRAMS
            _copy_tile(ring, slot, qkv_ptr, tile, QKV, HIDDEN, SLOT, STAGES, 1, NUM_WARPS, CUT)
    async_copy.commit_group()


@gluon.constexpr_function
def count_tiles(outputs, inputs, slot, parts):
    """Of a product whose weight has `parts` rows for each output."""
    rows = slot // power_of_two(inputs) // parts
    return (outputs + rows - 1) // rows


@gluon.jit
def _multiply(
    ring, x, began, first, count, o_ptr, gate_up_ptr, down_ptr, qkv_ptr, bias_ptr, bases_ptr, out_ptr, inbox, stamp,
    OUTPUTS: gl.constexpr, INPUTS: gl.constexpr, PARTS: gl.constexpr, KIND: gl.constexpr, BIAS: gl.constexpr,
    WORLD: gl.constexpr, SEEN: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr, QKV: gl.constexpr,
    SLOT: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, NUM_WARPS: gl.constexpr, CUT: gl.constexpr,
    FROM: gl.constexpr,
):  # fmt: skip
    """This program's tiles of one product, which are those from `began` on of all of its own. x: float32 [INPUTS]."""
    WIDTH: gl.constexpr = power_of_two(INPUTS)
    PLACES: gl.constexpr = PARTS * CUT if FROM == 3 else PARTS  # in one of the ring
    ROWS: gl.constexpr = SLOT // WIDTH // PLACES
    layout: gl.constexpr = tile_layout(WIDTH, NUM_WARPS)
    one_each: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])  # outputs side by side in one store
    tiles = _as_tiles(ring, PLACES, STAGES, ROWS, WIDTH)
    for i in range(count):
        _ask(
            ring, began + i + STAGES - 1, o_ptr, gate_up_ptr, down_ptr, qkv_ptr,
            SEEN, HIDDEN, INNER, QKV, SLOT, STAGES, PROGRAMS, NUM_WARPS, CUT, FROM,
        )  # fmt: skip
        output = (first + i * PROGRAMS) * ROWS + gl.arange(0, ROWS, one_each)
        there = output < OUTPUTS
        async_copy.wait_group(STAGES - 1)
        slot = (began + i) % STAGES * PLACES
        y = tiles.index(slot).load(layout).to(gl.float32) * x[None, :]
        if KIND == GATED:  # both at once: warps wait for each other in every sum
            up = tiles.index(slot + 1).load(layout).to(gl.float32) * x[None, :]
            y, up = gl.reduce((y, up), 1, _each)
            y, up = gl.convert_layout(y, one_each), gl.convert_layout(up, one_each)
            y = y / (1.0 + gl.exp2(y * -1.4426950408889634)) * up
        else:
            y = gl.convert_layout(gl.sum(y, 1), one_each)
        if BIAS:
            y += gl.load(bias_ptr + output, mask=there, other=0.0).to(gl.float32)
        if KIND == PLAIN:
            gl.store(out_ptr + output, y.to(out_ptr.dtype.element_ty), mask=there)
        else:
            bits = y.to(ring.dtype).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
            word = bits | stamp
            if KIND == GATED:
                gl.store(out_ptr + output, word, mask=there)
            else:
                for peer in gl.static_range(WORLD):
                    base = gl.load(bases_ptr + peer).to(gl.pointer_type(gl.int32)) + inbox
                    gl.store(base + output, word, mask=there)


@gluon.jit
def _now(turn):
    return gl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l,r", [turn], dtype=gl.int64, is_pure=False, pack=1)


@gluon.jit
def _trap_if_late(began):
    """A peer is gone: the card must not hang for ever."""
    gl.inline_asm_elementwise(
        """{
        .reg .u64 now;
        .reg .pred late;
        mov.u64 now, %globaltimer;
        sub.u64 now, now, $1;
        setp.gt.u64 late, now, 120000000000;
        @late trap;
        mov.u32 $0, 0;
        }""",
        "=r,l", [began], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _look(box_ptr, column, stamp, SIZE: gl.constexpr, SENDERS: gl.constexpr, DTYPE: gl.constexpr):
    """(sum of what the senders wrote, float32; whether any word is of another turn)."""
    inside = (column >= 0) & (column < SIZE)
    wrong = column * 0
    total = wrong.to(gl.float32)
    for sender in gl.static_range(SENDERS):  # in the same order on all ranks: the same bits
        word = gl.load(box_ptr + sender * SIZE + column, mask=inside, other=0, volatile=True)
        wrong = wrong | gl.where(inside, word ^ stamp, 0)
        total += (word & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)
    late = gl.max(((wrong & -65536) != 0).to(gl.int32), 0)
    return total, late


@gluon.jit
def _receive(
    box_ptr, column, stamp, SIZE: gl.constexpr, SENDERS: gl.constexpr, DTYPE: gl.constexpr, NUM_WARPS: gl.constexpr,
    WAIT: gl.constexpr,
):  # fmt: skip
    """The sum of what all senders wrote in this turn."""
    if WAIT:  # a few words first, of the tiles dealt last: to read all again and again would hold up the weights
        began = _now(stamp)
        probe = SIZE - 1 - gl.arange(0, 32 * NUM_WARPS, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
        _, late = _look(box_ptr, probe, stamp, SIZE, SENDERS, DTYPE)
        while late > 0:
            _, late = _look(box_ptr, probe, stamp, SIZE, SENDERS, DTYPE)
            _trap_if_late(began)
    total, late = _look(box_ptr, column, stamp, SIZE, SENDERS, DTYPE)
    if WAIT:
        while late > 0:
            total, late = _look(box_ptr, column, stamp, SIZE, SENDERS, DTYPE)
            _trap_if_late(began)
    return total


@gluon.jit(do_not_specialize=["rank"])
def _chain_kernel(
    seen_ptr, o_ptr, gate_up_ptr, down_ptr, qkv_ptr, bias_ptr, norm_ptr, next_norm_ptr, residual_ptr, out_ptr,
    bases_ptr, inner_ptr, counter_ptr, inbox, rank, eps, next_eps,
    SEEN: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr, QKV: gl.constexpr, BIAS: gl.constexpr,
    NORM: gl.constexpr, WORLD: gl.constexpr, SLOT: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    CUT: gl.constexpr, WAIT: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """QKV 0: no product at the end; then NORM says whether the residual comes out normed. CUT: into how many parts q, k
    and v's tiles are cut, which are too few to be dealt evenly."""
    DTYPE: gl.constexpr = o_ptr.dtype.element_ty
    WIDTH: gl.constexpr = power_of_two(HIDDEN)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, SLOT], flat)
    kept = gl.allocate_shared_memory(DTYPE, [WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    program = gl.program_id(0)
    T: gl.constexpr = count_tiles(HIDDEN, SEEN, SLOT, 1)
    U: gl.constexpr = count_tiles(INNER, HIDDEN, SLOT, 2)
    D: gl.constexpr = count_tiles(HIDDEN, INNER, SLOT, 1)
    first_o, num_o = _share(T, 0, PROGRAMS)
    first_u, num_u = _share(U, T, PROGRAMS)
    first_d, num_d = _share(D, T + U, PROGRAMS)
    for stage in range(STAGES - 1):
        _ask(
            ring, stage, o_ptr, gate_up_ptr, down_ptr, qkv_ptr,
            SEEN, HIDDEN, INNER, QKV, SLOT, STAGES, PROGRAMS, num_warps, CUT, 0,
        )  # fmt: skip
    # o
    o_layout: gl.constexpr = tile_layout(power_of_two(SEEN), num_warps)
    seen_column = gl.arange(0, power_of_two(SEEN), gl.SliceLayout(0, o_layout))
    if PDL:
        gdc_wait()
    turn = gl.load(counter_ptr + program) + 1
    stamp = turn << 16
    x = gl.load(seen_ptr + seen_column, mask=seen_column < SEEN, other=0.0).to(gl.float32)
    _multiply(
        ring, x, 0, first_o, num_o, o_ptr, gate_up_ptr, down_ptr, qkv_ptr, bias_ptr, bases_ptr, inner_ptr,
        inbox + rank * HIDDEN, stamp, HIDDEN, SEEN, 1, TO_ALL, False,
        WORLD, SEEN, HIDDEN, INNER, QKV, SLOT, STAGES, PROGRAMS, num_warps, CUT, 0,
    )  # fmt: skip
    # gate and up
    layout: gl.constexpr = tile_layout(WIDTH, num_warps)
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    inside = column < HIDDEN
    own_box = gl.multiple_of(gl.load(bases_ptr + rank).to(gl.pointer_type(gl.int32)), 64) + inbox
    norm = gl.load(norm_ptr + column, mask=inside, other=0.0).to(gl.float32)
    before = gl.load(residual_ptr + column, mask=inside, other=0.0).to(gl.float32)
    r = (_receive(own_box, column, stamp, HIDDEN, WORLD, DTYPE, num_warps, WAIT) + before).to(DTYPE)
    kept.store(r)
    x = r.to(gl.float32)
    x = (x * (1.0 / gl.sqrt(gl.sum(x * x, 0) / HIDDEN + eps)) * norm).to(DTYPE).to(gl.float32)
    _multiply(
        ring, x, num_o, first_u, num_u, o_ptr, gate_up_ptr, down_ptr, qkv_ptr, bias_ptr, bases_ptr, inner_ptr,
        inbox, stamp, INNER, HIDDEN, 2, GATED, False,
        WORLD, SEEN, HIDDEN, INNER, QKV, SLOT, STAGES, PROGRAMS, num_warps, CUT, 1,
    )  # fmt: skip
    # down
    d_layout: gl.constexpr = tile_layout(power_of_two(INNER), num_warps)
    inner_column = gl.arange(0, power_of_two(INNER), gl.SliceLayout(0, d_layout))
    x = _receive(inner_ptr, inner_column, stamp, INNER, 1, DTYPE, num_warps, WAIT)
    _multiply(
        ring, x, num_o + num_u, first_d, num_d, o_ptr, gate_up_ptr, down_ptr, qkv_ptr, bias_ptr, bases_ptr, inner_ptr,
        inbox + (WORLD + rank) * HIDDEN, stamp, HIDDEN, INNER, 1, TO_ALL, False,
        WORLD, SEEN, HIDDEN, INNER, QKV, SLOT, STAGES, PROGRAMS, num_warps, CUT, 2,
    )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    # the next layer's q, k and v
    gl.store(counter_ptr + program, turn)
    down_box = own_box + WORLD * HIDDEN
    if QKV > 0:
        q_layout: gl.constexpr = tile_layout(WIDTH, num_warps)
        column = gl.arange(0, WIDTH, gl.SliceLayout(0, q_layout))
        inside = column < HIDDEN
        norm = gl.load(next_norm_ptr + column, mask=inside, other=0.0).to(gl.float32)
        before = kept.load(gl.SliceLayout(0, q_layout)).to(gl.float32)
        r = (_receive(down_box, column, stamp, HIDDEN, WORLD, DTYPE, num_warps, WAIT) + before).to(DTYPE)
        gl.store(residual_ptr + column, r, mask=inside & (program == 0))
        x = r.to(gl.float32)
        x = (x * (1.0 / gl.sqrt(gl.sum(x * x, 0) / HIDDEN + next_eps)) * norm).to(DTYPE).to(gl.float32)
        Q: gl.constexpr = count_tiles(QKV, HIDDEN, SLOT, CUT)
        first_q, num_q = _share(Q, T + U + D, PROGRAMS)
        _multiply(
            ring, x, num_o + num_u + num_d, first_q, num_q, o_ptr, gate_up_ptr, down_ptr, qkv_ptr, bias_ptr, bases_ptr,
            out_ptr, inbox, stamp, QKV, HIDDEN, 1, PLAIN, BIAS,
            WORLD, SEEN, HIDDEN, INNER, QKV, SLOT, STAGES, PROGRAMS, num_warps, CUT, 3,
        )  # fmt: skip
    elif program == 0:
        held = kept.load(gl.SliceLayout(0, layout)).to(gl.float32)
        after = (_receive(down_box, column, stamp, HIDDEN, WORLD, DTYPE, num_warps, WAIT) + held).to(DTYPE)
        gl.store(residual_ptr + column, after, mask=inside)
        if NORM:
            y = after.to(gl.float32)
            weight = gl.load(next_norm_ptr + column, mask=inside, other=0.0).to(gl.float32)
            y = y * (1.0 / gl.sqrt(gl.sum(y * y, 0) / HIDDEN + next_eps)) * weight
            gl.store(out_ptr + column, y.to(DTYPE), mask=inside)


def inbox_words(world: int, hidden: int) -> int:
    """Of 4 bytes, of one inbox."""
    return 2 * world * hidden


def suits(seen: int, hidden: int, inner: int, qkv: int, sizes: tuning.Sizes, num_programs: int) -> bool:
    """Whether these widths fit the ring, and every program has a tile of `down`."""
    slot = sizes["slot"]
    widths = [tuning.next_power_of_two(seen), 2 * tuning.next_power_of_two(hidden), tuning.next_power_of_two(inner)]
    shared = (sizes["stages"] * slot + widths[1] // 2) * 2 * sizes["per_sm"]
    if max(widths) > slot or shared > SHARED_BYTES or any(n % 16 for n in (seen, hidden, inner, qkv)):
        return False
    # Words are read by one thread each: of two that read the same at two moments one may see what the other does not.
    if min(hidden, inner) <= 128 * sizes["warps"]:
        return False
    return bool(triton.cdiv(hidden, slot // tuning.next_power_of_two(inner)) >= num_programs)


def chain(
    seen_1S: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor | None],
    norms: tuple[tuple[Tensor, float], tuple[Tensor, float] | None],
    bias_Q: Tensor | None,
    residual_1D: Tensor,
    out_1X: Tensor,
    bases_W: Tensor,
    inner_I: Tensor,
    counters: Tensor,
    rank: int,
    sizes: tuning.Sizes,
    *,
    inbox_at: int,
    wait: bool = True,
) -> Tensor:
    """One layer for one token, from behind its attention. Returns `out_1X`; `residual_1D` is updated in place.

    `weights`: of o [hidden, S], gate and up [2 I, hidden], down [hidden, I], and of the next layer's q, k and v [X,
    hidden] or None. `norms`: (weight, epsilon) before gate and up, and before what comes next or None. `bases_W`:
    int64, the addresses of the ranks' shared buffers, where `inbox_words` begin at byte `inbox_at`; `inner_I`: int32,
    `counters`: int32 [programs], this rank's own. All of these three zero at first and used by nothing else. `sizes`:
    numbers of a place of the ring (`slot`), places (`stages`), `warps`, programs a multiprocessor (`per_sm`),
    multiprocessors left to others (`spare`), tiles of q, k and v that a place would hold (`cut`, 1 by default). `wait`
    false: all words are known to be there (tests).
    """
    o_DS, gate_up_UD, down_DI, qkv_XD = weights
    hidden, seen = o_DS.shape
    inner = down_DI.shape[1]
    qkv = 0 if qkv_XD is None else qkv_XD.shape[0]
    world = bases_W.shape[0]
    num_programs = programs_of(seen_1S, sizes)
    assert suits(seen, hidden, inner, qkv, sizes, num_programs)
    assert all(w is None or w.is_contiguous() for w in weights)
    assert seen_1S.shape == (1, seen)
    assert gate_up_UD.shape == (2 * inner, hidden)
    assert counters.shape[0] >= num_programs
    assert inner_I.shape[0] >= inner
    (norm_D, eps), (next_norm_D, next_eps) = norms[0], norms[1] or norms[0]
    _chain_kernel[(num_programs,)](
        seen_1S, o_DS, gate_up_UD, down_DI, o_DS if qkv_XD is None else qkv_XD, o_DS if bias_Q is None else bias_Q,
        norm_D, next_norm_D, residual_1D, out_1X, bases_W, inner_I, counters, inbox_at // 4, rank, eps, next_eps,
        SEEN=seen, HIDDEN=hidden, INNER=inner, QKV=qkv, BIAS=bias_Q is not None, NORM=norms[1] is not None, WORLD=world,
        SLOT=sizes["slot"], STAGES=sizes["stages"], PROGRAMS=num_programs, CUT=sizes.get("cut", 1), WAIT=wait,
        num_warps=sizes["warps"], **tuning.overlap(seen_1S.device),
    )  # fmt: skip
    return out_1X


def programs_of(x: Tensor, sizes: tuning.Sizes) -> int:
    """How many there are on this device."""
    return (tuning.device_facts(x.device).num_sms - sizes.get("spare", 0)) * sizes["per_sm"]
