"""Where a GPU rank's bytes go, beside what `argosy plan` predicts: the ledger for several models and step sizes.

    python benchmarks/planner/measure_memory.py --model 06b 8b --steps 8192:512 2048:256 --output out.jsonl

Random weights, one rank in this process (no driver); one JSON line a combination. With `--pair` also the blocks that a
whole engine of one and of two ranks gets when its memory is capped (the super-linear row).
"""

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
from bench_gpu import COMMON, SHAPES

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.placement.plan import make_plan
from argosy.placement.process_groups import ParallelContext
from argosy.workers.device import DeviceMemory
from argosy.workers.memory import MemoryLedger, measure_num_blocks, warm_up_shapes
from argosy.workers.model_runner import ModelRunner


def measure(folder: str, model: str, tokens: int, rows: int) -> dict[str, object]:
    """One rank's ledger, and what is in use once graphs are recorded."""
    device = torch.device("cuda", 0)
    config = ServingConfig.from_mapping(
        {
            "model": folder, "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 4096,
            "max_num_batched_tokens": tokens, "max_num_seqs": rows, "max_cuda_graph_batch": rows,
        }
    )  # fmt: skip
    ledger = MemoryLedger(meter=DeviceMemory(device))
    ledger.mark("context", outside="context")
    spec = read_model_spec(folder)
    rank = make_plan(spec.num_layers, 1, 1).ranks[0]
    parallel = ParallelContext(rank, device, 60.0)
    runner = ModelRunner(config, spec, parallel, device=device, dtype=torch.bfloat16, cache_dtype=torch.bfloat16)
    ledger.mark("buffers")
    runner.load(Path(folder), None)
    ledger.mark("weights", outside="workspace")
    blocks = measure_num_blocks(runner, ledger)
    runner.allocate(blocks)
    ledger.mark("kv")
    runner.warm_up(warm_up_shapes(runner))
    ledger.mark("workspace")
    runner.record_graphs()
    ledger.mark("graphs", outside="graphs")
    row = {
        "model": model, "tokens": tokens, "rows": rows, "blocks": blocks, "block_bytes": runner.block_bytes,
        "activation_bytes": ledger.activation_bytes, "graph_bytes": ledger.graph_bytes, "room": ledger.room_bytes,
        "ledger": ledger.entries(), "gpu": torch.cuda.get_device_name(device),
    }  # fmt: skip
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    return row


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["06b"], choices=sorted(SHAPES))
    parser.add_argument("--steps", nargs="*", default=["8192:512", "2048:256"], help="token budget : rows")
    parser.add_argument("--pair", metavar="SHARE", type=float, help="memory share of one and of two ranks of 8b")
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()

    def tell(row: dict[str, object]) -> None:
        print(json.dumps(row), flush=True)
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    for model in args.model:
        with tempfile.TemporaryDirectory(prefix="argosy-memory-") as folder:
            Path(folder, "config.json").write_text(json.dumps({**COMMON, **SHAPES[model]}))
            for step in args.steps:
                tokens, rows = map(int, step.split(":"))
                tell(measure(folder, model, tokens, rows))
            if args.pair and model == "8b":
                for tp_size in (1, 2):
                    tell(_engine_blocks(folder, tp_size, args.pair))
    return 0


def _engine_blocks(folder: str, tp_size: int, share: float) -> dict[str, object]:
    from argosy.deploy.offline import LLM

    with LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", distributed_executor_backend="local",
        tensor_parallel_size=tp_size, gpu_memory_utilization=share, max_num_seqs=256, max_num_batched_tokens=8192,
        max_model_len=4096,
    ) as llm:  # fmt: skip
        return {"pair": f"TP{tp_size}", "share": share, "blocks": llm._gateway.info.num_blocks}


if __name__ == "__main__":
    raise SystemExit(main())
