"""How the weights of a checkpoint are packed, from the `quantization_config` of its `config.json`; or how we pack them.

Read are FP8 weights (e4m3) in two spellings: Hugging Face's "fp8" (a scale a tensor, or a scale a block of 128 x 128 as
DeepSeek-V3 and Qwen3-FP8 have it) and "compressed-tensors" (by tensor, channel or block; a scheme for each group of
modules). Weights of 4 and 8 bits: `int_quant_spec`. What is not understood is refused with its key and value:
wrong numbers would be worse than none.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from argosy.cluster.protocol import int_quant_spec
from argosy.cluster.protocol.errors import ConfigError, UnsupportedModel
from argosy.cluster.protocol.int_quant_spec import IntScheme

CONFIG_FILE: Final = "config.json"
KEYS: Final = ("quantization_config", "compression_config")
BLOCK: Final = (128, 128)


class WeightScheme(msgspec.Struct, frozen=True, kw_only=True):
    """FP8 weights of one kind."""

    weight: Literal["tensor", "channel", "block"]  # what has a scale of its own
    block: tuple[int, int] | None = None  # rows and columns that share a scale
    activations: Literal["dynamic", "static", "none"] = "dynamic"  # rounded by what they are, by a stored scale, or not
    online: bool = False  # the checkpoint holds plain weights; we round them as they come


class WeightGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Modules (names, "re:" patterns, or "Linear" for all) that share a scheme."""

    targets: tuple[str, ...]
    scheme: WeightScheme | IntScheme


class QuantSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which linear layers are packed, and how."""

    method: str  # as the config or the setting names it
    groups: tuple[WeightGroup, ...]
    ignored: tuple[str, ...] = ()  # names (of modules or what they are in) and "re:" patterns that stay as they are
    has_kv_scales: bool = False  # the checkpoint has a scale for keys and one for values of each layer

    def scheme_of(self, module: str) -> WeightScheme | IntScheme | None:
        """The scheme of a module, by its full name in the checkpoint. None: it is not packed."""
        if any(_names(pattern, module) for pattern in self.ignored):
            return None
        for group in self.groups:
            if any(target == "Linear" or _names(target, module) for target in group.targets):
                return group.scheme
        return None


# by the value of `quantization`, for checkpoints of plain weights
ONLINE: Final[Mapping[str, WeightScheme | IntScheme]] = {
    "fp8": WeightScheme(weight="channel", online=True),
    "fp8_per_tensor": WeightScheme(weight="tensor", online=True),
    "fp8_block": WeightScheme(weight="block", block=BLOCK, online=True),
    **int_quant_spec.ONLINE,
}
# names that users of other engines write
OTHER_NAMES: Final[Mapping[str, str]] = {
    "awq_marlin": "awq", "gptq_marlin": "gptq", "fbgemm_fp8": "fp8", "ptpc_fp8": "fp8",
    "bitsandbytes": "int8", "experts_int8": "int8",
}  # fmt: skip
# of plain checkpoints: heads and whatever chooses experts are small, and errors in them change much
ONLINE_IGNORED: Final = ("lm_head", "embed_out", r"re:.*\.(gate|router|shared_expert_gate)$")


_INT_READERS: Final = {
    "gptq": int_quant_spec.read_gptq, "awq": int_quant_spec.read_awq, "bitsandbytes": int_quant_spec.read_bitsandbytes,
}  # fmt: skip


def choose_quantization(config: Mapping[str, Any], wanted: str | None) -> QuantSpec | None:
    """From a `config.json` and the setting `quantization` to what will be done. None: weights stay as they are."""
    asked, wanted = wanted, OTHER_NAMES.get(wanted, wanted) if wanted is not None else None
    key = next((key for key in KEYS if config.get(key) is not None), None)
    if key is None:
        if wanted is None:
            return None
        if wanted not in ONLINE:
            raise ConfigError(
                f"quantization={asked!r}: the model's {CONFIG_FILE} has no quantization_config, so its weights are "
                f"rounded as they are loaded; supported for that: {', '.join(ONLINE)}"
            )
        return QuantSpec(
            method=wanted, groups=(WeightGroup(targets=("Linear",), scheme=ONLINE[wanted]),), ignored=ONLINE_IGNORED
        )
    stored = read_quantization(config[key], key)
    names = {stored.method, stored.method.replace("-", "_"), OTHER_NAMES.get(stored.method, stored.method)}
    if any(isinstance(group.scheme, WeightScheme) for group in stored.groups):
        names.add("fp8")  # whoever wrote them
    if wanted is not None and wanted not in names:
        raise ConfigError(f"quantization={asked!r}: the model's weights are stored as {stored.method!r}; leave it out")
    return stored


def read_quantization(values: object, key: str = KEYS[0]) -> QuantSpec:
    """A `quantization_config`. Raises `UnsupportedModel` for what is not FP8 or not understood."""
    if not isinstance(values, dict):
        raise _unsupported(key, values, "must be an object")
    method = values.get("quant_method")
    if method == "fp8":
        return _read_fp8(values, key)
    if method == "compressed-tensors":
        return _read_compressed(values, key)
    if method == "mxfp4":  # experts alone, which know their format by this name
        return QuantSpec(method="mxfp4", groups=())
    if method in _INT_READERS:
        scheme, ignored = _INT_READERS[method](values, key)
        return QuantSpec(method=method, groups=(WeightGroup(targets=("Linear",), scheme=scheme),), ignored=ignored)
    raise _unsupported(
        f"{key}.quant_method", method, f"supported: fp8, compressed-tensors, mxfp4, {', '.join(_INT_READERS)}"
    )


def _read_fp8(values: Mapping[str, Any], key: str) -> QuantSpec:
    if values.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _unsupported(f"{key}.fmt", values["fmt"], "supported: e4m3")
    scheme_name = values.get("activation_scheme", "dynamic")
    if scheme_name not in ("dynamic", "static"):
        raise _unsupported(f"{key}.activation_scheme", scheme_name, "supported: dynamic, static")
    block = values.get("weight_block_size")
    if block is None:
        scheme = WeightScheme(weight="tensor", activations=scheme_name)
    else:
        if scheme_name == "static":
            raise _unsupported(f"{key}.activation_scheme", scheme_name, "must be dynamic with weight_block_size")
        scheme = WeightScheme(weight="block", block=_block(block, f"{key}.weight_block_size"))
    ignored = values.get("modules_to_not_convert", values.get("ignored_layers"))
    return QuantSpec(
        method="fp8",
        groups=(WeightGroup(targets=("Linear",), scheme=scheme),),
        ignored=("lm_head", *_strings(ignored, f"{key}.modules_to_not_convert")),
        has_kv_scales=values.get("kv_cache_scheme") == "static",
    )


def _read_compressed(values: Mapping[str, Any], key: str) -> QuantSpec:
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _unsupported(f"{key}.config_groups", groups, "must name at least one group")
    read = []
    for name, group in groups.items():
        where = f"{key}.config_groups.{name}"
        if not isinstance(group, dict):
            raise _unsupported(where, group, "must be an object")
        targets = _strings(group.get("targets"), f"{where}.targets")
        weights = group.get("weights")
        if isinstance(weights, dict) and weights.get("type") == "int":
            form = group.get("format") or values.get("format")
            whole = int_quant_spec.read_compressed_group(weights, form, f"{where}.weights")
            read.append(WeightGroup(targets=targets, scheme=whole))
            continue
        weight, block = _stored_weight(group.get("weights"), f"{where}.weights")
        activations = _stored_activations(group.get("input_activations"), f"{where}.input_activations")
        if group.get("output_activations") is not None:
            raise _unsupported(f"{where}.output_activations", group["output_activations"], "must be null")
        if activations == "static" and block is not None:
            raise _unsupported(f"{where}.input_activations", "static", "must be dynamic with blocks")
        read.append(
            WeightGroup(targets=targets, scheme=WeightScheme(weight=weight, block=block, activations=activations))
        )
    return QuantSpec(
        method="compressed-tensors",
        groups=tuple(read),
        ignored=_strings(values.get("ignore"), f"{key}.ignore"),
        has_kv_scales=_has_kv_scales(values.get("kv_cache_scheme"), f"{key}.kv_cache_scheme"),
    )


def _stored_weight(values: Any, where: str) -> tuple[Literal["tensor", "channel", "block"], tuple[int, int] | None]:
    _check_fp8(values, where)
    strategy = values.get("strategy")
    if strategy == "block":
        return "block", _block(values.get("block_structure"), f"{where}.block_structure")
    if strategy == "tensor":
        return "tensor", None
    if strategy == "channel":
        return "channel", None
    raise _unsupported(f"{where}.strategy", strategy, "supported: tensor, channel, block")


def _stored_activations(values: Any, where: str) -> Literal["dynamic", "static", "none"]:
    if values is None:
        return "none"
    _check_fp8(values, where)
    if values.get("dynamic"):
        return "dynamic"
    if values.get("strategy") not in (None, "tensor"):
        raise _unsupported(f"{where}.strategy", values["strategy"], "must be tensor where dynamic is false")
    return "static"


def _has_kv_scales(values: Any, where: str) -> bool:
    if values is None:
        return False
    _check_fp8(values, where)
    return not values.get("dynamic") and values.get("strategy", "tensor") == "tensor"


def _check_fp8(values: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise _unsupported(where, values, "must be an object")
    kind = (values.get("num_bits"), values.get("type"))
    if kind != (8, "float"):
        raise _unsupported(where, f"num_bits {kind[0]}, type {kind[1]}", "supported: 8 bits of float")
    if values.get("symmetric") is False:
        raise _unsupported(f"{where}.symmetric", False, "must be true")


def _block(value: Any, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int for n in value):
        raise _unsupported(where, value, "must be two numbers")
    rows, columns = value
    if not 1 <= rows <= 4096 or columns not in (32, 64, 128):
        raise _unsupported(where, value, "supported: blocks 32, 64 or 128 columns wide")
    return rows, columns


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _unsupported(where, value, "must be a list of names")
    for item in value:
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except re.error as error:
                raise _unsupported(where, item, f"is not a regular expression ({error})") from error
    return tuple(value)


def _names(pattern: str, module: str) -> bool:
    """Whether a name or "re:" pattern means this module, or something that it is in."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.startswith(f"{pattern}.") or module.endswith(f".{pattern}")


def _unsupported(key: str, value: object, problem: str) -> UnsupportedModel:
    shown = repr(value) if not isinstance(value, str) else f"'{value}'"
    return UnsupportedModel(CONFIG_FILE, key, f"{shown[:80]}: {problem}")
