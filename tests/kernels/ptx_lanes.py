"""The 32 lanes of a warp on a CPU, as far as the texts of `kernels/warp_parts` need them: a few instructions of PTX."""

import re

import numpy as np
import torch
from numpy.typing import NDArray

Lanes = NDArray[np.uint32]
LANE = np.arange(32)


def floats(x: Lanes) -> NDArray[np.float32]:
    """Registers as float32."""
    return x.view(np.float32)


def bits(x: NDArray[np.float32]) -> Lanes:
    """Float32 as registers."""
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)


def halves(x: Lanes) -> NDArray[np.float16]:
    """The two float16 of each register [32, 2], the lower first."""
    return np.ascontiguousarray(x).view(np.float16).reshape(32, 2)


def brain_halves(x: Lanes) -> torch.Tensor:
    """The two bfloat16 of each register [32, 2], the lower first."""
    return torch.from_numpy(np.ascontiguousarray(x).view(np.int16).copy()).view(torch.bfloat16).view(32, 2)


def run(text: str, inputs: list[Lanes], num_outputs: int) -> list[Lanes]:
    """Carry out a text of inline assembly: outputs are $0 and on, then come the inputs."""
    registers = {f"${num_outputs + i}": np.asarray(x, dtype=np.uint32) for i, x in enumerate(inputs)}
    for line in re.split(r"[;\n]", text.strip().removeprefix("{").removesuffix("}")):
        if line.strip() and not line.strip().startswith(".reg"):
            _carry_out(line.strip(), registers)
    return [registers[f"${i}"] for i in range(num_outputs)]


def _carry_out(line: str, registers: dict[str, Lanes]) -> None:
    name, rest = line.split(maxsplit=1)
    operands = [x.strip() for x in re.findall(r"\{[^}]*\}|[^,{}]+", rest) if x.strip()]

    def value(operand: str) -> Lanes:
        if operand in registers:
            return registers[operand]
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return np.full(32, number & 0xFFFFFFFF, dtype=np.uint32)

    def group(operand: str) -> list[str]:
        return [x.strip() for x in operand.strip("{}").split(",")]

    into, sources = operands[0], operands[1:]
    kind = name.split(".")[0]
    if kind == "mma":
        a, b, c = ([value(x) for x in group(operand)] for operand in sources)
        for register, result in zip(group(into), _multiply(a, b, c), strict=True):
            registers[register] = result
    elif kind == "mov" and into.startswith("{"):
        low, high = group(into)
        registers[low], registers[high] = value(sources[0]) & 0xFFFF, value(sources[0]) >> 16
    elif kind == "mov":
        registers[into] = value(sources[0])
    elif kind in ("xor", "and", "shr"):
        operation = {"xor": np.bitwise_xor, "and": np.bitwise_and, "shr": np.right_shift}[kind]
        registers[into] = operation(value(sources[0]), value(sources[1]))
    elif kind == "lop3":
        assert sources[3] == "0xea", "the first two, or the third"
        registers[into] = (value(sources[0]) & value(sources[1])) | value(sources[2])
    elif name.endswith(".bf16x2"):
        first, second = (brain_halves(value(x)) for x in sources)
        made = first - second if kind == "sub" else first * second
        registers[into] = made.contiguous().view(torch.int16).numpy().view(np.uint32).reshape(32)
    elif kind == "prmt":
        every = np.stack([(value(x) >> (8 * i)) & 255 for x in sources[:2] for i in range(4)])
        picks = [(int(sources[2], 16) >> (4 * i)) & 7 for i in range(4)]
        registers[into] = sum((every[pick] << (8 * i) for i, pick in enumerate(picks)), np.zeros(32, np.uint32))
    elif name == "sub.f16x2":
        difference = halves(value(sources[0])) - halves(value(sources[1]))
        registers[into] = np.ascontiguousarray(difference).view(np.uint32).reshape(32)
    elif name == "cvt.rn.f16x2.e4m3x2":
        two = np.stack([value(sources[0]) & 255, value(sources[0]) >> 8], 1).astype(np.uint8)
        numbers = torch.from_numpy(two).view(torch.float8_e4m3fn).half().numpy()
        registers[into] = np.ascontiguousarray(numbers).view(np.uint32).reshape(32)
    elif name == "cvt.rn.f16x2.f32":
        two_floats = np.stack([floats(value(sources[1])), floats(value(sources[0]))], 1).astype(np.float16)
        registers[into] = np.ascontiguousarray(two_floats).view(np.uint32).reshape(32)
    elif kind == "shfl":
        registers[into] = value(sources[0])[LANE ^ int(sources[1])]
    elif kind == "movmatrix":
        turned = halves(value(sources[0])).reshape(8, 8).T  # row: lane // 4; columns: two of each of its four lanes
        registers[into] = np.ascontiguousarray(turned).view(np.uint32).reshape(32)
    elif kind == "ex2":
        registers[into] = bits(np.exp2(floats(value(sources[0]))))
    else:
        numbers_in = [floats(value(x)) for x in sources]
        if kind == "fma":
            result = numbers_in[0] * numbers_in[1] + numbers_in[2]
        else:
            result = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax}[kind](
                *numbers_in
            )
        registers[into] = bits(result)


def _multiply(a: list[Lanes], b: list[Lanes], c: list[Lanes]) -> list[Lanes]:
    """m16n8k16: the fragments as NVIDIA's manual of PTX lays them over a warp."""
    row, pair = LANE // 4, LANE % 4 * 2
    left, right, sums = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for i in range(4):
        for j in range(2):
            left[row + 8 * (i % 2), pair + 8 * (i // 2) + j] = halves(a[i])[:, j]
    for i in range(2):
        for j in range(2):
            right[pair + 8 * i + j, row] = halves(b[i])[:, j]
    for i in range(4):
        sums[row + 8 * (i // 2), pair + i % 2] = floats(c[i])
    made = (left @ right + sums).astype(np.float32)
    return [bits(made[row + 8 * (i // 2), pair + i % 2]) for i in range(4)]
