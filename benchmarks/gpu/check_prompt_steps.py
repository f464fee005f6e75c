"""Whether recorded steps with prompts give the tokens of eager ones over several cards: a tiny model in float32.

    python benchmarks/gpu/check_prompt_steps.py --layout 2x1 1x2

Tensor x pipeline parallel; exit code 1 on a difference. No reference by transformers: `check_gpu.py` has one. `--long`:
prompts of up to 520 tokens in steps of up to 2048, over a group in halves whose sums are copied. `--many`: 400 requests
over 256 places, so that over stages prompts go beside many rows, piece by piece.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

from bench_gpu import COMMON

from argosy import LLM, SamplingParams

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "initializer_range": 0.2,
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 512, "vocab_size": 1024, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip


def main() -> int:
    """Each layout both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", nargs="+", default=["1x1"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--many", action="store_true")
    args = parser.parse_args()
    rng, failures = random.Random(7), 0
    lengths = [1, 5, 16, 17, 33, 64, 100, 130, 40, 25, 90, 7]
    if args.long:
        lengths = [4 * length for length in lengths * 8]
        os.environ["ARGOSY_OVERLAP_TOKENS"] = "1024"  # so small a model would not go in halves
    if args.many:
        lengths = [rng.randrange(1, 300) for _ in range(400)]
    places, budget = (256, 8192) if args.many else (96, 2048) if args.long else (8, 64)
    prompts = [[rng.randrange(3, 1000) for _ in range(length)] for length in lengths]
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=rng.randrange(8, 64) if args.many else 16, ignore_eos=True, detokenize=False
        )
        for _ in lengths
    ]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**COMMON, **SHAPE}))
        for layout in args.layout:
            tp_size, pp_size = map(int, layout.split("x"))
            said = []
            for eager in (False, True):
                with LLM(
                    folder, load_format="dummy", skip_tokenizer_init=True, dtype=args.dtype, enforce_eager=eager,
                    tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, device=args.device,
                    max_num_seqs=places, max_num_batched_tokens=budget,
                    max_model_len=1024, gpu_memory_utilization=0.2, distributed_executor_backend="local",
                ) as llm:  # fmt: skip
                    outputs = llm.generate(prompts, params, use_tqdm=False)
                    said.append([list(output.outputs[0].token_ids) for output in outputs])
                print(layout, "eager" if eager else "recorded", "answered", len(said[-1]), flush=True)
            same = sum(a == b for a, b in zip(*said, strict=True))
            distinct = len({tuple(one) for one in said[0]})
            print(json.dumps({"layout": layout, "same": same, "of": len(prompts), "distinct": distinct}), flush=True)
            failures += same < len(prompts)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
