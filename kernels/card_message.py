"""Short messages between two cards that address each other: one launch to write one, one to wait for it and take it.

A program writes its share of the message into a slot in the other card's memory and then sets its own counter there;
the program of the same number on the other side waits for that, copies its share out, and sets a counter back, which
says that the slot is free. Always the same number of programs, so that counters of all of them count all messages.

Counters are int32 and only go up; `count` is the number of the message, from 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 32
COUNTER_BYTES = PROGRAMS * 4  # of one direction of one wire
BLOCK = 1024  # numbers of 4 bytes that a program moves at once


@triton.jit
def _await(address, program, least):
    """Until the program's counter is `least` or more: what was written before it is there."""
    counter = tl.cast(address, tl.int64) + (program + tl.arange(0, 1)).to(tl.int64) * 4
    tl.inline_asm_elementwise(
        """{
        .reg .s32 seen;
        .reg .pred there;
        again:
        ld.acquire.sys.global.s32 seen, [$1];
        sub.s32 seen, seen, $2;
        setp.ge.s32 there, seen, 0;
        @there bra done;
        bra again;
        done:
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [counter, tl.zeros((1,), tl.int32) + least], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _announce(address, program, count):
    """All that the program has read and written so far is done, for whoever sees the counter."""
    tl.debug_barrier()
    counter = tl.cast(address, tl.int64) + (program + tl.arange(0, 1)).to(tl.int64) * 4
    tl.inline_asm_elementwise(
        "st.release.sys.global.s32 [$1], $2; mov.u32 $0, 0;",
        "=r,l,r", [counter, tl.zeros((1,), tl.int32) + count], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_words", "least", "count"])
def _move_kernel(
    source, target, num_words, await_address, least, announce_address, count,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, MEETS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if MEETS:
        _await(await_address, program, least)
    source_ptr = tl.cast(source, tl.int64).to(tl.pointer_type(tl.int32))
    target_ptr = tl.cast(target, tl.int64).to(tl.pointer_type(tl.int32))
    for start in range(program * BLOCK, num_words, PROGRAMS * BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < num_words
        words = tl.load(source_ptr + place, inside, cache_modifier=".cg")  # not from a cache that saw the slot before
        tl.store(target_ptr + place, words, inside)
    if MEETS:
        _announce(announce_address, program, count)


def move(
    source: int, target: int, num_bytes: int, *, await_address: int, least: int, announce_address: int, count: int
) -> None:
    """On the current stream: wait until all counters at `await_address` are `least` or more, copy, and set those at
    `announce_address` to `count`. Addresses as this card knows them; bytes are a multiple of 4."""
    _move_kernel[(PROGRAMS,)](
        source, target, num_bytes // 4, await_address, least, announce_address, count,
        BLOCK=BLOCK, PROGRAMS=PROGRAMS, MEETS=True, num_warps=4,
    )  # fmt: skip


def copy_tensor(source: Tensor, target: Tensor) -> None:
    """The copying alone, for tests without a second card."""
    assert source.dtype is target.dtype is torch.int32
    _move_kernel[(PROGRAMS,)](
        source.data_ptr(), target.data_ptr(), source.numel(), 0, 0, 0, 0,
        BLOCK=BLOCK, PROGRAMS=PROGRAMS, MEETS=False, num_warps=4,
    )  # fmt: skip
