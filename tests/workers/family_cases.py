"""A tiny config of every family, the checkpoint that transformers makes of it, and what transformers answers."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from family_harness import Expected
from torch import Tensor

PROMPTS = [[7], [1, 2, 3, 4, 5], list(range(20, 32)), list(range(60, 77))]
NUM_NEW = 6
VOCAB = 101
# what the newer configs call things, and what the GPT-2 line calls them
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 80, "vocab_size": VOCAB, "max_position_embeddings": 128, "initializer_range": 0.2}
MHA = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
GPT = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": VOCAB, "initializer_range": 0.2}
BLOOM = {"hidden_size": 48, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB, "initializer_range": 0.2}
FALCON = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB}
FALCON |= {"initializer_range": 0.2, "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1000.0}
DEEPSEEK = MHA | {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 12}
DEEPSEEK |= {"qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 6, "num_experts_per_tok": 3}
DEEPSEEK |= {"first_k_dense_replace": 1, "moe_intermediate_size": 16, "n_shared_experts": 2}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.0}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}


@dataclass(frozen=True)
class Case:
    """One row of the table of families."""

    config: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    max_model_len: int | None = None


def _longrope(original: int) -> dict[str, Any]:
    pairs = 6
    scales = {"short_factor": [1.0 + 0.1 * i for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    return {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **scales,
                                "original_max_position_embeddings": original}}  # fmt: skip


CASES: dict[str, Case] = {
    "llama": Case("LlamaConfig", "LlamaForCausalLM", SMALL | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, one kv head, biases": Case("LlamaConfig", "LlamaForCausalLM", SMALL | {"attention_bias": True,
        "mlp_bias": True, "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"}),
    "llama linear": Case("LlamaConfig", "LlamaForCausalLM", SMALL | {"rope_parameters": {"rope_type": "linear",
        "factor": 2.0, "rope_theta": 1e4}}),
    "mistral": Case("MistralConfig", "MistralForCausalLM", SMALL | {"sliding_window": 6, "head_dim": 16}),
    "qwen2": Case("Qwen2Config", "Qwen2ForCausalLM", SMALL | {"rope_parameters": YARN}),
    "qwen2 window": Case("Qwen2Config", "Qwen2ForCausalLM", SMALL | {"use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": Case("Qwen3Config", "Qwen3ForCausalLM", SMALL | {"head_dim": 24}),
    "gpt2": Case("GPT2Config", "GPT2LMHeadModel", GPT),
    "opt": Case("OPTConfig", "OPTForCausalLM", MHA | {"ffn_dim": 80, "word_embed_proj_dim": 48, "init_std": 0.2}),
    "opt post-norm, projected": Case(
        "OPTConfig", "OPTForCausalLM",
        MHA | {"ffn_dim": 80, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "init_std": 0.2},
    ),
    "bloom": Case("BloomConfig", "BloomForCausalLM", BLOOM),
    "bloom, 6 heads": Case("BloomConfig", "BloomForCausalLM", BLOOM | {"n_head": 6}),
    "gpt-neox": Case("GPTNeoXConfig", "GPTNeoXForCausalLM", MHA | {"rotary_pct": 0.5}),
    "gpt-neox sequential": Case("GPTNeoXConfig", "GPTNeoXForCausalLM", MHA | {"use_parallel_residual": False,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gpt-j": Case("GPTJConfig", "GPTJForCausalLM", GPT | {"rotary_dim": 8}),
    "phi": Case("PhiConfig", "PhiForCausalLM", MHA | {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"}),
    "phi3": Case("Phi3Config", "Phi3ForCausalLM", SMALL | {"pad_token_id": 0, "sliding_window": 7}),
    "phi3 longrope, short": Case("Phi3Config", "Phi3ForCausalLM", SMALL | {"pad_token_id": 0, **_longrope(64)}, 64),
    "phi3 longrope, long": Case("Phi3Config", "Phi3ForCausalLM", SMALL | {"pad_token_id": 0, **_longrope(4)}),
    "gemma": Case("GemmaConfig", "GemmaForCausalLM", SMALL | {"head_dim": 16}),
    "gemma2": Case("Gemma2Config", "Gemma2ForCausalLM", SMALL | GEMMA | {"attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 20.0}),
    "gemma3": Case("Gemma3TextConfig", "Gemma3ForCausalLM", SMALL | GEMMA | {"layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}),
    "granite": Case("GraniteConfig", "GraniteForCausalLM", SMALL | {"embedding_multiplier": 3.0,
        "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "olmo2": Case("Olmo2Config", "Olmo2ForCausalLM", SMALL),
    "starcoder2": Case("Starcoder2Config", "Starcoder2ForCausalLM", SMALL | {"sliding_window": 6}),
    "stablelm": Case("StableLmConfig", "StableLmForCausalLM", SMALL | {"use_qkv_bias": True,
        "partial_rotary_factor": 0.5}),
    "command-r": Case("CohereConfig", "CohereForCausalLM", SMALL | {"use_qk_norm": True, "logit_scale": 0.5}),
    "command-r7b": Case("Cohere2Config", "Cohere2ForCausalLM", SMALL | {"sliding_window": 6, "logit_scale": 0.5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "falcon 7b": Case("FalconConfig", "FalconForCausalLM", FALCON),
    "falcon 40b": Case("FalconConfig", "FalconForCausalLM", FALCON | {"new_decoder_architecture": True,
        "num_kv_heads": 2}),
    "falcon rw": Case("FalconConfig", "FalconForCausalLM", FALCON | {"alibi": True, "multi_query": False,
        "parallel_attn": False, "bias": True}),
    "mixtral": Case("MixtralConfig", "MixtralForCausalLM", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": Case("Qwen2MoeConfig", "Qwen2MoeForCausalLM", SMALL | {"num_experts": 6, "num_experts_per_tok": 3,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "qwen3-moe": Case("Qwen3MoeConfig", "Qwen3MoeForCausalLM", SMALL | {"num_experts": 6, "num_experts_per_tok": 3,
        "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 16}),
    "gpt-oss": Case("GptOssConfig", "GptOssForCausalLM", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2,
        "head_dim": 16, "sliding_window": 6, "intermediate_size": 40, "rope_parameters": YARN | {"truncate": False}}),
    "deepseek v2": Case("DeepseekV2Config", "DeepseekV2ForCausalLM", DEEPSEEK | {"topk_method": "group_limited_greedy",
        "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.0, "rope_parameters": YARN | {"mscale": 0.7,
        "mscale_all_dim": 0.7}}),
    "deepseek v2 lite": Case("DeepseekV2Config", "DeepseekV2ForCausalLM", DEEPSEEK | {"q_lora_rank": None}),
    "deepseek v3": Case("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK | {"n_group": 3, "topk_group": 2,
        "routed_scaling_factor": 2.5, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "olmoe": Case("OlmoeConfig", "OlmoeForCausalLM", SMALL | {"num_experts": 6, "num_experts_per_tok": 3,
        "intermediate_size": 32}),
    "granite moe": Case("GraniteMoeConfig", "GraniteMoeForCausalLM", SMALL | GRANITE | {"num_local_experts": 6,
        "num_experts_per_tok": 3, "intermediate_size": 32, "pad_token_id": 0}),
    "granite moe shared": Case("GraniteMoeSharedConfig", "GraniteMoeSharedForCausalLM", SMALL | GRANITE | {
        "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 32, "shared_intermediate_size": 40,
        "pad_token_id": 0}),
    "glm4 moe": Case("Glm4MoeConfig", "Glm4MoeForCausalLM", SMALL | {"n_routed_experts": 6, "num_experts_per_tok": 3,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": 16, "use_qk_norm": True,
        "attention_bias": True, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5}),
    "olmo3": Case("Olmo3Config", "Olmo3ForCausalLM", SMALL | {"sliding_window": 6, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"], "rope_parameters": {
        "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}}),
    "exaone4": Case("Exaone4Config", "Exaone4ForCausalLM", SMALL | {"sliding_window": 6, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"], "head_dim": 16}),
    "smollm3": Case("SmolLM3Config", "SmolLM3ForCausalLM", SMALL | {"pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "no_rope_layers": [1, 0, 1]}),
    "seed-oss": Case("SeedOssConfig", "SeedOssForCausalLM", SMALL | {"head_dim": 16}),
    "ernie 4.5": Case("Ernie4_5Config", "Ernie4_5ForCausalLM", SMALL | {"head_dim": 16, "use_bias": True}),
    "mpt": Case("MptConfig", "MptForCausalLM", {"d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 128,
        "vocab_size": VOCAB, "initializer_range": 0.2}),
}  # fmt: skip


# families of transformers that are none of ours
FALLBACKS: dict[str, Case] = {
    "gpt bigcode": Case("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT),
    "arcee": Case("ArceeConfig", "ArceeForCausalLM", SMALL),
    "apertus": Case("ApertusConfig", "ApertusForCausalLM", SMALL),
    "olmo": Case("OlmoConfig", "OlmoForCausalLM", SMALL | {"clip_qkv": 8.0, "pad_token_id": 0}),
    "nemotron": Case("NemotronConfig", "NemotronForCausalLM", SMALL | {"head_dim": 12}),
    "phi-3.5 moe": Case("PhimoeConfig", "PhimoeForCausalLM", SMALL | {"num_local_experts": 4}),
    "glm4": Case("Glm4Config", "Glm4ForCausalLM", SMALL | {"head_dim": 12, "pad_token_id": 0}),
    "hunyuan": Case("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", SMALL | {"head_dim": 12}),
    "helium": Case("HeliumConfig", "HeliumForCausalLM", SMALL | {"head_dim": 12, "pad_token_id": 0}),
    "persimmon": Case("PersimmonConfig", "PersimmonForCausalLM", MHA | {"pad_token_id": 0}),
    "minimax m2": Case("MiniMaxM2Config", "MiniMaxM2ForCausalLM", SMALL | {"num_local_experts": 4, "head_dim": 12,
        "num_experts_per_tok": 2, "pad_token_id": 0}),
    "gemma4": Case("Gemma4TextConfig", "Gemma4ForCausalLM", SMALL | {"head_dim": 12, "global_head_dim": 24,
        "pad_token_id": 0, "sliding_window": 6, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "glm4 moe lite": Case("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", MHA | {"num_key_value_heads": 4,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}),
    "llama4, up to a chunk": Case("Llama4TextConfig", "Llama4ForCausalLM", SMALL | {"num_local_experts": 2,
        "intermediate_size_mlp": 64, "attention_chunk_size": 128, "head_dim": 12}),
}  # fmt: skip
WHOLE_ONLY = ("gemma4",)  # each of its layers asks for the tokens, which later stages don't know
REFUSED: dict[str, Case] = {
    "list of attentions": Case("GPTNeoConfig", "GPTNeoForCausalLM", {"hidden_size": 48, "num_layers": 2, "num_heads": 4,
        "vocab_size": VOCAB, "max_position_embeddings": 128, "attention_types": [[["global", "local"], 1]]}),
    "chunked layers; .* use --max-model-len 8": Case("Llama4TextConfig", "Llama4ForCausalLM", SMALL | {
        "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 8, "head_dim": 12}),
    "attends more than once a layer": Case("DiffLlamaConfig", "DiffLlamaForCausalLM", SMALL),
    "attention interface": Case("CodeGenConfig", "CodeGenForCausalLM", GPT | {"rotary_dim": 8}),
    "names no attention heads": Case("MambaConfig", "MambaForCausalLM", {
        "hidden_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB}),
}  # fmt: skip


def widened(case: Case) -> Case:
    """The same with heads of 16, the least that a GPU's tensor cores take."""
    settings = dict(case.settings)
    heads = settings.get("num_attention_heads", settings.get("n_head", settings.get("n_heads")))
    for key in ("hidden_size", "n_embd", "d_model"):
        if key in settings:
            settings[key] = 16 * heads
    if "word_embed_proj_dim" in settings and settings["word_embed_proj_dim"] == case.settings["hidden_size"]:
        settings["word_embed_proj_dim"] = 16 * heads
    if settings.get("head_dim") == 12:
        settings["head_dim"] = 16
    if "qk_rope_head_dim" in settings:
        settings["qk_rope_head_dim"] = 16
    rope = settings.get("rope_parameters", {})
    if "long_factor" in rope:
        longer = {key: [*rope[key], 5.0, 6.0] for key in ("long_factor", "short_factor")}
        settings["rope_parameters"] = rope | longer
    return replace(case, settings=settings)


def make_checkpoint(folder: Path, name: str, *, wide: bool = False, case: Case | None = None) -> Expected:
    """One folder saved by transformers, and what transformers answers from it; also written beside it."""
    import transformers  # seconds of import: only where it is compared with

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    case = case or (CASES | FALLBACKS | REFUSED)[name]
    case = widened(case) if wide else case
    torch.manual_seed(len(name))
    settings = dict(case.settings)
    if "attn_logit_softcapping" in settings:
        settings["attn_implementation"] = "eager"  # some versions choose an attention that leaves soft caps out
    config = getattr(transformers, case.config)(**settings)
    model = getattr(transformers, case.model)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            _draw(parameter_name, parameter)
    model.save_pretrained(folder)
    answers, logits = greedy_answers(model)
    torch.save({"prompts": PROMPTS, "tokens": answers, "logits": logits}, folder / "expected.pt")
    return Expected(PROMPTS, answers, logits)


def greedy_answers(model: Any) -> tuple[list[list[int]], Tensor]:
    """The tokens that a model of transformers answers to all prompts, and the logits before each, [P, N, V]."""
    answers, all_logits = [], []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids, logits = list(prompt), []
            for _ in range(NUM_NEW):
                logits.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
                ids.append(int(logits[-1].argmax()))
            answers.append(ids[len(prompt) :])
            all_logits.append(torch.stack(logits))
    return answers, torch.stack(all_logits)


def _draw(name: str, values: Tensor) -> None:
    """transformers starts norms at 1, biases and some weights at 0: nothing would be tested."""
    if not values.is_floating_point() or "inv_freq" in name or "embed_scale" in name:
        return
    if values.ndim > 1:
        if isinstance(values, torch.nn.Parameter):
            values.normal_(0.0, 0.2)
        return
    is_norm = any(word in name for word in ("norm", "ln_")) and name.endswith("weight")
    if isinstance(values, torch.nn.Parameter) or name.endswith("e_score_correction_bias"):
        values.normal_(float(is_norm), 0.3 if is_norm or "sinks" in name else 0.1)


def num_layers_of(name: str) -> int:
    """Layers of a case."""
    settings = (CASES | FALLBACKS | REFUSED)[name].settings
    keys = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return int(next(settings[key] for key in keys if key in settings))
