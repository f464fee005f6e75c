"""Whether the engine on a GPU says what transformers says: tiny models of each family, float32, greedy, ragged prompts.

python benchmarks/gpu/check_gpu.py            recorded graphs and eager steps; exit code 1 on a difference
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from argosy import LLM, SamplingParams

FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 24}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 64}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 6}),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        {
            "head_dim": 64,
            "num_experts": 10,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 128,
            "norm_topk_prob": True,
        },
    ),
    "deepseek-v3": (
        transformers.DeepseekV3Config,
        {
            "num_key_value_heads": 8,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 128,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
}
SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 512, "vocab_size": 1024, "max_position_embeddings": 4096,
}  # fmt: skip
WAYS = {"e": "sum", "a": "all_to_all"}  # of tokens to whole experts on other ranks


def reference(folder: str, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy continuations by transformers in float32 on the CPU: prompts of one length at once, others one by one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # `min_new_tokens` would keep it from being chosen
    equal = len({len(prompt) for prompt in prompts}) == 1
    answers = []
    for rows in [prompts] if equal else [[prompt] for prompt in prompts]:
        ids = torch.tensor(rows)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False,
        )  # fmt: skip
        answers += out[:, ids.shape[1] :].tolist()
    return answers


def swap_prompts() -> list[list[int]]:
    """Sixteen that grow to 112 tokens each."""
    rng = random.Random(12)
    return [[rng.randrange(3, 1000) for _ in range(40)] for _ in range(16)]


def swapped(folder: str, layout: str, backend: str, want: list[list[int]]) -> bool:
    """Sixteen long answers in room for three, in two rounds: they swap, nothing is computed twice, and each answer is
    that of transformers (`want`) or, where two tokens are as likely but for rounding, of the same engine with room."""
    tp_size, pp_size = map(int, layout.split("x"))
    prompts, said, plain, began = swap_prompts(), list[list[list[int]]](), want, time.perf_counter()
    for memory in ({"num_gpu_blocks_override": 24, "swap_space": 1}, {}):
        if not memory and all(ids == want for ids in said):
            break
        with LLM(
            folder, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, dtype="float32",
            skip_tokenizer_init=True, distributed_executor_backend=backend, max_num_seqs=16,
            max_num_batched_tokens=256, max_model_len=256, gpu_memory_utilization=0.2, **memory,
        ) as llm:  # fmt: skip
            print(f"         {layout} ready after {time.perf_counter() - began:.1f} s", flush=True)
            params = SamplingParams(temperature=0.0, max_tokens=72, ignore_eos=True, detokenize=False)
            found = [
                [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]
                for _ in range(1 + bool(memory))
            ]
            if memory:
                said, figures = found, {metric.name: metric.value for metric in llm.get_metrics()}
            else:
                plain = found[0]
    same = sum(a == b for ids in said for a, b in zip(ids, want, strict=True))
    right = sum(a in (b, c) for ids in said for a, b, c in zip(ids, want, plain, strict=True))
    out, into = (figures[f'argosy_swap_blocks_total{{direction="{way}"}}'] for way in ("out", "in"))
    moved, again = figures["argosy_preemptions_swapped_total"], figures["argosy_tokens_recomputed_total"]
    print(f"         {layout} swapped: {right} of 32 right, {same} as transformers; {moved:g} requests, {out:g} blocks "
          f"out, {into:g} in, {again:g} tokens computed twice", flush=True)  # fmt: skip
    return right == 32 and moved > 3 and again == 0


def main() -> int:
    """All families, with and without graphs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=sorted(FAMILIES), default=sorted(FAMILIES))
    parser.add_argument(
        "--layout",
        nargs="+",
        default=["1x1"],
        help="tensor x pipeline parallel, such as 2x1 1x2 "
        "2x2; 2x1e: whole experts on each rank, 2x1a: reached by exchange",
    )
    parser.add_argument("--long", action="store_true", help="prompts of 1000 to 1700 tokens in steps of up to 2048")
    parser.add_argument("--swap", action="store_true", help="only this: more than there is room for, with swap_space")
    parser.add_argument("--blocks", type=int, help="of the KV cache: several runs of this script may share a card then")
    parser.add_argument("--backend", default="local", choices=("local", "ray"))
    args = parser.parse_args()
    torch.set_num_threads(4)  # tiny models: more wait for each other, and for whatever else runs on the host
    rng, failures = random.Random(7), 0
    lengths = (1001, 1300, 1700, 7) if args.long else (1, 5, 16, 17, 33, 64, 100, 130)
    for family in args.family:
        config_type, extra = FAMILIES[family]
        with tempfile.TemporaryDirectory(prefix="argosy-check-") as parent:
            folder = str(Path(parent, family))
            torch.manual_seed(1)
            config = config_type(**{**SHAPE, **extra}, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            if args.swap:
                print(family, flush=True)
                want = reference(folder, swap_prompts(), 72)
                failures += sum(not swapped(folder, layout, args.backend, want) for layout in args.layout)
                continue
            prompts = [[rng.randrange(3, 1000) for _ in range(n)] for n in lengths]
            want = reference(folder, prompts, 24)
            for layout, eager in itertools.product(args.layout, (False, True)):
                tp_size, pp_size = map(int, layout.rstrip("ea").split("x"))
                if eager and layout != "1x1" and not layout.endswith(("e", "a")):
                    continue
                experts = {"enable_expert_parallel": True, "all2all_backend": WAYS.get(layout[-1])}
                with LLM(
                    folder, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size,
                    dtype="float32", skip_tokenizer_init=True, distributed_executor_backend=args.backend,
                    enforce_eager=eager, max_num_seqs=8, max_num_batched_tokens=2048 if args.long else 64,
                    gpu_memory_utilization=0.2, num_gpu_blocks_override=args.blocks,
                    **(experts if layout[-1] in WAYS else {}),
                ) as llm:  # fmt: skip
                    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
                    outputs = llm.generate(prompts, params, use_tqdm=False)
                    got = [list(o.outputs[0].token_ids) for o in outputs]
                    draws = []
                    drawing = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=16, ignore_eos=True, n=3,
                                             detokenize=False)  # fmt: skip
                    for _ in range(2):
                        outputs = llm.generate(prompts, drawing, use_tqdm=False)
                        draws.append([[list(c.token_ids) for c in o.outputs] for o in outputs])
                same = sum(a == b for a, b in zip(got, want, strict=True))
                drawn = draws[0] == draws[1]
                how = "eager" if eager else "graphs"
                print(f"{family:8} {layout} {how:7} {same}/{len(want)} as transformers; draws {drawn}", flush=True)
                failures += same != len(want) or not drawn
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
