"""What a warp of `warp_decode` does to its registers, in the GPU's assembly: unpack, multiply, weigh.

Every text works on one element a lane, or on four beside each other where a product of the tensor cores (m16n8k16) has
four. The rows of the first product are keys, its columns heads; those of the second are numbers of values, and heads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SHUFFLES = (4, 8, 16)  # over the lanes that have other keys of the same heads


def _numbers(into: tuple[str, str], word: str, e4m3: bool) -> str:
    """The four numbers of a word as float16, two a register."""
    if e4m3:
        return f"mov.b32 {{h0, h1}}, {word};\ncvt.rn.f16x2.e4m3x2 {into[0]}, h0;\ncvt.rn.f16x2.e4m3x2 {into[1]}, h1;\n"
    # x + 128 in the low byte of a float16 of 1024 is 1152 + x
    return (
        f"xor.b32 w, {word}, 0x80808080;\n"
        f"prmt.b32 {into[0]}, w, 0x64646464, 0x4140;\nsub.f16x2 {into[0]}, {into[0]}, unit;\n"
        f"prmt.b32 {into[1]}, w, 0x64646464, 0x4342;\nsub.f16x2 {into[1]}, {into[1]}, unit;\n"
    )


def _attend_text(e4m3: bool) -> str:
    """Products of 16 keys and 8 heads of 128 numbers: 8 words of a lane's key, 8 of that 8 keys on, 16 of queries."""
    text = "{\n.reg .b32 w, unit, a<4>;\n.reg .b16 h0, h1;\n.reg .f32 zero, e<8>;\n"
    text += "mov.b32 unit, 0x64806480;\nmov.f32 zero, 0f00000000;\n"
    for step in range(8):
        text += _numbers(("a0", "a2"), f"${4 + step}", e4m3) + _numbers(("a1", "a3"), f"${12 + step}", e4m3)
        sums = [f"e{4 * (step % 2) + i}" for i in range(4)]  # two chains
        before = ", ".join(sums if step > 1 else ["zero"] * 4)
        text += (
            f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{', '.join(sums)}}}, {{a0, a1, a2, a3}}, "
            f"{{${20 + 2 * step}, ${21 + 2 * step}}}, {{{before}}};\n"
        )
    return text + "".join(f"add.f32 ${i}, e{i}, e{i + 4};\n" for i in range(4)) + "}"


def _weigh_text() -> str:
    """From products to weights, as the second product wants them; largest logits and sums before and after. Limits are
    inf, or -inf for keys that are not there."""
    text = "{\n.reg .f32 l<4>, n<2>, o;\n.reg .b32 p;\n"
    for i in range(4):
        text += f"fma.rn.f32 l{i}, ${8 + i}, ${12 + i // 2}, ${14 + i // 2};\n"
        text += f"min.f32 l{i}, l{i}, ${18 + i // 2};\n"
    for head in range(2):
        text += f"max.f32 n{head}, l{head}, l{head + 2};\n"
        for distance in SHUFFLES:
            text += f"shfl.sync.bfly.b32 o, n{head}, {distance}, 31, -1;\nmax.f32 n{head}, n{head}, o;\n"
        text += f"max.f32 ${head}, n{head}, ${20 + head};\n"
        text += f"sub.f32 o, ${20 + head}, ${head};\nex2.approx.ftz.f32 ${2 + head}, o;\n"
    for i in range(4):
        text += f"sub.f32 l{i}, l{i}, ${i % 2};\nex2.approx.ftz.f32 l{i}, l{i};\n"
    for head in range(2):
        text += f"mul.f32 o, ${22 + head}, ${2 + head};\nfma.rn.f32 o, l{head}, $16, o;\n"
        text += f"fma.rn.f32 ${4 + head}, l{head + 2}, $17, o;\n"
    for half in range(2):
        text += f"cvt.rn.f16x2.f32 p, l{2 * half + 1}, l{2 * half};\n"
        text += f"movmatrix.sync.aligned.m8n8.trans.b16 ${6 + half}, p;\n"
    return text + "}"


def _values_text(e4m3: bool) -> str:
    """The same word of four keys, as the numbers of two products: keys beside each other, not numbers."""
    text = "{\n.reg .b32 w, unit;\n.reg .b16 h0, h1;\nmov.b32 unit, 0x64806480;\n"
    for tile, (bytes_int8, bytes_e4m3) in enumerate((("0x5410", "0x5140"), ("0x7632", "0x7362"))):
        for pair in range(2):  # of keys
            first, second = 4 * tile + 2 * pair, 4 * tile + 2 * pair + 1
            words = f"${8 + 2 * pair}, ${9 + 2 * pair}"
            if e4m3:
                text += f"prmt.b32 w, {words}, {bytes_e4m3};\nmov.b32 {{h0, h1}}, w;\n"
                text += f"cvt.rn.f16x2.e4m3x2 ${first}, h0;\ncvt.rn.f16x2.e4m3x2 ${second}, h1;\n"
            else:
                text += f"prmt.b32 w, {words}, {bytes_int8};\nxor.b32 w, w, 0x80808080;\n"
                text += f"prmt.b32 ${first}, w, 0x64646464, 0x4240;\nsub.f16x2 ${first}, ${first}, unit;\n"
                text += f"prmt.b32 ${second}, w, 0x64646464, 0x4341;\nsub.f16x2 ${second}, ${second}, unit;\n"
    return text + "}"


ATTEND_INT8 = gl.constexpr(_attend_text(False))
ATTEND_E4M3 = gl.constexpr(_attend_text(True))
VALUES_INT8 = gl.constexpr(_values_text(False))
VALUES_E4M3 = gl.constexpr(_values_text(True))
WEIGH = gl.constexpr(_weigh_text())
# registers 0 and 2 of a product belong to one head, 1 and 3 to the next
ADD = gl.constexpr(
    "{\n.reg .f32 s<4>;\n"
    + "".join(f"mul.f32 s{i}, ${4 + i}, ${20 + 4 * (i % 2) + i};\n" for i in range(4))
    + "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $16}, "
    "{s0, s1, s2, s3};\n}"
)
FOUR_SUMS = gl.constexpr(",".join(["=&f"] * 4 + ["r"] * 32))
WEIGHED = gl.constexpr(",".join(["=&f"] * 6 + ["=&r"] * 2 + ["f"] * 16))
UNPACKED = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 4))
ADDED = gl.constexpr(",".join(["=&f"] * 4 + ["f"] * 4 + ["r"] * 12 + ["f"] * 8))


@gluon.jit
def lane_of(x):
    """One element a lane, however it came about."""
    return gl.convert_layout(x, gl.BlockedLayout([1], [32], [1], [0]), assert_trivial=True)


@gluon.jit
def four(x):
    """The columns of [32, 4]."""
    even, odd = gl.split(x.reshape([32, 2, 2]))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    return lane_of(x0), lane_of(x1), lane_of(x2), lane_of(x3)


@gluon.jit
def eight(x):
    """The columns of [32, 8]."""
    even, odd = gl.split(x.reshape([32, 4, 2]))
    x0, x2, x4, x6 = four(even)
    x1, x3, x5, x7 = four(odd)
    return x0, x1, x2, x3, x4, x5, x6, x7


@gluon.jit
def sum_over_keys(x):
    """The sum over the lanes that have other keys of the same heads, for all of them."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 sum, other;
        shfl.sync.bfly.b32 other, $1, 4, 31, -1;
        add.f32 sum, $1, other;
        shfl.sync.bfly.b32 other, sum, 8, 31, -1;
        add.f32 sum, sum, other;
        shfl.sync.bfly.b32 other, sum, 16, 31, -1;
        add.f32 $0, sum, other;
        }""",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def all_stored(x):
    """`x`, once all that the lanes stored can be seen by everybody who sees what is stored next."""
    return gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; bar.warp.sync -1; mov.b32 $0, $1;", "=r,r", [gl.to_tensor(x)], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def attend(k_here, k_there, q_first, q_second, E4M3: gl.constexpr):
    """Products of 16 keys (words [32, 8] of two of them a lane) and queries (words [32, 8] of even and odd places)."""
    k0, k1, k2, k3, k4, k5, k6, k7 = eight(k_here)
    l0, l1, l2, l3, l4, l5, l6, l7 = eight(k_there)
    a0, a1, a2, a3, a4, a5, a6, a7 = eight(q_first)
    b0, b1, b2, b3, b4, b5, b6, b7 = eight(q_second)
    return gl.inline_asm_elementwise(
        ATTEND_E4M3 if E4M3 else ATTEND_INT8, FOUR_SUMS,
        [k0, k1, k2, k3, k4, k5, k6, k7, l0, l1, l2, l3, l4, l5, l6, l7,
         a0, b0, a1, b1, a2, b2, a3, b3, a4, b4, a5, b5, a6, b6, a7, b7],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def weigh(c0, c1, c2, c3, factors, logs, inverses, limits, largest, totals):
    """(largest, shrinkage, sums) of a lane's two heads and the two registers of weights. Pairs but for products."""
    return gl.inline_asm_elementwise(
        WEIGH, WEIGHED,
        [c0, c1, c2, c3, factors[0], factors[1], logs[0], logs[1], inverses[0], inverses[1], limits[0], limits[1],
         largest[0], largest[1], totals[0], totals[1]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def add(acc, v0, v1, v2, v3, b0, b1, s0, s1, E4M3: gl.constexpr):
    """acc [32, 8, 4], shrunk, and weights times values: words [32, 4] of four keys a lane."""
    o0, o1, o2, o3, o4, o5, o6, o7 = gl.inline_asm_elementwise(
        VALUES_E4M3 if E4M3 else VALUES_INT8, UNPACKED, [v0, v1, v2, v3],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    even = gl.join(gl.join(o0, o4), gl.join(o2, o6))
    odd = gl.join(gl.join(o1, o5), gl.join(o3, o7))
    a = gl.convert_layout(gl.join(even, odd).reshape([32, 8, 4]), acc.type.layout, assert_trivial=True)
    wide: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, acc.type.layout))
    b0 = gl.convert_layout(b0, wide, assert_trivial=True)[:, None, None]
    b1 = gl.convert_layout(b1, wide, assert_trivial=True)[:, None, None]
    s0 = gl.convert_layout(s0, wide, assert_trivial=True)[:, None, None]
    s1 = gl.convert_layout(s1, wide, assert_trivial=True)[:, None, None]
    return gl.inline_asm_elementwise(
        ADD, ADDED, [acc, a, b0, b1, s0, s1], dtype=gl.float32, is_pure=True, pack=4
    )  # fmt: skip
