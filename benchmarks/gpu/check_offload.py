"""Whether offloaded weights say what resident ones say, in every layout that the cards here allow: random weights.

    python benchmarks/gpu/check_offload.py --model 06b --gib 0.3 --layouts 1x1 2x1 1x2
    python benchmarks/gpu/check_offload.py --model 06b --gib 0 0.3 --slice 64 --dtype float32      long steps as well

One line a layout and way (recorded graphs, eager); exit code 1 on a difference. `--device cpu` runs it here and now.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from argosy import LLM, SamplingParams
from argosy.deploy import bench_models


def said(folder: Path, prompts: list[list[int]], **settings: Any) -> tuple[list[list[int]], list[dict[str, int]]]:
    """Greedy tokens, and the ranks' ledgers."""
    with LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, distributed_executor_backend="mp",
        max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=1024, **settings,
    ) as llm:  # fmt: skip
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], [dict(r.ledger) for r in llm._engine.ranks]


def main() -> int:
    """Compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="06b")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", help="round the weights, such as fp8")
    parser.add_argument("--gib", type=float, nargs="+", default=[0.3])
    parser.add_argument("--layouts", nargs="+", default=["1x1"], help="tensor-parallel x pipeline, such as 2x2")
    parser.add_argument("--slice", type=int, help="compute steps of more tokens in slices, hidden states on the host")
    parser.add_argument("--ways", nargs="+", default=["graphs", "eager"], choices=("graphs", "eager"))
    args = parser.parse_args()
    draw = random.Random(3)
    prompts = [[draw.randrange(1000) for _ in range(length)] for length in (3, 17, 200, 700)]
    is_equal = True
    with tempfile.TemporaryDirectory() as parent:
        folder, _ = bench_models.make_folder(args.model, Path(parent))
        for layout in args.layouts:
            tp_size, pp_size = map(int, layout.split("x"))
            for way in args.ways:
                common = {
                    "tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size, "device": args.device,
                    "dtype": args.dtype, "quantization": args.quantization, "enforce_eager": way == "eager",
                }  # fmt: skip
                expected, _ = said(folder, prompts, **common)
                sliced = {"activation_offload_gb": "auto", "activation_slice_tokens": args.slice} if args.slice else {}
                for gib in args.gib:
                    tokens, ledgers = said(folder, prompts, cpu_offload_gb=gib, **sliced, **common)
                    is_equal &= tokens == expected
                    row = {"model": args.model, "layout": layout, "way": way, "gib": gib, "equal": tokens == expected,
                           "quantization": args.quantization, "slice": args.slice, "ledgers": ledgers}  # fmt: skip
                    print(json.dumps(row), flush=True)
    return 0 if is_equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
