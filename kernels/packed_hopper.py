"""Products of some dozens to some hundreds of tokens with weights of 4 or 8 bits, for Hopper's tensor cores.

Meaning: `packed_reference.linear`, the weight in the type of the activations. A program has WGS groups of four warps
that multiply, each 16 TILES rows of the weight with the same TOKENS tokens, and one warp that fetches for them:

    fetch      by the copy engine, as far ahead as the ring has places: the words of 64 columns of all rows, their
               scales, and the tokens' 64 inputs. Words come before the kernel before this one is done
    multiply   words become 16 bits in the registers that the tensor cores read as their left side, and nowhere else;
               while one group multiplies, another unpacks. No register of a product is written before it is done

Work is cut into blocks of a group's columns: a program takes `per` of them after each other, whichever tiles they
belong to. Tiles that several programs share are added up by the one that is done last, in the order of the inputs.
Written in Triton's lower language (Gluon), since Triton runs all warps of a program in step.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argosy.kernels import tuning
from argosy.kernels.packed_reference import ROWS, PackedWeight
from argosy.kernels.packed_registers import unpacked

# Triton 3.9 calls them otherwise than 3.6
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
wait_for_all = getattr(gl, "thread_barrier", None) or gl.barrier
COLUMNS = gl.constexpr(64)  # of a place in the ring
GROUPS = (64, 128)
# Of a thread that multiplies, by the number of groups of warps and of programs that share a multiprocessor; and of all
# threads while they start, where Triton would take what one program may have.
REGISTERS = {(2, 1): 232, (4, 1): 112, (2, 2): 96}
START_REGISTERS = {(2, 2): 80}
FETCH_REGISTERS = 32
RING_BYTES = 200_000  # of a multiprocessor's 232,448, less barriers and what results go out through


@gluon.jit
def _fetch(
    x_desc, words_desc, pairs_desc, x_smem, words_smem, pairs_smem, full, empty, per, total, num_blocks, token_tiles,
    UNITS: gl.constexpr, PLANES: gl.constexpr, TILES: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    BYTES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    begin = gl.program_id(0) * per
    end = gl.minimum(begin + per, total)
    tile = begin // num_blocks
    block = begin - tile * num_blocks
    ready = gl.minimum(gl.minimum(num_blocks - block, end - begin) * UNITS, STAGES)
    row = tile // token_tiles * TILES
    for n in range(ready):
        mbarrier.expect(full.index(n), BYTES)
        _fetch_words(
            words_desc, pairs_desc, words_smem, pairs_smem, full.index(n), n, row, block + n // UNITS, n % UNITS, UNITS,
            PLANES,
        )  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = begin
    n = 0
    slot = 0
    phase = 1
    while at < end:  # divisions are for tiles, not for steps: one warp does all of this
        tile = at // num_blocks
        block = at - tile * num_blocks
        row = tile // token_tiles * TILES
        token = tile % token_tiles * TOKENS
        count = gl.minimum(num_blocks - block, end - at)
        column = block * (UNITS * COLUMNS)
        for i in range(count * UNITS):
            here = full.index(slot)
            if n >= ready:
                mbarrier.wait(empty.index(slot), phase)
                mbarrier.expect(here, BYTES)
                _fetch_words(
                    words_desc, pairs_desc, words_smem, pairs_smem, here, slot, row, block + i // UNITS, i % UNITS,
                    UNITS, PLANES,
                )  # fmt: skip
            copy_in(x_desc, [token, column], here, x_smem.index(slot))
            column += COLUMNS
            n += 1
            slot, phase = _next(slot, phase, STAGES)
        at += count


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    """The next place of the ring, and its phase."""
    slot += 1
    wraps = slot == STAGES
    return gl.where(wraps, 0, slot), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _fetch_words(
    words_desc, pairs_desc, words_smem, pairs_smem, full, slot, row, block, unit, UNITS: gl.constexpr,
    PLANES: gl.constexpr,
):  # fmt: skip
    for plane in gl.static_range(PLANES):
        here = slot * PLANES + plane
        column = ((block * PLANES + plane) * UNITS + unit) * 128
        copy_in(words_desc, [row, column], full, words_smem.index(here))
        copy_in(pairs_desc, [row, (block * PLANES + plane) * 16], full, pairs_smem.index(here))


@gluon.jit
def _begin(
    acc, x_smem, words_smem, pairs_smem, full, slot, phase, left_in: gl.constexpr, G: gl.constexpr,
    PLANES: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, FP16: gl.constexpr, HALF_SCALES: gl.constexpr,
):  # fmt: skip
    """Unpack a place of the ring and begin to multiply it. (sum, left side, the place, the next one, its phase)."""
    mbarrier.wait(full.index(slot), phase)
    v = unpacked(words_smem, pairs_smem, slot, left_in, G, PLANES, TILES, FP16, HALF_SCALES)
    acc = warpgroup_mma(v, x_smem.index(slot).permute((1, 0)), acc, is_async=True)
    follows, phase = _next(slot, phase, STAGES)
    return acc, v, slot, follows, phase


@gluon.jit
def _multiply(
    out_ptr, bias_ptr, part_ptr, counter_ptr, x_smem, words_smem, pairs_smem, full, empty, per, total, num_blocks,
    token_tiles, num_tokens, num_outputs, stride_out,
    G: gl.constexpr, WGS: gl.constexpr, UNITS: gl.constexpr, PLANES: gl.constexpr, TILES: gl.constexpr,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, HALF_SCALES: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
    SHARED: gl.constexpr,
):  # fmt: skip
    T: gl.constexpr = x_smem.dtype
    FP16: gl.constexpr = x_smem.dtype == gl.float16
    OWN: gl.constexpr = 16 * TILES
    AT_ONCE: gl.constexpr = 4 if TILES * TOKENS * WGS <= 512 else 2 if TILES * TOKENS * WGS <= 1024 else 1
    acc_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    left_in: gl.constexpr = gl.DotOperandLayout(0, acc_in, 2)
    out_in: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    program = gl.program_id(0)
    begin = program * per
    end = gl.minimum(begin + per, total)
    at = begin
    slot = 0
    phase = 0
    while at < end:
        tile = at // num_blocks
        count = gl.minimum((tile + 1) * num_blocks, end) - at
        acc = gl.zeros([OWN, TOKENS], gl.float32, acc_in)
        steps = count * UNITS
        for _ in range(steps // 4):  # the next columns are unpacked while those before are multiplied
            acc, v, one, slot, phase = _begin(
                acc, x_smem, words_smem, pairs_smem, full, slot, phase, left_in, G, PLANES, TILES, STAGES, FP16,
                HALF_SCALES,
            )  # fmt: skip
            acc, w, two, slot, phase = _begin(
                acc, x_smem, words_smem, pairs_smem, full, slot, phase, left_in, G, PLANES, TILES, STAGES, FP16,
                HALF_SCALES,
            )  # fmt: skip
            acc, v = warpgroup_mma_wait(1, deps=[acc, v])
            mbarrier.arrive(empty.index(one))
            acc, v, one, slot, phase = _begin(
                acc, x_smem, words_smem, pairs_smem, full, slot, phase, left_in, G, PLANES, TILES, STAGES, FP16,
                HALF_SCALES,
            )  # fmt: skip
            acc, w = warpgroup_mma_wait(1, deps=[acc, w])
            mbarrier.arrive(empty.index(two))
            acc, w, two, slot, phase = _begin(
                acc, x_smem, words_smem, pairs_smem, full, slot, phase, left_in, G, PLANES, TILES, STAGES, FP16,
                HALF_SCALES,
            )  # fmt: skip
            acc, v, w = warpgroup_mma_wait(0, deps=[acc, v, w])
            mbarrier.arrive(empty.index(one))
            mbarrier.arrive(empty.index(two))
        for _ in range(steps % 4):
            acc, v, one, slot, phase = _begin(
                acc, x_smem, words_smem, pairs_smem, full, slot, phase, left_in, G, PLANES, TILES, STAGES, FP16,
                HALF_SCALES,
            )  # fmt: skip
            acc, v = warpgroup_mma_wait(0, deps=[acc, v])
            mbarrier.arrive(empty.index(one))
        whole = count == num_blocks
        if SHARED and count < num_blocks:
            here = gl.arange(0, OWN, gl.SliceLayout(1, acc_in))[:, None] * TOKENS
            here += gl.arange(0, TOKENS, gl.SliceLayout(0, acc_in))[None, :]
            own = program * 2 + (at > begin).to(gl.int32)
            gl.store(part_ptr + (own.to(gl.int64) * WGS + G) * (OWN * TOKENS) + here, acc)
            wait_for_all()  # every thread's stores come before the one thread's release below
            first = tile * num_blocks // per
            last = ((tile + 1) * num_blocks - 1) // per
            counter = counter_ptr + tile * WGS + G
            if gl.atomic_add(counter, 1, sem="acq_rel") == last - first:
                gl.atomic_xchg(counter, 0, sem="relaxed")  # ready for the next launch
                acc = gl.zeros([OWN, TOKENS], gl.float32, acc_in)
                for others in range(first, last + 1, AT_ONCE):  # .cg: past the first-level cache
                    for one in gl.static_range(AT_ONCE):
                        other = gl.minimum(others + one, last)
                        place = other * 2 + (other * per < tile * num_blocks).to(gl.int32)
                        share = gl.load(
                            part_ptr + (place.to(gl.int64) * WGS + G) * (OWN * TOKENS) + here, cache_modifier=".cg"
                        )
                        acc += gl.where(others + one <= last, share, 0.0)
                whole = count < num_blocks
        if whole:
            first_row = (tile // token_tiles * WGS + G) * OWN
            if BIAS:
                of_acc = first_row + gl.arange(0, OWN, gl.SliceLayout(1, acc_in))
                acc += gl.load(bias_ptr + gl.minimum(of_acc, num_outputs - 1)).to(gl.float32)[:, None]
            row = first_row + gl.arange(0, OWN, gl.SliceLayout(1, out_in))
            token = tile % token_tiles * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, out_in))
            to = out_ptr + (token.to(gl.int64) * stride_out)[None, :] + row[:, None]
            kept = (token < num_tokens)[None, :] & (row < num_outputs)[:, None]
            y = gl.convert_layout(acc.to(T), out_in)
            if RESIDUAL:
                y = (y.to(gl.float32) + gl.load(to, kept, other=0.0, cache_modifier=".cg").to(gl.float32)).to(T)
            gl.store(to, y, kept)
        at += count


@gluon.jit(do_not_specialize=["num_tokens", "per", "total", "token_tiles"])
def hopper_kernel(
    x_desc, words_desc, pairs_desc, out_ptr, bias_ptr, part_ptr, counter_ptr, per, total, num_blocks, token_tiles,
    num_tokens, num_outputs, stride_out,
    UNITS: gl.constexpr, PLANES: gl.constexpr, HALF_SCALES: gl.constexpr, WGS: gl.constexpr, TILES: gl.constexpr,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, SHARED: gl.constexpr,
    REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    ALL: gl.constexpr = WGS * TILES
    BYTES: gl.constexpr = PLANES * ALL * (512 + 64) + TOKENS * 128
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TOKENS, 64], x_desc.layout)
    words_smem = gl.allocate_shared_memory(gl.int32, [STAGES * PLANES, ALL, 128], words_desc.layout)
    pairs_smem = gl.allocate_shared_memory(gl.int32, [STAGES * PLANES, ALL, 16], pairs_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WGS)
    # in full: a tuple that is given a name has no constants any more
    if WGS == 2:
        gl.warp_specialize([
            (_multiply, (
                out_ptr, bias_ptr, part_ptr, counter_ptr, x_smem, words_smem, pairs_smem, full, empty, per, total,
                num_blocks, token_tiles, num_tokens, num_outputs, stride_out, 0, WGS, UNITS, PLANES, TILES, TOKENS,
                STAGES, HALF_SCALES, BIAS, RESIDUAL, SHARED,
            )),
            (_multiply, (
                out_ptr, bias_ptr, part_ptr, counter_ptr, x_smem, words_smem, pairs_smem, full, empty, per, total,
                num_blocks, token_tiles, num_tokens, num_outputs, stride_out, 1, WGS, UNITS, PLANES, TILES, TOKENS,
                STAGES, HALF_SCALES, BIAS, RESIDUAL, SHARED,
            )),
            (_fetch, (
                x_desc, words_desc, pairs_desc, x_smem, words_smem, pairs_smem, full, empty, per, total, num_blocks,
                token_tiles, UNITS, PLANES, ALL, TOKENS, STAGES, BYTES, PDL,
            )),
        ], [4, 1], [REGISTERS, FETCH_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
                out_ptr, bias_ptr, part_ptr, counter_ptr, x_smem, words_smem, pairs_smem, full, empty, per, total,
                num_blocks, token_tiles, num_tokens, num_outputs, stride_out, 0, WGS, UNITS, PLANES, TILES, TOKENS,
                STAGES, HALF_SCALES, BIAS, RESIDUAL, SHARED,
            )),
            (_multiply, (
                out_ptr, bias_ptr, part_ptr, counter_ptr, x_smem, words_smem, pairs_smem, full, empty, per, total,
                num_blocks, token_tiles, num_tokens, num_outputs, stride_out, 1, WGS, UNITS, PLANES, TILES, TOKENS,
                STAGES, HALF_SCALES, BIAS, RESIDUAL, SHARED,
            )),
            (_multiply, (
                out_ptr, bias_ptr, part_ptr, counter_ptr, x_smem, words_smem, pairs_smem, full, empty, per, total,
                num_blocks, token_tiles, num_tokens, num_outputs, stride_out, 2, WGS, UNITS, PLANES, TILES, TOKENS,
                STAGES, HALF_SCALES, BIAS, RESIDUAL, SHARED,
            )),
            (_multiply, (
                out_ptr, bias_ptr, part_ptr, counter_ptr, x_smem, words_smem, pairs_smem, full, empty, per, total,
                num_blocks, token_tiles, num_tokens, num_outputs, stride_out, 3, WGS, UNITS, PLANES, TILES, TOKENS,
                STAGES, HALF_SCALES, BIAS, RESIDUAL, SHARED,
            )),
            (_fetch, (
                x_desc, words_desc, pairs_desc, x_smem, words_smem, pairs_smem, full, empty, per, total, num_blocks,
                token_tiles, UNITS, PLANES, ALL, TOKENS, STAGES, BYTES, PDL,
            )),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, FETCH_REGISTERS])  # fmt: skip


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(x_TI: Tensor, weight: PackedWeight) -> bool:
    """Whether these can be multiplied here: 16 bits in rows that the copy engine can fetch, groups of 64 or 128."""
    return (
        x_TI.is_cuda
        and x_TI.element_size() == 2
        and x_TI.stride(1) == 1
        and x_TI.stride(0) % 8 == 0
        and x_TI.data_ptr() % 16 == 0
        and weight.group in GROUPS
        and _is_hopper(x_TI.device)
    )


def place_bytes(weight: PackedWeight, sizes: tuning.Sizes) -> int:
    """Shared memory of one place in the ring."""
    return int(weight.planes * sizes["wgs"] * sizes["tiles"] * (512 + 64) + sizes["tokens"] * 128)


def default_sizes(weight: PackedWeight, num_tokens: int, num_sms: int) -> dict[str, int]:
    """Large tiles where they fill the card; else smaller ones, and work shared out where there are too few of them."""
    tokens = min(256, max(16, tuning.next_power_of_two(num_tokens)))
    rows, enough = weight.words_MUW.shape[0], 0.7 * num_sms
    if tokens == 256 and -(-rows // 8) * -(-num_tokens // 256) < enough:
        tokens = 128
    columns = -(-num_tokens // tokens)
    is_large = tokens < 256 and -(-rows // 16) * columns >= enough
    sizes = {"wgs": 2, "tiles": 8 if is_large else 4, "tokens": tokens}
    programs = num_sms if -(-rows // (2 * sizes["tiles"])) * columns < enough else 0
    return {**sizes, "stages": min(8, RING_BYTES // place_bytes(weight, sizes)), "programs": programs}


def linear(
    x_TI: Tensor, weight: PackedWeight, bias_O: Tensor | None, residual: bool, out_TO: Tensor, sizes: tuning.Sizes
) -> Tensor:  # fmt: skip
    """x W^T + bias into `out_TO`, or (`residual`) added to it. Ask `takes` first.

    `sizes`: wgs (2 or 4 groups of warps), tiles (4 or 8 of 16 rows, of each), tokens (of a program), stages, programs
    (0: each takes one tile of the result; else so many share all work evenly), sharing (2 programs a multiprocessor;
    1 without), late (1: begins when the kernel before is done. Behind attention of many rows programs that come early
    crowd on the multiprocessors that are done first).
    """
    num_tokens, words, pairs = x_TI.shape[0], weight.words_MUW, weight.pairs_MKR2
    units, planes = weight.group // 64, weight.planes
    wgs, tiles, tokens = sizes["wgs"], sizes["tiles"], sizes["tokens"]
    blocks = words.shape[1] // (units * planes)
    token_tiles = triton.cdiv(num_tokens, tokens)
    total = triton.cdiv(words.shape[0], wgs * tiles) * token_tiles * blocks
    per = triton.cdiv(total, sizes["programs"]) if sizes["programs"] else blocks
    if total // blocks * wgs > tuning.MAX_COUNTERS:
        per = blocks
    programs = triton.cdiv(total, per)
    shared = per % blocks != 0
    part, counters = out_TO, out_TO
    if shared:
        part = torch.empty(programs * 2 * wgs * tiles * ROWS * tokens, dtype=torch.float32, device=x_TI.device)
        counters = tuning.counters(x_TI.device)
    share = (wgs, sizes.get("sharing", 1))
    start = {"maxnreg": START_REGISTERS[share]} if share in START_REGISTERS else {}
    overlap = {"PDL": False} if sizes.get("late", 0) else tuning.overlap(x_TI.device)
    flat, words_2d = gl.NVMMASharedLayout(0, 32, 2), words.view(words.shape[0], -1)
    pairs_2d = pairs.view(torch.int32).view(pairs.shape[0], -1)
    hopper_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_TI, [tokens, 64], gl.NVMMASharedLayout(128, 16, 2)),
        TensorDescriptor.from_tensor(words_2d, [wgs * tiles, 128], flat),
        TensorDescriptor.from_tensor(pairs_2d, [wgs * tiles, 16], flat),
        out_TO, out_TO if bias_O is None else bias_O, part, counters, per, total, blocks, token_tiles, num_tokens,
        weight.num_outputs, out_TO.stride(0),
        UNITS=units, PLANES=planes, HALF_SCALES=pairs.dtype == torch.float16, WGS=wgs, TILES=tiles, TOKENS=tokens,
        STAGES=sizes["stages"], BIAS=bias_O is not None, RESIDUAL=residual, SHARED=shared,
        REGISTERS=REGISTERS[share], FETCH_REGISTERS=FETCH_REGISTERS, num_warps=4, **start,
        **overlap,
    )  # fmt: skip
    return out_TO
