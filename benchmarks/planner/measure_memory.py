"""Where the bytes of GPU ranks go: the ledgers of whole engines, for several models, layouts, step sizes and shares.

    python benchmarks/planner/measure_memory.py --cases 8b:1x1:8192:1024 8b:2x1:2048:256:0.1219 --output out.jsonl

A case is MODEL:TPxPP:TOKENS:ROWS, with :SHARE of the card's memory (0.92) and :QUANTIZATION behind it. Random weights;
one JSON line a rank; `compare_memory.py` sets them beside what `argosy plan` says.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from argosy.cluster.protocol.errors import ServingError
from argosy.deploy import bench_models, bench_table, launch
from argosy.deploy.offline import LLM

HERE = Path(__file__).resolve().parent
CASES = ("06b:1x1:8192:1024", "8b:1x1:8192:1024", "8b:1x1:2048:256", "8b:1x1:8192:256:0.92:fp8")


def parse(case: str) -> dict[str, Any]:
    """The case in words."""
    model, layout, tokens, rows, *more = case.split(":")
    tp_size, pp_size = map(int, layout.split("x"))
    share = float(more[0]) if more else 0.92
    return {"model": model, "tp_size": tp_size, "pp_size": pp_size, "tokens": int(tokens), "max_rows": int(rows),
            "share": share, "quantization": more[1] if len(more) > 1 else None}  # fmt: skip


def measure(case: dict[str, Any], parent: Path, device: str, max_model_len: int) -> list[dict[str, Any]]:
    """An engine's start; a row for each of its ranks, in order."""
    folder, options = bench_models.make_folder(case["model"], parent)
    file = parent / "ranks.jsonl"
    os.environ["ARGOSY_MEMORY"] = str(file)
    began = time.perf_counter()
    with LLM(
        str(folder), dtype="bfloat16", device=device,
        distributed_executor_backend="local", tensor_parallel_size=case["tp_size"],
        pipeline_parallel_size=case["pp_size"], gpu_memory_utilization=case["share"], max_num_seqs=case["max_rows"],
        max_num_batched_tokens=case["tokens"], max_model_len=max_model_len, max_cuda_graph_batch=case["max_rows"],
        quantization=case["quantization"], **options,
    ) as llm:  # fmt: skip
        took = time.perf_counter() - began
        about = {"gpu": llm._gateway.info.device, "seconds": round(took, 1)}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        {**case, "max_model_len": max_model_len, **row, **about} for row in sorted(rows, key=lambda row: row["rank"])
    ]


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL:TPxPP:TOKENS:ROWS[:SHARE[:QUANTIZATION]]")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch.launch_engine.__kwdefaults__["rank_module"] = "measured_rank"
    failed = 0
    for case in map(parse, args.cases):
        with tempfile.TemporaryDirectory(prefix="argosy-memory-") as parent:
            try:
                rows = measure(case, Path(parent), args.device, args.max_model_len)
            except ServingError as error:
                print(f"{case}: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
        for row in rows:
            bench_table.tell(row, args.output)
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
