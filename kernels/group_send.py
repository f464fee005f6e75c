"""The sum over a tensor-parallel group for some hundred rows, each summed by one rank: parts are sent, not fetched.

Meaning: `group_sum.sum_add_norm` with rows shared out. A program a row sends this rank's part to the rank that sums the
row (r % WORLD), with a flag behind it; that one adds, norms, and sends the result to all. Stores over the link need
nobody's answer, where a fetched number is a question and an answer; and one thread of a program fences, not all.

A stage is written again only after another sum of the same group: see `workers/layers/group_sum.py`. Flags are those of
`group_sum`, [MAX_PROGRAMS, WORLD] int32 at the start of the shared buffers: of a row, the one who sums it has the flags
of all, and the others have his.

Bytes of a stage: [WORLD, ceil(rows / WORLD), width] numbers.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.group_sum import MAX_PROGRAMS, MAX_WORLD, PATIENCE_NS

MAX_ROWS = MAX_PROGRAMS  # a flag each


@triton.jit
def _tell(flag_ptr, turn, thread: tl.constexpr):
    """One thread says that all this program wrote is there: after a barrier."""
    tl.inline_asm_elementwise(
        """{
        .reg .u32 id;
        .reg .pred mine;
        mov.u32 id, %tid.x;
        setp.eq.u32 mine, id, $3;
        @mine st.release.sys.global.s32 [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r", [flag_ptr, turn, tl.full((), thread, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _await(flag_ptr, turn, thread: tl.constexpr):
    """One thread waits for a flag; a barrier must follow. A peer that is gone traps."""
    tl.inline_asm_elementwise(
        """{
        .reg .u32 id;
        .reg .s32 seen;
        .reg .u64 began, now;
        .reg .pred other, there, late;
        mov.u32 id, %tid.x;
        setp.ne.u32 other, id, $4;
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
        "=r,l,r,l,r",
        [flag_ptr, turn, tl.full((), PATIENCE_NS, tl.int64), tl.full((), thread, tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _numbers(base, offset, DTYPE: tl.constexpr):
    """Numbers of a rank's buffer from `offset` (in numbers) on; base: its address."""
    return tl.multiple_of(base.to(tl.pointer_type(DTYPE)), 16) + offset


@triton.jit(do_not_specialize=["rank"])
def _send_kernel(
    bases_ptr, counter_ptr, part_ptr, stage_offset, shared_offset, residual_ptr, weight_ptr, stride_residual, eps, rank,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, WORLD: tl.constexpr, SHARE: tl.constexpr, ADD: tl.constexpr,
    NORM: tl.constexpr, WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = residual_ptr.dtype.element_ty
    row = tl.program_id(0)
    owner = row % WORLD
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    here = residual_ptr + row.to(tl.int64) * stride_residual + column
    # before the wait: addresses, weights, and the residual, whose last writer was done before our predecessor began
    owners_base, base = tl.load(bases_ptr + owner), tl.load(bases_ptr + rank)
    turn = tl.load(counter_ptr + row) + 1
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    part = tl.load(part_ptr + row.to(tl.int64) * WIDTH + column, inside, other=0.0, cache_modifier=".cg")
    slot = (row // WORLD).to(tl.int64) * WIDTH
    place = _numbers(owners_base, stage_offset, DTYPE) + rank.to(tl.int64) * SHARE * WIDTH + slot
    tl.store(place + column, part, inside)
    if WAIT:
        tl.debug_barrier()
        _tell(owners_base.to(tl.pointer_type(tl.int32)) + row * WORLD + rank, turn, 0)
    flags = base.to(tl.pointer_type(tl.int32)) + row * WORLD
    if owner == rank:
        before = tl.load(here, inside, other=0.0) if ADD else weight
        if WAIT:
            for peer in tl.static_range(WORLD):
                _await(flags + peer, turn, peer)
            tl.debug_barrier()
        total = tl.zeros((BLOCK,), tl.float32)
        staged = _numbers(base, stage_offset, DTYPE) + slot + column
        for peer in tl.static_range(WORLD):
            total += tl.load(staged + peer * SHARE * WIDTH, inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        if ADD:
            total += before.to(tl.float32)
        made = total.to(DTYPE)
        tl.store(here, made, inside)
        if NORM:
            x = made.to(tl.float32)  # the norm of what was stored
            scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
            made = (x * scale * weight).to(DTYPE)
        result = shared_offset + row.to(tl.int64) * WIDTH
        for peer in tl.static_range(WORLD):
            tl.store(_numbers(tl.load(bases_ptr + peer), result, DTYPE) + column, made, inside)
        if WAIT:
            tl.debug_barrier()
            for peer in tl.static_range(WORLD):
                _tell(tl.load(bases_ptr + peer).to(tl.pointer_type(tl.int32)) + row * WORLD + rank, turn, peer)
    elif WAIT:
        _await(flags + owner, turn, 0)
    tl.store(counter_ptr + row, turn)


def stage_bytes(world: int, most_rows: int, width: int, itemsize: int) -> int:
    """Of one stage for up to so many rows."""
    return world * -(-min(most_rows, MAX_ROWS) // world) * width * itemsize


def send_add_norm(
    bases_W: Tensor,
    counters: Tensor,
    rank: int,
    part_TD: Tensor,
    residual_TD: Tensor,
    norm_weight_D: Tensor | None,
    eps: float,
    *,
    stage_at: int,
    most_rows: int,
    shared_bytes: int,
    shared_TD: Tensor,
    add: bool = True,
    wait: bool = True,
) -> Tensor:
    """residual (+)= sum over the group of `part_TD` in this rank's rows; the RMS norm of all rows comes to `shared_TD`.

    `stage_at`: byte of the shared buffers where `stage_bytes` of `most_rows` belong to this call; `shared_bytes`: where
    `shared_TD` lies in each. Without `norm_weight_D` it is the sum itself. `wait` false: all is there (tests).
    """
    num_rows, width = residual_TD.shape
    world, size = bases_W.shape[0], residual_TD.element_size()
    assert 1 < world <= MAX_WORLD
    assert num_rows <= min(most_rows, MAX_ROWS)
    assert residual_TD.stride(1) == 1
    assert part_TD.is_contiguous()
    block = tuning.next_power_of_two(width)
    _send_kernel[(num_rows,)](
        bases_W, counters, part_TD, stage_at // size, shared_bytes // size, residual_TD,
        residual_TD if norm_weight_D is None else norm_weight_D, residual_TD.stride(0), eps, rank,
        WIDTH=width, BLOCK=block, WORLD=world, SHARE=triton.cdiv(min(most_rows, MAX_ROWS), world), ADD=add,
        NORM=norm_weight_D is not None, WAIT=wait, num_warps=min(16, max(4, block // 512)),
        **tuning.overlap(residual_TD.device),
    )  # fmt: skip
    return shared_TD
