"""How many bytes a matrix takes in each weight format, scales and zero points included."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.errors import ConfigError, UnsupportedModel


class WeightFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How the linear layers of a model are stored. `bits` 16 stands for the model's own dtype."""

    name: str = "none"
    bits: int = 16
    block: tuple[int, int] | None = None  # FP8 blocks of outputs x inputs, one float32 scale each
    group: int = 0  # inputs that share a scale (and a zero point); 0: one scale a tensor or a row
    row_scales: bool = False  # one scale an output; ranks keep the scale of a whole tensor so, too
    scale_bytes: int = 4
    zero_bits: int = 0
    order_bytes: int = 0  # an entry for each input (GPTQ's group index)
    experts_only: bool = False  # everything else is plain

    @property
    def computes_in_fp8(self) -> bool:
        """Whether products run on the FP8 units."""
        return self.bits == 8 and self.name.startswith("fp8")

    def matrix_bytes(self, num_out: int, num_in: int, dtype_bytes: int) -> int:
        """Bytes of one matrix without its bias."""
        if self.bits == 16:
            return num_out * num_in * dtype_bytes
        size = (num_out * num_in * self.bits + 7) // 8
        if self.block:
            return size + self.scale_bytes * -(-num_out // self.block[0]) * -(-num_in // self.block[1])
        if self.group:
            groups = -(-num_in // self.group)
            return (
                size
                + groups * num_out * self.scale_bytes
                + groups * num_out * self.zero_bits // 8
                + (num_in * self.order_bytes)
            )
        return size + self.scale_bytes * (num_out if self.row_scales else 1)


_WHOLE_ROW: Final = 1 << 30  # inputs, more than any matrix has


FORMATS: Final[Mapping[str, WeightFormat]] = {
    "none": WeightFormat(),
    "fp8": WeightFormat(name="fp8", bits=8, row_scales=True),
    "fp8_per_tensor": WeightFormat(name="fp8_per_tensor", bits=8, row_scales=True),
    "fp8_block": WeightFormat(name="fp8_block", bits=8, block=(128, 128)),
    # rounded here: a scale and a zero of 16 bits for every 4 bits of a number's width
    "int8": WeightFormat(name="int8", bits=8, group=128, scale_bytes=4, zero_bits=32),
    "int4": WeightFormat(name="int4", bits=4, group=128, scale_bytes=2, zero_bits=16),
    # checkpoints pack zeros in as many bits as numbers; ranks keep them as above
    "gptq": WeightFormat(name="gptq", bits=4, group=128, scale_bytes=2, zero_bits=16),
    "awq": WeightFormat(name="awq", bits=4, group=128, scale_bytes=2, zero_bits=16),
}


def format_by_name(name: str) -> WeightFormat:
    """The format that `--quantization` names. Raises `ConfigError`."""
    if name not in FORMATS:
        raise ConfigError(f"quantization={name!r}: must be one of {', '.join(FORMATS)}")
    return FORMATS[name]


def format_from_config(config: Mapping[str, Any]) -> WeightFormat:
    """The format of a checkpoint from its `quantization_config`. Raises `UnsupportedModel`."""
    given = config.get("quantization_config")
    if not isinstance(given, Mapping):
        return FORMATS["none"]
    method = str(given.get("quant_method", "")).lower()
    if method in ("fp8", "fbgemm_fp8"):
        block = given.get("weight_block_size")
        if isinstance(block, list) and len(block) == 2:
            return msgspec.structs.replace(FORMATS["fp8_block"], block=(int(block[0]), int(block[1])))
        return FORMATS["fp8"]
    if method in ("gptq", "awq"):
        bits, group = int(given.get("bits", 4)), int(given.get("group_size", 128))
        return msgspec.structs.replace(
            FORMATS[method],
            bits=bits,
            scale_bytes=bits // 2,
            zero_bits=4 * bits,
            group=group if group > 0 else _WHOLE_ROW,
            order_bytes=4 if given.get("desc_act") else 0,
        )
    if method == "mxfp4":
        return WeightFormat(name="mxfp4", bits=4, group=32, scale_bytes=1, experts_only=True)
    if method == "compressed-tensors":
        return _compressed(given)
    if method == "bitsandbytes" and given.get("load_in_8bit"):
        return FORMATS["int8"]
    raise UnsupportedModel(
        "config.json",
        "quantization_config",
        f"{method!r:.80}: can't be sized; known: fp8, fbgemm_fp8, gptq, awq, compressed-tensors",
    )


def _compressed(given: Mapping[str, Any]) -> WeightFormat:
    groups = given.get("config_groups")
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if isinstance(weights, Mapping):
        bits, kind = int(weights.get("num_bits", 8)), str(weights.get("type", "int"))
        if bits == 8:
            return FORMATS["fp8" if kind == "float" else "int8"]
        if bits == 4:
            group = int(weights.get("group_size") or 128)
            ordered = weights.get("actorder") in (True, "group", "dynamic")
            return msgspec.structs.replace(FORMATS["awq"], name="int4", group=group, order_bytes=4 * ordered)
    raise UnsupportedModel("config.json", "quantization_config", "compressed-tensors without a known weight scheme")
