"""Dashboards and alerts are built on metric names: one that goes away breaks them in silence."""

import re

from argosy.cluster.metrics import METRIC_NAMES


def test_names_say_whose_they_are_and_what_they_count() -> None:
    """Ours begin with argosy_, counters end in _total, and both are what Prometheus accepts."""
    for name, metric in METRIC_NAMES.items():
        assert re.fullmatch(r"argosy_[a-z0-9_]+", name), name
        assert metric.kind != "counter" or name.endswith("_total"), name
        assert metric.help.endswith("."), name
        assert not metric.vllm or metric.vllm.startswith("vllm:"), name


def test_the_names_that_others_rely_on_stay() -> None:
    """Those that the server and vLLM's dashboards read. Others may be added freely."""
    relied_on = {
        "argosy_requests_running",
        "argosy_requests_waiting",
        "argosy_kv_blocks_total",
        "argosy_kv_blocks_used",
        "argosy_generation_tokens_total",
        "argosy_prompt_tokens_total",
        "argosy_preemptions_total",
        "argosy_time_to_first_token_seconds",
    }
    assert relied_on <= set(METRIC_NAMES)
    vllm = {metric.vllm for metric in METRIC_NAMES.values()}
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= vllm
