"""The sum over a tensor-parallel group, the addition to the residual and the next norm, in one launch over NVLink.

Each rank's product lies in a buffer that all GPUs of the group can address. A program tells its peers that this rank's
part is there (a flag in their memory), waits for theirs, and reads rows from all of them: one trip over the link where
a collective, an addition and a norm took three launches. Two ways:

- each rank sums all rows (`SCATTER` false): no second trip; for two ranks also the fewest bytes;
- each rank sums, adds and norms every WORLDth row and writes the result to all: for many rows over more than two ranks.
  The residual of a row is then kept up to date by its owner alone.

Flags count up, so nothing has to be reset and a recorded graph may be replayed for ever. A program meets the one of the
same number on the other GPUs; the lowest number that is not done always runs, so they can't wait in a circle. A wait
ends the process by a trap after `PATIENCE_NS`: a peer is gone, and the card must not hang for ever.

Bytes of the shared buffer, at the start: flags [MAX_PROGRAMS, WORLD] int32; then what the caller puts there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning

MAX_PROGRAMS = 1024
MAX_WORLD = 8
FLAG_BYTES = MAX_PROGRAMS * MAX_WORLD * 4
PATIENCE_NS = tl.constexpr(120_000_000_000)


@triton.jit
def _meet(bases_ptr, counter_ptr, program, rank, WORLD: tl.constexpr, PEERS: tl.constexpr):
    """All that this program and the kernels before it wrote is there for the peers, and theirs for this program."""
    turn = tl.load(counter_ptr + program) + 1
    tl.debug_barrier()  # all have read the count, and all have written what the flag announces
    tl.store(counter_ptr + program, turn)
    peer = tl.arange(0, PEERS)
    peer = tl.where(peer < WORLD, peer, rank)
    theirs = tl.load(bases_ptr + peer) + (program * WORLD + rank) * 4
    # the first warp has all PEERS of them; the others would fence and ask once more each
    tl.inline_asm_elementwise(
        """{
        .reg .u32 id;
        .reg .pred first;
        mov.u32 id, %tid.x;
        setp.lt.u32 first, id, 32;
        @first st.release.sys.global.s32 [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [theirs, turn], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    ours = tl.load(bases_ptr + rank) + (program * WORLD + peer) * 4
    tl.inline_asm_elementwise(
        """{
        .reg .u32 id;
        .reg .s32 seen;
        .reg .u64 began, now;
        .reg .pred other, there, late;
        mov.u32 id, %tid.x;
        setp.ge.u32 other, id, 32;
        @other bra done;
        mov.u64 began, %globaltimer;
        again:
        ld.acquire.sys.global.s32 seen, [$1];
        sub.s32 seen, seen, $2;
        setp.ge.s32 there, seen, 0;
        @there bra done;
        mov.u64 now, %globaltimer;
        sub.u64 now, now, began;
        setp.gt.u64 late, now, $3;
        @late trap;
        bra again;
        done:
        mov.u32 $0, 0;
        }""",
        "=r,l,r,l", [ours, turn, tl.full((PEERS,), PATIENCE_NS, tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _row_of(bases_ptr, peer, offset, row, column, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """Where a row lies in the buffer of a peer; `offset` in numbers."""
    base = tl.load(bases_ptr + peer).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(base, 16) + offset + row * WIDTH + column


@triton.jit(do_not_specialize=["num_rows", "rank"])
def _sum_kernel(
    bases_ptr, counter_ptr, parts_offset, shared_offset, residual_ptr, weight_ptr, out_ptr, num_rows, stride_residual,
    eps, rank, ids_ptr, num_experts,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, WORLD: tl.constexpr, PEERS: tl.constexpr, SCATTER: tl.constexpr,
    ADD: tl.constexpr, NORM: tl.constexpr, MEET: tl.constexpr, PDL: tl.constexpr, TOP_K: tl.constexpr,
    TOP_K_2: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = residual_ptr.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)  # no kernel writes weights: before the wait
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # the next product asks for its weights while we wait for the link
    if MEET:
        _meet(bases_ptr, counter_ptr, program, rank, WORLD, PEERS)
    step: tl.constexpr = WORLD if SCATTER else 1
    first = tl.cast(rank if SCATTER else 0, tl.int64)
    for turn in range(program, tl.cdiv(num_rows, step), programs):
        row = first + turn * step
        present = column < tl.where(row < num_rows, WIDTH, 0)
        total = tl.zeros((BLOCK,), tl.float32)
        if TOP_K:  # which ranks have experts of this token; what the others wrote is 0 and stays there
            choice = tl.arange(0, TOP_K_2)
            is_choice = choice < tl.where(row < num_rows, TOP_K, 0)
            expert = tl.load(ids_ptr + row * TOP_K + choice, is_choice, other=0)
            owner = tl.where(is_choice, ((expert + 1) * WORLD - 1) // num_experts, -1)
        for peer in tl.static_range(WORLD):  # in the same order on all ranks: the same bits
            part_ptr = _row_of(bases_ptr, peer, parts_offset, row, column, WIDTH, DTYPE)
            wanted = present
            if TOP_K:
                wanted = column < tl.where(tl.max((owner == peer).to(tl.int32), axis=0) > 0, WIDTH, 0)
            total += tl.load(part_ptr, wanted, other=0.0, cache_modifier=".cg").to(tl.float32)
        here = residual_ptr + row * stride_residual + column
        if ADD:
            total += tl.load(here, present, other=0.0).to(tl.float32)
        made = total.to(DTYPE)
        tl.store(here, made, present)
        if NORM:
            x = made.to(tl.float32)  # the norm of what was stored, as the next layer will read it
            scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
            made = (x * scale * weight).to(DTYPE)
        if SCATTER:
            for peer in tl.static_range(WORLD):
                tl.store(_row_of(bases_ptr, peer, shared_offset, row, column, WIDTH, DTYPE), made, present)
        elif NORM:
            tl.store(out_ptr + row * WIDTH + column, made, present)
    if SCATTER and MEET:
        _meet(bases_ptr, counter_ptr, program, rank, WORLD, PEERS)


def sum_add_norm(
    bases_W: Tensor,
    counters: Tensor,
    rank: int,
    residual_TD: Tensor,
    norm_weight_D: Tensor | None,
    eps: float,
    *,
    parts_bytes: int,
    shared_bytes: int | None = None,
    shared_TD: Tensor | None = None,
    out_TD: Tensor | None = None,
    add: bool = True,
    meet: bool = True,
    asked: tuple[Tensor, int] | None = None,
) -> Tensor:
    """residual (+)= sum over the group of the parts at `parts_bytes` of each buffer, then its RMS norm.

    `bases_W`: int64, the buffers' addresses on this GPU; `counters`: int32 [MAX_PROGRAMS], this rank's own, zero at
    first. With `shared_bytes` (where in the buffers) and `shared_TD` (the same place of this rank's buffer) each rank
    takes its share of the rows and writes to all; the result is `shared_TD`. `out_TD`: where else the norm goes.
    Without `norm_weight_D` the result is the sum itself. `add` false: the residual is only written. `meet` false: all
    parts are known to be there (tests). `asked`: (ids int32 [T, K], number of experts) of a mixture whose ranks have
    whole ones: only what ranks with experts of a row made of it is read.
    """
    num_rows, width = residual_TD.shape
    world = bases_W.shape[0]
    size = residual_TD.element_size()
    scatter = shared_TD is not None
    assert 1 < world <= MAX_WORLD
    assert residual_TD.stride(1) == 1
    if norm_weight_D is None:
        out_TD = residual_TD
    elif shared_TD is not None:
        out_TD = shared_TD
    if out_TD is None:
        out_TD = torch.empty((num_rows, width), dtype=residual_TD.dtype, device=residual_TD.device)
    top_k = 0 if asked is None else asked[0].shape[1]
    assert asked is None or asked[0].is_contiguous()
    block = tuning.next_power_of_two(width)
    programs = min(MAX_PROGRAMS, triton.cdiv(num_rows, world) if scatter else num_rows)
    _sum_kernel[(programs,)](
        bases_W, counters, parts_bytes // size, (shared_bytes or 0) // size, residual_TD,
        residual_TD if norm_weight_D is None else norm_weight_D, out_TD, num_rows, residual_TD.stride(0), eps, rank,
        bases_W if asked is None else asked[0], 1 if asked is None else asked[1], WIDTH=width, BLOCK=block,
        WORLD=world, PEERS=tuning.next_power_of_two(world), SCATTER=scatter, ADD=add,
        NORM=norm_weight_D is not None, MEET=meet, TOP_K=top_k, TOP_K_2=tuning.next_power_of_two(max(1, top_k)),
        num_warps=min(16, max(4, block // 256)), **tuning.overlap(residual_TD.device),
    )  # fmt: skip
    return shared_TD if shared_TD is not None else out_TD


@triton.jit(do_not_specialize=["stride_staged"])
def _staged_kernel(
    own_ptr, staged_ptr, residual_ptr, weight_ptr, out_ptr, stride_staged, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PEERS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
    place = row * WIDTH + column
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.load(own_ptr + place, inside, other=0.0).to(tl.float32)
    for peer in tl.static_range(PEERS):
        total += tl.load(staged_ptr + peer * stride_staged + place, inside, other=0.0).to(tl.float32)
    total += tl.load(residual_ptr + place, inside, other=0.0).to(tl.float32)
    made = total.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + place, made, inside)
    if NORM:
        x = made.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
        made = (x * scale * weight).to(residual_ptr.dtype.element_ty)
    tl.store(out_ptr + place, made, inside)


def add_staged_norm(
    own_RD: Tensor, staged_PRD: Tensor, residual_RD: Tensor, norm_weight_D: Tensor | None, eps: float, out_RD: Tensor
) -> None:
    """residual += own part + the parts of peers, copied here; `out_RD`: its RMS norm, or itself. All contiguous."""
    num_rows, width = residual_RD.shape
    if num_rows == 0:
        return
    assert own_RD.is_contiguous()
    assert residual_RD.is_contiguous()
    assert out_RD.is_contiguous()
    assert staged_PRD.stride(1) == width
    block = tuning.next_power_of_two(width)
    _staged_kernel[(num_rows,)](
        own_RD, staged_PRD, residual_RD, residual_RD if norm_weight_D is None else norm_weight_D, out_RD,
        staged_PRD.stride(0), eps, WIDTH=width, BLOCK=block, PEERS=staged_PRD.shape[0],
        NORM=norm_weight_D is not None, num_warps=min(16, max(4, block // 512)), **tuning.overlap(residual_RD.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "rank", "first_id"])
def _choose_kernel(
    bases_ptr, counter_ptr, place_offset, logits_ptr, id_ptr, value_ptr, out_ptr, num_rows, stride_logits, rank,
    first_id,
    MAX_ROWS: tl.constexpr, ROWS: tl.constexpr, WORLD: tl.constexpr, PEERS: tl.constexpr, MEET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    present = row < num_rows
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.load(id_ptr + row, present, other=0)
    value = tl.load(logits_ptr + row.to(tl.int64) * stride_logits + token, present, other=0.0).to(tl.float32)
    packed = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (token + first_id)
    for peer in tl.static_range(WORLD):
        base = tl.load(bases_ptr + peer).to(tl.pointer_type(tl.int64)) + place_offset
        tl.store(base + rank * MAX_ROWS + row, packed, present)
    if MEET:
        _meet(bases_ptr, counter_ptr, program, rank, WORLD, PEERS)
    best_value = tl.full((ROWS,), float("-inf"), tl.float32)
    best_token = tl.zeros((ROWS,), tl.int64)
    own = tl.load(bases_ptr + rank).to(tl.pointer_type(tl.int64)) + place_offset
    for peer in tl.static_range(WORLD):
        found = tl.load(own + peer * MAX_ROWS + row, present, other=0, cache_modifier=".cg")
        value = (found >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        # what is no number on one rank is none for all; of equals the first rank's, which has the lower ids
        better = (best_value == best_value) & ((value > best_value) | (value != value))
        best_value = tl.where(better, value, best_value)
        best_token = tl.where(better, found & 0x7FFFFFFF, best_token)
    tl.store(value_ptr + row, best_value, present)
    tl.store(out_ptr + row, best_token, present)


def choose_over_group(
    bases_W: Tensor,
    counters: Tensor,
    rank: int,
    logits_RV: Tensor,
    ids_R: Tensor,
    first_id: int,
    *,
    place_bytes: int,
    max_rows: int,
    meet: bool = True,
) -> tuple[Tensor, Tensor]:
    """From the most likely of each rank's tokens to the most likely of all, the same on every rank.

    `ids_R`: int64, columns of this rank's `logits_RV`, whose first one is token `first_id`. `place_bytes`: where in the
    buffers there is room for [WORLD, max_rows] int64. Returns (ids, their logits in float32). A NaN wins; of equals the
    lowest id.
    """
    num_rows, world = ids_R.shape[0], bases_W.shape[0]
    assert num_rows <= max_rows
    out_R = torch.empty_like(ids_R)
    values_R = torch.empty(num_rows, dtype=torch.float32, device=ids_R.device)
    rows = 64
    _choose_kernel[(triton.cdiv(num_rows, rows),)](
        bases_W, counters, place_bytes // 8, logits_RV, ids_R, values_R, out_R, num_rows, logits_RV.stride(0), rank,
        first_id, MAX_ROWS=max_rows, ROWS=rows, WORLD=world, PEERS=tuning.next_power_of_two(world), MEET=meet,
        num_warps=2, **tuning.overlap(ids_R.device),
    )  # fmt: skip
    return out_R, values_R
