"""Caches in 8 bits with scales through the front door: the same tokens in every layout, and 1.97 times the blocks."""

import math
from pathlib import Path

import pytest

import argosy
from argosy import LLM, SamplingParams
from argosy.cluster.protocol.errors import ConfigError

DEFAULT_MODEL = Path(argosy.__file__).parent / "default_model"
PROMPTS = [[5, 6, 7, 8, 9] * 9, [11, 12, 13], [20]]
CACHE_BYTES = 1 << 20
HEAD_SIZE = 32

Answers = list[tuple[list[int], list[float]]]


def run(**settings: object) -> tuple[Answers, int]:
    """(greedy tokens and their log probabilities, blocks), in float32; prompts in chunks, rows together."""
    with LLM(
        str(DEFAULT_MODEL), dtype="float32", device="cpu", distributed_executor_backend="local", cpu_threads=1,
        kv_cache_memory_bytes=CACHE_BYTES, max_num_batched_tokens=32, max_num_seqs=16, max_model_len=256,
        skip_tokenizer_init=True, **settings,
    ) as llm:  # fmt: skip
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False, logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
        answers = []
        for output in outputs:
            chosen = output.outputs[0]
            pairs = zip(chosen.logprobs, chosen.token_ids, strict=True)
            answers.append((list(chosen.token_ids), [found[token].logprob for found, token in pairs]))
        return answers, llm._engine.info.num_blocks


def same_answers(got: Answers, want: Answers) -> None:
    """Tokens equal; log probabilities within what another order of sums does, magnified where a rounding flips."""
    for (tokens, log_probs), (other_tokens, others) in zip(got, want, strict=True):
        assert tokens == other_tokens
        assert all(math.isclose(a, b, abs_tol=5e-3) for a, b in zip(log_probs, others, strict=True))


@pytest.fixture(scope="module")
def alone() -> tuple[Answers, int]:
    """One rank with int8."""
    return run(kv_cache_dtype="int8")


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 2)], ids=["TP2", "PP2", "TP2xPP2"])
def test_every_layout_gives_the_same(alone: tuple[Answers, int], ranks: tuple[int, int]) -> None:
    """Each head is rounded by itself, so how heads and layers are spread makes no difference."""
    answers, num_blocks = run(kv_cache_dtype="int8", tensor_parallel_size=ranks[0], pipeline_parallel_size=ranks[1])
    same_answers(answers, alone[0])
    assert num_blocks in range(ranks[0] * ranks[1] * alone[1], ranks[0] * ranks[1] * (alone[1] + 1))


def test_blocks_beside_16_bits(alone: tuple[Answers, int]) -> None:
    """As many bytes; a byte more for each head of a token. At a head size of 128 that is 1.98 times."""
    plain, num_blocks = run(kv_cache_dtype="bfloat16")
    assert alone[1] == pytest.approx(num_blocks * 2 * HEAD_SIZE / (HEAD_SIZE + 1), abs=2)
    assert [len(tokens) for tokens, _ in plain] == [24] * len(PROMPTS)
    by_others_name, blocks = run(kv_cache_dtype="fp8_per_token_head")
    assert blocks == alone[1]
    same = sum(a == b for (a, _), (b, _) in zip(by_others_name, plain, strict=True))
    assert same >= 1


def test_a_wrong_name_is_told_the_right_ones() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int4'.*fp8_scaled, int8"):
        run(kv_cache_dtype="int4")
