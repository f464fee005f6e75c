"""The facts of a model that follow from its folder's `config.json`, without torch.

`read_model_spec` checks everything it reads: what is missing, of the wrong type or not supported is a `WeightError` or
`UnsupportedModel` with file, key and value. No code of a model folder is ever run. The facts themselves are in
`model_facts` and `rope_spec`, what a family's name implies in `families` and `families_moe`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from argosy.cluster.protocol.config_json import CONFIG_FILE, Reader, read_json
from argosy.cluster.protocol.errors import UnsupportedModel, WeightError
from argosy.cluster.protocol.fallback_spec import falls_back, read_fallback_spec
from argosy.cluster.protocol.families import Family
from argosy.cluster.protocol.families_moe import FAMILIES
from argosy.cluster.protocol.model_facts import (
    DTYPE_BYTES,
    DTYPES,
    KV_SCALE_BYTES,
    MLASpec,
    ModelSpec,
    MoESpec,
    kv_bytes_per_token,
    kv_heads_per_rank,
    kv_sizes,
)
from argosy.cluster.protocol.quant_spec import choose_quantization
from argosy.cluster.protocol.rope_spec import ROPE_TYPES, RopeSpec, reachable, read_ropes

__all__ = [
    "CONFIG_FILE",
    "DTYPES",
    "DTYPE_BYTES",
    "FAMILIES",
    "KV_SCALE_BYTES",
    "ROPE_TYPES",
    "Family",
    "MLASpec",
    "MoESpec",
    "ModelSpec",
    "RopeSpec",
    "kv_bytes_per_token",
    "kv_heads_per_rank",
    "kv_sizes",
    "read_model_spec",
]

ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


TEXT_PART: Final = "text_config"  # of a model that has eyes as well


def read_model_spec(
    folder: str | Path, overrides: Mapping[str, Any] | None = None, quantization: str | None = None
) -> ModelSpec:
    """The spec of a Hugging Face model folder. `overrides` replaces top-level keys of its `config.json`; `quantization`
    is the setting: how to pack weights that are stored plain.

    Raises `WeightError` or `UnsupportedModel`, always naming file, key and value.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightError(str(folder), "", "is not a folder")
    config = override(read_json(folder / CONFIG_FILE), overrides or {})
    architecture = _architecture(config)
    if architecture in FAMILIES:
        return _own(folder, config, architecture, quantization)
    spec = _fallback(folder, config, architecture, quantization)
    return msgspec.structs.replace(spec, source_overrides=json.dumps(overrides) if overrides else "")


def _own(folder: Path, config: dict[str, Any], architecture: str, quantization: str | None) -> ModelSpec:
    """Of a family that we have layers for."""
    family = FAMILIES[architecture]
    read = Reader(CONFIG_FILE, _complete(config, family), names=family.names)
    num_heads = read.integer("num_attention_heads", 1)
    hidden_size = read.integer("hidden_size", 1)
    if read.get("head_dim") is None and read.get("kv_lora_rank") is None and hidden_size % num_heads:
        raise read.wrong("hidden_size", hidden_size, f"must be divisible by num_attention_heads={num_heads}")
    head_size = read.integer("head_dim", 2, 4096, default=max(2, hidden_size // num_heads))
    num_layers = read.integer("num_hidden_layers", 1, 4096)
    vocab_size = read.integer("vocab_size", 1)
    max_position = read.integer("max_position_embeddings", 1)
    window, windowed = _windows(read, family, num_layers)
    rotated = read.integer("qk_rope_head_dim", 2, default=head_size)
    if rotated % 2:
        raise read.wrong("head_dim", rotated, "must be even: rotations take pairs")
    rope, local_rope = read_ropes(read, max_position=max_position, head_size=rotated)
    eos = _end_ids(folder, read, vocab_size)
    facts: dict[str, Any] = {
        "architecture": architecture,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": read.integer("num_key_value_heads", 1, default=num_heads),
        "head_size": head_size,
        "intermediate_size": read.integer("intermediate_size", 1, default=4 * hidden_size if family.wide_mlp else None),
        "vocab_size": vocab_size,
        "max_position": reachable(rope, max_position),
        "norm_eps": read.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        "activation": _activation(read),
        "tied": read.boolean("tie_word_embeddings"),
        "qkv_bias": read.switch(family.qkv_bias),
        "o_bias": read.switch(family.o_bias),
        "mlp_bias": read.switch(family.mlp_bias),
        "qk_norm": family.qk_norm,
        "rope": rope,
        "sliding_window": window,
        "windowed_layers": windowed,
        "local_rope": local_rope if window is not None else None,
        "dtype": _dtype(read),
        "eos_token_ids": eos,
        "quantization": choose_quantization(config, quantization),
    }
    if family.rotates == "windowed" and window is not None and windowed:
        facts["unrotated_layers"] = tuple(not has_window for has_window in windowed)
    if family.extra is not None:
        facts |= family.extra(read)
    if num_heads % facts["num_kv_heads"]:
        raise read.wrong("num_key_value_heads", facts["num_kv_heads"], f"must divide num_attention_heads={num_heads}")
    return ModelSpec(**facts)


def override(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's config with some keys replaced, also in its text part, where those that stand there belong. The older
    rotary spelling in `overrides` wins over the newer one."""
    overrides = _to_text_part(config, overrides)
    inner = config.get("rope_parameters")
    if isinstance(inner, dict) and "rope_parameters" not in overrides:
        if "rope_scaling" in overrides:
            config = {**config, "rope_parameters": None, "rope_theta": inner.get("rope_theta")}
        elif "rope_theta" in overrides:
            config = {**config, "rope_parameters": {**inner, "rope_theta": overrides["rope_theta"]}}
    return {**config, **overrides}


def _to_text_part(config: dict[str, Any], overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """`overrides` with the text part as it is then, if a model has eyes and any of them is meant for that."""
    text, given = config.get(TEXT_PART), overrides.get(TEXT_PART, {})
    if not isinstance(text, dict) or not isinstance(given, Mapping):
        return overrides
    known = {*text, "rope_theta", "rope_scaling"} if "rope_parameters" in text else {*text}
    own = {key: value for key, value in overrides.items() if key in known}
    if not own and not given:
        return overrides
    others = {key: value for key, value in overrides.items() if key not in own or key in config}
    return {**others, TEXT_PART: override(text, {**own, **given})}


def _complete(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The config with what the family's published ones leave out, and the text part's keys at the top."""
    if family.nested:
        nested = config.get(family.nested)
        if not isinstance(nested, dict):
            raise WeightError(CONFIG_FILE, family.nested, f"{nested!r:.80}: must be an object")
        config = {**config, **nested}
    ours = {theirs: key for key, theirs in family.names.items()}
    missing = {
        key: value for key, value in family.defaults.items() if key not in config and ours.get(key, key) not in config
    }
    return {**missing, **config}


def _architecture(config: Mapping[str, Any]) -> str:
    given = config.get("architectures")
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise WeightError(CONFIG_FILE, "architectures", f"{given!r:.80}: must be a list with the architecture's name")
    for name in given:
        if name in FAMILIES:
            return str(name)
    for name in given:
        if falls_back(name):
            return str(name)
    raise UnsupportedModel(
        CONFIG_FILE, "architectures",
        f"{given!r:.80} is not supported; supported: {', '.join(FAMILIES)}, and decoders of the installed transformers",
    )  # fmt: skip


def _fallback(folder: Path, config: dict[str, Any], architecture: str, quantization: str | None) -> ModelSpec:
    """The spec of a model that transformers' own modules run."""
    if quantization is not None or config.get("quantization_config") is not None:
        raise UnsupportedModel(
            CONFIG_FILE, "quantization_config", f"{architecture} runs through transformers' modules: plain weights only"
        )
    spec = read_fallback_spec(folder, config, architecture)
    read = Reader(CONFIG_FILE, config)
    return msgspec.structs.replace(spec, dtype=_dtype(read), eos_token_ids=_end_ids(folder, read, spec.vocab_size))


def _activation(read: Reader) -> str:
    name = read.get("hidden_act") or read.get("hidden_activation") or "silu"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModel(
            CONFIG_FILE, read.spelt("hidden_act"), f"{name!r:.80}: supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _dtype(read: Reader) -> str:
    key = "dtype" if read.get("dtype") is not None else "torch_dtype"
    value = read.get(key)
    if value is None:
        return "float32"
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPES:
        raise UnsupportedModel(CONFIG_FILE, key, f"{value!r:.80}: supported: {', '.join(DTYPES)}")
    return str(name)


def _windows(read: Reader, family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it."""
    if family.window == "never" or read.get("sliding_window") is None:
        return None, ()
    if family.window == "switched" and not read.boolean("use_sliding_window"):
        return None, ()
    window = read.integer("sliding_window", 1)
    kinds = read.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
            raise read.wrong("layer_types", kinds, f"must be {num_layers} names out of {', '.join(known)}")
        return window, tuple(kind == "sliding_attention" for kind in kinds)
    if family.window == "switched":
        first = read.integer("max_window_layers", 0, default=28)
        return window, tuple(layer >= first for layer in range(num_layers))
    if family.window_period:
        period = read.integer("sliding_window_pattern", 1, default=family.window_period)
        return window, tuple((layer + 1) % period != 0 for layer in range(num_layers))
    return window, ()


def _end_ids(folder: Path, read: Reader, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end an answer: of `generation_config.json` where it names them, else of `config.json`."""
    path = folder / "generation_config.json"
    sources = [Reader(path.name, read_json(path))] if path.exists() else []
    sources.append(read)
    for source in sources:
        if (given := source.get("eos_token_id")) is not None:
            ids = given if isinstance(given, list) else [given]
            for token_id in ids:
                if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                    raise source.wrong("eos_token_id", given, "must be a token id or a list of them")
            if found := tuple(token_id for token_id in dict.fromkeys(ids) if token_id < vocab_size):
                return found
    return ()
