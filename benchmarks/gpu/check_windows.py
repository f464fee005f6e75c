"""Whether models of sliding windows say on cards what transformers says: past many windows, graphs and eager.

    python benchmarks/gpu/check_windows.py FOLDER --write                 tiny models and answers, by transformers
    python benchmarks/gpu/check_windows.py FOLDER --layouts 1x1 2x1 1x2   the same tokens from our ranks, in float32

One line a model, layout and way; exit code 1 on a difference. `--device cpu` runs it here and now.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

NUM_TOKENS, NUM_REQUESTS = 40, 12
SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "vocab_size": 128, "max_position_embeddings": 512, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "sliding_window": 40,
}  # fmt: skip
MIXED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3Text", {"layer_types": MIXED, "query_pre_attn_scalar": 16, "pad_token_id": 0}),
    "mistral": ("Mistral", {}),
    "cohere2": ("Cohere2", {"layer_types": MIXED, "pad_token_id": 0}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 4}),
}


def prompts() -> list[list[int]]:
    """From one token to seven windows; every third begins like the longest."""
    draw = random.Random(5)
    longest = [draw.randrange(128) for _ in range(280)]
    made = [[draw.randrange(128) for _ in range(1 + 25 * place)] for place in range(NUM_REQUESTS)]
    made[::3] = [[*longest[: 60 + 50 * place], 1, place] for place in range(len(made[::3]))]
    return made


def write(folder: Path) -> None:
    """The models, and what transformers answers to each prompt."""
    import torch
    import transformers

    for name, (kind, extra) in MODELS.items():
        torch.manual_seed(len(name))
        config = getattr(transformers, f"{kind}Config")(**{**SMALL, **extra}, dtype="float32")
        architecture = f"{kind.removesuffix('Text')}ForCausalLM"
        model = getattr(transformers, architecture)(config).to(torch.float32).eval()
        model.save_pretrained(folder / name)
        answers, margin = [], 1e9
        with torch.inference_mode():
            for prompt in prompts():
                ids = list(prompt)
                for _ in range(NUM_TOKENS):
                    best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
                    margin = min(margin, float(best.values[0] - best.values[1]))
                    ids.append(int(best.indices[0]))
                answers.append(ids[len(prompt) :])
        (folder / name / "answers.json").write_text(json.dumps(answers))
        print(f"{name}: nearest two tokens {margin:.1e} apart", flush=True)


def said(folder: Path, **settings: Any) -> tuple[list[list[int]], list[list[int]], str]:
    """Greedy tokens, twice (the second time over prefix hits), and the groups of layers."""
    from argosy import LLM, SamplingParams

    with LLM(
        str(folder), dtype="float32", skip_tokenizer_init=True, distributed_executor_backend="mp",
        max_model_len=512, max_num_seqs=16, max_num_batched_tokens=96, kv_cache_memory_bytes=1 << 24, **settings,
    ) as llm:  # fmt: skip
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts()]
        found = [
            [list(output.outputs[0].token_ids) for output in llm.generate(asked, params, use_tqdm=False)]
            for _ in range(2)
        ]
        return found[0], found[1], str(llm._engine.info.kv_windows)


def main() -> int:
    """Compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="make the models first (needs transformers)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--layouts", nargs="+", default=["1x1"], help="tensor-parallel x pipeline, such as 2x2")
    parser.add_argument("--ways", nargs="+", default=["graphs", "eager"], choices=("graphs", "eager"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--block-size", type=int, default=16)
    args = parser.parse_args()
    if args.write:
        write(args.folder)
        return 0
    is_equal = True
    for layout in args.layouts:
        tp_size, pp_size = map(int, layout.split("x"))
        for name in args.models:
            expected = json.loads((args.folder / name / "answers.json").read_text())
            for way in args.ways:
                first, again, windows = said(
                    args.folder / name, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size,
                    device=args.device, enforce_eager=way == "eager", block_size=args.block_size,
                )  # fmt: skip
                same = [sum(a == b for a, b in zip(found, expected, strict=True)) for found in (first, again)]
                is_equal &= same == [len(expected)] * 2
                row = {"model": name, "layout": layout, "way": way, "windows": windows, "block": args.block_size,
                       "equal": same, "of": len(expected)}  # fmt: skip
                print(json.dumps(row), flush=True)
    return 0 if is_equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
