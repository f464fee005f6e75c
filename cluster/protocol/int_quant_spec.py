"""Weights of 4 or 8 bits in a checkpoint, by its `quantization_config`: GPTQ, AWQ, compressed-tensors,
bitsandbytes.

    gptq        qweight [I / n, O], qzeros [G, O / n], scales [G, O], g_idx [I]; zeros are stored less one, in "gptq_v2"
                as they are; inputs may be ordered by how much they matter (`desc_act`)
    awq         qweight [I, O / 8], qzeros [G, O / 8], scales [G, O]; a word holds its eight as 0 2 4 6 1 3 5 7
    packed      compressed-tensors: weight_packed [O, I / n], weight_scale [O, G], perhaps weight_zero_point [O / n, G];
                weight_g_idx [I] where inputs are grouped in an order of their own (`actorder` group)
    int8        compressed-tensors: weight [O, I] of int8, weight_scale [O, 1]
    bitsandbytes  weight [O, I] of int8, SCB [O]: the largest magnitude of a row, which is 127

n = 32 / bits numbers in a word, G = groups of inputs. A checkpoint of plain weights is rounded as it is loaded.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from argosy.cluster.protocol.errors import UnsupportedModel

CONFIG_FILE: Final = "config.json"
Layout = Literal["gptq", "awq", "packed", "int8", "bitsandbytes", "plain"]


class IntScheme(msgspec.Struct, frozen=True, kw_only=True):
    """Weights of 4 or 8 bits of one kind; activations stay in 16 bits."""

    layout: Layout
    bits: int
    group: int  # inputs that share a scale; -1: all of a row
    symmetric: bool = True  # the zero is in the middle and is not stored (gptq stores it all the same)
    ordered: bool = False  # inputs are grouped in an order of their own
    zero_offset: int = 0  # what a stored zero lacks

    @property
    def online(self) -> bool:
        """The checkpoint holds plain weights."""
        return self.layout == "plain"


# by the value of `quantization`, for checkpoints of plain weights
ONLINE: Final[Mapping[str, IntScheme]] = {
    "int8": IntScheme(layout="plain", bits=8, group=128),
    "int4": IntScheme(layout="plain", bits=4, group=128, symmetric=False),
}


def read_gptq(values: Mapping[str, Any], key: str) -> tuple[IntScheme, tuple[str, ...]]:
    """(the scheme, names that stay plain) of a GPTQ checkpoint. Raises `UnsupportedModel` with what we don't have."""
    bits = _one_of(values, key, "bits", (4, 8))
    group = _group(values.get("group_size", -1), f"{key}.group_size")
    form = values.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise _unsupported(f"{key}.checkpoint_format", form, "supported: gptq, gptq_v2")
    dynamic = values.get("dynamic") or {}
    if any(not str(pattern).startswith("-:") for pattern in dynamic):
        raise _unsupported(f"{key}.dynamic", next(iter(dynamic)), "modules of their own settings are unknown")
    scheme = IntScheme(
        layout="gptq",
        bits=bits,
        group=group,
        symmetric=bool(values.get("sym", True)),
        ordered=bool(values.get("desc_act", False)),
        zero_offset=int(form == "gptq"),
    )
    return scheme, ("lm_head", *(f"re:{pattern[2:]}" for pattern in dynamic))


def read_awq(values: Mapping[str, Any], key: str) -> tuple[IntScheme, tuple[str, ...]]:
    """The same of an AWQ checkpoint."""
    bits = _one_of(values, key, "bits", (4,))
    version = str(values.get("version", "gemm")).lower()
    if version != "gemm":
        raise _unsupported(f"{key}.version", version, "supported: gemm")
    kept = values.get("modules_to_not_convert") or ()
    scheme = IntScheme(
        layout="awq", bits=bits, group=_group(values.get("group_size", 128), f"{key}.group_size"), symmetric=False
    )
    return scheme, ("lm_head", *map(str, kept))


def read_bitsandbytes(values: Mapping[str, Any], key: str) -> tuple[IntScheme, tuple[str, ...]]:
    """The same of a checkpoint that bitsandbytes wrote in 8 bits. Its 4 bits are places in a table (nf4, fp4)."""
    if not (values.get("load_in_8bit") or values.get("_load_in_8bit")):
        raise _unsupported(
            f"{key}.load_in_8bit", values.get("load_in_8bit"),
            "only 8 bits of bitsandbytes are read; for 4 bits name the original model, with load_in_4bit=True",
        )  # fmt: skip
    kept = values.get("llm_int8_skip_modules") or ()
    return IntScheme(layout="bitsandbytes", bits=8, group=-1), ("lm_head", *map(str, kept))


# of compressed-tensors' `actorder`: inputs of a group lie anywhere, or beside each other in the file
_OWN_ORDERS: Final = ("group", "dynamic")
_FILE_ORDERS: Final = ("weight", "static")


def read_compressed_group(weights: Mapping[str, Any], form: object, where: str) -> IntScheme:
    """The scheme of one group of modules of a compressed-tensors checkpoint whose weights are whole numbers."""
    bits = _one_of(weights, where, "num_bits", (4, 8))
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel", "tensor"):
        raise _unsupported(f"{where}.strategy", strategy, "supported: group, channel, tensor")
    order = weights.get("actorder")
    if order not in (None, True, False, *_OWN_ORDERS, *_FILE_ORDERS):
        raise _unsupported(f"{where}.actorder", order, f"supported: {', '.join((*_OWN_ORDERS, *_FILE_ORDERS))}")
    if form not in ("pack-quantized", "int-quantized"):
        raise _unsupported("quantization_config.format", form, "supported: pack-quantized, int-quantized")
    group = _group(weights.get("group_size") or -1, f"{where}.group_size") if strategy == "group" else -1
    return IntScheme(
        layout="packed" if form == "pack-quantized" else "int8",
        bits=bits,
        group=group,
        symmetric=bool(weights.get("symmetric", True)),
        ordered=form == "pack-quantized" and strategy == "group" and (order is True or order in _OWN_ORDERS),
    )


def _group(value: Any, where: str) -> int:
    if type(value) is not int or (value != -1 and (value < 8 or value % 8)):
        raise _unsupported(where, value, "must be -1 or a multiple of 8")
    return value


def _one_of(values: Mapping[str, Any], key: str, name: str, allowed: tuple[int, ...]) -> int:
    value = values.get(name)
    if value not in allowed:
        raise _unsupported(f"{key}.{name}", value, f"supported: {', '.join(map(str, allowed))}")
    return int(value)


def _unsupported(key: str, value: object, problem: str) -> UnsupportedModel:
    return UnsupportedModel(CONFIG_FILE, key, f"{value!r}: {problem}"[:200])
