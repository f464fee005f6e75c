"""The tensors in which checkpoints have a weight of 4 or 8 bits, and the numbers that they mean.

`cluster.protocol.int_quant_spec` names the layouts. n = 32 / bits numbers in a word, I = inputs, O = outputs, G =
groups of inputs that share a scale, all of the whole weight.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from argosy.cluster.protocol.errors import UnsupportedModel
from argosy.cluster.protocol.int_quant_spec import IntScheme

SCALE_DTYPES = ("F16", "BF16", "F32")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output the positions of a word hold, from the lowest bits on


class StoredTensor(NamedTuple):
    """One tensor of a weight in a file: what it is, its shape, and what else it may look like."""

    role: str  # numbers, scales, zeros, order
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    other_shapes: tuple[tuple[int, ...], ...] = ()


def tensors_of(scheme: IntScheme, rows: int, columns: int, groups: int) -> dict[str, StoredTensor]:
    """By their names behind the module's."""
    per = 32 // scheme.bits
    words: tuple[str, ...] = ("I32",)
    if scheme.layout == "int8":
        others: tuple[tuple[int, ...], ...] = ((rows,), (1,), (1, 1), ())
        return {
            "weight": StoredTensor("numbers", (rows, columns), ("I8",)),
            "weight_scale": StoredTensor("scales", (rows, groups), SCALE_DTYPES, others),
        }
    if scheme.layout == "bitsandbytes":
        return {
            "weight": StoredTensor("numbers", (rows, columns), ("I8",)),
            "SCB": StoredTensor("scales", (rows,), ("F32",), ((rows, 1),)),
        }
    if scheme.layout == "packed":
        found = {
            "weight_packed": StoredTensor("numbers", (rows, -(-columns // per)), words),
            "weight_scale": StoredTensor("scales", (rows, groups), SCALE_DTYPES, ((1,), (1, 1), ())),
        }
        if not scheme.symmetric:
            found["weight_zero_point"] = StoredTensor("zeros", (-(-rows // per), groups), words)
        if scheme.ordered:
            found["weight_g_idx"] = StoredTensor("order", (columns,), words)
        return found
    if scheme.layout == "awq":
        found = {"qweight": StoredTensor("numbers", (columns, rows // per), words)}
    else:
        found = {"qweight": StoredTensor("numbers", (columns // per, rows), words)}
        if scheme.ordered:
            found["g_idx"] = StoredTensor("order", (columns,), words)
    found["qzeros"] = StoredTensor("zeros", (groups, rows // per), words)
    found["scales"] = StoredTensor("scales", (groups, rows), SCALE_DTYPES)
    return found


def num_tensors(scheme: IntScheme) -> int:
    """How many tensors make a weight."""
    return len(tensors_of(scheme, 32, 32, 1))


def steps_of_scale(scheme: IntScheme) -> float:
    """Files of bitsandbytes have a row's largest magnitude, which is 127 steps, where others have a step."""
    return 127.0 if scheme.layout == "bitsandbytes" else 1.0


def read(
    scheme: IntScheme, rows: int, columns: int, tensors: Mapping[str, Tensor], scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """From tensors by their roles to numbers [O, I], scales and zeros [O, G] in `scale_dtype`, and the inputs in the
    order of their groups, in which the numbers are then; None where it is that of the checkpoint."""
    numbers, scales = tensors["numbers"], (tensors["scales"] / steps_of_scale(scheme)).to(scale_dtype)
    middle = float(1 << (scheme.bits - 1))
    if scheme.layout in ("gptq", "awq"):
        scale_OG = scales.t()
        zeros_GO = _unpack_last(tensors["zeros"].to(torch.int32), scheme.bits)
        if scheme.layout == "awq":
            numbers_IO = _unpack_last(numbers.to(torch.int32), scheme.bits)
            return _from_awq_order(numbers_IO).t(), scale_OG, _from_awq_order(zeros_GO).t().to(scales.dtype), None
        numbers_OI = _unpack_last(numbers.to(torch.int32).t(), scheme.bits)
        zero_OG = ((zeros_GO + scheme.zero_offset) & ((1 << scheme.bits) - 1)).t().to(scales.dtype)
    else:
        scale_OG = scales.reshape(-1, scales.shape[-1] if scales.ndim == 2 else 1)
        scale_OG = scale_OG.expand(rows, scale_OG.shape[1])
        zero_OG = torch.full_like(scale_OG, middle)
        if scheme.layout != "packed":
            return numbers.to(torch.int32) + int(middle), scale_OG, zero_OG, None
        numbers_OI = _unpack_last(numbers.to(torch.int32), scheme.bits)[:, :columns]
        if not scheme.symmetric:
            zeros = _unpack_last(tensors["zeros"].to(torch.int32).t(), scheme.bits).t()[:rows]
            zero_OG = zeros.to(scale_OG.dtype)
    order_I = _order(scheme, columns, tensors["order"].long()) if scheme.ordered else None
    return numbers_OI if order_I is None else numbers_OI[:, order_I], scale_OG, zero_OG, order_I


def _order(scheme: IntScheme, columns: int, group_I: Tensor) -> Tensor | None:
    """The inputs by their groups. Raises `UnsupportedModel` where those are not of one size, or not all there."""
    if bool((group_I == -1).all()):  # announced, and not made use of
        return None
    found_I = torch.argsort(group_I, stable=True)
    if torch.equal(group_I, group_I[found_I]):
        return None
    expected = torch.arange(columns, device=group_I.device) // scheme.group
    if scheme.group == -1 or not torch.equal(group_I[found_I], expected):
        raise UnsupportedModel("config.json", "quantization_config", "g_idx does not name groups of one size")
    return found_I


def _unpack_last(words: Tensor, bits: int) -> Tensor:
    """Numbers of int32 words along the last axis, lowest bits first."""
    per = 32 // bits
    shifts = torch.arange(per, dtype=torch.int32, device=words.device) * bits
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _from_awq_order(numbers: Tensor) -> Tensor:
    """Outputs along the last axis from the order of AWQ's words to their own."""
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8)
    back = torch.empty_like(eights)
    back[..., list(AWQ_ORDER)] = eights
    return back.flatten(-2)
