"""From words of 4-bit numbers to the tensor cores' registers: two numbers an instruction, and no way through memory.

A number is put below an exponent under which one step is 1: BASE + q, in 16 bits. Two neighbours of a row must share a
register, so words are taken in pairs: one `prmt` brings their lower halves together, one their upper halves, and then
a shift and one three-way logic operation make two numbers. Where that is not needed (Triton's interpreter), plain
operations say the same.
"""

import os

import torch
import triton
import triton.language as tl

from argosy.kernels import tuning

ASSEMBLES = os.environ.get("TRITON_INTERPRET") != "1"  # the interpreter knows no assembler
BASE_BF16, BASE_FP16 = tl.constexpr(128.0), tl.constexpr(64.0)
_HALVES = """
prmt.b32 lo, $8, $9, 0x5410;
prmt.b32 hi, $8, $9, 0x7632;"""


def _unpacking(mask: str, magic: str, shifts: tuple[str, ...]) -> str:
    lines = []
    for half, first in (("lo", 0), ("hi", 4)):
        for field, shift in enumerate(shifts):
            source = "t" if shift else half
            if shift:
                lines.append(shift.replace("@", half))
            lines.append(f"lop3.b32 ${first + field}, {source}, {mask}, {magic}, 0xea;")
    return _HALVES + "\n".join(["", *lines])


_MASKS_BF16 = ("0x000f000f", "0x43004300", "0x43004300")  # of a number, the exponent over it, BASE twice
_MASKS_FP16 = ("0x00f000f0", "0x54005400", "0x54005400")
_SHIFTS_BF16 = ("", *(f"shr.b32 t, @, {4 * field};" for field in (1, 2, 3)))
_SHIFTS_FP16 = ("shl.b32 t, @, 4;", "", "shr.b32 t, @, 4;", "shr.b32 t, @, 8;")
_BF16, _FP16 = _unpacking(*_MASKS_BF16[:2], _SHIFTS_BF16), _unpacking(*_MASKS_FP16[:2], _SHIFTS_FP16)


def _zeroing(kind: str, base: str) -> str:
    """Less the zero: $10 has (scale, zero) of the upper row, $12 of the one eight below."""
    lines = [f"mov.b32 t, {base};"]
    for row, pair in ((0, "$10"), (1, "$12")):
        lines.append(f"prmt.b32 z{row}, {pair}, {pair}, 0x3232;\nadd.rn.{kind}x2 z{row}, z{row}, t;")
    lines += [f"sub.rn.{kind}x2 ${field}, ${field}, z{field // 2 % 2};" for field in range(8)]
    return "\n".join(["", *lines])


def _scaling(kind: str) -> str:
    """Times the scale, after `_zeroing`."""
    lines = [f"prmt.b32 z{row}, {pair}, {pair}, 0x1010;" for row, pair in ((0, "$10"), (1, "$12"))]
    lines += [f"mul.rn.{kind}x2 ${field}, ${field}, z{field // 2 % 2};" for field in range(8)]
    return "\n".join(["", *lines])


_REGISTERS = "{\n.reg .b32 lo, hi, t, z0, z1;"
ASM_BF16 = tl.constexpr(f"{_REGISTERS}{_BF16}\n}}")
ASM_FP16 = tl.constexpr(f"{_REGISTERS}{_FP16}\n}}")
_LESS_BF16, _LESS_FP16 = _BF16 + _zeroing("bf16", "0x43004300"), _FP16 + _zeroing("f16", "0x54005400")
ASM_LESS_BF16 = tl.constexpr(f"{_REGISTERS}{_LESS_BF16}\n}}")
ASM_LESS_FP16 = tl.constexpr(f"{_REGISTERS}{_LESS_FP16}\n}}")
ASM_SCALED_BF16 = tl.constexpr(f"{_REGISTERS}{_LESS_BF16}{_scaling('bf16')}\n}}")
ASM_SCALED_FP16 = tl.constexpr(f"{_REGISTERS}{_LESS_FP16}{_scaling('f16')}\n}}")


def _planes(mask: str, magic: str, base: str, kind: str, shifts: tuple[str, ...], sixteen: str) -> str:
    """Numbers of 8 bits, (low - zero) + 16 (high - zero) times the scale.

    $8, $9: words of the low plane, $10, $11 of the high one; $12, $14: the low plane's pairs of the upper row and of
    the one eight below, $16, $18 the high one's.
    """
    lines = [f"mov.b32 t, {base};", f"mov.b32 sixteen, {sixteen};"]
    for row, low, high in ((0, "$12", "$16"), (1, "$14", "$18")):
        for name, pair in (("z", low), ("y", high)):
            lines.append(f"prmt.b32 {name}{row}, {pair}, {pair}, 0x3232;\nadd.rn.{kind}x2 {name}{row}, {name}{row}, t;")
        lines.append(f"prmt.b32 s{row}, {low}, {low}, 0x1010;")
    for half, selector in ((0, "0x5410"), (1, "0x7632")):
        lines += [f"prmt.b32 lo, $8, $9, {selector};", f"prmt.b32 hi, $10, $11, {selector};"]
        for place, shift in enumerate(shifts):
            field, row = 4 * half + place, place // 2
            for source, to, zero in (("lo", f"${field}", "z"), ("hi", "u", "y")):
                if shift:
                    lines.append(shift.replace("@", source))
                lines.append(f"lop3.b32 {to}, {'t' if shift else source}, {mask}, {magic}, 0xea;")
                lines.append(f"sub.rn.{kind}x2 {to}, {to}, {zero}{row};")
            lines.append(
                f"fma.rn.{kind}x2 ${field}, u, sixteen, ${field};\nmul.rn.{kind}x2 ${field}, ${field}, s{row};"
            )
    registers = ".reg .b32 lo, hi, t, u, sixteen, z0, z1, y0, y1, s0, s1;"
    return "\n".join(["{", registers, *lines, "}"])


def _both(mask: str, magic: str, kind: str, shifts: tuple[str, ...], sixteen: str, less: str) -> str:
    """Numbers of 8 bits less 128, exact: 16 (BASE + high) - (17 BASE + 128), and that to BASE + low."""
    lines = [f"mov.b32 sixteen, {sixteen};", f"mov.b32 less, {less};"]
    for half, selector in ((0, "0x5410"), (1, "0x7632")):
        lines += [f"prmt.b32 lo, $8, $9, {selector};", f"prmt.b32 hi, $10, $11, {selector};"]
        for place, shift in enumerate(shifts):
            for source, to in (("lo", "v"), ("hi", "u")):
                if shift:
                    lines.append(shift.replace("@", source))
                lines.append(f"lop3.b32 {to}, {'t' if shift else source}, {mask}, {magic}, 0xea;")
            lines.append(f"fma.rn.{kind}x2 u, u, sixteen, less;\nadd.rn.{kind}x2 ${4 * half + place}, u, v;")
    return "\n".join(["{", ".reg .b32 lo, hi, t, u, v, sixteen, less;", *lines, "}"])


_BOTH_BF16, _BOTH_FP16 = ("0x41804180", "0xc510c510"), ("0x4c004c00", "0xe4c0e4c0")  # 16; less 17 BASE and 128
ASM_BOTH_BF16 = tl.constexpr(_both(*_MASKS_BF16[:2], "bf16", _SHIFTS_BF16, *_BOTH_BF16))
ASM_BOTH_FP16 = tl.constexpr(_both(*_MASKS_FP16[:2], "f16", _SHIFTS_FP16, *_BOTH_FP16))
ASM_PLANES_BF16 = tl.constexpr(_planes(*_MASKS_BF16, "bf16", _SHIFTS_BF16, "0x41804180"))
ASM_PLANES_FP16 = tl.constexpr(_planes(*_MASKS_FP16, "f16", _SHIFTS_FP16, "0x4c004c00"))


def _unit(mask: str, magic: str, kind: str, shifts: tuple[str, ...], sixteen: str = "", less: str = "") -> str:
    """A unit of 16 x 64 by one token: $0-$3 sums of BASE + q by the tensor cores.

    $4-$7: a lane's words; $8-$15: its pairs of inputs, 8 columns apart. With `sixteen`, numbers of 8 bits less 128,
    as `_both` makes them; $16-$19: words of the high plane.
    """
    lines = [f"mov.f32 ${sum_}, 0f00000000;" for sum_ in range(4)]
    if sixteen:
        lines += [f"mov.b32 sixteen, {sixteen};", f"mov.b32 less, {less};"]
    for half in range(2):
        for quarter, selector in enumerate(("0x5410", "0x7632")):
            lines.append(f"prmt.b32 lo, ${4 + 2 * half}, ${5 + 2 * half}, {selector};")
            if sixteen:
                lines.append(f"prmt.b32 hi, ${16 + 2 * half}, ${17 + 2 * half}, {selector};")
            for field, shift in enumerate(shifts):
                for source, to in (("lo", f"f{field}"), ("hi", "u"))[: 2 if sixteen else 1]:
                    if shift:
                        lines.append(shift.replace("@", source))
                    lines.append(f"lop3.b32 {to}, {'t' if shift else source}, {mask}, {magic}, 0xea;")
                if sixteen:
                    lines.append(f"fma.rn.{kind}x2 u, u, sixteen, less;\nadd.rn.{kind}x2 f{field}, u, f{field};")
            lines.append(_by_tensor_cores(kind, "f0, f2, f1, f3", 8 + 4 * half + 2 * quarter))
    return "\n".join(["{", ".reg .b32 lo, hi, t, u, sixteen, less, f0, f1, f2, f3;", *lines, "}"])


def _by_tensor_cores(kind: str, left: str, inputs: int) -> str:
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    return f"{product} {{$0, $1, $2, $3}}, {{{left}}}, {{${inputs}, ${inputs + 1}}}, {{$0, $1, $2, $3}};"


def _sums(kind: str, ones: str) -> str:
    """$0-$3: the sum of a unit's inputs, whose pairs are $4-$11: a product with ones."""
    lines = [f"mov.b32 one, {ones};", *(f"mov.f32 ${sum_}, 0f00000000;" for sum_ in range(4))]
    lines += [_by_tensor_cores(kind, "one, one, one, one", inputs) for inputs in (4, 6, 8, 10)]
    return "\n".join(["{", ".reg .b32 one;", *lines, "}"])


def _half_unit() -> str:
    """`_unit` by one token in float16, whose pairs of inputs are 16 columns apart, as a word's halves are.

    A field is BASE + q of 1024 or 64, without a shift for two of four. $8-$15: pairs of a lane's quarter, two of each
    word, 8 columns apart.
    """
    lines = [f"mov.f32 ${sum_}, 0f00000000;" for sum_ in range(4)]
    for word in range(4):
        lines.append(f"shr.b32 t, ${4 + word}, 8;")
        for field, source in enumerate((f"${4 + word}", f"${4 + word}", "t", "t")):
            mask, magic = (("0x000f000f", "0x64006400"), ("0x00f000f0", "0x54005400"))[field % 2]
            lines.append(f"lop3.b32 f{field}, {source}, {mask}, {magic}, 0xea;")
        lines.append(_by_tensor_cores("f16", "f0, f2, f1, f3", 8 + 2 * word))
    return "\n".join(["{", ".reg .b32 t, f0, f1, f2, f3;", *lines, "}"])


def _half_sums() -> str:
    """$0, $1: the sums of BASE times a unit's inputs, $2, $3 those of the inputs; its pairs are $4-$11."""
    lines = ["mov.b32 one, 0x3c003c00;", "mov.b32 low, 0x64006400;", "mov.b32 high, 0x54005400;"]
    lines += [f"mov.f32 ${sum_}, 0f00000000;" for sum_ in range(4)]
    lines += [_by_tensor_cores("f16", "low, one, high, one", first) for first in (4, 6, 8, 10)]
    return "\n".join(["{", ".reg .b32 one, low, high;", *lines, "}"])


HALF_UNIT, HALF_SUMS = tl.constexpr(_half_unit()), tl.constexpr(_half_sums())
UNIT_BF16 = tl.constexpr(_unit(*_MASKS_BF16[:2], "bf16", _SHIFTS_BF16))
UNIT_FP16 = tl.constexpr(_unit(*_MASKS_FP16[:2], "f16", _SHIFTS_FP16))
BOTH_BF16 = tl.constexpr(_unit(*_MASKS_BF16[:2], "bf16", _SHIFTS_BF16, *_BOTH_BF16))
BOTH_FP16 = tl.constexpr(_unit(*_MASKS_FP16[:2], "f16", _SHIFTS_FP16, *_BOTH_FP16))
SUMS_BF16, SUMS_FP16 = tl.constexpr(_sums("bf16", "0x3f803f80")), tl.constexpr(_sums("f16", "0x3c003c00"))
_SUMS = ["=&f"] * 4
SUMS_OPERANDS = tl.constexpr(",".join(_SUMS + ["r"] * 8))
UNIT_OPERANDS = tl.constexpr(",".join(_SUMS + ["r"] * 12))
BOTH_OPERANDS = tl.constexpr(",".join(_SUMS + ["r"] * 16))
_OUTPUTS = ",".join(["=&r"] * 8)
TWO_WORDS = tl.constexpr(_OUTPUTS + ",r" * 4)
PLANES_AND_PAIRS = tl.constexpr(_OUTPUTS + ",r" * 12)
WORDS_ALONE, WORDS_AND_PAIRS = tl.constexpr(f"{_OUTPUTS},r,r"), tl.constexpr(f"{_OUTPUTS},r,r,r,r,r,r")
EIGHT_BF16, EIGHT_FP16 = tl.constexpr((tl.bfloat16,) * 8), tl.constexpr((tl.float16,) * 8)


def adds_pairs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the texts that add and multiply numbers of this type two at a time run here: two bfloat16 from Hopper
    on. `fields` alone asks for no such thing."""
    return ASSEMBLES and (dtype == torch.float16 or tuning.device_facts(device).adds_bf16)


@triton.jit
def _field(words, FIELD: tl.constexpr, FP16: tl.constexpr):
    """Field FIELD of each word as BASE + q."""
    number = (words >> (4 * FIELD)) & 15
    if FP16:
        return ((number << 4) | 0x5400).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return (number | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def fields(words, FP16: tl.constexpr, ASM: tl.constexpr):
    """The eight fields of each word as BASE + q, a tensor each."""
    if ASM and FP16:
        return tl.inline_asm_elementwise(ASM_FP16, WORDS_ALONE, [words], dtype=EIGHT_FP16, is_pure=True, pack=2)
    elif ASM:
        return tl.inline_asm_elementwise(ASM_BF16, WORDS_ALONE, [words], dtype=EIGHT_BF16, is_pure=True, pack=2)
    else:
        return (
            _field(words, 0, FP16), _field(words, 1, FP16), _field(words, 2, FP16), _field(words, 3, FP16),
            _field(words, 4, FP16), _field(words, 5, FP16), _field(words, 6, FP16), _field(words, 7, FP16),
        )  # fmt: skip


@triton.jit
def both_fields(low, high, FP16: tl.constexpr, ASM: tl.constexpr):
    """The eight numbers of 8 bits of each two words, less 128, a tensor each."""
    if ASM and FP16:
        return tl.inline_asm_elementwise(ASM_BOTH_FP16, TWO_WORDS, [low, high], dtype=EIGHT_FP16, is_pure=True, pack=2)
    elif ASM:
        return tl.inline_asm_elementwise(ASM_BOTH_BF16, TWO_WORDS, [low, high], dtype=EIGHT_BF16, is_pure=True, pack=2)
    else:
        return (
            _both_field(low, high, 0, FP16), _both_field(low, high, 1, FP16), _both_field(low, high, 2, FP16),
            _both_field(low, high, 3, FP16), _both_field(low, high, 4, FP16), _both_field(low, high, 5, FP16),
            _both_field(low, high, 6, FP16), _both_field(low, high, 7, FP16),
        )  # fmt: skip


@triton.jit
def _both_field(low, high, FIELD: tl.constexpr, FP16: tl.constexpr):
    number = ((low >> (4 * FIELD)) & 15) + ((high >> (4 * FIELD)) & 15) * 16 - 128
    return number.to(tl.float16 if FP16 else tl.bfloat16)


@triton.jit
def scale_of(pair, HALF: tl.constexpr):
    """The lower half of each pair as float32; HALF: it is float16, else bfloat16."""
    if HALF:
        return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def zero_of(pair, HALF: tl.constexpr):
    """The upper half."""
    return scale_of(pair >> 16, HALF)


@triton.jit
def _made_field(number, upper, lower, FIELD: tl.constexpr, SCALED: tl.constexpr, FP16: tl.constexpr):
    T: tl.constexpr = tl.float16 if FP16 else tl.bfloat16
    BASE: tl.constexpr = BASE_FP16 if FP16 else BASE_BF16
    pair = lower if FIELD // 2 % 2 else upper
    exact = (number.to(tl.float32) - BASE - zero_of(pair, FP16)).to(T)
    if SCALED:
        exact = (exact.to(tl.float32) * scale_of(pair, FP16)).to(T)
    return exact


@triton.jit
def made_fields(words, upper, lower, SCALED: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr):
    """q - zero, exact; SCALED: times the scale, rounded. `upper` and `lower` are the pairs of a word's two rows."""
    if ASM and SCALED and FP16:
        return tl.inline_asm_elementwise(
            ASM_SCALED_FP16, WORDS_AND_PAIRS, [words, upper, lower], dtype=EIGHT_FP16, is_pure=True, pack=2
        )
    elif ASM and SCALED:
        return tl.inline_asm_elementwise(
            ASM_SCALED_BF16, WORDS_AND_PAIRS, [words, upper, lower], dtype=EIGHT_BF16, is_pure=True, pack=2
        )
    elif ASM and FP16:
        return tl.inline_asm_elementwise(
            ASM_LESS_FP16, WORDS_AND_PAIRS, [words, upper, lower], dtype=EIGHT_FP16, is_pure=True, pack=2
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            ASM_LESS_BF16, WORDS_AND_PAIRS, [words, upper, lower], dtype=EIGHT_BF16, is_pure=True, pack=2
        )
    else:
        a, b, c, d, e, f, g, h = fields(words, FP16, ASM)
        return (
            _made_field(a, upper, lower, 0, SCALED, FP16), _made_field(b, upper, lower, 1, SCALED, FP16),
            _made_field(c, upper, lower, 2, SCALED, FP16), _made_field(d, upper, lower, 3, SCALED, FP16),
            _made_field(e, upper, lower, 4, SCALED, FP16), _made_field(f, upper, lower, 5, SCALED, FP16),
            _made_field(g, upper, lower, 6, SCALED, FP16), _made_field(h, upper, lower, 7, SCALED, FP16),
        )  # fmt: skip


@triton.jit
def prefetch(ptr):
    """Ask for the 128 bytes at each place into the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def joined(a, b, c, d, e, f, g, h):
    """[..., f0, f1, f2] from the eight fields."""
    return tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
