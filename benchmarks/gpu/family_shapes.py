"""Widths of published models, a few layers of each: what `check_families.py` and `bench_experts.py` build."""

from typing import Any

COMMON = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 8192}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 32000, "rope_theta": 1e6,
    },
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"], "hidden_size": 2880, "num_hidden_layers": 2, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 2880, "num_local_experts": 128,
        "num_experts_per_tok": 4, "vocab_size": 201088, "rope_theta": 150000, "sliding_window": 128,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
                         "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
    "deepseek-r1": {
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "num_hidden_layers": 2,
        "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "moe_intermediate_size": 2048,
        "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        "vocab_size": 129280, "rope_theta": 10000, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "qwen3-30b": {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 4, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "vocab_size": 151936,
        "rope_theta": 1e6,
    },
    "llama-405b": {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16384, "num_hidden_layers": 2,
        "num_attention_heads": 128, "num_key_value_heads": 8, "intermediate_size": 53248, "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "gemma3-27b": {
        "architectures": ["Gemma3ForCausalLM"], "hidden_size": 5376, "num_hidden_layers": 6, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 16, "intermediate_size": 21504, "vocab_size": 262208,
        "query_pre_attn_scalar": 168, "sliding_window": 1024, "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "command-r": {
        "architectures": ["CohereForCausalLM"], "hidden_size": 8192, "num_hidden_layers": 2,
        "num_attention_heads": 64, "num_key_value_heads": 64, "intermediate_size": 22528, "vocab_size": 256000,
        "rope_theta": 8e6, "logit_scale": 0.0625, "layer_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "bloom-7b": {
        "architectures": ["BloomForCausalLM"], "hidden_size": 4096, "n_layer": 2, "n_head": 32,
        "vocab_size": 250880, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "falcon-40b": {
        "architectures": ["FalconForCausalLM"], "hidden_size": 8192, "num_hidden_layers": 2,
        "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True, "vocab_size": 65024,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
}  # fmt: skip


SHAPES["deepseek-r1-fp8"] = SHAPES["deepseek-r1"] | {"quantization_config": FP8}  # as it is published
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True}
SHAPES["mixtral-awq"] = SHAPES["mixtral"] | {"quantization_config": AWQ}
SHAPES["qwen3-30b-awq"] = SHAPES["qwen3-30b"] | {"quantization_config": AWQ}
SHAPES["qwen3-30b-gptq"] = SHAPES["qwen3-30b"] | {"quantization_config": GPTQ}
SHAPES["gpt-oss-mxfp4"] = SHAPES["gpt-oss"] | {"quantization_config": {"quant_method": "mxfp4"}}

# families of the list at a published width that no slice above has
SHAPES |= {
    "gemma2-27b": {
        "architectures": ["Gemma2ForCausalLM"], "hidden_size": 4608, "num_hidden_layers": 2, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 16, "intermediate_size": 36864, "vocab_size": 256000,
        "query_pre_attn_scalar": 144, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi-4": {
        "architectures": ["Phi3ForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 2, "num_attention_heads": 40,
        "num_key_value_heads": 10, "intermediate_size": 17920, "vocab_size": 100352, "rope_theta": 250000.0,
        "original_max_position_embeddings": 8192,
    },
    "gpt-neox-20b": {
        "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 6144, "num_hidden_layers": 2,
        "num_attention_heads": 64, "intermediate_size": 24576, "vocab_size": 50432, "rotary_pct": 0.25,
        "rotary_emb_base": 10000, "hidden_act": "gelu_fast", "layer_norm_eps": 1e-5, "use_parallel_residual": True,
    },
    "gpt-j-6b": {
        "architectures": ["GPTJForCausalLM"], "n_embd": 4096, "n_layer": 2, "n_head": 16, "rotary_dim": 64,
        "n_positions": 2048, "vocab_size": 50400, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    },
    "opt-30b": {
        "architectures": ["OPTForCausalLM"], "hidden_size": 7168, "num_hidden_layers": 2, "num_attention_heads": 56,
        "ffn_dim": 28672, "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 7168,
        "activation_function": "relu", "do_layer_norm_before": True, "tie_word_embeddings": True,
    },
    "gpt2-xl": {
        "architectures": ["GPT2LMHeadModel"], "n_embd": 1600, "n_layer": 2, "n_head": 25, "n_positions": 1024,
        "vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "starcoder2-15b": {
        "architectures": ["Starcoder2ForCausalLM"], "hidden_size": 6144, "num_hidden_layers": 2,
        "num_attention_heads": 48, "num_key_value_heads": 4, "intermediate_size": 24576, "vocab_size": 49152,
        "rope_theta": 100000.0, "use_bias": True, "norm_epsilon": 1e-5, "sliding_window": 4096,
        "hidden_act": "gelu_pytorch_tanh", "bos_token_id": 0, "eos_token_id": 0,
    },
    "olmo2-32b": {
        "architectures": ["Olmo2ForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 2, "num_attention_heads": 40,
        "num_key_value_heads": 8, "intermediate_size": 27648, "vocab_size": 100352, "rope_theta": 500000.0,
    },
    "granite-8b": {
        "architectures": ["GraniteForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12800, "vocab_size": 49155,
        "rope_theta": 1e7, "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "logits_scaling": 16.0,
        "residual_multiplier": 0.22, "tie_word_embeddings": True,
    },
    "qwen2-57b-a14b": {
        "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 3584, "num_hidden_layers": 2,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "num_experts": 64,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480,
        "norm_topk_prob": False, "vocab_size": 151936, "rope_theta": 1e6, "qkv_bias": True,
    },
}  # fmt: skip


def narrowed(shape: dict[str, Any], by: int) -> dict[str, Any]:
    """The same, with all widths and the vocabulary divided."""
    keys = ("hidden_size", "intermediate_size", "vocab_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank")
    keys += ("num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_head", "n_embd", "ffn_dim")
    keys += ("word_embed_proj_dim", "shared_expert_intermediate_size")
    return {key: max(1, value // by) if key in keys else value for key, value in shape.items()}
