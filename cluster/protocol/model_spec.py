"""The facts of a model that follow from its folder's `config.json`, without torch.

`read_model_spec` checks everything it reads: what is missing, of the wrong type or not supported is a `WeightError` or
`UnsupportedModel` with file, key and value. No code of a model folder is ever run. Both spellings of rotary settings
are read: `rope_theta` with `rope_scaling`, and `rope_parameters` of transformers 5 (also per layer type).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from argosy.cluster.protocol.errors import ConfigError, UnsupportedModel, WeightError

CONFIG_FILE: Final = "config.json"
MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024
DTYPES: Final = ("float32", "bfloat16", "float16")
DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1}
ACTIVATIONS: Final = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
ROPE_TYPES: Final = ("default", "linear", "dynamic", "llama3", "yarn")


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
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What an architecture's name implies. A string is the config key to read, whose default is False."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    window: Literal["never", "always", "switched"] = "never"  # switched: use_sliding_window, from max_window_layers on


FAMILIES: Final[Mapping[str, Family]] = {
    "LlamaForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family(window="always"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window="switched"),
    "Qwen3ForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, window="switched"),
    "OracleForCausalLM": Family(),  # for tests: see cluster/oracle.py
}


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model, as numbers."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float = 1e-6
    activation: str = "silu"  # "silu" or "gelu_tanh"
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeSpec = RopeSpec()
    sliding_window: int | None = None
    windowed_layers: tuple[bool, ...] = ()  # one for each layer; empty: all, if there is a window
    dtype: str = "float32"  # of the checkpoint
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def window_of(self, layer: int) -> int | None:
        """The sliding window of one layer; None: it sees everything before it."""
        if self.windowed_layers and not self.windowed_layers[layer]:
            return None
        return self.sliding_window

    def check_layout(self, tp_size: int, pp_size: int = 1) -> None:
        """Raise `ConfigError` when heads or widths can't be divided over so many ranks."""
        if pp_size > self.num_layers:
            raise ConfigError(f"pipeline_parallel_size={pp_size} exceeds the model's {self.num_layers} layers")
        for name, count in (("num_attention_heads", self.num_heads), ("intermediate_size", self.intermediate_size)):
            if count % tp_size:
                raise ConfigError(
                    f"tensor_parallel_size={tp_size} does not divide {CONFIG_FILE}'s {name}={count}; "
                    f"possible: {self._possible_tp_sizes()}"
                )
        if self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            raise ConfigError(
                f"tensor_parallel_size={tp_size} neither divides nor is a multiple of {CONFIG_FILE}'s "
                f"num_key_value_heads={self.num_kv_heads}; possible: {self._possible_tp_sizes()}"
            )

    def _possible_tp_sizes(self) -> str:
        sizes = [
            n
            for n in range(1, min(self.num_heads, 64) + 1)
            if not self.num_heads % n
            and not self.intermediate_size % n
            and (not self.num_kv_heads % n or not n % self.num_kv_heads)
        ]
        return ", ".join(map(str, sizes))

    @property
    def num_parameters(self) -> int:
        """Weights and biases of the whole model, a tied head counted once."""
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        layer = self.hidden_size * (2 * q + 2 * kv) + 3 * self.hidden_size * self.intermediate_size
        layer += 2 * self.hidden_size + 2 * self.head_size * self.qk_norm
        layer += (q + 2 * kv) * self.qkv_bias + self.hidden_size * self.o_bias
        layer += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.num_layers * layer + self.hidden_size


def kv_heads_per_rank(spec: ModelSpec, tp_size: int) -> int:
    """Key/value heads that one rank holds: its share, or one that it has in common with others."""
    return max(1, spec.num_kv_heads // tp_size)


def kv_bytes_per_token(spec: ModelSpec, dtype_bytes: int, tp_size: int, num_layers: int) -> int:
    """KV bytes of one token on one rank that has `num_layers` layers."""
    return 2 * num_layers * kv_heads_per_rank(spec, tp_size) * spec.head_size * dtype_bytes


def read_model_spec(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The spec of a Hugging Face model folder. `overrides` replaces top-level keys of its `config.json`.

    Raises `WeightError` or `UnsupportedModel`, always naming file, key and value.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightError(str(folder), "", "is not a folder")
    config = _override(_read_json(folder / CONFIG_FILE), overrides or {})
    read = _Reader(CONFIG_FILE, config)
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    _refuse_formats(config)
    num_heads = read.integer("num_attention_heads", 1)
    num_kv_heads = read.integer("num_key_value_heads", 1, default=num_heads)
    if num_heads % num_kv_heads:
        raise read.wrong("num_key_value_heads", num_kv_heads, f"must divide num_attention_heads={num_heads}")
    hidden_size = read.integer("hidden_size", 1)
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise read.wrong("hidden_size", hidden_size, f"must be divisible by num_attention_heads={num_heads}")
    head_size = read.integer("head_dim", 2, 4096, default=hidden_size // num_heads)
    if head_size % 2:
        raise read.wrong("head_dim", head_size, "must be even: rotations take pairs")
    num_layers = read.integer("num_hidden_layers", 1, 4096)
    vocab_size = read.integer("vocab_size", 1)
    max_position = read.integer("max_position_embeddings", 1)
    window, windowed = _windows(read, family, num_layers)
    rope = _rope(read, max_position)
    eos, bos = _special_ids(folder, read, vocab_size)
    return ModelSpec(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        intermediate_size=read.integer("intermediate_size", 1),
        vocab_size=vocab_size,
        max_position=_reachable(rope, max_position),
        norm_eps=read.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        activation=_activation(read),
        tied=read.boolean("tie_word_embeddings"),
        qkv_bias=read.switch(family.qkv_bias),
        o_bias=read.switch(family.o_bias),
        mlp_bias=read.switch(family.mlp_bias),
        qk_norm=family.qk_norm,
        rope=rope,
        sliding_window=window,
        windowed_layers=windowed,
        dtype=_dtype(read),
        bos_token_id=bos,
        eos_token_ids=eos,
    )


def _override(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The config with some keys replaced. The older rotary spelling in `overrides` wins over the newer in the file."""
    inner = config.get("rope_parameters")
    if isinstance(inner, dict) and "rope_parameters" not in overrides:
        if "rope_scaling" in overrides:
            config = {**config, "rope_parameters": None, "rope_theta": inner.get("rope_theta")}
        elif "rope_theta" in overrides:
            config = {**config, "rope_parameters": {**inner, "rope_theta": overrides["rope_theta"]}}
    return {**config, **overrides}


class _Reader:
    """Typed look-ups in one JSON object; what is wrong names the file, the key and the value."""

    def __init__(self, file: str, values: Mapping[str, Any], prefix: str = ""):
        self.file, self.values, self.prefix = file, values, prefix

    def wrong(self, key: str, value: object, problem: str) -> WeightError:
        """The error for a value that can't be right."""
        shown = repr(value)
        return WeightError(self.file, self.prefix + key, f"{shown[:80]}: {problem}")

    def integer(self, key: str, low: int, high: int = 2**31 - 1, default: int | None = None) -> int:
        """A whole number from `low` to `high`; null counts as absent."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(key, value, f"must be an integer from {low} to {high}")
        return value

    def number(self, key: str, above: float, most: float, default: float | None = None) -> float:
        """A finite number above `above` and at most `most`."""
        value = self._get(key, default)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not ok or not above < value <= most:
            raise self.wrong(key, value, f"must be a number above {above:g} and at most {most:g}")
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "must be true or false")
        return value

    def switch(self, rule: bool | str) -> bool:
        """A family's switch: fixed, or a config key."""
        return rule if isinstance(rule, bool) else self.boolean(rule)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise WeightError(self.file, self.prefix + key, "is missing")
            return default
        return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise WeightError(path.name, "", f"is larger than {MAX_CONFIG_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightError(str(path), "", "is missing: a model folder needs it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(str(path), "", f"is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightError(str(path), "", f"must hold a JSON object, not {type(value).__name__}")
    return value


def _architecture(config: Mapping[str, Any]) -> str:
    given = config.get("architectures")
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise WeightError(CONFIG_FILE, "architectures", f"{given!r:.80}: must be a list with the architecture's name")
    for name in given:
        if name in FAMILIES:
            return str(name)
    raise UnsupportedModel(
        CONFIG_FILE, "architectures", f"{given!r:.80} is not supported; supported: {', '.join(FAMILIES)}"
    )


def _refuse_formats(config: Mapping[str, Any]) -> None:
    if config.get("quantization_config") is not None:
        quantization = config["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            CONFIG_FILE, "quantization_config", f"{method!r:.80}: quantised weights are not supported yet"
        )


def _activation(read: _Reader) -> str:
    name = read.values.get("hidden_act", read.values.get("hidden_activation", "silu"))
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModel(CONFIG_FILE, "hidden_act", f"{name!r:.80}: supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _dtype(read: _Reader) -> str:
    key = "dtype" if read.values.get("dtype") is not None else "torch_dtype"
    value = read.values.get(key)
    if value is None:
        return "float32"
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPES:
        raise UnsupportedModel(CONFIG_FILE, key, f"{value!r:.80}: supported: {', '.join(DTYPES)}")
    return str(name)


def _windows(read: _Reader, family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it."""
    if family.window == "never" or read.values.get("sliding_window") is None:
        return None, ()
    if family.window == "switched" and not read.boolean("use_sliding_window"):
        return None, ()
    window = read.integer("sliding_window", 1)
    kinds = read.values.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
            raise read.wrong("layer_types", kinds, f"must be {num_layers} names out of {', '.join(known)}")
        return window, tuple(kind == "sliding_attention" for kind in kinds)
    if family.window == "switched":
        first = read.integer("max_window_layers", 0, default=28)
        return window, tuple(layer >= first for layer in range(num_layers))
    return window, ()


def _rope(read: _Reader, max_position: int) -> RopeSpec:
    for key in ("rope_parameters", "rope_scaling"):
        values = read.values.get(key)
        if values is not None:
            break
    else:
        key, values = "rope_scaling", {}
    if not isinstance(values, dict):
        raise read.wrong(key, values, "must be an object")
    values, prefix = _one_layer_type(read, key, values)
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModel(
            read.file, f"{prefix}rope_type", f"{rope_type!r:.80} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    inner = _Reader(read.file, values, prefix)
    theta_from = inner if values.get("rope_theta") is not None else read
    theta = theta_from.number("rope_theta", 0.0, 1e15, default=10000.0)
    for source in (inner, read):
        if source.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
            raise UnsupportedModel(read.file, f"{source.prefix}partial_rotary_factor", "only 1.0 is supported here")
    if rope_type == "default":
        return RopeSpec(theta=theta)
    factor = inner.number("factor", 0.0, 1e6)
    original = inner.integer("original_max_position_embeddings", 1, default=max_position)
    if rope_type == "llama3":
        low, high = inner.number("low_freq_factor", 0.0, 1e6), inner.number("high_freq_factor", 0.0, 1e6)
        if low >= high:
            raise inner.wrong("low_freq_factor", low, f"must be below high_freq_factor={high:g}")
        return RopeSpec(
            rope_type="llama3",
            theta=theta,
            factor=factor,
            original_max_position=inner.integer("original_max_position_embeddings", 1),
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if rope_type == "yarn":
        return RopeSpec(
            rope_type="yarn",
            theta=theta,
            factor=factor,
            original_max_position=original,
            beta_fast=inner.number("beta_fast", 0.0, 1e6, default=32.0),
            beta_slow=inner.number("beta_slow", 0.0, 1e6, default=1.0),
            truncate=inner.boolean("truncate", True),
            attention_factor=_yarn_attention_factor(inner, factor),
        )
    return RopeSpec(rope_type=rope_type, theta=theta, factor=factor, original_max_position=max_position)


def _one_layer_type(read: _Reader, key: str, values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Settings given per layer type, where all types say the same."""
    kinds = {kind: inner for kind, inner in values.items() if isinstance(inner, dict)}
    if not kinds:
        return values, f"{key}."
    first, *others = kinds
    for other in others:
        if kinds[other] != kinds[first]:
            raise UnsupportedModel(read.file, key, f"differs between {first!r} and {other!r}: not supported yet")
    return kinds[first], f"{key}.{first}."


def _yarn_attention_factor(read: _Reader, factor: float) -> float:
    """What cos and sin are multiplied by: given, or 0.1 ln(factor) + 1 (Peng et al. 2023, section 3.4)."""
    if read.values.get("attention_factor") is not None:
        return read.number("attention_factor", 0.0, 1e3)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if read.values.get("mscale") and read.values.get("mscale_all_dim"):
        return magnitude(read.number("mscale", 0.0, 1e3)) / magnitude(read.number("mscale_all_dim", 0.0, 1e3))
    return magnitude(1.0)


def _reachable(rope: RopeSpec, max_position: int) -> int:
    """Positions that the scaled rotations reach.

    `dynamic` changes all earlier rotations once a sequence outgrows the original length, which no cache of rotated
    keys can follow: it is served up to that length, where it equals the unscaled one.
    """
    if rope.rope_type == "yarn":
        return max(max_position, int(rope.original_max_position * rope.factor))
    return max_position


def _special_ids(folder: Path, read: _Reader, vocab_size: int) -> tuple[tuple[int, ...], int | None]:
    """End and begin tokens: of `generation_config.json` where it names them, else of `config.json`."""
    path = folder / "generation_config.json"
    sources = [_Reader(path.name, _read_json(path))] if path.exists() else []
    sources.append(read)
    eos: tuple[int, ...] = ()
    bos: int | None = None
    for source in sources:
        if not eos and (given := source.values.get("eos_token_id")) is not None:
            ids = given if isinstance(given, list) else [given]
            for token_id in ids:
                if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                    raise source.wrong("eos_token_id", given, "must be a token id or a list of them")
            eos = tuple(token_id for token_id in dict.fromkeys(ids) if token_id < vocab_size)
        if bos is None and source.values.get("bos_token_id") is not None:
            bos = source.integer("bos_token_id", 0)
    return eos, bos
