"""One rank under the real scheduler: the tokens of transformers, whatever happens to the requests on the way."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rig import (
    FAMILIES,
    VOCAB,
    InProcessRank,
    Run,
    answers,
    greedy,
    make_config,
    oracle_config,
    transformers_greedy,
    write_family,
)

from argosy.cluster.oracle import oracle_continuation
from argosy.cluster.protocol.messages import NewRequest, SchedulerOutput
from argosy.cluster.protocol.sampling import TokenParams
from argosy.workers import prompt_logprobs

NUM_TOKENS = 12


def ragged_prompts(count: int = 6) -> list[list[int]]:
    """Lengths around block and chunk borders; two share a prefix of several blocks."""
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (1, 4, 7, 16, 21, 37)[:count]]
    prompts.append([*prompts[-1][:18], 3, 1, 4])
    return prompts


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """For each family: its folder, and what transformers answers to the ragged prompts."""
    folder = tmp_path_factory.mktemp("families")
    made = {}
    for family in FAMILIES:
        path = write_family(folder, family)
        made[family] = (path, transformers_greedy(path, ragged_prompts(), NUM_TOKENS))
    return made


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("mode", ["chunked", "preempted", "swapped", "prefix_hits", "n=3", "synchronous"])
def test_greedy_tokens_are_those_of_transformers(
    family: str, mode: str, families: dict[str, tuple[Path, list[list[int]]]]
) -> None:
    """Ragged prompts together in a batch with a budget of 16 tokens a step, so that prompts come in chunks."""
    folder, expected = families[family]
    num_blocks = 16 if mode in ("preempted", "swapped") else 128
    num_host_blocks = 200 if mode == "swapped" else 0
    config = make_config(folder, async_scheduling=mode != "synchronous")
    rank = InProcessRank(config, num_blocks, num_host_blocks)
    run = Run(rank, config, num_blocks, num_host_blocks=num_host_blocks)
    n = 3 if mode == "n=3" else 1
    for stream_id, prompt in enumerate(ragged_prompts()):
        run.add(greedy(prompt, NUM_TOKENS, stream_id=stream_id, n=n))
    run.finish()
    assert answers(run.requests) == [answer for answer in expected for _ in range(n)]
    has_room = family == "mistral"  # its window leaves room for the others
    if mode == "swapped" and not has_room:
        assert run.metrics.preemptions_swapped == run.metrics.preemptions > 0
        assert run.metrics.swap_blocks["in"] > 5
        assert run.metrics.tokens_recomputed == 0
    if mode == "preempted" and not has_room:
        assert run.metrics.preemptions > 0
    if mode == "n=3":
        assert run.metrics.block_copies > 0
    if mode == "prefix_hits":
        for stream_id, prompt in enumerate(ragged_prompts()):
            run.add(greedy(prompt, NUM_TOKENS, stream_id=100 + stream_id))
        run.finish()
        assert answers(run.requests[len(expected) :]) == expected
        assert run.metrics.prefix_hits > 50


def test_the_last_layer_multiplies_only_tokens_that_somebody_asks_for(
    families: dict[str, tuple[Path, list[list[int]]]],
) -> None:
    """A prompt of 37 in chunks of 16: nothing, nothing, one row; with logprobs of the prompt all of them."""
    folder, expected = families["llama"]
    config = make_config(folder, async_scheduling=False)
    rank = InProcessRank(config, 128)
    layers = list(rank.runner.model.layers.values())
    seen: dict[int, list[int]] = {0: [], len(layers) - 1: []}
    for place, rows in seen.items():
        layers[place].mlp.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(len(inputs[0])))
    run = Run(rank, config, 128)
    run.add(greedy(ragged_prompts()[5], NUM_TOKENS))
    run.finish()
    assert answers(run.requests) == [expected[5]]
    assert seen[0][:3] == [16, 16, 5]
    assert seen[len(layers) - 1][:2] == [1, 1]  # the third chunk, then the first token after it
    run.add(greedy(ragged_prompts()[4], NUM_TOKENS, stream_id=7, prompt_logprobs=1))
    seen[len(layers) - 1].clear()
    run.finish()
    assert sum(seen[len(layers) - 1][:2]) == 21


def test_draws_are_the_same_in_any_batch_and_after_preemption(
    families: dict[str, tuple[Path, list[list[int]]]],
) -> None:
    """Seeded requests alone, then all together in a pool that can't hold them."""
    folder, _ = families["llama"]
    wishes = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2}
    alone = []
    for seed, prompt in enumerate(ragged_prompts()):
        config = make_config(folder)
        run = Run(InProcessRank(config, 128), config, 128)
        run.add(greedy(prompt, NUM_TOKENS, seed=seed, **wishes))
        run.finish()
        alone += answers(run.requests)
    config = make_config(folder)
    run = Run(InProcessRank(config, 16), config, 16)
    for seed, prompt in enumerate(ragged_prompts()):
        run.add(greedy(prompt, NUM_TOKENS, seed=seed, stream_id=seed, **wishes))
    run.finish()
    assert run.metrics.preemptions > 0
    assert answers(run.requests) == alone
    assert len({tuple(answer) for answer in alone}) == len(alone)


@pytest.mark.parametrize("at_once", [prompt_logprobs.ROWS_AT_ONCE, 3])
def test_prompt_logprobs_are_those_of_one_whole_pass(
    at_once: int, families: dict[str, tuple[Path, list[list[int]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt of 37 tokens comes in three chunks beside other rows; each position is scored once, with the logits of
    a whole chunk in memory, or of three positions."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(prompt_logprobs, "ROWS_AT_ONCE", at_once)

    folder, _ = families["qwen3"]
    prompts = ragged_prompts()
    config = make_config(folder)
    run = Run(InProcessRank(config, 128), config, 128)
    run.add(greedy(prompts[2], NUM_TOKENS))
    (request,) = run.add(greedy(prompts[5], 3, stream_id=1, prompt_logprobs=2, logprobs=1, read_prefix_cache=False))
    run.finish()
    figures = request.deltas[0].prompt_logprobs
    assert figures is not None
    assert figures[0] is None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([request.token_ids])).logits[0].log_softmax(dim=-1)
    for position in range(1, len(prompts[5])):
        figure, row = figures[position], expected[position - 1]
        assert figure is not None
        assert figure.top_ids[0] == prompts[5][position]
        assert figure.top_ids[1:] == row.topk(2).indices.tolist()
        torch.testing.assert_close(torch.tensor(figure.top_logprobs), row[figure.top_ids], atol=1e-4, rtol=1e-4)
        assert figure.rank == int((row > row[prompts[5][position]]).sum()) + 1
    sampled = [figure for delta in request.deltas for figure in delta.logprobs]
    assert [figure.top_ids[0] for figure in sampled] == request.token_ids[-3:]
    for position, figure in enumerate(sampled, start=len(prompts[5])):
        row = expected[position - 1]
        torch.testing.assert_close(torch.tensor(figure.top_logprobs), row[figure.top_ids], atol=1e-4, rtol=1e-4)


def test_a_row_that_can_not_be_computed_fails_alone(tmp_path: Path) -> None:
    """An id beyond the vocabulary slipped past the doors: that row fails by name, its neighbour is right."""
    config = oracle_config(tmp_path)
    rank = InProcessRank(config, 32)
    params = TokenParams(max_tokens=5, temperature=0.0)
    new = [NewRequest(0, [1, 5000, 3], 3, 0, [0], params), NewRequest(1, [1, 2, 3], 3, 0, [1], params)]
    rank.submit(SchedulerOutput(step_id=0, epoch=0, rows=[0, 1], num_tokens=[3, 3], new_requests=new))
    answer = rank.next_answer()
    assert answer.token_ids == [-1, *oracle_continuation([1, 2, 3], 1, 997)]
    ((place, problem),) = answer.failed
    assert place == 0
    assert "vocabulary" in problem


@pytest.mark.parametrize("num_host_blocks", [0, 12, 300])
def test_the_oracle_stays_exact_under_random_load(tmp_path: Path, num_host_blocks: int) -> None:
    """Arrivals, shared prefixes, n, aborts and preemptions at random: every token of every answer is checked.

    The oracle's next token hashes all ids read back from the blocks, so one lost, stale or foreign block shows. With a
    host tier, small or large, blocks go there and come back.
    """
    rng = random.Random(7)
    config = oracle_config(tmp_path, max_num_seqs=12, max_num_batched_tokens=24)
    num_blocks = 40
    rank = InProcessRank(config, num_blocks, num_host_blocks)
    run = Run(rank, config, num_blocks, num_host_blocks=num_host_blocks)
    prefixes = [[rng.randrange(997) for _ in range(rng.randint(5, 30))] for _ in range(4)]

    def arrive_or_leave() -> None:
        if rng.random() < 0.25 and len(run.requests) < 220:
            prompt = (rng.choice(prefixes) if rng.random() < 0.6 else []) + [
                rng.randrange(997) for _ in range(rng.randint(1, 20))
            ]
            run.add(greedy(prompt, rng.randint(1, 40), stream_id=len(run.requests), n=rng.choice((1, 1, 1, 2, 3))))
        running = [request for request in run.requests if not request.is_finished]
        if running and rng.random() < 0.03:
            run.abort(rng.choice(running))

    while len(run.requests) < 220:
        arrive_or_leave()
        run.step()
        run.scheduler.check()
    run.finish(arrive_or_leave)
    run.scheduler.check()
    for request in run.requests:
        prompt, output = request.token_ids[: request.num_prompt_tokens], answers([request])[0]
        assert output == oracle_continuation(prompt, len(output), 997), request.story
    assert run.metrics.preemptions > 5
    assert run.metrics.prefix_hits > 100
    assert run.metrics.block_copies > 5
    if num_host_blocks:
        assert min(run.metrics.swap_blocks.values()) > 20
        assert run.metrics.host_hits > 20
        assert run.scheduler.host.pool.num_held == 0
    if num_host_blocks > 100:
        assert run.metrics.tokens_recomputed == 0


def test_the_oracle_notices_a_block_that_is_not_its_own(tmp_path: Path) -> None:
    """The judge must be able to condemn: one wrong id in a block table, and every later token differs."""
    config = oracle_config(tmp_path)
    rank = InProcessRank(config, 32)
    run = Run(rank, config, 32)
    prompt = list(range(20))
    (request,) = run.add(greedy(prompt, 20))
    other = run.add(greedy([9] * 20, 20, stream_id=1))[0]
    for _ in range(6):
        run.step()
    good = len(answers([request])[0])
    rank.runner.batch.block_table_NGB[request.handle, 0, 1] = other.block_ids[1]
    run.finish()
    output, expected = answers([request])[0], oracle_continuation(prompt, 20, 997)
    assert output[:good] == expected[:good]
    wrong = [a != b for a, b in zip(output, expected, strict=True)]
    assert sum(wrong) >= 20 - good - 3
