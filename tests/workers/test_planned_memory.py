"""What the plan says of bytes and blocks, beside what real ranks measure and allocate on a CPU."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.kv_groups import kv_groups
from argosy.cluster.protocol.model_spec import KV_SCALE_BYTES, read_model_spec
from argosy.placement import rank_memory as planned
from argosy.placement.calibration import default_calibration
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan import RankInfo, make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.placement.rank_memory import Serving, StageBytes
from argosy.placement.stage_transport import StageTransport
from argosy.placement.step_memory import SHARED_UNIT, SMALL_SUM_BYTES, group_bytes
from argosy.placement.topology import Gpu
from argosy.placement.uneven import layers_for, stage_memory
from argosy.workers import memory
from argosy.workers.kv_cache import KVCache
from argosy.workers.layers.group_sum import GroupSum
from argosy.workers.loading.stream import load_weights
from argosy.workers.long_steps import LongSteps, slice_tokens_of
from argosy.workers.memory import MemoryLedger, measure_num_blocks
from argosy.workers.models.group_forward import HALF_MULTIPLE
from argosy.workers.models.registry import build_model

BASE = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 211, "max_position_embeddings": 256}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "llama_wide": {"architectures": ["LlamaForCausalLM"], "hidden_size": 256, "head_dim": 128,
                   "intermediate_size": 384},
    "llama_tied": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "llama_biased": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "mistral_window": {"architectures": ["MistralForCausalLM"], "sliding_window": 32},
    "qwen2_window": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 32,
                     "max_window_layers": 2},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 20, "sliding_window_pattern": 3,
               "head_dim": 16, "query_pre_attn_scalar": 16},
    "bloom": {"architectures": ["BloomForCausalLM"], "n_layer": 6, "n_head": 4},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 6, "n_head": 4, "n_positions": 256},
    "opt": {"architectures": ["OPTForCausalLM"], "ffn_dim": 96},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
}  # fmt: skip
# model, settings, TP, layers of each stage
LAYOUTS: list[tuple[str, dict[str, Any], int, tuple[int, ...]]] = [
    ("llama", {}, 1, (6,)),
    ("llama", {"block_size": 32}, 2, (6,)),
    (
        "llama",
        {
            "max_num_batched_tokens": 512,
            "max_num_seqs": 8,
            "activation_offload_gb": "auto",
            "activation_slice_tokens": 16,
        },
        1,
        (6,),
    ),
    ("llama", {"dtype": "bfloat16"}, 4, (6,)),  # more ranks than key/value heads
    ("llama", {"kv_cache_memory_bytes": 1_000_003}, 2, (4, 2)),
    ("llama_tied", {}, 1, (2, 4)),
    ("llama_tied", {"max_num_seqs": 3, "max_model_len": 65}, 2, (3, 3)),  # bounded by what can be used
    ("llama_biased", {"kv_cache_memory_bytes": 777_777}, 2, (6,)),
    ("qwen2", {"block_size": 1}, 2, (1, 2, 3)),
    ("qwen3", {"dtype": "bfloat16", "kv_cache_dtype": "float32"}, 2, (5, 1)),
    ("qwen3", {"dtype": "bfloat16", "kv_cache_dtype": "int8"}, 4, (6,)),  # a scale for each copy of a head
    ("llama", {"kv_cache_dtype": "fp8_scaled", "kv_cache_memory_bytes": 777_777}, 2, (4, 2)),
    ("mistral_window", {"num_gpu_blocks_override": 77}, 1, (6,)),
    ("mistral_window", {"max_num_seqs": 3, "max_num_batched_tokens": 50}, 1, (6,)),  # bounded by windows and chunks
    (
        "qwen2_window",
        {"kv_cache_memory_bytes": 777_777},
        2,
        (1, 3, 2),
    ),  # kinds of layers apart
    ("gemma3", {"kv_cache_memory_bytes": 777_777, "block_size": 8}, 1, (4, 2)),
    ("gemma3", {"max_num_seqs": 3, "max_num_batched_tokens": 50, "block_size": 4}, 2, (6,)),
    ("bloom", {"kv_cache_memory_bytes": 500_000}, 2, (2, 4)),
    ("gpt2", {"kv_cache_memory_bytes": 500_000}, 4, (6,)),
    ("opt", {"kv_cache_memory_bytes": 500_000}, 2, (3, 3)),
    ("mixtral", {"kv_cache_memory_bytes": 500_000}, 2, (6,)),
    ("qwen3_moe", {"kv_cache_memory_bytes": 500_000}, 2, (4, 2)),
]


def folder_of(tmp_path: Path, model: str) -> Path:
    """A folder with that model's config and no weights."""
    folder = tmp_path / model
    folder.mkdir()
    dtype = {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**BASE, **dtype, **MODELS[model]}))
    return folder


class RealRank:
    """What `measure_num_blocks` asks of a rank: its part of the model with real (empty) weights, and no neighbours."""

    def __init__(self, folder: Path, settings: dict[str, Any], rank: RankInfo):
        self.config = ServingConfig.from_mapping({"model": str(folder), "device": "cpu", **settings})
        self.spec, self.rank, self.device = read_model_spec(folder), rank, torch.device("cpu")
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        dtypes |= {"int8": torch.int8, "fp8_scaled": torch.float8_e4m3fn}
        dtype = self.config.model.dtype if self.config.model.dtype != "auto" else self.spec.dtype
        self.dtype = dtypes[dtype]
        self.cache_dtype = dtypes.get(self.config.cache.kv_cache_dtype, self.dtype)
        self.max_model_len = self.config.model.max_model_len or self.spec.max_position
        parallel = ParallelContext(rank, self.device, 5.0)
        self.model = build_model(self.spec, rank, parallel, self.dtype, self.device)
        scheduler, width = self.config.scheduler, self.spec.hidden_size
        slice_tokens = slice_tokens_of(self.config, self.model, width * self.dtype.itemsize)
        self.most_tokens = max(slice_tokens or scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
        self.long_steps = None
        if slice_tokens is not None:
            self.long_steps = LongSteps(
                self.model, rank, StageTransport(parallel, width, self.dtype, timeout_seconds=1.0),
                slice_tokens=slice_tokens, max_tokens=scheduler.max_num_batched_tokens, width=width, dtype=self.dtype,
                device=self.device,
            )  # fmt: skip
        block_size = self.config.cache.block_size
        self.kv_groups = kv_groups(self.spec, self.max_model_len)
        self.cache_scales = self.config.cache.kv_cache_dtype in KV_SCALE_BYTES
        self.block_bytes = KVCache.block_bytes(
            self.spec, rank, block_size, self.cache_dtype, groups=self.kv_groups, scaled=self.cache_scales
        )

    def measure(self) -> int:
        """Blocks that there is room for, by the worker's own rules."""
        return measure_num_blocks(self, MemoryLedger())  # type: ignore[arg-type]  # as much of a runner as it asks for

    def allocated_bytes(self, num_blocks: int) -> int:
        """Bytes of the tensors behind so many blocks."""
        block_size = self.config.cache.block_size
        cache = KVCache.allocate(
            self.spec,
            self.rank,
            num_blocks,
            block_size,
            self.cache_dtype,
            self.device,
            groups=self.kv_groups,
            scaled=self.cache_scales,
        )
        return cache.num_bytes


@pytest.mark.parametrize(("model", "settings", "tp_size", "layers"), LAYOUTS)
def test_blocks_and_weights_are_what_the_plan_said(
    tmp_path: Path, model: str, settings: dict[str, Any], tp_size: int, layers: tuple[int, ...]
) -> None:
    """Every stage's first rank: weights to the byte, the size of a block, and how many of them it has room for."""
    folder = folder_of(tmp_path, model)
    plan = make_plan(6, tp_size, len(layers), layers)
    shape = read_model_shape(folder)
    config = ServingConfig.from_mapping({"model": str(folder), **settings})
    sizes = StageBytes(shape, Serving.from_config(config, shape))
    for pp_rank in range(len(layers)):
        rank = plan.stage(pp_rank)[0]
        real = RealRank(folder, settings, rank)
        blocks = real.measure()
        gpu = Gpu(index=0, model="CPU", memory_bytes=psutil.virtual_memory().available)
        said = planned.rank_memory(
            sizes, default_calibration("CPU"), gpu, tp_size=tp_size, pp_size=len(layers),
            first_layer=rank.first_layer, last_layer=rank.last_layer,
        )  # fmt: skip
        assert said.weight_bytes == sum(parameter.nbytes for parameter in real.model.parameters())
        assert said.block_bytes == real.block_bytes
        assert said.num_blocks == blocks
        assert said.kv_bytes == real.allocated_bytes(blocks)


def test_a_cpu_gives_the_cache_the_same_share_in_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing bounds it but the machine: 0.3 of what is available, 4 GiB at most, over the ranks."""
    assert memory.CPU_CACHE_BYTES == planned.CPU_CACHE_BYTES
    assert memory.CPU_CACHE_FRACTION == planned.CPU_CACHE_FRACTION
    assert memory.MIN_SLACK == planned.MIN_SLACK
    folder = folder_of(tmp_path, "llama")
    shape = read_model_shape(folder)
    config = ServingConfig.from_mapping({"model": str(folder), "max_num_seqs": 256})
    sizes = StageBytes(shape, Serving.from_config(config, shape))
    for available in (30_000_000, 100_000_001):

        class Machine:
            available = 0

        Machine.available = available
        monkeypatch.setattr(memory.psutil, "virtual_memory", Machine)
        rank = make_plan(6, 2, 2).stage(0)[0]
        blocks = RealRank(folder, {"max_num_seqs": 256}, rank).measure()
        gpu = Gpu(index=0, model="CPU", memory_bytes=available)
        said = planned.rank_memory(
            sizes, default_calibration("CPU"), gpu, tp_size=2, pp_size=2, first_layer=0, last_layer=rank.last_layer
        )
        assert said.num_blocks == blocks > 0


@pytest.mark.parametrize("quantization", ["fp8", "fp8_per_tensor", "fp8_block"])
def test_packed_weights_are_counted_to_the_byte(tmp_path: Path, quantization: str) -> None:
    """Scales included, on one rank (over several, blocks that a cut goes through keep their scale on both sides)."""
    folder = folder_of(tmp_path, "llama_wide")  # parts of products begin where blocks do, as in real models
    spec = read_model_spec(folder, quantization=quantization)
    rank = make_plan(6, 1, 1).ranks[0]
    device = torch.device("cpu")
    model = build_model(spec, rank, ParallelContext(rank, device, 5.0), torch.bfloat16, device)
    shape = read_model_shape(folder)
    config = ServingConfig.from_mapping({"model": str(folder), "dtype": "bfloat16", "quantization": quantization})
    sizes = StageBytes(shape, Serving.from_config(config, shape))
    said, held = sizes.stage_bytes(1, 0, 6), sum(parameter.nbytes for parameter in model.parameters())
    assert held == said


@pytest.mark.parametrize("quantization", ["fp8", "int8", "int4"])
def test_a_cpu_is_foretold_the_plain_weights_that_it_makes_of_packed_ones(tmp_path: Path, quantization: str) -> None:
    folder = folder_of(tmp_path, "llama_wide")
    spec = read_model_spec(folder, quantization=quantization)
    rank, device = make_plan(6, 1, 1).ranks[0], torch.device("cpu")
    model = build_model(spec, rank, ParallelContext(rank, device, 5.0), torch.float32, device)
    load_weights(model, folder, spec, load_format="dummy")
    held = sum(parameter.nbytes for parameter in model.parameters())
    sizes = StageBytes(read_model_shape(folder), Serving.from_config(
        ServingConfig.from_mapping({"model": str(folder), "dtype": "float32", "quantization": quantization}),
        read_model_shape(folder),
    ))  # fmt: skip
    gpu = Gpu(index=0, model="CPU", memory_bytes=psutil.virtual_memory().available)
    layout = {"tp_size": 1, "pp_size": 1, "first_layer": 0, "last_layer": 6}
    said = planned.rank_memory(sizes, default_calibration("CPU"), gpu, **layout)
    assert said.weight_bytes == held > sizes.stage_bytes(1, 0, 6)


def test_a_rank_of_half_the_memory_does_not_cut_the_other(tmp_path: Path) -> None:
    """Two stages, one capped to half: the split by room uses 97 % of both, and has 1.4 times an even split's blocks."""
    folder = tmp_path / "llama"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], **BASE, "num_hidden_layers": 60, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"stage_memory_gb": (64 / 1024, 32 / 1024), "pipeline_parallel_size": 2, "max_num_seqs": 256}
    shape = read_model_shape(folder)
    serving = ServingConfig.from_mapping({"model": str(folder), **settings})
    gpus = [Gpu(index=0, model="CPU", memory_bytes=psutil.virtual_memory().available)] * 2
    layers = layers_for(serving, shape, gpus)
    found = {}
    for split in (layers, (30, 30)):
        plan = make_plan(60, 1, 2, split)
        ranks = [RealRank(folder, settings, rank) for rank in plan.ranks]
        blocks = [real.measure() for real in ranks]
        sizes = StageBytes(shape, Serving.from_config(serving, shape))
        said = [
            stage_memory(sizes, gpus[0], 1, 2, rank.pp_rank, rank.first_layer, rank.last_layer) for rank in plan.ranks
        ]
        assert [one.num_blocks for one in said] == blocks
        used = [
            one.weight_bytes + one.activation_bytes + min(blocks) * real.block_bytes
            for one, real in zip(said, ranks, strict=True)
        ]
        found[split] = min(blocks), [size / cap for size, cap in zip(used, serving.stage_memory_bytes, strict=True)]
    assert layers[0] > 30 > layers[1]
    assert min(found[layers][1]) >= 0.97, found
    assert found[layers][0] >= 1.4 * found[30, 30][0], found


@pytest.mark.parametrize(
    ("tp_size", "tokens", "rows"), [(2, 8192, 1024), (2, 2048, 256), (4, 8192, 1024), (8, 512, 64)]
)
def test_what_a_group_opens_for_its_cards_is_planned(tp_size: int, tokens: int, rows: int) -> None:
    """The buffer of a real `GroupSum`, whose cards are asked for nothing but its size; rounded up as drivers do."""
    asked: list[int] = []

    def shared_buffer(num_bytes: int) -> Any:
        asked.append(num_bytes)
        return SimpleNamespace(local=torch.zeros(1, dtype=torch.uint8))

    parallel: Any = SimpleNamespace(
        rank=SimpleNamespace(tp_rank=0), tp_size=tp_size, device=torch.device("cpu"), shared_buffer=shared_buffer
    )
    GroupSum(parallel, max_tokens=tokens, width=4096, max_rows=rows, dtype=torch.bfloat16)
    staged = (tp_size - 1) * -(-(tokens // 2 + HALF_MULTIPLE) // tp_size) * 4096 * 2
    opened = group_bytes(tokens, 4096, rows, tp_size=tp_size, dtype_bytes=2) - SMALL_SUM_BYTES - staged
    assert 0 <= opened - asked[0] < 2 * SHARED_UNIT
