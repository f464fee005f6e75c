"""Four real rank processes, as TP2, PP2 and TP2 x PP2, behind real channels: tokens and oracles as with one rank."""

import random
import select
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from rig import (
    DEADLINE_SECONDS,
    FAMILIES,
    VOCAB,
    InProcessRank,
    RankHosts,
    Run,
    answers,
    greedy,
    make_config,
    oracle_config,
    start,
    transformers_greedy,
    write_family,
)

from argosy.cluster.oracle import oracle_continuation, oracle_next_token
from argosy.cluster.protocol.errors import ChannelClosed
from argosy.cluster.protocol.messages import NewRequest, Ping, Pong, SchedulerOutput, WorkerError
from argosy.cluster.protocol.sampling import TokenParams

NUM_TOKENS = 10
NUM_HOST_BLOCKS = 100
LAYOUTS = {"TP2": (2, 1), "PP2": (1, 2), "TP2xPP2": (2, 2), "PP3": (1, 3)}  # PP3: stages of 1, 2 and 1 layers
FAMILY_LAYOUTS = [(family, layout) for family in FAMILIES for layout in LAYOUTS if layout != "PP3" or family == "llama"]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """Each family's folder and the answers of transformers."""
    folder = tmp_path_factory.mktemp("families")
    paths = {family: write_family(folder, family) for family in FAMILIES}
    return {family: (path, transformers_greedy(path, prompts(), NUM_TOKENS)) for family, path in paths.items()}


def prompts() -> list[list[int]]:
    """Ragged, longer than a chunk and a block, two with a common prefix."""
    rng = random.Random(9)
    made = [[rng.randrange(VOCAB) for _ in range(length)] for length in (2, 5, 16, 33)]
    return [*made, [*made[-1][:17], 1, 2]]


@pytest.mark.parametrize(("family", "layout"), FAMILY_LAYOUTS)
def test_every_layout_says_what_transformers_says(
    family: str, layout: str, families: dict[str, tuple[Path, list[list[int]]]], hosts: RankHosts, tmp_path: Path
) -> None:
    """Chunked prefill, the same again over prefix hits and with n = 3, then in a pool that forces preemption, at first
    by computing anew and then by swapping to each rank's host memory."""
    folder, expected = families[family]
    tp_size, pp_size = LAYOUTS[layout]
    config = make_config(folder, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size)
    ranks = start(hosts, config, 128, tmp_path, NUM_HOST_BLOCKS)
    assert all(min(ready.swap_seconds) > 0.0 for ready in ranks.ready)
    run = Run(ranks, config, 128)
    for n in (1, 3):
        for prompt in prompts():
            run.add(greedy(prompt, NUM_TOKENS, stream_id=len(run.requests), n=n))
        run.finish()
    assert answers(run.requests) == expected + [answer for answer in expected for _ in range(3)]
    assert run.metrics.prefix_hits > 50
    assert run.metrics.block_copies > 0
    for num_host_blocks in (0, NUM_HOST_BLOCKS):
        tight = Run(ranks, config, 12, num_host_blocks=num_host_blocks)
        tight.scheduler._next_step_id = 1000 + num_host_blocks * 10
        for prompt in prompts():
            tight.add(greedy(prompt, NUM_TOKENS, stream_id=len(tight.requests)))
        # the ranks forget nothing by themselves: handles of the first run are all given back by its end
        tight.finish()
        assert answers(tight.requests) == expected
        if family == "mistral":
            continue  # its window leaves room for the others
        assert tight.metrics.preemptions > 0
        assert bool(tight.metrics.swap_blocks["in"]) == bool(num_host_blocks)
        assert num_host_blocks == 0 or tight.metrics.tokens_recomputed == 0
    ranks.stop()


@pytest.mark.parametrize("layout", ["PP2", "TP2xPP2"])
def test_stages_heed_what_each_request_wishes(
    layout: str, families: dict[str, tuple[Path, list[list[int]]]], hosts: RankHosts, tmp_path: Path
) -> None:
    """Penalties, bans, seeds, stops and figures need the tokens so far, which only the last stage draws, and steps are
    under way before the driver knows them: the answers are those of one rank that is asked one step at a time."""
    folder, _ = families["llama"]
    wishes = [
        {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0.9, "top_p": 0.9, "seed": 11},
        {"temperature": 1.2, "top_k": 9, "min_p": 0.01, "seed": 12, "logprobs": 3},
        {"bad_word_ids": ((5,), (9, 17)), "min_tokens": 6, "stop_token_ids": tuple(range(0, VOCAB, 5))},
        {"logit_bias": ((3, 2.0), (8, -4.0)), "logprobs": 0, "prompt_logprobs": 1},
        {"temperature": 0.7, "seed": 13, "n": 3, "eos_token_ids": tuple(range(1, VOCAB, 9))},
    ]

    def ask(run: Run) -> list[tuple[list[int], list[object]]]:
        for wish in wishes:
            for prompt in prompts()[::2]:
                run.add(greedy(prompt, 14, stream_id=len(run.requests), **wish))
        run.finish()
        figures = [
            [figure.top_ids for delta in request.deltas for figure in delta.logprobs] for request in run.requests
        ]
        return list(zip(answers(run.requests), figures, strict=True))

    alone = make_config(folder, async_scheduling=False)
    expected = ask(Run(InProcessRank(alone, 128), alone, 128))
    tp_size, pp_size = LAYOUTS[layout]
    config = make_config(folder, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size)
    ranks = start(hosts, config, 128, tmp_path)
    assert ask(Run(ranks, config, 128)) == expected
    ranks.stop()


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("num_host_blocks", [0, NUM_HOST_BLOCKS], ids=["recomputes", "swaps"])
def test_the_oracle_stays_exact_in_every_layout(
    layout: str, hosts: RankHosts, tmp_path: Path, num_host_blocks: int
) -> None:
    """Random load with aborts and preemptions, through the TP sum and from stage to stage. One request also asks for
    the figures of its prompt, which comes in chunks."""
    rng = random.Random(3)
    tp_size, pp_size = LAYOUTS[layout]
    config = oracle_config(
        tmp_path, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, max_num_batched_tokens=24
    )
    num_blocks = 36
    ranks = start(hosts, config, num_blocks, tmp_path, num_host_blocks)
    run = Run(ranks, config, num_blocks, num_host_blocks=num_host_blocks)
    prefix = [rng.randrange(997) for _ in range(19)]
    scored_prompt = [rng.randrange(997) for _ in range(40)]
    wishes = {"prompt_logprobs": 1, "logprobs": 0, "read_prefix_cache": False}
    (scored,) = run.add(greedy(scored_prompt, 6, **wishes))
    while len(run.requests) < 60:
        if rng.random() < 0.3:
            prompt = (prefix if rng.random() < 0.5 else []) + [rng.randrange(997) for _ in range(rng.randint(1, 20))]
            run.add(greedy(prompt, rng.randint(1, 30), stream_id=len(run.requests), n=rng.choice((1, 1, 2))))
        running = [request for request in run.requests if not request.is_finished]
        if running and rng.random() < 0.04:
            run.abort(rng.choice(running))
        run.step()
    run.finish()
    for request in run.requests:
        output = answers([request])[0]
        expected = oracle_continuation(request.token_ids[: request.num_prompt_tokens], len(output), 997)
        assert output == expected, (request, request.story)
    assert run.metrics.preemptions > 0
    if num_host_blocks:
        assert run.metrics.tokens_recomputed == 0
        assert min(run.metrics.swap_blocks.values()) > 10
    figures = scored.deltas[0].prompt_logprobs
    assert figures is not None
    for position, figure in enumerate(figures[1:], start=1):
        likely = oracle_next_token(scored_prompt[:position], 997)
        assert figure is not None
        assert figure.top_ids == [scored_prompt[position], likely]
    ranks.channels[0].send(Ping(nonce=17))
    pong = ranks.wait_for(0, Pong)
    assert (pong.nonce, pong.step_id) == (17, run.num_steps - 1)
    report = ranks.reports[0]
    assert report.num_blocks == 128
    assert report.block_bytes == 2 * 4 * (4 // tp_size) * 2 * 4 * (4 // pp_size)  # k and v, slots, heads, size, fp32
    ranks.stop()


def test_a_rank_goes_when_its_driver_goes_even_from_within_a_collective(hosts: RankHosts, tmp_path: Path) -> None:
    """TP2, and only rank 0 gets the step: it waits in an all-reduce. Then the driver dies; the rank must free its
    device at once and not after the collective's deadline."""
    del hosts  # these ranks are not coming back, so they have their own processes
    own = RankHosts(2, tmp_path)
    try:
        config = oracle_config(tmp_path, tensor_parallel_size=2)
        ranks = start(own, config, 16, tmp_path)
        new = NewRequest(0, [1, 2, 3], 3, 0, [0], TokenParams(max_tokens=5, temperature=0.0))
        output = SchedulerOutput(step_id=0, epoch=0, rows=[0], num_tokens=[3], new_requests=[new])
        ranks.channels[0].send(output)
        with pytest.raises(TimeoutError):
            ranks.channels[0].recv(0.5)
        began = time.monotonic()
        ranks.channels[0].close()
        assert own.processes[0].wait(timeout=DEADLINE_SECONDS) != 0
        assert time.monotonic() - began < 5.0
    finally:
        for process in own.processes:
            process.kill()
            process.wait(timeout=DEADLINE_SECONDS)


def test_an_error_in_a_step_is_told_and_ends_the_rank(hosts: RankHosts, tmp_path: Path) -> None:
    """A step message that can't be right (a block table that ends too early) is our own mistake: one line to the
    driver, and the rank is gone; nothing wrong is ever answered."""
    config = oracle_config(tmp_path)
    ranks = start(hosts, config, 16, tmp_path)
    new = NewRequest(0, [1, 2, 3], 3, 0, [99], TokenParams(max_tokens=5))
    ranks.submit(SchedulerOutput(step_id=0, epoch=0, rows=[0], num_tokens=[3], new_requests=[new]))
    message = ranks.channels[0].recv(DEADLINE_SECONDS)
    assert isinstance(message, WorkerError)
    assert message.code == "worker_failed"
    assert "\n" not in message.message
    with pytest.raises(ChannelClosed):
        ranks.channels[0].recv(DEADLINE_SECONDS)


def test_a_model_that_can_not_be_served_is_told_in_one_line(hosts: RankHosts, tmp_path: Path) -> None:
    """The folder has no weights: the rank says which file, and ends."""
    config = oracle_config(tmp_path).replace(model=make_config(tmp_path / "oracle").model)
    with pytest.raises(AssertionError, match=r"WorkerError.*weight_error.*safetensors"):
        start(hosts, config, 16, tmp_path)


def test_select_sees_no_word_from_an_idle_rank(hosts: RankHosts, tmp_path: Path) -> None:
    """A step without rows is answered, a late step of another epoch is not."""
    config = oracle_config(tmp_path)
    ranks = start(hosts, config, 16, tmp_path)
    ranks.submit(SchedulerOutput(step_id=5, epoch=7, rows=[0]))
    ranks.submit(SchedulerOutput(step_id=6, epoch=0, rows=[]))
    answer = ranks.next_answer()
    assert (answer.step_id, list(answer.token_ids)) == (6, [])
    assert not select.select([ranks.channels[0]], [], [], 0.05)[0]
    ranks.stop()
