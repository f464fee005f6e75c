"""As `argosy bench --model 8b`, with the switches of those who tune: layers of stages, a trace of the rank's steps.

    python benchmarks/gpu/bench_gpu.py --model 06b --workload decode1 decode8 decode64 decode256 fixed512x256 chat1000

Random weights of the published shapes, greedy, no end-of-sequence; one JSON line a figure, a table last. In process:
a driver and its ranks without Ray, unless `--backend ray`.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from argosy.deploy import bench, bench_engine, bench_models, bench_table, launch
from argosy.deploy.offline import LLM

SHAPES, COMMON = bench_models.GPU_SHAPES, bench_models.GPU_COMMON


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="06b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", help="round the weights, such as fp8 or fp8_block")
    parser.add_argument("--kv-cache-dtype", default="auto", help="such as fp8_e4m3")
    parser.add_argument("--workload", nargs="+", default=["decode1", "decode8", "decode64", "decode256"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-layers", type=int, nargs="+", default=[], help="layers of each stage")
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--cpu-offload-gb", type=float, default=0.0, help="of each rank's weights, on the host")
    parser.add_argument("--backend", default="local", choices=("local", "ray"))
    parser.add_argument("--note", default="")
    parser.add_argument("--trace", help="write what the rank's host did in each step to this file (local backend)")
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    about = {key: value for key, value in bench.describe_machine().items() if key != "cores"}
    layout = f"TP{args.tensor_parallel_size}" + (
        f"xPP{args.pipeline_parallel_size}" if args.pipeline_parallel_size > 1 else ""
    )
    numbers = "fp8" if (args.quantization or "").startswith("fp8") else args.dtype
    group = bench_table.name_of(args.model, numbers, layout)
    if args.trace:
        os.environ["ARGOSY_TRACE"] = os.path.abspath(args.trace)
        launch.launch_engine.__kwdefaults__["rank_module"] = "traced_rank"
    rows = []
    with tempfile.TemporaryDirectory(prefix="argosy-bench-") as parent:
        folder, options = bench_models.make_folder(args.model, Path(parent))
        started = time.perf_counter()
        with LLM(
            str(folder), **options, dtype=args.dtype,
            quantization=args.quantization, kv_cache_dtype=args.kv_cache_dtype,
            distributed_executor_backend=args.backend, tensor_parallel_size=args.tensor_parallel_size,
            pipeline_parallel_size=args.pipeline_parallel_size, pipeline_layers=tuple(args.pipeline_layers),
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens, max_model_len=args.max_model_len,
            max_cuda_graph_batch=args.max_num_seqs, enforce_eager=args.enforce_eager,
            cpu_offload_gb=args.cpu_offload_gb,
        ) as llm:  # fmt: skip
            print(f"engine ready after {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
            for name in args.workload:
                row: dict[str, object] = {
                    "group": group,
                    "model": args.model,
                    "dtype": args.dtype,
                    "layout": layout,
                    "note": args.note,
                }
                row |= {"quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype}
                row |= {**bench_engine.measure(llm, name, SHAPES[args.model]["vocab_size"], args.repeats), **about}
                rows.append(row)
                bench_table.tell(row, args.output)
    print("\n" + bench_table.comparison(rows, bench_table.read_suite("h200")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
