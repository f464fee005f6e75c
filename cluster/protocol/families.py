"""What an architecture's name implies: how its config spells our keys, what it leaves out, and what is special to it.

A row of `FAMILIES` is enough for a model that is another one's shape; `extra` turns the special keys of a family into
facts of `ModelSpec`. What a family could be configured to do and we don't is refused by key and value.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import msgspec

from argosy.cluster.protocol.config_json import Reader
from argosy.cluster.protocol.errors import UnsupportedModel

Facts = dict[str, Any]


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What an architecture's name implies. A string is the config key to read, whose default is False."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    # always: wherever there is a sliding_window; switched: use_sliding_window, from max_window_layers on
    window: Literal["never", "always", "switched"] = "never"
    window_period: int = 0  # without `layer_types`: every so many layers one sees everything
    names: Mapping[str, str] = {}  # our key -> the family's
    defaults: Mapping[str, Any] = {}  # what a published config leaves out
    extra: Callable[[Reader], Facts] | None = None
    rotates: Literal["all", "windowed"] = "all"  # windowed: layers that see everything have no positions
    wide_mlp: bool = False  # four times the model's width where the config says nothing
    nested: str = ""  # the key under which a model of several modes keeps the config of its text part


def refuse(read: Reader, key: str, *wanted: object) -> None:
    """Raise unless the key is absent or has one of the values that are supported."""
    value = read.get(key)
    if value is not None and value not in wanted:
        raise UnsupportedModel(
            read.file,
            read.prefix + read.spelt(key),
            f"{value!r:.80}: this family is supported with {', '.join(map(str, wanted))} only",
        )


def _gpt2(read: Reader) -> Facts:
    refuse(read, "scale_attn_weights", True)
    refuse(read, "scale_attn_by_inverse_layer_idx", False)
    refuse(read, "add_cross_attention", False)
    rows = read.integer("max_position_embeddings", 1)
    return {"norm": "layer", "position": "learned", "position_rows": rows, "gated": False}


def _opt(read: Reader) -> Facts:
    refuse(read, "layer_norm_elementwise_affine", True)
    before = read.boolean("do_layer_norm_before", True)
    width, inner = read.integer("hidden_size", 1), read.integer("word_embed_proj_dim", 1, default=2**31 - 1)
    return {
        "norm": "layer",
        "block": "sequential" if before else "post_norm",
        "final_norm": before and not read.boolean("_remove_final_layer_norm"),
        "embedding_size": inner if inner not in (width, 2**31 - 1) else 0,
        "position": "learned",
        "position_rows": read.integer("max_position_embeddings", 1) + 2,
        "position_offset": 2,  # the first two rows of its table were meant for padding
        "gated": False,
    }


def _bloom(read: Reader) -> Facts:
    refuse(read, "apply_residual_connection_post_layernorm", False)
    return {"norm": "layer", "position": "alibi", "gated": False, "embedding_norm": True, "activation": "gelu_tanh"}


def _neox(read: Reader) -> Facts:
    parallel = read.boolean("use_parallel_residual", True)
    return {"norm": "layer", "block": "parallel_two_norms" if parallel else "sequential", "gated": False}


def _gptj(read: Reader) -> Facts:
    return {"norm": "layer", "block": "parallel", "gated": False, "head_bias": True}


def _phi(read: Reader) -> Facts:
    refuse(read, "qk_layernorm", False)
    return {"norm": "layer", "block": "parallel", "gated": False, "head_bias": True}


def _stablelm(read: Reader) -> Facts:
    refuse(read, "qk_layernorm", False)
    return {"norm": "layer", "block": "parallel" if read.boolean("use_parallel_residual") else "sequential"}


def _starcoder2(read: Reader) -> Facts:
    return {"norm": "layer", "gated": False}


def _falcon(read: Reader) -> Facts:
    new, heads = read.boolean("new_decoder_architecture"), read.integer("num_attention_heads", 1)
    kv_heads = heads
    if new:
        kv_heads = read.integer("num_kv_heads", 1, default=heads)
    elif read.boolean("multi_query", True):
        kv_heads = 1
    norms = read.integer("num_ln_in_parallel_attn", 1, 2, default=2 if new else 1)
    parallel = "parallel_two_norms" if new and norms == 2 else "parallel"
    return {
        "norm": "layer",
        "num_kv_heads": kv_heads,
        "alibi_scale": (read.integer("hidden_size", 1) / heads) ** -0.5,  # it scales the sum of logits and bias
        "block": parallel if new or read.boolean("parallel_attn", True) else "sequential",
        "position": "alibi" if read.boolean("alibi") else "rotary",
        "gated": False,
    }


def _mpt(read: Reader) -> Facts:
    attention = read.get("attn_config") or {}
    inner = Reader(read.file, attention, "attn_config.")
    for key, wanted in (("attn_type", "multihead_attention"), ("prefix_lm", False), ("qk_ln", False)):
        refuse(inner, key, wanted)
    refuse(inner, "alibi", True)
    refuse(read, "no_bias", True)
    refuse(read, "logit_scale", None)
    width = read.integer("hidden_size", 1)
    return {
        "norm": "layer_no_bias",
        "position": "alibi",
        "alibi_max": float(inner.integer("alibi_bias_max", 1, default=8)),
        "attention_scale": inner.optional_number("softmax_scale", 0.0, 1e3),
        "clip_qkv": inner.optional_number("clip_qkv", 0.0, 1e6),
        "intermediate_size": int(read.number("expansion_ratio", 0.0, 1e3, default=4.0) * width),
        "gated": False,
        "activation": "gelu",
    }


def _gemma(read: Reader) -> Facts:
    refuse(read, "use_bidirectional_attention", None, False)
    return {
        "norm": "rms_plus_one",
        "embedding_scale": read.integer("hidden_size", 1) ** 0.5,
        "activation": "gelu_tanh",  # also where the first configs said "gelu"
    }


def _gemma2(read: Reader) -> Facts:
    scalar = read.number("query_pre_attn_scalar", 0.0, 1e6, default=256.0)
    return _gemma(read) | {
        "block": "sandwich",
        "attention_scale": scalar**-0.5,
        "attention_soft_cap": read.optional_number("attn_logit_softcapping", 0.0, 1e6),
        "final_soft_cap": read.optional_number("final_logit_softcapping", 0.0, 1e6),
    }


def _olmo2(read: Reader) -> Facts:
    return {"block": "norm_after", "qk_norm_kind": "full"}


def granite_scales(read: Reader) -> Facts:
    """Granite's four multipliers."""
    return {
        "embedding_scale": read.number("embedding_multiplier", 0.0, 1e6, default=1.0),
        "residual_scale": read.number("residual_multiplier", 0.0, 1e6, default=1.0),
        "attention_scale": read.number("attention_multiplier", 0.0, 1e6, default=1.0),
        "logit_scale": 1.0 / read.number("logits_scaling", 0.0, 1e6, default=1.0),
    }


def _exaone4(read: Reader) -> Facts:
    return {"block": "norm_after"}


def _smollm3(read: Reader) -> Facts:
    num_layers = read.integer("num_hidden_layers", 1)
    rotated, every = read.get("no_rope_layers"), read.integer("no_rope_layer_interval", 1, default=4)
    if rotated is None:
        rotated = [int((layer + 1) % every != 0) for layer in range(num_layers)]
    if not isinstance(rotated, list) or len(rotated) != num_layers:
        raise read.wrong("no_rope_layers", rotated, f"must be {num_layers} numbers, 0 for a layer without rotation")
    return {"unrotated_layers": tuple(not rotates for rotates in rotated)}


def _cohere(read: Reader) -> Facts:
    return {
        "norm": "layer_no_bias",
        "block": "parallel",
        "logit_scale": read.number("logit_scale", 0.0, 1e6, default=0.0625),
        "qk_norm": read.boolean("use_qk_norm"),
        "qk_norm_kind": "layer_head",
    }


def _cohere2(read: Reader) -> Facts:
    return _cohere(read) | {"qk_norm": False}


LAYER_NORM_EPS: Final = {"rms_norm_eps": "layer_norm_eps"}
GPT_NAMES: Final = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
    "intermediate_size": "n_inner",
}
GEMMA2_DEFAULTS: Final = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}
COHERE_DEFAULTS: Final = {"tie_word_embeddings": True, "layer_norm_eps": 1e-5, "rope_interleave": True}

GEMMA3: Final = Family(
    qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, window="always", window_period=6,
    extra=_gemma2,
    defaults={
        "tie_word_embeddings": True, "head_dim": 256, "sliding_window": 4096, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 262208, "max_position_embeddings": 131072,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    },
)  # fmt: skip

DENSE_FAMILIES: Final[Mapping[str, Family]] = {
    "LlamaForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family(window="always"),
    "MinistralForCausalLM": Family(window="always"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window="switched"),
    "Qwen3ForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, window="switched"),
    "OracleForCausalLM": Family(),  # for tests: see cluster/oracle.py
    "GPT2LMHeadModel": Family(
        qkv_bias=True, o_bias=True, mlp_bias=True, names=GPT_NAMES, wide_mlp=True, extra=_gpt2,
        defaults={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    ),
    "OPTForCausalLM": Family(
        qkv_bias="enable_bias", o_bias="enable_bias", mlp_bias="enable_bias", extra=_opt,
        names={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        defaults={
            "tie_word_embeddings": True, "enable_bias": True, "activation_function": "relu", "rms_norm_eps": 1e-5
        },
    ),
    "BloomForCausalLM": Family(
        qkv_bias=True, o_bias=True, mlp_bias=True, wide_mlp=True, extra=_bloom,
        names={
            "num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "rms_norm_eps": "layer_norm_epsilon",
            "max_position_embeddings": "seq_length", "hidden_size": "n_embed",
        },
        defaults={"tie_word_embeddings": True, "seq_length": 2048, "layer_norm_epsilon": 1e-5, "hidden_act": "gelu"},
    ),
    "GPTNeoXForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias=True, extra=_neox,
        names=LAYER_NORM_EPS | {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
        defaults={"attention_bias": True, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "rotary_pct": 0.25},
    ),
    "GPTJForCausalLM": Family(
        mlp_bias=True, names=GPT_NAMES, wide_mlp=True, extra=_gptj,
        defaults={
            "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "rope_interleave": True, "rotary_dim": 64
        },
    ),
    "PhiForCausalLM": Family(
        qkv_bias=True, o_bias=True, mlp_bias=True, names=LAYER_NORM_EPS, extra=_phi,
        defaults={"layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
    ),
    "Phi3ForCausalLM": Family(window="always"),
    "GemmaForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", extra=_gemma,
        defaults={"tie_word_embeddings": True, "head_dim": 256},
    ),
    "Gemma2ForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", window="always", window_period=2, extra=_gemma2,
        defaults=GEMMA2_DEFAULTS,
    ),
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": msgspec.structs.replace(GEMMA3, nested="text_config"),
    "GraniteForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias", extra=granite_scales
    ),
    "Olmo2ForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, extra=_olmo2),
    "Olmo3ForCausalLM": Family(  # what is scaled are the rotations of layers that see everything
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, window="always", window_period=4,
        extra=_olmo2, names={"rope_local_base_freq": "rope_theta"},
        defaults={"sliding_window": 4096, "rope_theta": 5e5},
    ),
    "Exaone4ForCausalLM": Family(
        qk_norm=True, window="always", window_period=4, rotates="windowed", extra=_exaone4,
    ),
    "SmolLM3ForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias", window="switched", extra=_smollm3,
        defaults={"tie_word_embeddings": True, "rope_theta": 2e6},
    ),
    "SeedOssForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_out_bias", mlp_bias="mlp_bias",
        defaults={"attention_bias": True, "head_dim": 128},
    ),
    "Ernie4_5ForCausalLM": Family(
        qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias",
        defaults={"rope_interleave": True, "tie_word_embeddings": True, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
    ),
    "Starcoder2ForCausalLM": Family(
        qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", window="always", extra=_starcoder2,
        names={"rms_norm_eps": "norm_epsilon"},
        defaults={
            "use_bias": True, "norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True
        },
    ),
    "StableLmForCausalLM": Family(
        qkv_bias="use_qkv_bias", names=LAYER_NORM_EPS, extra=_stablelm,
        defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    ),
    "CohereForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", names=LAYER_NORM_EPS, extra=_cohere,
        defaults=COHERE_DEFAULTS,
    ),
    "Cohere2ForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", names=LAYER_NORM_EPS, extra=_cohere2, window="always",
        window_period=4, rotates="windowed", defaults=COHERE_DEFAULTS | {"sliding_window": 4096},
    ),
    "FalconForCausalLM": Family(
        qkv_bias="bias", o_bias="bias", mlp_bias="bias", wide_mlp=True, extra=_falcon,
        names={
            "rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation", "intermediate_size": "ffn_hidden_size",
            "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_kv_heads": "n_head_kv",
        },
        defaults={
            "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "activation": "gelu",
            "max_position_embeddings": 2048,
        },
    ),
    "MptForCausalLM": Family(
        wide_mlp=True, extra=_mpt,
        names={
            "hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers",
            "max_position_embeddings": "max_seq_len", "rms_norm_eps": "layer_norm_epsilon",
        },
        defaults={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "hidden_act": "gelu"},
    ),
}  # fmt: skip
