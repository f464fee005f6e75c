"""What the numbers of the KV cache do to decode steps: `python benchmarks/gpu/bench_kv.py --kind auto int8`.

An engine of random weights for each kind of cache: how many blocks it has, milliseconds a step with rows of a context
(the prompts lie in the prefix cache, so all rows decode together from the first step on), and fixed512x256. One JSON
line a figure, a table beside the first kind last.
"""

import argparse
import gc
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from argosy.cluster.protocol.ledger import describe_ledger
from argosy.deploy import bench, bench_engine, bench_models, bench_table, workload
from argosy.deploy.offline import LLM

NUM_NEW = 65
Row = dict[str, object]


def decode(llm: LLM, rows: int, context: int, vocab: int) -> tuple[float, float]:
    """(milliseconds a step, output tokens a second) of so many rows around this context."""
    prompts = workload.fixed(rows, context - NUM_NEW // 2, 1, vocab=vocab, seed=9)
    bench_engine.run(llm, prompts)
    longer = [workload.WorkloadRequest(r.index, r.prompt, NUM_NEW) for r in prompts]
    bench_engine.run(llm, longer[: max(1, rows // 8)])
    seconds, outputs = bench_engine.run(llm, longer)
    gaps = [
        (t.last_token_ts - t.first_token_ts) / (t.num_generation_tokens - 1)
        for t in (output.metrics for output in outputs)
        if t is not None
    ]
    return 1e3 * statistics.median(gaps), rows * NUM_NEW / seconds


def measure(kind: str, folder: Path, options: Mapping[str, Any], args: argparse.Namespace) -> list[Row]:
    """All figures of one kind of cache."""
    vocab = bench_models.vocab_size(folder)
    found: list[Row] = []
    with LLM(
        str(folder), **options, dtype=args.dtype, device=args.device,
        quantization=args.quantization, kv_cache_dtype=kind, distributed_executor_backend="local",
        max_num_seqs=args.max_num_seqs, max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len, kv_cache_memory_bytes=args.kv_cache_memory_bytes,
    ) as llm:  # fmt: skip
        num_blocks = llm._engine.info.num_blocks
        print(kind, describe_ledger(llm._engine.ranks[0].ledger), flush=True)
        found.append({"workload": "blocks", "figure": num_blocks, "unit": "blocks"})
        for case in args.decode:
            rows, context = map(int, case.split("x"))
            if rows * context <= num_blocks * llm._engine.info.block_size:
                step, rate = decode(llm, rows, context, vocab)
                name = f"{rows} rows at {context}"
                found.append({"workload": name, "figure": round(step, 3), "unit": "ms/step", "tokens/s": round(rate)})
                print(kind, found[-1], flush=True)
        for name in args.workload:
            llm.reset_prefix_cache()
            found.append(bench_engine.measure(llm, name, vocab, args.repeats))
            print(kind, found[-1], flush=True)
    return [{"model": args.model, "quantization": args.quantization, "kv_cache_dtype": kind, **row} for row in found]


def main() -> int:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", default=["auto", "int8", "fp8_scaled", "fp8"], help="of cache")
    parser.add_argument("--model", choices=sorted(bench_models.GPU_SHAPES), default="8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantization", help="of the weights, such as fp8")
    parser.add_argument("--decode", nargs="*", default=["64x1024", "64x4096", "256x1024"], metavar="ROWSxCONTEXT")
    parser.add_argument("--workload", nargs="*", default=["fixed512x256"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--kv-cache-memory-bytes", type=int)
    parser.add_argument("--output", help="append the JSON lines to this file")
    args = parser.parse_args()
    about = {key: value for key, value in bench.describe_machine().items() if key != "cores"}
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="argosy-bench-") as parent:
        folder, options = bench_models.make_folder(args.model, Path(parent))
        for kind in args.kind:
            for row in measure(kind, folder, options, args):
                figures.setdefault(str(row["workload"]), {})[kind] = float(str(row["figure"]))
                bench_table.tell({**row, **about}, args.output)
            gc.collect()
    print(f"\n{'':22}" + "".join(f"{kind:>24}" for kind in args.kind))
    for name, row_figures in figures.items():
        first = row_figures[args.kind[0]]
        cells = (f"{figure:,.6g} ({figure / first:.3f}x)" for figure in row_figures.values())
        print(f"{name:22}" + "".join(f"{cell:>24}" for cell in cells))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
