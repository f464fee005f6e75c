"""Models whose layers have sliding windows, past several of them: the tokens of transformers, and no block too many."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import GEMMA, SMALL, VOCAB, YARN, Case, make_checkpoint
from rig import InProcessRank, RankHosts, Run, answers, greedy, make_config, start

from argosy.cluster.protocol.kv_groups import KVGroups

NUM_TOKENS = 20
WINDOW = {"sliding_window": 7}
SIX = SMALL | {"num_hidden_layers": 6}
MIXED = ["sliding_attention"] * 2 + ["full_attention"]
NUM_HOST_BLOCKS = 400
CASES: dict[str, tuple[Case, tuple[int, ...]]] = {
    "mistral": (Case("MistralConfig", "MistralForCausalLM", SMALL | WINDOW | {"head_dim": 16}), (7,)),
    "phi3": (Case("Phi3Config", "Phi3ForCausalLM", SMALL | WINDOW | {"pad_token_id": 0}), (7,)),
    "starcoder2": (Case("Starcoder2Config", "Starcoder2ForCausalLM", SMALL | {"sliding_window": 1}), (1,)),
    "gemma2": (Case("Gemma2Config", "Gemma2ForCausalLM", SIX | GEMMA | {
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0}), (0, 6)),
    "gemma3": (Case("Gemma3TextConfig", "Gemma3ForCausalLM", SIX | GEMMA | {"layer_types": 2 * MIXED}), (0, 6, 6)),
    "gpt-oss": (Case("GptOssConfig", "GptOssForCausalLM", SIX | WINDOW | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 40,
        "rope_parameters": YARN | {"truncate": False}}), (0, 7)),
    "command-r7b": (Case("Cohere2Config", "Cohere2ForCausalLM", SIX | WINDOW | {
        "logit_scale": 0.5, "layer_types": 2 * MIXED}), (0, 7, 7)),
    "qwen2, windows above": (Case("Qwen2Config", "Qwen2ForCausalLM", SIX | WINDOW | {
        "use_sliding_window": True, "max_window_layers": 4}), (0, 0, 7)),
}  # fmt: skip
PARTS = [(name, layout) for name in ("gemma3", "qwen2, windows above") for layout in ("TP2", "PP2")]
LAYOUTS = {"TP2": (2, 1), "PP2": (1, 2), "TP2xPP2": (2, 2)}


def prompts() -> list[list[int]]:
    """Within a window, of several, of nine; and one that leaves the longest in the middle of a block."""
    rng = random.Random(3)
    made = [[rng.randrange(VOCAB) for _ in range(length)] for length in (3, 25, 61)]
    return [*made, [*made[-1][:42], 5, 6]]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """Each model's folder, and what transformers answers."""
    from transformers import AutoModelForCausalLM

    made = {}
    for name, (case, _) in CASES.items():
        folder = tmp_path_factory.mktemp("families") / name.split(",")[0]
        make_checkpoint(folder, name, case=case)
        how = {"attn_implementation": "eager"} if "gemma2" in name else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
        found = []
        with torch.inference_mode():
            for prompt in prompts():
                ids = list(prompt)
                for _ in range(NUM_TOKENS):
                    ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
                found.append(ids[len(prompt) :])
        made[name] = (folder, found)
    return made


def ask_all(run: Run, *, n: int = 1, preempts: bool = False) -> list[list[int]]:
    """The answers to all prompts, together in the batch. `preempts`: three steps take the blocks of one."""
    before = len(run.requests)
    for place, prompt in enumerate(prompts()):
        run.add(greedy(prompt, NUM_TOKENS, stream_id=before + place, n=n))

    def look() -> None:
        run.scheduler.check()
        decoding = [request for request in run.scheduler._running.decoding if request.is_decoding]
        if preempts and run.num_steps in (9, 20, 31) and decoding:
            run.scheduler._preempt(decoding[-1])

    run.finish(look)
    return answers(run.requests[before:])


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, {}) for name in CASES]
    + [(name, {"async_scheduling": False, "max_num_batched_tokens": 64}) for name in ("mistral", "gemma3")],
    ids=str,
)
def test_one_rank_says_what_transformers_says(
    name: str, settings: dict[str, object], families: dict[str, tuple[Path, list[list[int]]]]
) -> None:
    """In chunks, over prefix hits, with n = 3, then in a pool that forces preemption: computed anew, then swapped."""
    folder, expected = families[name]
    config = make_config(folder, **settings)
    rank = InProcessRank(config, 256, NUM_HOST_BLOCKS)
    run = Run(rank, config, 256)
    assert run.groups.windows == CASES[name][1]
    assert ask_all(run) == expected
    assert ask_all(run) == expected
    hits = run.metrics.prefix_hits
    assert hits > 60, "of 61 and 44 prompt tokens most are found, whatever fell out of windows meanwhile"
    assert ask_all(run, n=3) == [answer for answer in expected for _ in range(3)]
    assert run.metrics.block_copies >= run.groups.num_groups
    num_blocks = run.groups.num_blocks(81, 4) + 2
    for num_host_blocks in (0, NUM_HOST_BLOCKS):
        tight = Run(rank, config, num_blocks, num_host_blocks=num_host_blocks)
        tight.scheduler._next_step_id = 1000 + num_host_blocks * 10
        assert ask_all(tight, preempts=True) == expected
        assert tight.metrics.preemptions > 0
        assert tight.metrics.preemptions_swapped == (tight.metrics.preemptions if num_host_blocks else 0)


@pytest.mark.parametrize(("name", "in_chunks"), [(name, 16) for name in CASES] + [("gemma3", 250), ("mistral", 4)])
def test_a_long_sequence_holds_what_the_formula_says(
    name: str, in_chunks: int, families: dict[str, tuple[Path, list[list[int]]]]
) -> None:
    """A table that grows for each group that sees everything, and for each with a window so many blocks as it spans,
    and those of the running chunk."""
    folder, _ = families[name]
    config = make_config(folder, max_num_batched_tokens=in_chunks, max_num_seqs=4, enable_prefix_caching=False)
    run = Run(InProcessRank(config, 300), config, 300, max_len=128)
    run.add(greedy([place % VOCAB for place in range(90)], 38))
    pool, groups = run.scheduler.blocks.pool, run.groups
    held_of: dict[int, int] = {}

    def look() -> None:
        (request,) = run.requests
        if not request.is_finished:
            held_of[request.num_computed_tokens] = pool.num_held

    run.finish(look)
    assert all(held <= groups.num_blocks(count, 4, in_chunks) for count, held in held_of.items())
    decoding = {count: held for count, held in held_of.items() if count > 93}
    assert len(decoding) > 30
    assert all(held <= groups.num_blocks(count, 4) for count, held in decoding.items())
    assert max(decoding.values()) == groups.num_blocks(127, 4)
    num_full = groups.windows.count(0)
    window = max(groups.windows)
    windowed = (groups.num_groups - num_full) * (-(-window // 4) + 1)
    assert max(decoding.values()) <= num_full * 32 + windowed


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_what_was_given_back_is_never_read(name: str, families: dict[str, tuple[Path, list[list[int]]]]) -> None:
    """After every step whatever nobody holds is overwritten with huge numbers."""
    folder, expected = families[name]
    config = make_config(folder, enable_prefix_caching=False)
    rank = InProcessRank(config, 256)
    run = Run(rank, config, 256)
    for place, prompt in enumerate(prompts()):
        run.add(greedy(prompt, NUM_TOKENS, stream_id=place))
    assert rank.runner.kv_cache is not None
    tensors, num_spoilt = rank.runner.kv_cache.tensors, 0

    def spoil() -> None:
        nonlocal num_spoilt
        free = [block for block, count in enumerate(run.scheduler.blocks.pool.ref_counts) if not count]
        num_spoilt += sum(bool((tensors[0][block] != 1e4).any()) and bool(tensors[0][block].any()) for block in free)
        for tensor in tensors:
            tensor[free] = 1e4

    run.finish(spoil)
    assert answers(run.requests) == expected
    assert num_spoilt > 20


def test_a_prompt_longer_than_the_pool_passes_through_a_model_of_windows(
    families: dict[str, tuple[Path, list[list[int]]]],
) -> None:
    """Mistral with room for 24 tokens: its chunks are as long as the pool allows."""
    folder, expected = families["mistral"]
    config = make_config(folder, max_num_batched_tokens=64)
    run = Run(InProcessRank(config, 6), config, 6)
    assert ask_all(run) == expected


@pytest.mark.parametrize(("name", "layout"), [(name, "TP2xPP2") for name in CASES] + PARTS)
def test_every_layout_says_what_transformers_says(
    name: str, layout: str, families: dict[str, tuple[Path, list[list[int]]]], hosts: RankHosts, tmp_path: Path
) -> None:
    """Stages deal their own layers to the groups, and the tables are the same for all."""
    folder, expected = families[name]
    tp_size, pp_size = LAYOUTS[layout]
    config = make_config(folder, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size)
    ranks = start(hosts, config, 256, tmp_path, NUM_HOST_BLOCKS)
    run = Run(ranks, config, 256)
    assert {KVGroups(report.kv_windows) for report in ranks.reports} == {run.groups}
    assert ask_all(run) == expected
    assert ask_all(run, n=3) == [answer for answer in expected for _ in range(3)]
    assert run.metrics.prefix_hits > 60
    for num_host_blocks in (0, NUM_HOST_BLOCKS):
        tight = Run(ranks, config, run.groups.num_blocks(81, 4) + 2, num_host_blocks=num_host_blocks)
        tight.scheduler._next_step_id = 1000 + num_host_blocks * 10
        assert ask_all(tight, preempts=True) == expected
        assert bool(tight.metrics.swap_blocks["in"]) == bool(num_host_blocks)
    ranks.stop()
