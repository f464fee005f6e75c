"""The one table of metric names, and the light objects that count.

The step loop only adds to plain numbers; `deploy/metrics_export.py` renders a snapshot as Prometheus text. Names are
ours (`argosy_`) and, where they mean the same, vLLM's (`vllm:`), so that existing dashboards work. A key of a snapshot
is a name with its labels as Prometheus writes them: `argosy_requests_finished_total{reason="stop"}`.
"""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, TypeAlias

from argosy.cluster.protocol.ledger import TOTAL, place_entries
from argosy.cluster.protocol.sampling import FinishReason

Kind: TypeAlias = Literal["gauge", "counter", "histogram"]


class MetricName(NamedTuple):
    """One row of the table."""

    kind: Kind
    help: str
    vllm: str = ""  # vLLM's name for the same


_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_STEP_SECONDS: Final = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.5,
    10.0,
)
_TOKENS: Final = tuple(float(2**power) for power in range(18))

METRIC_NAMES: Final[Mapping[str, MetricName]] = {
    "argosy_requests_running": MetricName("gauge", "Requests that hold blocks.", "vllm:num_requests_running"),
    "argosy_requests_waiting": MetricName("gauge", "Requests in the queue.", "vllm:num_requests_waiting"),
    "argosy_kv_blocks_total": MetricName("gauge", "KV blocks of the replica."),
    "argosy_kv_blocks_used": MetricName("gauge", "KV blocks held by requests."),
    "argosy_kv_blocks_cached": MetricName("gauge", "Free KV blocks whose content may be found again."),
    "argosy_kv_usage_ratio": MetricName("gauge", "Used part of the KV blocks.", "vllm:kv_cache_usage_perc"),
    "argosy_kv_waste_ratio": MetricName("gauge", "Part of the used KV slots that holds no token."),
    "argosy_rank_memory_bytes": MetricName(
        "gauge", "Where the bytes of each rank went, by purpose, on its device and in its host's memory (place)."
    ),
    "argosy_rank_memory_total_bytes": MetricName(
        "gauge", "What each rank's device has: the sum of its purposes there, free among them."
    ),
    "argosy_steps_in_flight": MetricName("gauge", "Steps sent and not answered."),
    "argosy_epoch": MetricName("gauge", "How often the ranks were rebuilt."),
    "argosy_steps_total": MetricName("counter", "Steps that were answered."),
    "argosy_stale_outputs_total": MetricName("counter", "Answers from a lost epoch that were dropped."),
    "argosy_prompt_tokens_total": MetricName("counter", "Prompt tokens taken up.", "vllm:prompt_tokens_total"),
    "argosy_prompt_tokens_cached_total": MetricName(
        "counter", "Prompt tokens found in the prefix cache.", "vllm:prompt_tokens_cached_total"
    ),
    "argosy_generation_tokens_total": MetricName("counter", "Tokens generated.", "vllm:generation_tokens_total"),
    "argosy_tokens_dropped_total": MetricName("counter", "Tokens of requests that had ended a step before."),
    "argosy_tokens_recomputed_total": MetricName("counter", "Computed tokens given up by preemption or a loss."),
    "argosy_prefix_cache_queries_total": MetricName(
        "counter", "Tokens looked up in the prefix cache.", "vllm:prefix_cache_queries_total"
    ),
    "argosy_prefix_cache_hits_total": MetricName(
        "counter", "Tokens found in the prefix cache.", "vllm:prefix_cache_hits_total"
    ),
    "argosy_preemptions_total": MetricName("counter", "Requests sent back for blocks.", "vllm:num_preemptions_total"),
    "argosy_recoveries_total": MetricName("counter", "Requests sent back by the loss of ranks."),
    "argosy_block_copies_total": MetricName("counter", "Blocks copied before a write."),
    "argosy_requests_loading": MetricName("gauge", "Requests whose blocks come in from host memory."),
    "argosy_host_blocks_total": MetricName("gauge", "KV blocks of the pool in host memory (swap_space)."),
    "argosy_host_blocks_used": MetricName("gauge", "Host blocks held by requests."),
    "argosy_host_blocks_cached": MetricName("gauge", "Free host blocks whose content may be found again."),
    "argosy_preemptions_swapped_total": MetricName(
        "counter", "Requests sent back for blocks whose computed tokens went to host memory."
    ),
    "argosy_swap_blocks_total": MetricName("counter", "Blocks copied between device and host, by direction."),
    "argosy_swap_bytes_total": MetricName("counter", "Their bytes on all ranks, by direction."),
    "argosy_swap_seconds_total": MetricName("counter", "Seconds of these copies on one rank, by direction."),
    "argosy_host_tier_hits_total": MetricName("counter", "Tokens of known prefixes that came in from host memory."),
    "argosy_requests_refused_total": MetricName("counter", "Requests refused on arrival, by error code."),
    "argosy_requests_finished_total": MetricName("counter", "Ended requests, by reason.", "vllm:request_success_total"),
    "argosy_step_tokens": MetricName("histogram", "Tokens computed in a step.", "vllm:iteration_tokens_total"),
    "argosy_time_to_first_token_seconds": MetricName(
        "histogram", "From arrival to the first token.", "vllm:time_to_first_token_seconds"
    ),
    "argosy_inter_token_seconds": MetricName(
        "histogram", "Between two tokens of a request.", "vllm:inter_token_latency_seconds"
    ),
    "argosy_request_seconds": MetricName("histogram", "From arrival to the end.", "vllm:e2e_request_latency_seconds"),
    "argosy_request_queue_seconds": MetricName(
        "histogram", "From arrival to the first step.", "vllm:request_queue_time_seconds"
    ),
    "argosy_request_prompt_tokens": MetricName("histogram", "Length of prompts.", "vllm:request_prompt_tokens"),
    "argosy_request_generation_tokens": MetricName("histogram", "Length of answers.", "vllm:request_generation_tokens"),
}

_DIRECTIONS: Final = ("out", "in")  # of the device
_BOUNDS: Final[Mapping[str, tuple[float, ...]]] = {
    "argosy_step_tokens": _TOKENS,
    "argosy_request_prompt_tokens": _TOKENS,
    "argosy_request_generation_tokens": _TOKENS,
    "argosy_inter_token_seconds": _STEP_SECONDS,
}


class Histogram:
    """Counts between bounds. `counts` has one place more than `bounds`: what is above the last."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Metrics:
    """The figures of one driver. Gauges are worked out when asked for, by who knows them."""

    def __init__(self) -> None:
        self.steps = self.stale_outputs = self.prompt_tokens = self.cached_tokens = 0
        self.generation_tokens = self.tokens_dropped = self.tokens_recomputed = 0
        self.prefix_queries = self.prefix_hits = 0
        self.preemptions = self.recoveries = self.block_copies = 0
        self.preemptions_swapped = self.host_hits = 0
        self.swap_blocks = dict.fromkeys(_DIRECTIONS, 0)
        self.swap_bytes = dict.fromkeys(_DIRECTIONS, 0)
        self.swap_seconds = dict.fromkeys(_DIRECTIONS, 0.0)
        self.refused: dict[str, int] = {}
        self.ledgers: dict[int, Mapping[str, int]] = {}  # of each rank of the group that is ready
        self.finished = dict.fromkeys(FinishReason, 0)
        self._histograms = {
            name: Histogram(_BOUNDS.get(name, _SECONDS))
            for name, metric in METRIC_NAMES.items()
            if metric.kind == "histogram"
        }
        self.step_tokens = self._histograms["argosy_step_tokens"]
        self.time_to_first_token = self._histograms["argosy_time_to_first_token_seconds"]
        self.inter_token = self._histograms["argosy_inter_token_seconds"]
        self.request_seconds = self._histograms["argosy_request_seconds"]
        self.queue_seconds = self._histograms["argosy_request_queue_seconds"]
        self.request_prompt_tokens = self._histograms["argosy_request_prompt_tokens"]
        self.request_generation_tokens = self._histograms["argosy_request_generation_tokens"]

    def refuse(self, code: str) -> None:
        """A request was refused on arrival."""
        self.refused[code] = self.refused.get(code, 0) + 1

    def values(self, gauges: Mapping[str, float]) -> dict[str, float]:
        """All gauges and counters by name with labels, ours and vLLM's."""
        plain = {
            **gauges,
            "argosy_steps_total": self.steps,
            "argosy_stale_outputs_total": self.stale_outputs,
            "argosy_prompt_tokens_total": self.prompt_tokens,
            "argosy_prompt_tokens_cached_total": self.cached_tokens,
            "argosy_generation_tokens_total": self.generation_tokens,
            "argosy_tokens_dropped_total": self.tokens_dropped,
            "argosy_tokens_recomputed_total": self.tokens_recomputed,
            "argosy_prefix_cache_queries_total": self.prefix_queries,
            "argosy_prefix_cache_hits_total": self.prefix_hits,
            "argosy_preemptions_total": self.preemptions,
            "argosy_recoveries_total": self.recoveries,
            "argosy_block_copies_total": self.block_copies,
            "argosy_preemptions_swapped_total": self.preemptions_swapped,
            "argosy_host_tier_hits_total": self.host_hits,
        }
        found: dict[str, float] = {}
        for name, value in plain.items():
            found[name] = float(value)
            if METRIC_NAMES[name].vllm:
                found[METRIC_NAMES[name].vllm] = float(value)
        for name, by_direction in (("blocks", self.swap_blocks), ("bytes", self.swap_bytes)):
            for direction, amount in by_direction.items():
                found[f'argosy_swap_{name}_total{{direction="{direction}"}}'] = float(amount)
        for direction, seconds in self.swap_seconds.items():
            found[f'argosy_swap_seconds_total{{direction="{direction}"}}'] = seconds
        for rank, ledger in sorted(self.ledgers.items()):
            for place, purpose, num_bytes in place_entries(ledger):
                labels = f'rank="{rank}",place="{place}",purpose="{purpose}"'
                found[f"argosy_rank_memory_bytes{{{labels}}}"] = float(num_bytes)
            if TOTAL in ledger:
                found[f'argosy_rank_memory_total_bytes{{rank="{rank}"}}'] = float(ledger[TOTAL])
        for reason, count in self.finished.items():
            found[f'argosy_requests_finished_total{{reason="{reason}"}}'] = float(count)
            found[f'vllm:request_success_total{{finished_reason="{reason}"}}'] = float(count)
        for code, count in sorted(self.refused.items()):
            found[f'argosy_requests_refused_total{{code="{code}"}}'] = float(count)
        return found

    def histograms(self) -> dict[str, tuple[list[float], list[int], float]]:
        """All histograms by name: bounds, counts, sum."""
        found: dict[str, tuple[list[float], list[int], float]] = {}
        for name, histogram in self._histograms.items():
            figures = (list(histogram.bounds), list(histogram.counts), histogram.total)
            found[name] = figures
            if METRIC_NAMES[name].vllm:
                found[METRIC_NAMES[name].vllm] = figures
        return found
