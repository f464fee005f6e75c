"""On real GPUs, engine and all: each family says what transformers says, graphs what eager steps say, and every layout
what one card says. `pytest -m gpu` runs these and the kernels' own tests; layouts that need more cards are left out.
"""

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "workers"))
from rig import FAMILIES, SHAPE

from argosy import LLM, SamplingParams

DEVICE = os.environ.get("ARGOSY_TEST_DEVICE", "cuda")  # "cpu" tries the tests themselves where there is no card
NUM_CARDS = torch.cuda.device_count() if DEVICE == "cuda" else 4
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(DEVICE == "cuda" and not NUM_CARDS, reason="needs an NVIDIA GPU"),
]
WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "vocab_size": 1024, "max_position_embeddings": 512, "initializer_range": 0.15,
}  # fmt: skip  # heads of a size that models have
NUM_NEW = 24
Scores = list[list[float]]
USED_MIB = 200  # a card on which somebody computes has a context, which takes more
ENVIRONMENT = dict(os.environ)  # of whoever called, before a Ray cluster of this process adds to it


def used_mib() -> list[int]:
    """Of each card that is ours, by its driver."""
    if DEVICE != "cuda":
        return [0] * NUM_CARDS
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    query += [f"--id={ids}"] if (ids := ENVIRONMENT.get("CUDA_VISIBLE_DEVICES")) else []
    return [int(line) for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()]


class Folders(dict[str, Path]):
    """A random model of each family in bfloat16, saved by transformers when it is first asked for."""

    def __init__(self, parent: Path):
        super().__init__()
        self._parent = parent

    def __missing__(self, family: str) -> Path:
        import transformers

        name, extra = FAMILIES[family]
        torch.manual_seed(list(FAMILIES).index(family))
        config = getattr(transformers, f"{name}Config")(**{**SHAPE, **WIDE, **extra, "head_dim": 64})
        model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16)
        for module_name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases that do something
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in module_name else 0.0, std=0.2)
        self[family] = self._parent / family
        model.save_pretrained(self[family])
        return self[family]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Folders(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Ragged, around the borders of blocks, chunks and tiles."""
    rng = random.Random(7)
    return [[rng.randrange(3, 1000) for _ in range(length)] for length in (1, 5, 16, 17, 33, 64, 100, 130)]


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[LLM]:
    """Small numbers, so that prompts are cut and rows come and go."""
    small = {
        "device": DEVICE, "distributed_executor_backend": "mp", "skip_tokenizer_init": True, "max_num_seqs": 8,
        "max_num_batched_tokens": 64, "num_gpu_blocks_override": 256, "cpu_threads": 1,
    }  # fmt: skip
    with LLM(str(folder), **{**small, **settings}) as llm:
        yield llm


def answer(llm: LLM, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], Scores]:
    """Greedy: token ids, and the log probability of every token after the first, of prompts and answers."""
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0
    )
    tokens, scores = [], []
    for prompt, output in zip(prompts, llm.generate(list(prompts), params, use_tqdm=False), strict=True):
        (made,) = output.outputs
        assert made.logprobs is not None
        assert output.prompt_logprobs is not None
        places = [*zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        places += [*zip(made.token_ids, made.logprobs, strict=True)]
        tokens.append(list(made.token_ids))
        scores.append([figures[token].logprob for token, figures in places if figures is not None])
    return tokens, scores


def score(folder: Path, sequences: Sequence[Sequence[int]], dtype: torch.dtype) -> tuple[Scores, Scores]:
    """By transformers: the log probability of every token after the first, and that of the most likely one there."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()
    given, best = [], []
    with torch.inference_mode():
        for sequence in sequences:
            ids = torch.tensor([list(sequence)], device=DEVICE)
            logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
            given.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
            best.append(logprobs.max(-1).values.tolist())
    return given, best


def distance(first: Scores, second: Scores) -> float:
    """Root mean square difference over all positions."""
    pairs = [(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)]
    return (sum((a - b) ** 2 for a, b in pairs) / len(pairs)) ** 0.5


def regret_of(chosen: Scores, best: Scores, num_new: int = NUM_NEW) -> float:
    """How far the least likely of the chosen answers' tokens is behind the most likely one at its place."""
    pairs = [
        (c, b) for cs, bs in zip(chosen, best, strict=True) for c, b in zip(cs[-num_new:], bs[-num_new:], strict=True)
    ]
    return max(b - c for c, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_bfloat16_is_as_near_to_exact_numbers_as_transformers_is(
    family: str, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    """Judged by the same weights in float32: prompts in pieces, decode steps in graphs, all rows at once."""
    with engine(folders[family], dtype="bfloat16") as llm:
        tokens, ours = answer(llm, prompts)
    sequences = [[*prompt, *made] for prompt, made in zip(prompts, tokens, strict=True)]
    exact, best = score(folders[family], sequences, torch.float32)
    theirs, _ = score(folders[family], sequences, torch.bfloat16)
    bound = 1.5 * distance(theirs, exact) + 0.01
    assert distance(ours, exact) < bound, (distance(ours, exact), distance(theirs, exact))
    assert regret_of(exact, best) < 8 * bound, "a token was chosen that is not nearly the most likely one"


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_and_eager_steps_give_transformers_tokens_in_float32(
    family: str, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    """Greedy choices equal one by one; where two are nearly as likely, either may be taken."""
    made = []
    for enforce_eager in (False, True):
        with engine(folders[family], dtype="float32", enforce_eager=enforce_eager) as llm:
            made.append(answer(llm, prompts))
    (tokens, scores), (eager_tokens, eager_scores) = made
    assert tokens == eager_tokens
    assert distance(scores, eager_scores) < 1e-3
    sequences = [[*prompt, *new] for prompt, new in zip(prompts, tokens, strict=True)]
    exact, best = score(folders[family], sequences, torch.float32)
    assert distance(scores, exact) < 1e-3
    assert regret_of(exact, best) < 1e-3


def test_a_last_piece_of_one_token_is_read_from_the_prompt(folders: dict[str, Path]) -> None:
    """One token more than steps may have: the last one looks like a row that decodes, but nobody sampled it."""
    rng = random.Random(11)
    prompts = [[rng.randrange(3, 1000) for _ in range(length)] for length in (65, 129, 64, 66)]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False)
    with engine(folders["llama"], dtype="float32") as llm:
        made = [llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    sequences = [[*prompt, *new] for prompt, new in zip(prompts, made, strict=True)]
    assert regret_of(*score(folders["llama"], sequences, torch.float32)) < 1e-3


def test_drawn_tokens_are_the_same_again(folders: dict[str, Path], prompts: list[list[int]]) -> None:
    """A seed, whatever else runs beside."""
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=16, ignore_eos=True, n=3, detokenize=False)
    with engine(folders["llama"], dtype="float32") as llm:  # rows beside it change the last bit, not the draw
        first = llm.generate(prompts, params, use_tqdm=False)
        llm.reset_prefix_cache()
        second = llm.generate(prompts[::-1], params, use_tqdm=False)[::-1]
    drawn = [[[list(one.token_ids) for one in output.outputs] for output in outputs] for outputs in (first, second)]
    assert drawn[0] == drawn[1]
    assert any(a != b for answers in drawn[0] for a, b in itertools.pairwise(answers)), "all three draws are the same"


LAYOUTS = [
    pytest.param(family, tp, pp, marks=pytest.mark.skipif(tp * pp > NUM_CARDS, reason=f"needs {tp * pp} cards"))
    for family, tp, pp in (
        ("llama", 2, 1), ("qwen3", 1, 2), ("qwen3", 4, 1), ("llama", 2, 2), ("mistral", 1, 3), ("qwen2", 2, 1)
    )
]  # fmt: skip


@pytest.mark.parametrize(("family", "tp", "pp"), LAYOUTS)
def test_a_layout_says_what_one_card_says(
    family: str, tp: int, pp: int, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    """As near to exact numbers as one card is held to above: a thousandth in float32, what 16 bits cost in bfloat16."""
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    with engine(folders[family], dtype="float32", **sizes) as llm:
        tokens, scores = answer(llm, prompts)
        assert len(llm._engine.ranks) == tp * pp
    sequences = [[*prompt, *new] for prompt, new in zip(prompts, tokens, strict=True)]
    exact, best = score(folders[family], sequences, torch.float32)
    assert distance(scores, exact) < 1e-3
    assert regret_of(exact, best) < 1e-3
    with engine(folders[family], dtype="bfloat16", **sizes) as llm:
        tokens, scores = answer(llm, prompts)
    sequences = [[*prompt, *new] for prompt, new in zip(prompts, tokens, strict=True)]
    exact, _ = score(folders[family], sequences, torch.float32)
    theirs, _ = score(folders[family], sequences, torch.bfloat16)
    assert distance(scores, exact) < 1.5 * distance(theirs, exact) + 0.01


@pytest.mark.parametrize(("family", "tp", "pp"), LAYOUTS[:4])
def test_a_layout_over_nccl_alone_says_what_transformers_says(
    family: str, tp: int, pp: int, folders: dict[str, Path], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between cards that can't address each other: its sums, gathers and hand-overs inside recorded steps."""
    monkeypatch.setenv("ARGOSY_DISABLE_SYMMETRIC_MEMORY", "1")
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    with engine(folders[family], dtype="float32", **sizes) as llm:
        tokens, scores = answer(llm, prompts)
    sequences = [[*prompt, *new] for prompt, new in zip(prompts, tokens, strict=True)]
    exact, best = score(folders[family], sequences, torch.float32)
    assert distance(scores, exact) < 1e-3
    assert regret_of(exact, best) < 1e-3


@pytest.mark.parametrize("kind", ["int8", "fp8_scaled"])
def test_a_cache_in_8_bits_changes_little(kind: str, folders: dict[str, Path], prompts: list[list[int]]) -> None:
    """Recorded steps, steps of pieces of prompts, eager steps: the log probabilities of one text, near to those over
    16 bits, and nearer to each other."""
    settings = {"dtype": "bfloat16", "max_model_len": 512}
    with engine(folders["qwen3"], **settings) as llm:
        tokens, plain = answer(llm, prompts)
    texts = [[*prompt, *new] for prompt, new in zip(prompts, tokens, strict=True)]
    scores = []
    for eager in (False, True):
        with engine(folders["qwen3"], kv_cache_dtype=kind, enforce_eager=eager, **settings) as llm:
            scores.append([one[: len(text) - 1] for one, text in zip(answer(llm, texts)[1], texts, strict=True)])
            assert len(answer(llm, prompts)[0][0]) == NUM_NEW
    print(kind, distance(scores[0], plain), distance(scores[0], scores[1]))
    assert 0 < distance(scores[0], plain) < (0.15 if kind == "int8" else 0.5)
    assert distance(scores[0], scores[1]) < 0.1


@pytest.mark.parametrize(("tp", "pp"), [layout.values[1:] for layout in LAYOUTS[:2]])
def test_layouts_agree_over_a_cache_in_8_bits(
    tp: int, pp: int, folders: dict[str, Path], prompts: list[list[int]]
) -> None:
    """In float32, where only sums in another order could flip a rounding."""
    if tp * pp > NUM_CARDS:
        pytest.skip(f"needs {tp * pp} cards")
    found = []
    for sizes in ({}, {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}):
        with engine(folders["llama"], dtype="float32", kv_cache_dtype="int8", **sizes) as llm:
            found.append(answer(llm, prompts))
    assert found[0][0] == found[1][0]
    assert distance(found[0][1], found[1][1]) < 0.02


@pytest.mark.parametrize(("family", "tp", "pp"), [("llama", 1, 1), *LAYOUTS[:4]])
def test_steps_of_many_prompt_tokens_say_what_transformers_says(
    family: str, tp: int, pp: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many that a group sums them in halves, and that the last layer leaves most of them out; the last prompts come
    in pieces beside rows that decode."""
    monkeypatch.setenv("ARGOSY_OVERLAP_TOKENS", "1024")  # for a model of this size it would never pay
    rng = random.Random(9)
    prompts = [[rng.randrange(3, 1000) for _ in range(length)] for length in (300, 411, 460, 333, 470, 250, 401, 380)]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False)
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "max_num_batched_tokens": 1300}
    with engine(folders[family], dtype="float32", **sizes) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    sequences = [[*prompt, *output.outputs[0].token_ids] for prompt, output in zip(prompts, outputs, strict=True)]
    exact, best = score(folders[family], sequences, torch.float32)
    assert regret_of(exact, best) < 1e-3


ON_THE_HOST: dict[str, dict[str, Any]] = {
    "weights": {"cpu_offload_gb": 1.0},
    "hidden states": {"activation_offload_gb": "auto", "activation_slice_tokens": 10},
    "both, eager": {
        "cpu_offload_gb": 0.004, "activation_offload_gb": "auto", "activation_slice_tokens": 10, "enforce_eager": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("what", ON_THE_HOST)
def test_what_lives_on_the_host_changes_no_token(what: str, folders: dict[str, Path], prompts: list[list[int]]) -> None:
    """All or some layers' weights, slices of steps: the same answers, and the same score of every token of a prompt."""
    with engine(folders["qwen2"], dtype="float32") as llm:
        expected, scores = answer(llm, prompts)
    with engine(folders["qwen2"], dtype="float32", **ON_THE_HOST[what]) as llm:
        tokens, found = answer(llm, prompts)
        (rank,) = llm._engine.ranks
    assert tokens == expected
    assert distance(scores, found) < 1e-3
    assert any(name.startswith("host: ") for name in rank.ledger)


def test_one_rank_opens_one_card_and_no_group(folders: dict[str, Path]) -> None:
    """However many cards the host has: by the driver's figures of each, and nothing in the ledger for peers."""
    before = used_mib()
    with engine(folders["llama"], dtype="bfloat16") as llm:
        answer(llm, [[5, 6, 7]])
        opened = [now - then > USED_MIB for now, then in zip(used_mib(), before, strict=True)]
        (rank,) = llm._engine.ranks
    assert sum(opened) == (DEVICE == "cuda"), (before, opened)
    assert not rank.ledger.get("groups"), rank.ledger


def test_the_ledger_adds_up_to_what_the_driver_reports(folders: dict[str, Path]) -> None:
    """What is not free is what the driver says of the card, to two in a hundred, for a program that looks from outside;
    weights are as large as their files, and the cache as its blocks."""
    before = used_mib()
    settings = {"num_gpu_blocks_override": None, "gpu_memory_utilization": 0.5, "max_num_seqs": 512}
    with engine(folders["llama"], dtype="bfloat16", **{**settings, "max_num_batched_tokens": 512}) as llm:
        (rank,) = llm._engine.ranks
        num_blocks = llm._engine.info.num_blocks
        grown = max(now - then for now, then in zip(used_mib(), before, strict=True)) * 2**20
    ledger = {name: size for name, size in rank.ledger.items() if not name.startswith("host: ")}
    total = ledger.pop("total", 0)
    assert sum(rank.phases.values()) > 0
    if DEVICE != "cuda":
        return
    assert sum(ledger.values()) == total, rank.ledger
    ours = total - ledger["free"] - before[0] * 2**20
    with_files = sum(file.stat().st_size for file in folders["llama"].glob("*.safetensors"))
    print(f"ledger {ours / 2**20:.0f} MiB, driver {grown / 2**20:.0f} MiB, weights {ledger['weights']} in {with_files}")
    assert abs(ours - grown) < 0.02 * grown + 16 * 2**20, (ours, grown, rank.ledger)
    assert abs(ledger["weights"] - with_files) < 0.05 * with_files + 2**20, rank.ledger
    block_bytes = SHAPE["num_hidden_layers"] * 2 * 16 * WIDE["num_key_value_heads"] * WIDE["head_dim"] * 2
    assert abs(ledger["kv"] - num_blocks * block_bytes) < 0.02 * ledger["kv"], (num_blocks, rank.ledger)
