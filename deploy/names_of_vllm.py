"""vLLM's names of settings that we know and don't have: taken without effect, or refused.

Scripts spell out what they do not use: a name that would change what is served is taken where its value turns it off.
"""

from collections.abc import Mapping
from typing import Final

from argosy.cluster.protocol.errors import ConfigError

# those that nothing here depends on: other mechanisms do it, or there is nothing to switch
_SWITCHES = """
    trust_remote_code headless disable_custom_all_reduce enable_return_routed_experts disable_cascade_attn
    enable_log_requests disable_log_requests enable_request_id_headers use_v2_block_manager
    disable_uvicorn_access_log ray_workers_use_nsight enable_prompt_tokens_details enable_force_include_usage
    return_tokens_as_token_ids calculate_kv_scales disable_sliding_window use_tqdm_on_load
    disable_hybrid_kv_cache_manager enable_dbo enable_eplb kv_sharing_fast_prefill
"""
_VALUES = """
    distributed_executor_backend nnodes node_rank master_addr master_port runner convert task
    tokenizer_mode code_revision hf_config_path config_format ignore_patterns model_loader_extra_config
    compilation_config optimization_level performance_mode attention_config attention_backend
    profiler_config kv_offloading_backend max_log_len otlp_traces_endpoint uvicorn_log_level
    shutdown_timeout allowed_local_media_path allowed_media_domains limit_mm_per_prompt
    mm_processor_kwargs logprobs_mode chat_template_content_format num_scheduler_steps max_seq_len_to_capture
    max_context_len_to_capture cudagraph_capture_sizes data_parallel_backend max_concurrent_batches
    max_parallel_loading_workers worker_cls model_impl cuda_graph_sizes max_num_partial_prefills
    max_long_partial_prefills long_prefill_token_threshold num_lookahead_slots stream_interval
    pt_load_map_location prefix_caching_hash_algo preemption_mode guided_decoding_backend
    max_loras max_lora_rank max_cpu_loras offload_num_in_group offload_prefetch_step num_redundant_experts
    distributed_timeout_seconds prefill_context_parallel_size decode_context_parallel_size mamba_ssm_cache_dtype
"""
# and those that would change what is served, and can't yet: never ignored, never mistaken for a neighbour
_REFUSED = """
    enable_lora lora_modules speculative_config spec_method spec_model spec_tokens num_speculative_tokens
    structured_outputs_config reasoning_parser tool_call_parser enable_auto_tool_choice kv_transfer_config
    kv_events_config enable_sleep_mode override_generation_config logits_processors uds ssl_keyfile ssl_certfile
    ssl_ca_certs allowed_origins root_path middleware enable_prompt_embeds worker_extension_cls scheduler_cls
    offload_group_size offload_params
"""
# of the ignored, what would change what is served if it had its effect
_HARMLESS: Final[Mapping[str, tuple[object, ...]]] = {
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "task": ("auto", "generate"),
    "logprobs_mode": ("raw_logprobs",),
    "kv_offloading_backend": ("native",),
    "prefill_context_parallel_size": (1, "1"),
    "decode_context_parallel_size": (1, "1"),
}
_HINTS: Final[Mapping[str, str]] = {
    "offload_group_size": "; --cpu-offload-gb keeps weights in the host's memory",
    "offload_params": "; --cpu-offload-gb keeps weights in the host's memory",
}
_POOLING: Final = "poolings are not served yet; this engine continues texts: generate, chat"
_OF_LLM: Final[Mapping[str, str]] = {
    **dict.fromkeys(("encode", "embed", "classify", "score", "reward"), _POOLING),
    "beam_search": "beam search is not served yet; ask for n answers with logprobs and keep the best",
    **dict.fromkeys(("sleep", "wake_up"), "close() gives all memory back; make a new LLM to go on"),
    **dict.fromkeys(("enqueue", "wait_for_completion"), "use generate with all prompts, or argosy.AsyncClient"),
    **dict.fromkeys(("start_profile", "stop_profile"), "'argosy bench' measures"),
    "llm_engine": "run(work) calls your coroutine in the engine's event loop",
    "set_tokenizer": "give it to LLM(..., tokenizer=...)",
    "set_default_sampling_params": "give SamplingParams to each call",
}
NOT_YET: Final[frozenset[str]] = frozenset(_REFUSED.split())
IGNORED_SWITCHES: Final[frozenset[str]] = frozenset(_SWITCHES.split())
IGNORED: Final[frozenset[str]] = IGNORED_SWITCHES | frozenset(_VALUES.split())


def refuse_not_yet(written: str, name: str, value: object = True) -> bool:
    """Whether it is a name of something that we lack, turned off. Raises `ConfigError` where it is asked for."""
    if name not in NOT_YET:
        return False
    if value:
        raise ConfigError(f"{written} is not supported yet; leave it out{_HINTS.get(name, '')}")
    return True


def check_harmless(name: str, value: object) -> None:
    """Raises `ConfigError` for a value that asks for another kind of serving."""
    if name in _HARMLESS and value not in _HARMLESS[name]:
        fitting = " or ".join(dict.fromkeys(str(one) for one in _HARMLESS[name]))
        raise ConfigError(f"{name}={value!r}: only {fitting} is supported yet; leave it out")


def describe_missing(name: str) -> str:
    """What to say of an attribute that vLLM's `LLM` has and ours lacks; nothing of any other."""
    return f": {_OF_LLM[name]}" if name in _OF_LLM else ""
