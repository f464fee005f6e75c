"""What fetches for `hopper_attention` from a cache in 8 bits: unpacks keys and values on their way on chip.

The groups that multiply find keys and values in the queries' type, times their scales, as from a cache in 16 bits, and
know nothing of 8. One group of warps has the keys and one the values: each asks for a tile while it unpacks the one
before. Two numbers take five instructions (int8) or six (e4m3), the scale with them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from argosy.kernels.hopper_parts import ask_for_work, fact, hand_out_end, hand_out_queries

OLD_NAME: gl.constexpr = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))  # until Triton 3.8


@gluon.jit
def scale_bits(code):
    """Two bfloat16 of the scale of `kv_scales.decode` side by side, int32; nan for the code of nan."""
    scale = ((code + 766) << 21).to(gl.float32, bitcast=True) * 3.0814879110195774e-33
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $1, 0x3232;", "=r,r", [scale], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


# 128 + the lower seven bits, less 128 or 256 as the eighth says: bfloat16 has no room for 256 + all eight
INT8 = gl.constexpr("""{
    .reg .b32 low, high, minus, plus;
    prmt.b32 low, $2, 0x43434343, 0x4140;
    prmt.b32 high, $2, 0x43434343, 0x4342;
    and.b32 plus, low, 0xff7fff7f;
    and.b32 minus, low, 0xff80ff80;
    sub.rn.bf16x2 plus, plus, minus;
    mul.rn.bf16x2 $0, plus, $3;
    and.b32 plus, high, 0xff7fff7f;
    and.b32 minus, high, 0xff80ff80;
    sub.rn.bf16x2 plus, plus, minus;
    mul.rn.bf16x2 $1, plus, $3;
    }""")
# exponent and mantissa at the end of those of a bfloat16 are the number over 2^120, subnormal ones, too; none is nan
E4M3_BITS = gl.constexpr("""{
    .reg .b32 low, high, upper, unit;
    mov.b32 unit, 0x7b807b80;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    shr.b32 upper, low, 4;
    and.b32 upper, upper, 0x07f007f0;
    lop3.b32 low, low, 0x80008000, upper, 0xea;
    mul.rn.bf16x2 low, low, unit;
    mul.rn.bf16x2 $0, low, $3;
    shr.b32 upper, high, 4;
    and.b32 upper, upper, 0x07f007f0;
    lop3.b32 high, high, 0x80008000, upper, 0xea;
    mul.rn.bf16x2 high, high, unit;
    mul.rn.bf16x2 $1, high, $3;
    }""")


@gluon.jit
def _codes_of(words, tile: gl.constexpr, spread: gl.constexpr):
    """Codes [L / R, R] in words of four [L / R, R / 4]."""
    shift = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, spread)))) * 8
    codes = ((words[:, :, None] >> shift[None, None, :]) & 255).reshape([words.shape[0], words.shape[1] * 4])
    return gl.convert_layout(codes, gl.SliceLayout(2, tile), assert_trivial=True)


@gluon.jit
def _store(smem, x, words, there, tile: gl.constexpr, spread: gl.constexpr, E4M3: gl.constexpr, SCALES: gl.constexpr):
    """Words [L / R, R, H / 4] of a cache as bfloat16 to `smem` [L, H], times the scales that `words` [L / R, R / 4] of
    codes mean; zeros where not `there` [L / R, R]."""
    L: gl.constexpr = x.shape[0] * x.shape[1]
    if SCALES:  # noqa: SIM108 - known when compiling
        bits = scale_bits(_codes_of(words, tile, spread))
    else:
        bits = gl.full_like(there, 0x3F803F80, dtype=gl.int32)
    bits = gl.where(there, bits, 0)[:, :, None]
    first, second = gl.inline_asm_elementwise(  # words of four numbers: two words of two bfloat16 each
        E4M3_BITS if E4M3 else INT8, "=&r,=&r,r,r", [x, bits], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )  # fmt: skip
    pairs = gl.join(first, second).reshape([L, x.shape[2] * 2])
    by_words: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    if OLD_NAME:
        smem._reinterpret(gl.int32, [L, x.shape[2] * 2], by_words).store(pairs)
    else:
        smem.reinterpret(gl.int32, [L, x.shape[2] * 2], by_words).store(pairs)


@gluon.jit
def _block_of(table_row, first, num_keys, S: gl.constexpr, BLOCK_BYTES: gl.constexpr, WIDE: gl.constexpr):
    """Where the blocks of tokens `first` begin, in words, those past the end in the last one."""
    block = gl.load(table_row + gl.minimum(first // S, (num_keys - 1) // S))
    return (block.to(gl.int64) if WIDE else block) * (BLOCK_BYTES // 4)


@gluon.jit
def _load(
    cache_ptr, block, first, kv_head, wanted, tile: gl.constexpr, spread: gl.constexpr,
    K: gl.constexpr, H: gl.constexpr, S: gl.constexpr, R: gl.constexpr, SCALES: gl.constexpr,
):  # fmt: skip
    """Words of numbers [L / R, R, H / 4] and of codes [L / R, R / 4] of R tokens each from `first` on, in `block`. Past
    the end there may be anything, but no memory that is not the cache's."""
    row = gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, tile)))
    word = gl.arange(0, H // 4, gl.SliceLayout(0, gl.SliceLayout(1, tile)))
    inside = first % S
    # one address a thread, and distances from it that are known when compiling
    head_ptr = cache_ptr + (block + (inside * (K * H // 4) + kv_head * (H // 4)))
    x_ptr = (head_ptr[:, None, None] + word[None, None, :]) + (row * (K * H // 4))[None, :, None]
    x = gl.load(x_ptr, wanted)
    codes = block[:, None]
    if SCALES:
        code_tile: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, spread))
        four = gl.arange(0, R // 4, gl.SliceLayout(0, code_tile))
        at = gl.convert_layout(
            block + (inside // 4 + (kv_head * (S // 4) + S * K * H // 4)),
            gl.SliceLayout(1, code_tile),
            assert_trivial=True,
        )
        codes = gl.load((cache_ptr + at)[:, None] + four[None, :], wanted)
    return x, codes


@gluon.jit
def _unpack_row(
    cache_ptr, table_row, num_keys, kv_head, step, smem, full, empty, tile: gl.constexpr, spread: gl.constexpr,
    K: gl.constexpr, H: gl.constexpr, S: gl.constexpr, R: gl.constexpr, BLOCK_L: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr, E4M3: gl.constexpr, SCALES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Keys, or values, of all tokens of a tile's row, from the last to the first, into a ring's slots after `step`."""
    BLOCK_BYTES: gl.constexpr = S * K * (H + 1) if SCALES else S * K * H
    by_token: gl.constexpr = gl.SliceLayout(2, tile)
    within = gl.arange(0, BLOCK_L // R, gl.SliceLayout(1, by_token)) * R
    beside = gl.arange(0, R, gl.SliceLayout(0, by_token))
    there = gl.full([BLOCK_L // R, R], 1, gl.int1, by_token)
    num_steps = (num_keys + BLOCK_L - 1) // BLOCK_L
    start = (num_steps - 1) * BLOCK_L
    block = _block_of(table_row, start + within, num_keys, S, BLOCK_BYTES, WIDE)
    coming, coming_codes = _load(cache_ptr, block, start + within, kv_head, True, tile, spread, K, H, S, R, SCALES)
    before = gl.maximum(start - BLOCK_L, 0)
    block = _block_of(table_row, before + within, num_keys, S, BLOCK_BYTES, WIDE)
    for i in range(num_steps):
        x = coming
        codes = coming_codes
        if MASKED:
            there = start + within[:, None] + beside[None, :] < num_keys
        start = gl.maximum(start - BLOCK_L, 0)
        coming, coming_codes = _load(
            cache_ptr, block, start + within, kv_head, i + 1 < num_steps, tile, spread, K, H, S, R, SCALES
        )
        before = gl.maximum(start - BLOCK_L, 0)
        block = _block_of(table_row, before + within, num_keys, S, BLOCK_BYTES, WIDE)
        slot = (step + i) % STAGES
        mbarrier.wait(empty.index(slot), (((step + i) // STAGES) & 1) ^ 1)
        _store(smem.index(slot), x, codes, there, tile, spread, E4M3, SCALES)
        fence_async_shared()  # for the tensor cores
        mbarrier.arrive(full.index(slot))
    return step + num_steps


# A thread has R tokens beside each other, so that it reads one entry of the table and one word of codes for them, and
# eight numbers of each, so that storing them as 16 bytes meets no other thread's bank.


@gluon.jit
def fetch_keys(
    q_ptr, cache_ptr, table_ptr, tiles_ptr, counter_ptr, stride_q, stride_table, num_tiles, q_smem, k_smem, facts_smem,
    q_full, q_empty, k_full, k_empty,
    K: gl.constexpr, G: gl.constexpr, H: gl.constexpr, S: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_L: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, E4M3: gl.constexpr, SCALES: gl.constexpr,
):  # fmt: skip
    """Take tiles of the step's plan; queries, facts and keys of each to those who want them."""
    PER_ROW: gl.constexpr = H // 8
    R: gl.constexpr = 8 if S % 8 == 0 else 4 if S % 4 == 0 else 1
    copying: gl.constexpr = gl.BlockedLayout([1, 8], [32 // PER_ROW, PER_ROW], [4, 1], [1, 0])
    tile: gl.constexpr = gl.BlockedLayout([1, R, 2], [32 // PER_ROW, 1, PER_ROW], [4, 1, 1], [2, 1, 0])
    spread: gl.constexpr = gl.BlockedLayout(
        [1, R // 4 if R > 1 else 1, 4, 2], [32 // PER_ROW, 1, 1, PER_ROW], [4, 1, 1, 1], [3, 2, 1, 0]
    )
    few: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    cache_ptr = cache_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    place = gl.arange(0, 8, few)
    total = gl.load(tiles_ptr + num_tiles * 8) * K  # the line behind the last tile says how many there are
    turn = 0
    step = 0
    work = gl.program_id(0)
    facts = gl.load(tiles_ptr + work // K * 8 + place)
    while work < total:
        kv_head = work % K
        num_keys = fact(facts, 0, few)
        table_row = table_ptr + fact(facts, 4, few).to(gl.int64) * stride_table
        hand_out_queries(
            q_ptr, stride_q, facts, place, kv_head, turn, q_smem, facts_smem, q_full, q_empty, copying, few, G, H,
            BLOCK_M,
        )  # fmt: skip
        turn += 1
        work = ask_for_work(counter_ptr, total)
        facts = gl.load(tiles_ptr + gl.minimum(work // K, num_tiles) * 8 + place)
        step = _unpack_row(
            cache_ptr, table_row, num_keys, kv_head, step, k_smem, k_full, k_empty, tile, spread, K, H, S, R, BLOCK_L,
            STAGES, WIDE, E4M3, SCALES, False,
        )  # fmt: skip
    hand_out_end(turn, facts_smem, q_full, q_empty, few)


@gluon.jit
def fetch_values(
    cache_ptr, table_ptr, stride_table, v_smem, facts_smem, q_full, q_empty, v_full, v_empty,
    K: gl.constexpr, H: gl.constexpr, S: gl.constexpr, BLOCK_L: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    E4M3: gl.constexpr, SCALES: gl.constexpr,
):  # fmt: skip
    """Values of the tiles that `fetch_keys` took. Keys past the end are masked, but values are multiplied: zeros."""
    PER_ROW: gl.constexpr = H // 8
    R: gl.constexpr = 8 if S % 8 == 0 else 4 if S % 4 == 0 else 1
    tile: gl.constexpr = gl.BlockedLayout([1, R, 2], [32 // PER_ROW, 1, PER_ROW], [4, 1, 1], [2, 1, 0])
    spread: gl.constexpr = gl.BlockedLayout(
        [1, R // 4 if R > 1 else 1, 4, 2], [32 // PER_ROW, 1, 1, PER_ROW], [4, 1, 1, 1], [3, 2, 1, 0]
    )
    few: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    cache_ptr = cache_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    turn = 0
    step = 0
    mbarrier.wait(q_full.index(0), 0)
    facts = facts_smem.index(0).load(few)
    num_keys = fact(facts, 0, few)
    while num_keys > 0:
        mbarrier.arrive(q_empty.index(turn & 1))
        table_row = table_ptr + fact(facts, 4, few).to(gl.int64) * stride_table
        step = _unpack_row(
            cache_ptr, table_row, num_keys, fact(facts, 5, few), step, v_smem, v_full, v_empty, tile, spread, K, H, S,
            R, BLOCK_L, STAGES, WIDE, E4M3, SCALES, True,
        )  # fmt: skip
        turn += 1
        mbarrier.wait(q_full.index(turn & 1), (turn >> 1) & 1)
        facts = facts_smem.index(turn & 1).load(few)
        num_keys = fact(facts, 0, few)
