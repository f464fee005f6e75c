"""What both ways to fetch for `hopper_attention` share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

# Triton 3.9 calls it otherwise than 3.6
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def fact(facts, place: gl.constexpr, layout: gl.constexpr):
    """One of the numbers that the fetcher left for a tile, as a scalar."""
    return gl.sum(gl.where(gl.arange(0, 8, layout) == place, facts, 0), 0)


@gluon.jit
def block_of(table_row, start, within, num_keys, S: gl.constexpr, BLOCK_L: gl.constexpr, WIDE: gl.constexpr):
    """The blocks of a tile's keys, those past the end the last one."""
    # where tiles are whole blocks, most of it is the same for all of them and worked out once
    place = start // S + within // S if BLOCK_L % S == 0 else (start + within) // S
    block = gl.load(table_row + gl.minimum(place, (num_keys - 1) // S))
    return block.to(gl.int64) if WIDE else block


@gluon.jit
def hand_out_queries(
    q_ptr, stride_q, facts, place, kv_head, turn, q_smem, facts_smem, q_full, q_empty, copying: gl.constexpr,
    few: gl.constexpr, G: gl.constexpr, H: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """A tile's queries and facts to the groups that multiply, as soon as there is room for them."""
    dim = gl.arange(0, H, gl.SliceLayout(0, copying))
    line = gl.arange(0, BLOCK_M, gl.SliceLayout(1, copying))
    token = fact(facts, 2, few)
    num_queries = fact(facts, 3, few)
    slot = turn & 1
    mbarrier.wait(q_empty.index(slot), ((turn >> 1) & 1) ^ 1)
    facts_smem.index(slot).store(gl.where(place == 5, kv_head, facts))
    q_line = (token + gl.minimum(line // G, num_queries - 1)).to(gl.int64) * stride_q
    q_line += (kv_head * G + line % G) * H
    copy_async(q_smem.index(slot), q_ptr + (q_line[:, None] + dim[None, :]))
    async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
    mbarrier.arrive(q_full.index(slot))


@gluon.jit
def ask_for_work(counter_ptr, total):
    """The next tile and head that nobody has. Each program asks once too often; the last leaves the counter at zero."""
    work = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
    if work == total + gl.num_programs(0) - 1:
        gl.store(counter_ptr, 0)
    return work


@gluon.jit
def hand_out_end(turn, facts_smem, q_full, q_empty, few: gl.constexpr):
    """Tell the groups that multiply that there is nothing more."""
    slot = turn & 1
    mbarrier.wait(q_empty.index(slot), ((turn >> 1) & 1) ^ 1)
    facts_smem.index(slot).store(gl.full([8], 0, gl.int32, few))
    async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
    mbarrier.arrive(q_full.index(slot))
