"""How positions become rotations: the facts that follow from a config, in all spellings that checkpoints use.

Read are `rope_theta` with `rope_scaling`, `rope_parameters` of transformers 5 (also per layer type, as Gemma 3 has it),
and Gemma 3's older `rope_local_base_freq`.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.config_json import Reader
from argosy.cluster.protocol.errors import UnsupportedModel

ROPE_TYPES: Final = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
GLOBAL_LAYERS, WINDOWED_LAYERS = "full_attention", "sliding_attention"


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How positions become rotations. Fields beyond `theta` matter only to the types that use them."""

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn, longrope: cos and sin are multiplied by it
    rotary_size: int = 0  # dimensions of each head that are rotated, from the first on; 0: all
    interleaved: bool = False  # pairs are (0, 1), (2, 3) ..; else (i, i + rotary_size / 2)
    short_scales: tuple[float, ...] = ()  # longrope: what each pair's frequency is divided by
    long_scales: tuple[float, ...] = ()  # longrope: the same when more than `original_max_position` is served


def read_ropes(read: Reader, *, max_position: int, head_size: int) -> tuple[RopeSpec, RopeSpec | None]:
    """The rotation of a model, and that of its windowed layers where they have one of their own."""
    for key in ("rope_parameters", "rope_scaling"):
        values = read.get(key)
        if values is not None:
            break
    else:
        key, values = "rope_scaling", {}
    if not isinstance(values, dict):
        raise read.wrong(key, values, "must be an object")
    kinds: dict[str, dict[str, Any]] = {kind: inner for kind, inner in values.items() if isinstance(inner, dict)}
    if not kinds:
        rope = _read_rope(read, values, f"{key}.", max_position, head_size)
        if read.get("rope_local_base_freq") is None:
            return rope, None
        local = read.number("rope_local_base_freq", 0.0, 1e15)
        return rope, RopeSpec(theta=local, rotary_size=rope.rotary_size, interleaved=rope.interleaved)
    first = kinds.get(GLOBAL_LAYERS, next(iter(kinds.values())))
    name = GLOBAL_LAYERS if GLOBAL_LAYERS in kinds else next(iter(kinds))
    for other, settings in kinds.items():
        if settings != first and other != WINDOWED_LAYERS:
            raise UnsupportedModel(read.file, key, f"differs between {name!r} and {other!r}: not supported")
    rope = _read_rope(read, first, f"{key}.{name}.", max_position, head_size)
    local_values = kinds.get(WINDOWED_LAYERS, first)
    if local_values == first:
        return rope, None
    return rope, _read_rope(read, local_values, f"{key}.{WINDOWED_LAYERS}.", max_position, head_size)


def _read_rope(read: Reader, values: Mapping[str, Any], prefix: str, max_position: int, head_size: int) -> RopeSpec:
    inner = Reader(read.file, values, prefix)
    rope_type = values.get("rope_type", values.get("type", "default"))
    rope_type = "longrope" if rope_type == "su" else rope_type  # the name that the first Phi-3 had for it
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModel(
            read.file, f"{prefix}rope_type", f"{rope_type!r:.80} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    theta_from = inner if values.get("rope_theta") is not None else read
    rope = RopeSpec(
        rope_type=rope_type,
        theta=theta_from.number("rope_theta", 0.0, 1e15, default=10000.0),
        rotary_size=_rotary_size(read, inner, head_size),
        interleaved=read.boolean("rope_interleave"),
        original_max_position=max_position,
    )
    if rope_type == "default":
        return msgspec.structs.replace(rope, original_max_position=0)
    if rope_type == "longrope":
        return _read_longrope(read, inner, rope, max_position, head_size)
    factor = inner.number("factor", 0.0, 1e6)
    if rope_type == "llama3":
        low, high = inner.number("low_freq_factor", 0.0, 1e6), inner.number("high_freq_factor", 0.0, 1e6)
        if low >= high:
            raise inner.wrong("low_freq_factor", low, f"must be below high_freq_factor={high:g}")
        return msgspec.structs.replace(
            rope,
            factor=factor,
            original_max_position=inner.integer("original_max_position_embeddings", 1),
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if rope_type == "yarn":
        return msgspec.structs.replace(
            rope,
            factor=factor,
            original_max_position=inner.integer("original_max_position_embeddings", 1, default=max_position),
            beta_fast=inner.number("beta_fast", 0.0, 1e6, default=32.0),
            beta_slow=inner.number("beta_slow", 0.0, 1e6, default=1.0),
            truncate=inner.boolean("truncate", True),
            attention_factor=_yarn_attention_factor(inner, factor),
        )
    return msgspec.structs.replace(rope, factor=factor)


def _rotary_size(read: Reader, inner: Reader, head_size: int) -> int:
    """Rotated dimensions of a head; 0 for all."""
    if read.get("rotary_dim") is not None:
        size = read.integer("rotary_dim", 2, head_size)
        key, given, source = "rotary_dim", float(size), read
    else:
        source = inner if inner.get("partial_rotary_factor") is not None else read
        key, given = "partial_rotary_factor", source.number("partial_rotary_factor", 0.0, 1.0, default=1.0)
        size = int(head_size * given)
    if size % 2 or not size:
        raise source.wrong(key, given, f"rotates {size} of {head_size} dimensions, which must be pairs")
    return 0 if size == head_size else size


def _read_longrope(read: Reader, inner: Reader, rope: RopeSpec, max_position: int, head_size: int) -> RopeSpec:
    pairs = (rope.rotary_size or head_size) // 2
    source = inner if inner.get("original_max_position_embeddings") is not None else read
    original = source.integer("original_max_position_embeddings", 2, default=max_position)
    factor = inner.number("factor", 0.0, 1e6, default=max_position / original)
    computed = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return msgspec.structs.replace(
        rope,
        factor=factor,
        original_max_position=original,
        attention_factor=inner.number("attention_factor", 0.0, 1e3, default=computed),
        short_scales=inner.numbers("short_factor", pairs),
        long_scales=inner.numbers("long_factor", pairs),
    )


def _yarn_attention_factor(read: Reader, factor: float) -> float:
    """What cos and sin are multiplied by: given, or 0.1 ln(factor) + 1 (Peng et al. 2023, section 3.4)."""
    if read.get("attention_factor") is not None:
        return read.number("attention_factor", 0.0, 1e3)
    if read.get("mscale") and read.get("mscale_all_dim"):
        over, under = read.number("mscale", 0.0, 1e3), read.number("mscale_all_dim", 0.0, 1e3)
        return yarn_magnitude(factor, over) / yarn_magnitude(factor, under)
    return yarn_magnitude(factor, 1.0)


def yarn_magnitude(factor: float, weight: float) -> float:
    """By how much logits of a context stretched `factor` times are to grow."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def reachable(rope: RopeSpec, max_position: int) -> int:
    """Positions that the scaled rotations reach.

    `dynamic` changes all earlier rotations once a sequence outgrows the original length, which no cache of rotated
    keys can follow: it is served up to that length, where it equals the unscaled one.
    """
    if rope.rope_type == "yarn":
        return max(max_position, int(rope.original_max_position * rope.factor))
    return max_position
