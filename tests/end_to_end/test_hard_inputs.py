"""Families through the whole engine with all that is hard at once, token by token what transformers says: prompts over
several steps and several windows, equal beginnings, and too little room, so that requests are swapped."""

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "workers"))
import family_cases

from argosy import LLM, SamplingParams

NUM_NEW, NUM_BLOCKS = 32, 36
EXCHANGED = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "all2all_backend": "all_to_all"}


def prompts() -> list[list[int]]:
    """Ragged, around the borders of blocks and chunks; three begin alike."""
    rng = random.Random(3)

    def draw(length: int) -> list[int]:
        return [rng.randrange(3, 100) for _ in range(length)]

    shared = draw(128)
    return [draw(250), shared + draw(40), shared + draw(33), draw(65), draw(64), draw(7), shared[:96] + draw(5)]


def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of transformers, without its cache."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(NUM_NEW):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.parametrize(
    ("name", "layout"),
    [("gpt-oss", {}), ("deepseek v3", {}), ("falcon rw", {}), ("mixtral", EXCHANGED)],
    ids=["windows and sinks", "latents", "slopes", "experts on other ranks"],
)
def test_all_that_is_hard_at_once(name: str, layout: dict[str, Any], tmp_path: Path) -> None:
    """A busy server of this family: twice alone (the second time from the prefix cache), and three answers at once."""
    case = family_cases.CASES[name]
    longer = {"max_position_embeddings": 512}
    if "sliding_window" in case.settings:
        longer["sliding_window"] = 37
    family_cases.make_checkpoint(tmp_path, name, case=replace(case, settings=case.settings | longer))
    asked = prompts()
    want = expected(tmp_path, asked)
    num_blocks = NUM_BLOCKS if "sliding_window" in longer else 22
    with LLM(
        str(tmp_path), dtype="float32", device="cpu", distributed_executor_backend="local", cpu_threads=1,
        num_gpu_blocks_override=num_blocks, swap_space=1, max_num_batched_tokens=48, max_num_seqs=6,
        max_model_len=320, skip_tokenizer_init=True, **layout,
    ) as llm:  # fmt: skip
        greedy = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False)
        three = SamplingParams(
            temperature=0.7, top_k=1, n=3, seed=3, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False
        )
        for params in (greedy, three, greedy):
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)
            assert [[list(c.token_ids) for c in o.outputs] for o in outputs] == [[ids] * params.n for ids in want]
        figures = {metric.name: metric.value for metric in llm.get_metrics()}
    assert figures["argosy_preemptions_swapped_total"] > 0
    assert figures["argosy_tokens_recomputed_total"] == 0
