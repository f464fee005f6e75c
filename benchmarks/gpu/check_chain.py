"""One request with and without the chain of a layer's products (`kernels/layer_chain`): what it says, and how fast.

    python benchmarks/gpu/check_chain.py --model 8b -tp 2

Weights are random, so two tokens may be as likely within the rounding of 16 bits: from there on answers differ, and
are compared no further. Until then log probabilities must differ no more than they do between one row and two of a
kind, which other kernels multiply. One JSON line; exit code 1 where they do.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from argosy import LLM, SamplingParams
from argosy.deploy import bench_models

PROMPTS, NEW = 6, 24


def main() -> int:
    """Without, twice, then with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=2)
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=1)
    parser.add_argument(
        "--ways", nargs="+", default=["0", "0x2", "1"],
        help="ARGOSY_LAYER_CHAIN of each run, x2: two of a kind at a time; others are compared with the first",
    )  # fmt: skip
    args = parser.parse_args()
    said, steps = [], []
    with tempfile.TemporaryDirectory() as parent:
        folder, options = bench_models.make_folder(args.model, Path(parent))
        prompts = [[3 + (7 * n + 13 * i) % 1000 for i in range(20 + 30 * n)] for n in range(PROMPTS)]
        for way in args.ways:
            chain, _, copies = way.partition("x")
            os.environ["ARGOSY_LAYER_CHAIN"] = chain
            with LLM(
                str(folder), **options, dtype="bfloat16", distributed_executor_backend="mp", max_model_len=4096,
                tensor_parallel_size=args.tensor_parallel_size, pipeline_parallel_size=args.pipeline_parallel_size,
                max_num_seqs=8,
            ) as llm:  # fmt: skip
                short = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=0)
                times, each = [], int(copies or 1)
                answers = [llm.generate([prompt] * each, short, use_tqdm=False)[0].outputs[0] for prompt in prompts]
                said.append(
                    [(list(a.token_ids), [next(iter(p.values())).logprob for p in a.logprobs]) for a in answers]
                )
                long = SamplingParams(temperature=0.0, max_tokens=257, ignore_eos=True, detokenize=False)
                for _ in range(4):
                    found = llm.generate([prompts[3][:128]], long, use_tqdm=False)[0].metrics
                    times.append(1e3 * (found.last_token_ts - found.first_token_ts) / 256)
                steps.append(round(statistics.median(times[1:]), 4))
            print(f"ARGOSY_LAYER_CHAIN={way}: {steps[-1]} ms a step", flush=True)
    differences: list[float] = []
    alike, far = [], []
    for others in said[1:]:
        found = []
        for (one, of_one), (other, of_other) in zip(said[0], others, strict=True):
            same = next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), NEW)
            alike.append(same)
            found += [abs(a - b) for a, b in zip(of_one[: same + 1], of_other[: same + 1], strict=True)]
        far.append(round(statistics.mean(found), 4))
        differences += found
    worst = max(differences)
    layout = f"TP{args.tensor_parallel_size}xPP{args.pipeline_parallel_size}"
    row = {"check": "layer_chain", "model": args.model, "layout": layout, "ways": args.ways, "step_ms": steps}
    print(json.dumps(row | {"same_tokens": alike, "mean_difference": far, "largest_difference": round(worst, 4)}))
    return int(len(far) > 1 and far[-1] > 2 * far[0])


if __name__ == "__main__":
    sys.exit(main())
