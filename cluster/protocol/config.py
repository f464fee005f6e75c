"""Every setting, frozen, parsed once at a door; unknown keys are refused with the nearest name.

`ServingConfig.from_mapping` takes the flat names users know from vLLM (`tensor_parallel_size`, `max_num_seqs`, ...).
What is "auto" or None here is worked out later into a new value (`replace`), never by mutation.
"""

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.swap import parse_swap_space


class _Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of settings."""

    def replace(self, **changes: Any) -> Any:
        """A copy with some fields changed, checked again."""
        return msgspec.structs.replace(self, **changes)


class ModelConfig(_Settings, frozen=True):
    """Which model, and in which numbers."""

    model: str
    tokenizer: str | None = None
    served_model_name: tuple[str, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None  # None: what the model's config says
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    seed: int = 0
    chat_template: str | None = None
    skip_tokenizer_init: bool = False
    generation_config: str = "auto"  # "auto": the folder's own; "vllm": none
    max_logprobs: int = 20
    quantization: str | None = None
    hf_overrides: dict[str, Any] | None = None
    revision: str | None = None  # of a hub name: branch, tag or commit
    tokenizer_revision: str | None = None
    download_dir: str | None = None  # instead of the hub's own cache
    hub_name: str | None = None  # where `model` came from when it was made a folder; for nodes that lack the folder


class CacheConfig(_Settings, frozen=True):
    """The paged KV cache."""

    block_size: int = 16  # tokens a block
    gpu_memory_utilization: float = 0.92  # fraction of device memory for everything
    kv_cache_memory_bytes: int | None = None  # overrides the above
    num_gpu_blocks_override: int | None = None  # overrides both
    enable_prefix_caching: bool = True
    # int8 and fp8_scaled: 8 bits, and a scale for each token and key/value head
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8_e4m3", "fp8_scaled", "int8"] = "auto"


class SchedulerConfig(_Settings, frozen=True):
    """What a step may hold, and who goes first."""

    max_num_seqs: int = 256  # rows of a step, and requests that hold blocks
    max_num_batched_tokens: int = 2048  # token budget of a step
    enable_chunked_prefill: bool = True
    policy: Literal["fcfs", "priority"] = "fcfs"
    max_num_waiting: int = 4096  # beyond it: Overloaded
    async_scheduling: bool = True
    max_recoveries: int = 3
    request_deadline_seconds: float = 600.0  # hard cap on any request
    watermark: float = 0.01  # fraction of blocks kept free when admitting new requests


class ParallelConfig(_Settings, frozen=True):
    """How many ranks, and where."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pipeline_layers: tuple[int, ...] = ()  # layers of each stage; empty: as even as can be
    stage_memory_gb: tuple[float, ...] = ()  # GiB that each rank of a stage may use, 0: what there is; empty: no bounds
    data_parallel_size: int = 1  # replicas of the whole, each with an engine of its own
    start_deadline_seconds: float = 600.0
    step_deadline_seconds: float = 60.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: int | None = None  # a CPU rank's threads; None: cores divided by ranks
    enforce_eager: bool = False
    max_cuda_graph_batch: int = 1024  # steps of more rows run eagerly
    # auto: the planner chooses the sizes above for the cluster that is there; one: the same, for a single replica
    layout: Literal["given", "auto", "one"] = "given"
    ray_address: str | None = None  # of a Ray cluster that runs; None: one of our own
    enable_expert_parallel: bool = False  # each rank of a tensor-parallel group has whole experts, not a part of each
    all2all_backend: Literal["auto", "sum", "all_to_all"] = "auto"  # how tokens come to them: see docs/models.md


class OffloadConfig(_Settings, frozen=True):
    """What lives in the host's memory beside a GPU, in GiB of each rank. "auto": as much as is needed, or nothing."""

    cpu_offload_gb: float | Literal["auto"] = 0.0  # of the weights: whole layers, at least so much
    activation_offload_gb: float | Literal["auto"] = 0.0  # hidden states of long steps, at most so much
    activation_slice_tokens: int = 4096  # of such a step, that are computed at once
    swap_space: float | Literal["auto"] = 0.0  # for KV blocks that have to make room; 0: they are computed anew


class ServerConfig(_Settings, frozen=True):
    """The doors."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys_file: str | None = None
    max_body_bytes: int = 4 * 1024 * 1024
    drain_seconds: float = 30.0
    disable_log_stats: bool = False
    response_role: str = "assistant"
    job_dir: str | None = None  # None: this server keeps no jobs
    max_upload_bytes: int = 200 * 1024 * 1024
    api_server_count: int | None = None  # processes at the doors; None: by the cores of the machine


class ServingConfig(_Settings, frozen=True):
    """All settings of one served model."""

    model: ModelConfig
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()
    offload: OffloadConfig = OffloadConfig()
    server: ServerConfig = ServerConfig()

    def __post_init__(self) -> None:
        check = _Checks()
        cache, scheduler, parallel = self.cache, self.scheduler, self.parallel
        check.at_least("block_size", cache.block_size, 1)
        check.between("gpu_memory_utilization", cache.gpu_memory_utilization, 0.01, 1.0)
        check.at_least("num_gpu_blocks_override", cache.num_gpu_blocks_override, 1)
        check.at_least("kv_cache_memory_bytes", cache.kv_cache_memory_bytes, 1)
        check.at_least("max_num_seqs", scheduler.max_num_seqs, 1)
        check.at_least("max_num_batched_tokens", scheduler.max_num_batched_tokens, 1)
        check.at_least("max_num_waiting", scheduler.max_num_waiting, 0)
        check.between("watermark", scheduler.watermark, 0.0, 0.5)
        check.at_least("max_recoveries", scheduler.max_recoveries, 0)
        check.seconds("request_deadline_seconds", scheduler.request_deadline_seconds, 0.001)
        check.seconds("start_deadline_seconds", parallel.start_deadline_seconds, 0.001)
        check.seconds("step_deadline_seconds", parallel.step_deadline_seconds, 0.001)
        check.seconds("drain_seconds", self.server.drain_seconds, 0.0)
        check.at_least("cpu_threads", parallel.cpu_threads, 1)
        check.at_least("max_body_bytes", self.server.max_body_bytes, 1)
        check.at_least("max_upload_bytes", self.server.max_upload_bytes, 1)
        if self.server.api_server_count is not None:
            check.between("api_server_count", self.server.api_server_count, 1, 64)
        check.at_least("max_logprobs", self.model.max_logprobs, -1)
        check.at_least("tensor_parallel_size", parallel.tensor_parallel_size, 1)
        check.at_least("pipeline_parallel_size", parallel.pipeline_parallel_size, 1)
        check.at_least("data_parallel_size", parallel.data_parallel_size, 1)
        check.at_least("max_model_len", self.model.max_model_len, 1)
        check.between("port", self.server.port, 0, 65535)
        if any(not name.strip() for name in self.model.served_model_name):
            raise ConfigError("served_model_name='': must be a name, or be left out")
        check.gib("cpu_offload_gb", self.offload.cpu_offload_gb)
        check.gib("activation_offload_gb", self.offload.activation_offload_gb)
        check.at_least("activation_slice_tokens", self.offload.activation_slice_tokens, 1)
        check.gib("swap_space", self.offload.swap_space)
        if scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={scheduler.max_num_batched_tokens} is below max_num_seqs="
                f"{scheduler.max_num_seqs}: a step could not give every running request one token; raise the first"
            )
        stages = parallel.pipeline_layers
        if stages and (len(stages) != parallel.pipeline_parallel_size or min(stages) < 1):
            raise ConfigError(
                f"pipeline_layers={list(stages)} must name at least one layer for each of the "
                f"{parallel.pipeline_parallel_size} stages"
            )

        caps = parallel.stage_memory_gb
        if caps and (len(caps) != parallel.pipeline_parallel_size or not all(0 <= cap < math.inf for cap in caps)):
            raise ConfigError(
                f"stage_memory_gb={list(caps)} must be {parallel.pipeline_parallel_size} numbers of GiB, one for each "
                "stage, 0 where a stage may use what there is"
            )

    @property
    def stage_memory_bytes(self) -> tuple[int, ...]:
        """`stage_memory_gb` in bytes."""
        return tuple(int(gib * 2**30) for gib in self.parallel.stage_memory_gb)

    @property
    def max_steps_in_flight(self) -> int:
        """Steps that may be sent and not answered: one for each stage, and one that waits on the ranks already."""
        return self.parallel.pipeline_parallel_size + int(self.scheduler.async_scheduling)

    @classmethod
    def from_mapping(cls, given: Mapping[str, object]) -> "ServingConfig":
        """The settings from flat names. Raises `ConfigError` with the name, the value and the nearest known name."""
        sections: dict[str, dict[str, object]] = {}
        for key, value in given.items():
            if key not in _SECTION_OF:
                near = get_close_matches(str(key), _SECTION_OF, n=1)
                raise ConfigError(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            sections.setdefault(_SECTION_OF[key], {})[key] = value
        if "model" not in sections.get("model", {}):
            raise ConfigError("no model given: name a Hugging Face folder or hub name as 'model'")
        built: dict[str, Any] = {}
        for section, settings_type in _SECTIONS.items():
            values = sections.get(section, {})
            for key, value in values.items():
                if key == "served_model_name" and isinstance(value, str):
                    values[key] = (value,)
                elif key == "swap_space":
                    values[key] = parse_swap_space(value)
            try:
                built[section] = msgspec.convert(values, settings_type)
            except msgspec.ValidationError as error:
                raise ConfigError(_explain(error, values)) from error
        return cls(**built)

    @classmethod
    def defaults(cls) -> dict[str, object]:
        """The flat names with what they are when nobody says so; the model has no default."""
        names = {name: kind() for name, kind in _SECTIONS.items() if kind is not ModelConfig}
        names["model"] = ModelConfig(model="")
        return {key: getattr(names[section], key) for key, section in _SECTION_OF.items() if key != "model"}

    @classmethod
    def known_settings(cls) -> tuple[str, ...]:
        """The flat names that `from_mapping` accepts."""
        return tuple(sorted(_SECTION_OF))


_SECTIONS: dict[str, type[_Settings]] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "parallel": ParallelConfig,
    "offload": OffloadConfig,
    "server": ServerConfig,
}
_SECTION_OF = {field: section for section, kind in _SECTIONS.items() for field in kind.__struct_fields__}

_CHOICES = {
    field: get_args(kind)
    for section in _SECTIONS.values()
    for field, kind in get_type_hints(section).items()
    if get_origin(kind) is Literal
}


_GIB = ("cpu_offload_gb", "activation_offload_gb", "swap_space")
_ALSO = {"fp8_e4m3": "fp8 (fp8_e4m3)"}  # as most write it
_WRITTEN = {"policy": "scheduling_policy"}  # as users know it
_TYPES = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false", "array": "a list",
          "object": "names and values"}  # fmt: skip


def _explain(error: msgspec.ValidationError, values: Mapping[str, object]) -> str:
    text = str(error)
    found = re.search(r"\$\.(\w+)", text)
    if found is None or found[1] not in values:
        return text
    key = found[1]
    value, choices = values[key], _CHOICES.get(key)
    written = f"{_WRITTEN.get(key, key)}={value!r}"
    if key in _GIB:
        return f"{written}: must be a number of GiB from 0 on, or auto"
    if choices:
        named = [_ALSO.get(choice, choice) for choice in choices]
        return f"{written}: must be one of {', '.join(named)}"
    kinds = re.match(r"Expected `([\w |]+)`", text)
    if kinds is None:
        return f"{written}: {text.split(' - at')[0]}"
    words = [_TYPES.get(kind, kind) for kind in kinds[1].split(" | ") if kind != "null"]
    each = "each " if f"$.{key}[" in text else ""
    return f"{written}: {each}must be {' or '.join(words)}"


class _Checks:
    @staticmethod
    def at_least(name: str, value: float | None, low: float) -> None:
        if value is not None and not value >= low:
            raise ConfigError(f"{name}={value}: must be at least {low}")

    @staticmethod
    def seconds(name: str, value: float, low: float) -> None:
        if not low <= value < math.inf:
            raise ConfigError(f"{name}={value}: must be a finite number, at least {low:g}")

    @staticmethod
    def gib(name: str, value: float | str) -> None:
        if isinstance(value, str):
            return  # "auto", and nothing else comes here
        if not 0.0 <= value < math.inf:
            raise ConfigError(f"{name}={value}: must be a number of GiB from 0 on, or auto")

    @staticmethod
    def between(name: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            raise ConfigError(f"{name}={value}: must be from {low:g} to {high:g}")
