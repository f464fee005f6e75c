"""Prompts that come one by one beside rows that decode, over pipeline stages: how large their pieces had better be.

    python benchmarks/gpu/bench_pieces.py --model 8b -tp 2 -pp 2 --max-num-seqs 128 --pieces as-ever now 64x4

One engine whose places are all taken: more requests with the lengths of a chat's (`chat1000`) than it has places for,
so that a new one begins whenever one ends. Each of `--pieces` is the least number of tokens beside rows that decode,
and how many pieces a stage has of what waits (`cluster/micro_batches.py`); `now` is what the scheduler does, `as-ever`
what it once did: it counted all that wait, not only those that find a place. All of them in turn, and again in the
opposite order. One JSON line each.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from bench_gpu import COMMON, SHAPES

from argosy.deploy import bench_engine, workload
from argosy.deploy.offline import LLM

AS_EVER, NOW = "as-ever", "now"
# Python runs it in each process of the engine; the driver's looks at the file before each step with prompts
HOOK = """
import os
from argosy.cluster import micro_batches, waiting_queue
_count, _budget = waiting_queue.WaitingQueue.num_uncomputed_tokens, micro_batches.MicroBatches.prompt_budget
NAMES = ("SMALL_PIECE", "PIECES_PER_STAGE")
_now = [getattr(micro_batches, name) for name in NAMES]
_places = [False]
def budget(self, num_prompt_tokens, num_decoding):
    with open(os.environ["ARGOSY_PIECES"]) as file:
        pieces = file.read().strip()
    _places[0] = pieces == "as-ever"
    least = [] if pieces == "now" else [512, 2] if _places[0] else list(map(int, pieces.split("x")))
    for name, value in zip(NAMES, least + _now[len(least):]):
        setattr(micro_batches, name, value)
    return _budget(self, num_prompt_tokens, num_decoding)
def count(self, most, num_places):
    return _count(self, most, 1 << 30 if _places[0] else num_places)
waiting_queue.WaitingQueue.num_uncomputed_tokens, micro_batches.MicroBatches.prompt_budget = count, budget
"""


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="8b")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=2)
    parser.add_argument("--pipeline-layers", type=int, nargs="+", default=[])
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--pieces", nargs="+", default=[AS_EVER, NOW, "64x4"])
    args = parser.parse_args()
    vocab = SHAPES[args.model]["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="argosy-pieces-") as folder:
        Path(folder, "config.json").write_text(json.dumps({**COMMON, **SHAPES[args.model]}))
        Path(folder, "sitecustomize.py").write_text(HOOK)
        chosen = Path(folder, "pieces")
        chosen.write_text(args.pieces[0])
        os.environ["ARGOSY_PIECES"] = str(chosen)
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        with LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            distributed_executor_backend="local", tensor_parallel_size=args.tensor_parallel_size,
            pipeline_parallel_size=args.pipeline_parallel_size, pipeline_layers=tuple(args.pipeline_layers),
            max_num_seqs=args.max_num_seqs, max_num_batched_tokens=8192, max_model_len=4096,
        ) as llm:  # fmt: skip
            bench_engine.run(llm, workload.lognormal(args.requests // 2, vocab=vocab, seed=2, salt=1))
            for turn, pieces in enumerate([*args.pieces, *args.pieces[::-1]]):
                chosen.write_text(pieces)
                requests = workload.lognormal(args.requests, vocab=vocab, seed=2, salt=2 + turn)
                seconds, outputs = bench_engine.run(llm, requests)
                times = [o.metrics for o in outputs if o.metrics is not None and o.metrics.num_generation_tokens > 1]
                gaps = [(t.last_token_ts - t.first_token_ts) / (t.num_generation_tokens - 1) for t in times]
                row = {
                    "model": args.model,
                    "layout": f"TP{args.tensor_parallel_size}xPP{args.pipeline_parallel_size}",
                    "max_num_seqs": args.max_num_seqs,
                    "pieces": pieces,
                    "turn": turn,
                    "tokens_per_second": round(sum(r.max_tokens for r in requests) / seconds, 1),
                    "ms_per_token_p50": round(1e3 * statistics.median(gaps), 3),
                    "ms_per_token_p95": round(1e3 * sorted(gaps)[len(gaps) * 95 // 100], 3),
                    "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
                }
                print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
