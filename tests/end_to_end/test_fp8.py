"""FP8 through the front door: the same two words as elsewhere, and half of the bytes."""

from pathlib import Path

import pytest

import argosy
from argosy import LLM, SamplingParams

DEFAULT_MODEL = Path(argosy.__file__).parent / "default_model"
PROMPTS = [[5, 6, 7, 8, 9] * 7, [11, 12, 13], [20]]
CACHE_BYTES = 2 << 20


def run(**settings: object) -> tuple[list[list[int]], int]:
    """(greedy tokens, blocks of the cache) in float32, so that a cut of the arithmetic changes no token."""
    with LLM(
        str(DEFAULT_MODEL), dtype="float32", device="cpu", distributed_executor_backend="local", cpu_threads=1,
        kv_cache_memory_bytes=CACHE_BYTES, max_num_batched_tokens=32, max_num_seqs=32, max_model_len=128,
        skip_tokenizer_init=True, **settings,
    ) as llm:  # fmt: skip
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], llm._engine.info.num_blocks


@pytest.fixture(scope="module")
def alone() -> tuple[list[list[int]], int]:
    """One rank, everything in FP8."""
    return run(quantization="fp8", kv_cache_dtype="fp8")


def test_rounded_weights_and_cache_give_the_same_tokens_on_two_ranks(alone: tuple[list[list[int]], int]) -> None:
    """Prompts in chunks, decode steps in batches, all over an e4m3 cache; two ranks share the heads."""
    tokens, num_blocks = alone
    assert all(len(row) == 16 for row in tokens)
    again, blocks_of_two = run(quantization="fp8", kv_cache_dtype="fp8", tensor_parallel_size=2)
    assert again == tokens
    assert blocks_of_two > num_blocks  # each rank has the bytes to itself and half of the heads


def test_a_cache_of_e4m3_has_four_times_the_blocks_of_float32(alone: tuple[list[list[int]], int]) -> None:
    """As many bytes, numbers of a quarter of the size."""
    tokens, num_blocks = run()
    assert all(len(row) == 16 for row in tokens)
    assert alone[1] == 4 * num_blocks
