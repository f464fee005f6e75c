"""Random models on random clusters: what the plan says fits must fit when the ranks' own tensors are allocated.

    python benchmarks/planner/fuzz_memory.py --count 100000 --seed 0

For each plan that fits, every stage's first rank is built by the code that ranks run, on torch's meta device (shapes
without memory), and its tensors, the KV cache and the planned activations and workspace go through a model of the CUDA
caching allocator, rounding and all. Fails with the config if a rank would run out of memory, or if weights or blocks
are not what the plan said.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import PlacementImpossible, ServingError
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.layout import Layout, Traffic
from argosy.placement.model_sources import read_model_shape
from argosy.placement.plan import PlacementPlan
from argosy.placement.plan_report import PlanOptions
from argosy.placement.planner import plan_cluster
from argosy.placement.process_groups import ParallelContext
from argosy.placement.rank_memory import Serving
from argosy.placement.topology_sources import parse_topology
from argosy.workers.kv_cache import KVCache
from argosy.workers.models.registry import build_model

MIB = 2**20
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ARCHITECTURES = ("Llama", "Llama", "Qwen2", "Qwen3", "Mistral", "Mixtral", "Bloom", "OPT", "GPT2")


class Allocator:
    """Bytes that the CUDA caching allocator would take from the device for tensors that all live."""

    def __init__(self) -> None:
        self.reserved = 0
        self._small = self._middle = 0  # free bytes of the open segments

    def take(self, num_bytes: int) -> None:
        """One tensor: sizes in steps of 512 B; small ones share segments of 2 MiB, middle ones of 20 MiB."""
        size = -(-max(num_bytes, 1) // 512) * 512
        if size <= MIB:
            self._small = self._from_segment(size, self._small, 2 * MIB)
        elif size < 10 * MIB:
            self._middle = self._from_segment(size, self._middle, 20 * MIB)
        else:
            self.reserved += -(-size // (2 * MIB)) * 2 * MIB

    def _from_segment(self, size: int, free: int, segment: int) -> int:
        if size > free:
            self.reserved += segment
            free = segment
        return free - size


def draw_model(rng: random.Random) -> dict[str, Any]:
    """A config of a model that could exist."""
    name = rng.choice(ARCHITECTURES)
    heads = rng.choice((4, 8, 12, 16, 32, 40, 64, 96))
    head = rng.choice((64, 80, 128))
    width = heads * head
    kv_heads = rng.choice([n for n in (1, 2, 4, 8, heads) if heads % n == 0])
    layers, inner = rng.randint(1, 6), rng.choice((2, 3, 4)) * width
    vocab, positions = rng.choice((4096, 32_000, 50_257, 128_256, 250_880)), rng.choice((1024, 4096, 32_768))
    tied = rng.random() < 0.5
    if name == "Bloom":
        return {"architectures": ["BloomForCausalLM"], "hidden_size": width, "n_layer": layers, "n_head": heads,
                "vocab_size": vocab, "seq_length": positions, "torch_dtype": "bfloat16"}  # fmt: skip
    if name == "GPT2":
        return {"architectures": ["GPT2LMHeadModel"], "n_embd": width, "n_layer": layers, "n_head": heads,
                "n_positions": positions, "vocab_size": vocab, "torch_dtype": "bfloat16"}  # fmt: skip
    config = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab,
        "max_position_embeddings": positions, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "intermediate_size": inner, "num_key_value_heads": kv_heads, "architectures": [f"{name}ForCausalLM"],
    }  # fmt: skip
    if name == "OPT":
        config |= {"ffn_dim": inner, "num_key_value_heads": heads}
    if name == "Mixtral":
        config |= {"num_local_experts": rng.choice((4, 8, 16)), "num_experts_per_tok": 2}
    if name == "Qwen3":
        config["head_dim"] = rng.choice((64, 128))
    return config


def draw_cluster(rng: random.Random) -> dict[str, Any]:
    """One to four nodes of one to eight cards, some with less memory than their neighbours, some in use by others."""

    def gpu() -> dict[str, Any]:
        found: dict[str, Any] = {"model": rng.choice(("L4", "A10G", "A100-40GB", "H100", "H200"))}
        if rng.random() < 0.7:
            found["memory_gib"] = rng.choice((2, 3, 4, 6, 8, 12, 16, 24))
            if rng.random() < 0.5:
                found["free_gib"] = found["memory_gib"] * rng.uniform(0.4, 1.0)
        return found

    nodes = []
    for number in range(rng.randint(1, 3)):
        alike, count = gpu(), rng.choice((1, 2, 2, 4))
        gpus = [gpu() for _ in range(count)] if rng.random() < 0.2 else [{**alike, "count": count}]
        nodes.append({"name": f"n{number}", "gpus": gpus})
    return {"network": rng.choice(("10Gbit", "100Gbit", "400Gbit")), "nodes": nodes}


def draw_settings(rng: random.Random) -> dict[str, Any]:
    """Settings that decide bytes."""
    rows = rng.choice((1, 8, 64, 256, 1024))
    found: dict[str, Any] = {
        "block_size": rng.choice((1, 8, 16, 32, 128)), "max_num_seqs": rows,
        "max_num_batched_tokens": max(rows, rng.choice((256, 2048, 8192))),
        "gpu_memory_utilization": rng.choice((0.5, 0.9, 0.92, 0.95)),
    }  # fmt: skip
    if rng.random() < 0.3:
        found["max_model_len"] = rng.choice((512, 1024))
    if rng.random() < 0.15:
        found["kv_cache_memory_bytes"] = int(rng.uniform(0.01, 20) * 2**30)
    if rng.random() < 0.1:
        found["num_gpu_blocks_override"] = rng.randint(100, 100_000)
    return found


def check(config: dict[str, Any], cluster: dict[str, Any], settings: dict[str, Any], folder: Path) -> int:
    """Ranks that were proved to fit; 0 when the plan refused. Raises AssertionError when one does not."""
    (folder / "config.json").write_text(json.dumps(config))
    shape = read_model_shape(folder)
    serving_config = ServingConfig.from_mapping({"model": str(folder), **settings})
    serving = Serving.from_config(serving_config, shape)
    topology = parse_topology(cluster)
    try:
        report = plan_cluster(shape, topology, PlanOptions(traffic=Traffic(input_len=128, output_len=64)), serving)
    except PlacementImpossible:
        return 0
    spec = read_model_spec(folder)
    seen = set()  # replicas on devices of the same kinds are the same
    for layout, plan in zip(report.chosen.replicas, report.plan.replicas, strict=True):
        for stage in range(layout.pp_size):
            rank = plan.stage(stage)[0]
            key = (rank.first_layer, rank.last_layer, layout.num_blocks, layout.stages[stage].group.kind)
            if key not in seen:
                seen.add(key)
                _check_rank(spec, serving, layout, plan, stage)
    return len(seen)


def _check_rank(spec: Any, serving: Serving, layout: Layout, plan: PlacementPlan, stage: int) -> None:
    rank, planned = plan.stage(stage)[0], layout.stages[stage]
    memory, gpu = planned.memory, planned.group.gpu
    device = torch.device("meta")
    if spec.moe is not None and layout.tp_size > 1 and spec.moe.intermediate_size % layout.tp_size:
        return  # experts would be dealt out, which is a setting of its own
    model = build_model(spec, rank, ParallelContext(rank, device, 1.0), DTYPES[spec.dtype], device)
    weights = [parameter.nbytes for parameter in model.parameters()]
    assert sum(weights) == memory.weight_bytes, (sum(weights), memory.weight_bytes)
    blocks = layout.num_blocks
    block_bytes = KVCache.block_bytes(spec, rank, serving.block_size, DTYPES[spec.dtype], groups=serving.groups)
    assert block_bytes == memory.block_bytes, (block_bytes, memory.block_bytes)
    allocator = Allocator()
    for size in weights:
        allocator.take(size)
    num_layers = rank.last_layer - rank.first_layer
    for _ in range(2 * num_layers):
        allocator.take(blocks * block_bytes // (2 * num_layers))
    held = allocator.reserved + memory.activation_bytes + memory.workspace_bytes
    assert held <= gpu.usable_bytes, f"stage {stage}: {held} bytes on a device with {gpu.usable_bytes}"


def main() -> int:
    """Draw, check, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first config")
    args = parser.parse_args()
    started, fits, ranks, refused = time.perf_counter(), 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="argosy-fuzz-") as name:
        for number in range(args.start, args.start + args.count):
            rng = random.Random(f"{args.seed}/{number}")
            drawn = draw_model(rng), draw_cluster(rng), draw_settings(rng)
            try:
                proved = check(*drawn, Path(name))
            except (AssertionError, ServingError) as error:
                print(f"case {args.seed}/{number}: {error}\n{json.dumps(drawn)}", file=sys.stderr, flush=True)
                return 1
            fits, ranks, refused = fits + (proved > 0), ranks + proved, refused + (proved == 0)
            if (number + 1) % 5_000 == 0:
                print(f"{number + 1} configs: {fits} fit, {refused} refused", flush=True)
    seconds = round(time.perf_counter() - started, 1)
    found = {"configs": args.count, "fit": fits, "refused": refused, "ranks_allocated": ranks, "out_of_memory": 0}
    print(json.dumps({**found, "seed": args.seed, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
