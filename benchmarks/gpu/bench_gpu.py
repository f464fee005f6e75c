"""Decode step times and throughput on a GPU, beside what vLLM 0.24 did with the same requests on an H200.

    python benchmarks/gpu/bench_gpu.py --model 06b --workload decode1 decode8 decode64 decode256 fixed512x256 chat1000

Random weights of the published shapes, greedy, no end-of-sequence; one JSON line a figure, a table last. In process:
a driver and its ranks without Ray, unless `--backend ray`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from argosy.deploy import bench, launch, workload
from argosy.deploy.offline import LLM

SHAPES = {
    "06b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    },
    "8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336,
        "vocab_size": 128256, "tie_word_embeddings": False, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    },
    "70b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 28672,
        "vocab_size": 128256, "tie_word_embeddings": False, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
COMMON = {
    "hidden_act": "silu", "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.02, "torch_dtype": "bfloat16", "attention_bias": False,
}  # fmt: skip
PEERS = Path(__file__).with_name("peers_h200.json")


def measure(llm: LLM, name: str, vocab: int, repeats: int) -> dict[str, object]:
    """Medians of one workload: ms a step for decode<batch>, output tokens a second for the others."""
    figures, ttft = [], []
    for repeat in range(-1, repeats):  # the first one warms up
        if name.startswith("decode"):
            requests = workload.decode(int(name.removeprefix("decode")), vocab=vocab, salt=repeat + 7)
        else:
            requests = workload.make(name, vocab=vocab, salt=repeat + 7)
        seconds, outputs = bench._run_engine(llm, requests)
        timings = [o.metrics for o in outputs]
        if repeat < 0:
            continue
        ttft += [t.first_token_latency for t in timings]
        if name.startswith("decode"):
            # all rows decode together between the last first token and the first last token
            steps = [(t.last_token_ts - t.first_token_ts) / (t.num_generation_tokens - 1) for t in timings]
            figures.append(1e3 * statistics.median(steps))
        else:
            figures.append(sum(r.max_tokens for r in requests) / seconds)
    return {
        "workload": name,
        "figure": round(statistics.median(figures), 4),
        "spread": [round(min(figures), 4), round(max(figures), 4)],
        "unit": "ms/step" if name.startswith("decode") else "output tokens/s",
        "ttft_ms_p50": round(1e3 * statistics.median(ttft), 2),
        "repeats": repeats,
        "digest": workload.digest(requests),
    }


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
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--enforce-eager", action="store_true")
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
    peers = json.loads(PEERS.read_text()).get(f"{args.model} {numbers} {layout}", {})
    if args.trace:
        os.environ["ARGOSY_TRACE"] = os.path.abspath(args.trace)
        launch.launch_engine.__kwdefaults__["rank_module"] = "traced_rank"
    rows = []
    with tempfile.TemporaryDirectory(prefix="argosy-bench-") as folder:
        Path(folder, "config.json").write_text(json.dumps({**COMMON, **SHAPES[args.model]}))
        started = time.perf_counter()
        with LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, dtype=args.dtype,
            quantization=args.quantization, kv_cache_dtype=args.kv_cache_dtype,
            distributed_executor_backend=args.backend, tensor_parallel_size=args.tensor_parallel_size,
            pipeline_parallel_size=args.pipeline_parallel_size, pipeline_layers=tuple(args.pipeline_layers),
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens, max_model_len=args.max_model_len,
            max_cuda_graph_batch=args.max_num_seqs, enforce_eager=args.enforce_eager,
        ) as llm:  # fmt: skip
            print(f"engine ready after {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
            for name in args.workload:
                row = {"model": args.model, "dtype": args.dtype, "layout": layout, "note": args.note}
                row |= {"quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype}
                row.update(measure(llm, name, SHAPES[args.model]["vocab_size"], args.repeats))
                row.update(about)
                rows.append(row)
                print(json.dumps(row), flush=True)
                if args.output:
                    with open(args.output, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    packed = args.quantization or args.dtype
    print(f"\n{args.model} {packed} {layout}: figure, vLLM's, goal, times vLLM (above 1 is faster)")
    for row in rows:
        vllm, goal = peers.get(row["workload"], (None, None))
        ratio = ""
        if vllm:
            ratio = f"{vllm / row['figure'] if row['unit'] == 'ms/step' else row['figure'] / vllm:.2f}x"
        print(f"{row['workload']:14} {row['figure']:>10} {row['unit']:16} {vllm!s:>8} {goal!s:>8} {ratio}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
