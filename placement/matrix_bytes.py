"""Bytes of one matrix on one rank: how it is cut, and what is packed there of what was asked for."""

import math
from typing import Final

import msgspec

from argosy.placement.model_shape import Matrix, ModelShape
from argosy.placement.weight_format import FORMATS, WeightFormat

_PLAIN: Final = WeightFormat()
INT_FORMATS: Final = ("gptq", "awq", "int4", "int8")
SMALLEST_GROUP: Final = 32  # inputs that share a scale, as kernels take them; larger ones are cut
LARGEST_GROUP: Final = 128


def matrix_bytes(
    shape: ModelShape, matrix: Matrix, asked: WeightFormat, dtype_bytes: int, tp_size: int, *, on_cpu: bool = False
) -> int:  # fmt: skip
    """Bytes that a rank of `tp_size` keeps of a matrix, bias included; `asked` is what the model is served in."""
    num_out, num_in, count = matrix.num_out, matrix.num_in, matrix.count
    bias_rows = num_out
    if matrix.cut == "column":
        num_out = bias_rows = num_out // tp_size
    elif matrix.cut == "kv":
        num_out = bias_rows = num_out // min(tp_size, shape.spec.num_kv_heads)
    elif matrix.cut == "row":
        num_in //= tp_size
    elif matrix.cut != "none" and shape.deals_experts(tp_size):
        count = -(-count // tp_size)
    elif matrix.cut == "expert_column":
        num_out //= tp_size
    elif matrix.cut == "expert_row":
        num_in //= tp_size
    experts_only = asked.experts_only
    # a CPU keeps nothing packed but experts in e4m3
    packs = matrix.quantised and (not (on_cpu or experts_only) or (matrix.is_experts and not (on_cpu and experts_only)))
    weight_format = asked if packs else _PLAIN
    if packs and matrix.is_experts:
        in_groups = weight_format.name in INT_FORMATS and (weight_format.bits == 4 or shape.weight_format.bits != 16)
        if in_groups and on_cpu:
            weight_format = _PLAIN
        elif in_groups:
            if weight_format.order_bytes and num_in < matrix.num_in:  # groups are filled up
                num_in = _filled(num_in, -(-matrix.num_in // weight_format.group))
            weight_format = _packed_experts(weight_format, num_in, dtype_bytes)
        elif shape.weight_format.bits == 16:
            rows = num_out // 2 if matrix.cut == "expert_column" else num_out
            weight_format = _rounded_experts(weight_format, rows, num_in)
    size = weight_format.matrix_bytes(num_out, num_in, dtype_bytes)
    return count * (size + (bias_rows * dtype_bytes if matrix.bias else 0))


def _filled(num_in: int, groups: int) -> int:
    """Inputs of a rank when each of the groups that its own are spread over lacks as many as it can."""
    return (num_in + groups * (SMALLEST_GROUP - 1)) // SMALLEST_GROUP * SMALLEST_GROUP


def _packed_experts(kept: WeightFormat, num_in: int, dtype_bytes: int) -> WeightFormat:
    """How experts of 4 or 8 bits are kept: in groups that kernels take, as `workers/layers/int_experts.py` decides."""
    group = min(LARGEST_GROUP, math.gcd(kept.group, num_in & -num_in))
    return _PLAIN if dtype_bytes != 2 or group < SMALLEST_GROUP else msgspec.structs.replace(kept, group=group)


def _rounded_experts(asked: WeightFormat, num_out: int, num_in: int) -> WeightFormat:
    """How experts of plain checkpoints are kept in 8 bits: in e4m3 by block, where blocks divide them."""
    block = FORMATS["fp8_block"]
    sizes = block.block or (1, 1)
    if asked.bits == 16 or num_out % sizes[0] or num_in % sizes[1]:
        return _PLAIN
    return block
