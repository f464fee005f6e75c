"""What a request says alone, and among as many as decode with other kernels: 8, 16, 64 and 256 rows at a time.

    python benchmarks/gpu/check_rows.py --model 8b -tp 2

Weights are random, so two tokens may be as likely within the rounding of 16 bits: from there on answers differ, and are
compared no further. Until then log probabilities must differ no more than sums in another order make them over 32
random layers: 0.03 on average, of which twice as much is let pass. One JSON line a number of rows; exit code 1 where
they do.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from argosy import LLM, SamplingParams
from argosy.deploy import bench_models

COMPARED, NEW = 8, 24
MOST = 0.06  # mean difference of log probabilities


def main() -> int:
    """Alone first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b")
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=2)
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 64, 256])
    args = parser.parse_args()
    wrong = False
    with tempfile.TemporaryDirectory() as parent:
        folder, options = bench_models.make_folder(args.model, Path(parent))
        most = max(args.rows)
        prompts = [[3 + (7 * n + 13 * i) % 1000 for i in range(100 + 30 * (n % 8))] for n in range(most)]
        greedy = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=0)
        with LLM(
            str(folder), **options, dtype="bfloat16", distributed_executor_backend="mp", max_model_len=2048,
            tensor_parallel_size=args.tensor_parallel_size, pipeline_parallel_size=args.pipeline_parallel_size,
            max_num_seqs=most, enable_prefix_caching=False,
        ) as llm:  # fmt: skip

            def said(asked: list[list[int]]) -> list[tuple[list[int], list[float]]]:
                outputs = [found.outputs[0] for found in llm.generate(asked, greedy, use_tqdm=False)[:COMPARED]]
                return [
                    (list(out.token_ids), [next(iter(place.values())).logprob for place in out.logprobs or ()])
                    for out in outputs
                ]

            alone = [said([prompt])[0] for prompt in prompts[:COMPARED]]
            for rows in args.rows:
                alike: list[int] = []
                found: list[float] = []
                for (one, of_one), (other, of_other) in zip(alone[:rows], said(prompts[:rows]), strict=True):
                    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), NEW)
                    alike.append(same)
                    found += [abs(a - b) for a, b in zip(of_one[: same + 1], of_other[: same + 1], strict=True)]
                mean = statistics.mean(found)
                wrong |= not mean <= MOST
                layout = f"TP{args.tensor_parallel_size}xPP{args.pipeline_parallel_size}"
                row = {"check": "rows", "model": args.model, "layout": layout, "rows": rows, "same_tokens": alike}
                differ = {"mean_difference": round(mean, 4), "largest_difference": round(max(found), 4)}
                print(json.dumps(row | differ), flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
