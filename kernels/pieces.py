"""A tile whose inputs several programs share out: each leaves its sums, and the one that is done last adds up all.

In order, so that the sum is the same whoever is last. Counters are zero between launches (`tuning.counters`).
"""

import triton
import triton.language as tl


@triton.jit
def leave(acc, part_ptr, counter_ptr, index, split, splits, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Store the sums [ROWS, TOKENS] of piece `split` of tile `index`. Gives how many pieces were there before."""
    tl.store(_place(part_ptr, index, splits, ROWS, TOKENS) + split * (ROWS * TOKENS), acc)
    tl.debug_barrier()  # every thread's stores come before the one thread's release below
    return tl.atomic_add(counter_ptr + index, 1, sem="acq_rel")


@triton.jit
def join(part_ptr, counter_ptr, index, splits, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """The sum of all pieces, for the program that left the last one."""
    tl.atomic_xchg(counter_ptr + index, 0, sem="relaxed")  # ready for the next launch
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    here = _place(part_ptr, index, splits, ROWS, TOKENS)
    for other in range(splits):  # .cg: past the first-level cache, which does not see others' stores
        acc += tl.load(here + other * (ROWS * TOKENS), cache_modifier=".cg")
    return acc


@triton.jit
def _place(part_ptr, index, splits, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    here = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    return part_ptr + index.to(tl.int64) * splits * (ROWS * TOKENS) + here
