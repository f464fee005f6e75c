"""What people write for a setting, in each of the ways that they do: 32k, 2GiB, half, torch.bfloat16, JSON."""

import json
import math
from collections.abc import Mapping
from typing import Final

from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.swap import parse_swap_space

KV_OFFLOADING: Final = "kv_offloading_size"  # vLLM's name of `swap_space`

_DTYPES: Final = {"half": "float16", "float": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# what others call caches with a scale for each token and head
_KV_DTYPES: Final = {"fp8": "fp8_e4m3", "int8_per_token_head": "int8", "fp8_per_token_head": "fp8_scaled"}
_UNITS: Final = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_KIND_WORDS: Final = {
    "int": "a whole number, such as 4096, 32k or 2GiB",
    "float": "a number",
    "gib": "a number of GiB, or auto",
    "json": "valid JSON",
}


def clean_value(name: str, kind: str, value: object) -> object:
    """The value of a setting of that kind (see `settings.Flag`) in its type. Raises `ConfigError`."""
    if name in ("dtype", "kv_cache_dtype"):
        text = str(value).removeprefix("torch.")  # torch.bfloat16, as users of vLLM pass it
        return _DTYPES.get(text, _KV_DTYPES.get(text, text) if name == "kv_cache_dtype" else text)
    if name == "job_dir" and value == "none":
        return None
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    try:
        if kind == "int":
            return whole_number(value)
        if kind == "float":
            return float(value)
        if kind == "gib":
            return _gib(value)
        if kind == "json":
            parsed = json.loads(value)
            return tuple(parsed) if isinstance(parsed, list) else parsed
    except ValueError as error:
        raise ConfigError(f"{name}={value!r}: must be {_KIND_WORDS[kind]}") from error
    return value


def whole_number(text: str) -> int:
    """4096, 32k or 2GiB. Raises `ValueError`."""
    plain = text.strip().lower().removesuffix("ib").removesuffix("b").strip()
    if plain and plain[-1] in _UNITS:
        return int(float(plain[:-1]) * _UNITS[plain[-1]])
    return int(plain)


def _gib(text: str) -> float | str:
    """A number of GiB: 4, 4.5, 4GiB or 512MiB; "auto" stays."""
    plain = text.strip().lower()
    if plain == "auto":
        return plain
    number = plain.removesuffix("ib").removesuffix("b")
    if number and number[-1] in _UNITS:
        return float(number[:-1]) * _UNITS[number[-1]] / _UNITS["g"]
    return float(plain)


def swap_of_each_rank(size: object, known: Mapping[str, object]) -> float:
    """`swap_space` for what vLLM calls `kv_offloading_size`: GiB of all ranks of a replica together."""
    asked = f"{KV_OFFLOADING}={size!r}"
    if "swap_space" in known:
        raise ConfigError(f"{asked} and swap_space={known['swap_space']!r} are the same memory; leave one out")
    try:
        total = parse_swap_space(size)
    except ConfigError:
        total = "none"
    if isinstance(total, str):
        raise ConfigError(f"{asked}: must be a number of GiB for all ranks together, or an amount with unit (16GiB)")
    if known.get("layout") == "auto":
        raise ConfigError(
            f"{asked} is for all ranks together, and how many they are is planned: name --tensor-parallel-size (1: a "
            "single rank), or give swap_space, which is for each rank"
        )
    ranks = [known.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
    num_ranks = math.prod(count for count in ranks if isinstance(count, int) and count > 0)
    return total / num_ranks
