"""The families with experts: what their names imply, as in `families`."""

from collections.abc import Mapping
from typing import Any, Final

from argosy.cluster.protocol.config_json import Reader
from argosy.cluster.protocol.families import DENSE_FAMILIES, Facts, Family, granite_scales, refuse
from argosy.cluster.protocol.model_facts import MLASpec, MoESpec
from argosy.cluster.protocol.rope_spec import yarn_magnitude


def _mixtral(read: Reader) -> Facts:
    return {
        "moe": MoESpec(
            num_experts=read.integer("num_local_experts", 1),
            top_k=read.integer("num_experts_per_tok", 1),
            intermediate_size=read.integer("intermediate_size", 1),
            renormalise=True,
        )
    }


def _sparse_layers(read: Reader) -> tuple[bool, ...]:
    """Which layers have experts, where `decoder_sparse_step` and `mlp_only_layers` say so."""
    step = read.integer("decoder_sparse_step", 1, default=1)
    dense = read.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise read.wrong("mlp_only_layers", dense, "must be a list of layer numbers")
    layers = range(read.integer("num_hidden_layers", 1))
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers)


def _qwen2_moe(read: Reader) -> Facts:
    return {
        "moe": MoESpec(
            num_experts=read.integer("num_experts", 1),
            top_k=read.integer("num_experts_per_tok", 1),
            intermediate_size=read.integer("moe_intermediate_size", 1),
            renormalise=read.boolean("norm_topk_prob"),
            shared_size=read.integer("shared_expert_intermediate_size", 1),
            shared_gate=True,
            layers=_sparse_layers(read),
        )
    }


def _qwen3_moe(read: Reader) -> Facts:
    return {
        "moe": MoESpec(
            num_experts=read.integer("num_experts", 1),
            top_k=read.integer("num_experts_per_tok", 1),
            intermediate_size=read.integer("moe_intermediate_size", 1),
            renormalise=read.boolean("norm_topk_prob"),
            layers=_sparse_layers(read),
        )
    }


def _olmoe(read: Reader) -> Facts:
    refuse(read, "clip_qkv", None)
    return {
        "qk_norm_kind": "full",
        "moe": MoESpec(
            num_experts=read.integer("num_experts", 1),
            top_k=read.integer("num_experts_per_tok", 1),
            intermediate_size=read.integer("intermediate_size", 1),
            renormalise=read.boolean("norm_topk_prob"),
        ),
    }


def _granite_moe(read: Reader) -> Facts:
    return granite_scales(read) | {
        "moe": MoESpec(
            num_experts=read.integer("num_local_experts", 1),
            top_k=read.integer("num_experts_per_tok", 1),
            intermediate_size=read.integer("intermediate_size", 1),
            scoring="softmax_after",
            shared_size=read.integer("shared_intermediate_size", 0, default=0),
        )
    }


def _gpt_oss(read: Reader) -> Facts:
    return {
        "sinks": True,
        "moe": MoESpec(
            num_experts=read.integer("num_local_experts", 1),
            top_k=read.integer("num_experts_per_tok", 1),
            intermediate_size=read.integer("intermediate_size", 1),
            scoring="softmax_after",
            router_bias=True,
            expert_bias=True,
            swiglu_limit=read.number("swiglu_limit", 0.0, 1e6, default=7.0),
            swiglu_alpha=read.number("swiglu_alpha", 0.0, 1e6, default=1.702),
        ),
    }


def _deepseek(read: Reader) -> Facts:
    mla = MLASpec(
        q_rank=read.integer("q_lora_rank", 1, default=0) if read.get("q_lora_rank") is not None else 0,
        kv_rank=read.integer("kv_lora_rank", 1),
        nope_size=read.integer("qk_nope_head_dim", 1),
        rope_size=read.integer("qk_rope_head_dim", 2),
        value_size=read.integer("v_head_dim", 1),
    )
    size = mla.nope_size + mla.rope_size
    facts: Facts = {"mla": mla, "head_size": size, "attention_scale": size**-0.5 * _stretch(read)}
    if read.get("n_routed_experts") is None:
        return facts
    layers = range(read.integer("num_hidden_layers", 1))
    first, period = read.integer("first_k_dense_replace", 0, default=0), read.integer("moe_layer_freq", 1, default=1)
    shared = read.integer("n_shared_experts", 0, default=0)
    inner = read.integer("moe_intermediate_size", 1)
    return facts | {
        "moe": MoESpec(
            num_experts=read.integer("n_routed_experts", 1),
            top_k=read.integer("num_experts_per_tok", 1),
            intermediate_size=inner,
            scaling_factor=read.number("routed_scaling_factor", 0.0, 1e6, default=1.0),
            shared_size=shared * inner,
            layers=tuple(layer >= first and layer % period == 0 for layer in layers),
            **_choice(read),
        )
    }


def _choice(read: Reader) -> dict[str, Any]:
    """How experts are chosen: V2 by softmax, V3 by sigmoid with a correction; both may go by groups."""
    groups, top_groups = read.get("n_group") or 1, read.get("topk_group") or 1
    method = read.get("topk_method") or ("noaux_tc" if read.get("scoring_func") == "sigmoid" else "greedy")
    if method == "noaux_tc":
        return {
            "scoring": "sigmoid",
            "renormalise": read.boolean("norm_topk_prob", True),
            "correction_bias": True,
            "num_groups": groups,
            "top_groups": top_groups,
            "group_score": "top2",
        }
    refuse(read, "topk_method", "greedy", "group_limited_greedy")
    refuse(read, "norm_topk_prob", False)
    limited = method == "group_limited_greedy"
    return {"num_groups": groups if limited else 1, "top_groups": top_groups if limited else 1}


def _glm4_moe(read: Reader) -> Facts:
    layers = range(read.integer("num_hidden_layers", 1))
    first, inner = read.integer("first_k_dense_replace", 0, default=0), read.integer("moe_intermediate_size", 1)
    return {
        "qk_norm": read.boolean("use_qk_norm"),
        "moe": MoESpec(
            num_experts=read.integer("n_routed_experts", 1),
            top_k=read.integer("num_experts_per_tok", 1),
            intermediate_size=inner,
            scaling_factor=read.number("routed_scaling_factor", 0.0, 1e6, default=1.0),
            shared_size=read.integer("n_shared_experts", 0, default=0) * inner,
            layers=tuple(layer >= first for layer in layers),
            **_choice(read),
        ),
    }


def _stretch(read: Reader) -> float:
    """What deepseek's yarn multiplies the attention by, where others multiply cos and sin."""
    scaling = read.get("rope_parameters") or read.get("rope_scaling") or {}
    inner = Reader(read.file, scaling, "rope_scaling.")
    if scaling.get("rope_type", scaling.get("type", "default")) == "default" or not inner.get("mscale_all_dim"):
        return 1.0
    magnitude = yarn_magnitude(inner.number("factor", 0.0, 1e6), inner.number("mscale_all_dim", 0.0, 1e3))
    return magnitude**2


DEEPSEEK_DEFAULTS: Final = {"rope_interleave": True, "n_shared_experts": 0}

MOE_FAMILIES: Final[Mapping[str, Family]] = {
    "MixtralForCausalLM": Family(window="always", extra=_mixtral),
    "Qwen2MoeForCausalLM": Family(
        qkv_bias="qkv_bias", window="switched", extra=_qwen2_moe, defaults={"qkv_bias": True}
    ),
    "Qwen3MoeForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, window="switched", extra=_qwen3_moe,
        names={"num_experts": "num_local_experts"},
    ),
    "GptOssForCausalLM": Family(
        qkv_bias=True, o_bias=True, window="always", window_period=2, extra=_gpt_oss,
        names={"num_experts_per_tok": "experts_per_token"}, defaults={"sliding_window": 128, "rms_norm_eps": 1e-5},
    ),
    "OlmoeForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, extra=_olmoe,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "GraniteMoeForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", extra=_granite_moe),
    "GraniteMoeSharedForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", extra=_granite_moe),
    "Glm4MoeForCausalLM": Family(
        qkv_bias="attention_bias", extra=_glm4_moe,
        defaults={"topk_method": "noaux_tc", "norm_topk_prob": True, "partial_rotary_factor": 0.5,
                  "n_shared_experts": 1, "rms_norm_eps": 1e-5},
    ),
    "DeepseekV2ForCausalLM": Family(extra=_deepseek, defaults=DEEPSEEK_DEFAULTS),
    "DeepseekV3ForCausalLM": Family(
        extra=_deepseek, defaults=DEEPSEEK_DEFAULTS | {"topk_method": "noaux_tc", "norm_topk_prob": True}
    ),
}  # fmt: skip

FAMILIES: Final[Mapping[str, Family]] = {**DENSE_FAMILIES, **MOE_FAMILIES}
