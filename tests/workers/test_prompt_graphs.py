"""Recorded steps with prompts, without a card: a replay does again what was recorded, over the same buffers."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import make_checkpoint
from recorded_rig import KINDS, Recorded
from rig import (
    VOCAB,
    InProcessRank,
    RankHosts,
    Ranks,
    Run,
    answers,
    greedy,
    make_config,
    start,
    transformers_greedy,
    write_family,
)
from test_kv_groups import CASES

from argosy.cluster.protocol.messages import SchedulerOutput
from argosy.workers import prompt_graphs
from argosy.workers.input_batch import InputBatch
from argosy.workers.prompt_graphs import Kind
from argosy.workers.step_recording import make_graphs

PROMPTS = (3, 30, 1, 17, 8, 40, 5, 23, 2, 60, 11, 29)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    made = {family: write_family(parent, family) for family in ("llama", "mistral", "qwen3")}
    for name in ("gemma3", "gpt-oss"):  # of two and three tables, with soft caps, sinks and experts
        make_checkpoint(parent / name, name, case=CASES[name][0])
        made[name] = parent / name
    return made


def prompts_of(rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(100) for _ in range(length)] for length in PROMPTS]


def run_all(ranks: Ranks, config: Any, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    """All through the real scheduler, joining one after another."""
    run = Run(ranks, config, 128)
    requests = []
    for number, prompt in enumerate(prompts):
        requests += run.add(greedy(prompt, 6 + number % 5, stream_id=number, **params))
        run.step()
    run.finish()
    return answers(requests)


def contexts_of(ranks: Recorded) -> list[tuple[Kind, int]]:
    """The kind of each step that is replayed from now on, and the longest context of its decode rows."""
    assert ranks.runner.graphs is not None
    prompts = ranks.runner.graphs.prompts
    assert prompts is not None
    begin, seen = prompts.begin, list[tuple[Kind, int]]()

    def noted(output: SchedulerOutput) -> Any:
        begun = begin(output)
        if begun is not None:
            inputs, kind = begun
            assert inputs.num_tokens_R is not None
            num_decodes = int((inputs.num_tokens_R == 1).sum())
            seen.append((kind, int(inputs.end_R[:num_decodes].max(initial=0))))
        return begun

    prompts.begin = noted  # type: ignore[method-assign]  # the same, noted
    return seen


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "gpt-oss"])
def test_recorded_steps_say_what_transformers_says(family: str, folders: dict[str, Path]) -> None:
    """Twelve prompts of 1 to 60 tokens in chunks, beside up to eight rows: each kind is replayed, and steps of more
    tokens than there are places for run eagerly between them."""
    prompts = prompts_of(random.Random(3))
    config = make_config(folders[family], max_num_batched_tokens=40)
    ranks = Recorded(config, 128)
    want = [ids[: 6 + number % 5] for number, ids in enumerate(transformers_greedy(folders[family], prompts, 10))]
    assert run_all(ranks, config, prompts) == want
    assert {kind for kind in ranks.kinds if kind is not None} == set(KINDS)
    assert None in ranks.kinds
    assert sum(graph.count for graph in ranks.recorder.made) > 10


@pytest.mark.parametrize("beside", [0, 2])
def test_a_last_piece_of_one_token_is_read_from_the_prompt(beside: int, folders: dict[str, Path]) -> None:
    """It looks like a row that decodes, alone or among such rows, but its token is not one that was sampled: so after
    prompts a step and one token long, and after losses, when a request comes back with all it had said."""
    config = make_config(folders["llama"], max_num_batched_tokens=24)
    lengths = [length + step for length in (24 - beside, 2 * (24 - beside)) for step in (0, 1, 2)]
    rng = random.Random(beside)
    prompts = [[rng.randrange(100) for _ in range(length)] for length in lengths]
    want = transformers_greedy(folders["llama"], prompts, 5)
    ranks = Recorded(config, 128)
    run = Run(ranks, config, 128)
    others = [run.add(greedy([1 + number], 80, stream_id=100 + number))[0] for number in range(beside)]
    run.step()
    run.step()
    requests = []
    for number, prompt in enumerate(prompts):
        requests += run.add(greedy(prompt, 5, stream_id=number))
        for _ in range(12):
            run.step()
    assert answers(requests) == want
    run.finish()
    assert answers(others) == transformers_greedy(folders["llama"], [[1 + number] for number in range(beside)], 80)


def test_a_piece_of_one_token_that_is_not_the_last_draws_nothing(folders: dict[str, Path]) -> None:
    """Two rows decode where a step has room for three tokens: each piece looks like a third row."""
    config = make_config(folders["llama"], max_num_batched_tokens=3, max_num_seqs=3)
    run = Run(Recorded(config, 128), config, 128)
    requests = [run.add(greedy([1 + number], 40, stream_id=number))[0] for number in range(2)]
    run.step()
    prompt = [5, 3, 8, 1, 9, 2, 7]
    requests += run.add(greedy(prompt, 40, stream_id=2))
    run.finish()
    assert answers(requests) == transformers_greedy(folders["llama"], [[1], [2], prompt], 40)


def test_a_prefix_is_found_and_drawn_tokens_are_the_same(folders: dict[str, Path]) -> None:
    """Requests of one beginning, drawn by seeds, with log probabilities: what an eager rank gives, token by token."""
    rng = random.Random(5)
    beginning = [rng.randrange(VOCAB) for _ in range(25)]
    prompts = [beginning + [rng.randrange(VOCAB) for _ in range(1 + number % 4)] for number in range(8)]
    config = make_config(folders["llama"], max_num_batched_tokens=24)
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": 11, "logprobs": 2}
    ranks = Recorded(config, 128)
    assert run_all(ranks, config, prompts, **drawn) == run_all(InProcessRank(config, 128), config, prompts, **drawn)
    assert None not in ranks.kinds


def test_prompts_whose_log_probabilities_are_asked_for_run_eagerly(folders: dict[str, Path]) -> None:
    """All their states are needed, and recorded steps leave those that sample; others come after them."""
    config = make_config(folders["llama"], max_num_batched_tokens=24)
    ranks = Recorded(config, 128)
    run = Run(ranks, config, 128)
    (asked,) = run.add(greedy(list(range(1, 12)), 1, prompt_logprobs=1))
    run.finish()
    assert ranks.kinds == []
    assert len(answers([asked])[0]) == 1
    run.add(greedy(list(range(2, 12)), 3, stream_id=1))
    run.finish()
    assert ranks.kinds
    assert ranks.kinds[0] == (24, 2)


def test_the_smallest_recording_is_taken(folders: dict[str, Path]) -> None:
    """By tokens first, then by decode rows; none for too many of either, or of prompts."""
    config = make_config(folders["llama"])
    graphs = make_graphs(InProcessRank(config, 8).runner, 8, KINDS)
    assert graphs.prompts is not None
    kind_of = graphs.prompts.kind_of
    assert kind_of(1, 0, 1) == kind_of(24, 2, 2) == (24, 2)
    assert kind_of(25, 0, 1) == kind_of(32, 2, 16) == (32, 2)
    assert kind_of(20, 3, 1) == (32, 6)
    assert kind_of(33, 0, 1) is kind_of(32, 7, 1) is kind_of(24, 0, 17) is None


def test_the_buffer_holds_the_largest_step() -> None:
    """Tokens and rows of the largest recording, each with as many blocks as a request may have."""
    for length, entries in ((60, 1 << 20), (4000, 1 << 20), (4000, 700)):
        batch = InputBatch(
            max_num_seqs=64, max_model_len=length, max_num_batched_tokens=64, block_size=4, vocab_size=100,
            device=torch.device("cpu"),
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prompt_graphs, "MOST_TABLE_ENTRIES", entries)
            nobody: Any = None
            graphs = prompt_graphs.PromptGraphs(
                batch, nobody, nobody, KINDS, max_model_len=length, hidden_size=8, dtype=torch.float32,
                is_first_stage=True, is_last_stage=True,
            )  # fmt: skip
        (staging,) = graphs._staging
        staging.begin()
        assert all(part.size for part in graphs._take(staging))
        rows, table = graphs._num_rows, min(graphs._num_rows * batch.max_blocks, entries)
        for count, is_long in ((rows, True), (rows, True), (rows, False), (table, False)):
            assert staging.take(count, is_long).shape == (count,)


class Turns(list[Any]):
    """Notes which of its places was asked for."""

    def __init__(self, staging: Any, count: int):
        super().__init__([staging] * count)
        self.asked: list[Any] = []

    def __getitem__(self, place: Any) -> Any:
        self.asked.append(place)
        return super().__getitem__(place)


def test_buffers_on_the_host_take_turns(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's copy to the card may be under way while the host fills the next one's: one more than steps in flight."""
    config = make_config(folders["llama"], max_num_batched_tokens=40)
    ranks = Recorded(config, 128)
    assert ranks.runner.graphs is not None
    prompts = ranks.runner.graphs.prompts
    assert prompts is not None
    turns = prompts._staging = Turns(prompts._staging[0], 3)
    run_all(ranks, config, prompts_of(random.Random(3)))
    assert turns.asked[:5] == [1, 2, 0, 1, 2]
    monkeypatch.setattr(prompt_graphs, "Staging", lambda capacity, device, twin: twin)
    prompts.batch.device = torch.device("meta")
    for in_flight, count in ((2, 3), (5, 6)):
        prompts.batch.max_steps_in_flight = in_flight
        made: list[Any] = prompts._make_staging()
        assert len(made) == count
        assert all(twin is made[0] for twin in made), "the device has one"


def test_steps_whose_block_tables_have_no_room_run_eagerly(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long contexts beside a prompt: they are found out before anything is written."""
    monkeypatch.setattr(prompt_graphs, "MOST_TABLE_ENTRIES", 12)
    prompts = prompts_of(random.Random(3))
    config = make_config(folders["llama"], max_num_batched_tokens=40)
    ranks = Recorded(config, 128)
    want = [ids[: 6 + number % 5] for number, ids in enumerate(transformers_greedy(folders["llama"], prompts, 10))]
    assert run_all(ranks, config, prompts) == want
    small = [kind for kind in ranks.kinds if kind is not None]
    assert small
    assert len(small) < len(ranks.kinds) - 3


def test_long_steps_have_room_for_more_prompts_and_are_not_padded_by_far(folders: dict[str, Path]) -> None:
    """Twenty prompts at once find no place in small recordings; a step that would be mostly padding runs eagerly."""
    config = make_config(folders["llama"], max_num_batched_tokens=1024, max_num_seqs=24)
    prompts = prompts_of(random.Random(4)) * 2
    ranks = Recorded(config, 200, [(24, 2), (1024, 24), (3072, 24)])
    run = Run(ranks, config, 200)
    requests = [run.add(greedy(prompt, 4, stream_id=number))[0] for number, prompt in enumerate(prompts)]
    run.finish()
    assert answers(requests) == transformers_greedy(folders["llama"], prompts, 4)
    assert (1024, 24) in ranks.kinds
    graphs = ranks.runner.graphs
    assert graphs is not None
    assert graphs.prompts is not None
    kind_of = graphs.prompts.kind_of
    assert kind_of(100, 0, 17) == kind_of(100, 3, 1) == kind_of(1000, 24, 64) == (1024, 24)
    assert kind_of(2049, 0, 1) == (3072, 24)
    assert kind_of(1000, 0, 65) is kind_of(1025, 0, 1) is kind_of(2048, 0, 1) is kind_of(1000, 25, 1) is None


def test_a_long_context_beside_long_prompts_goes_to_an_eager_step(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be one program's work where others have long ended; beside a few rows contexts are cut into pieces."""
    monkeypatch.setattr(prompt_graphs, "MOST_DECODE_CONTEXT", 40)
    config = make_config(folders["llama"], max_num_batched_tokens=1024, max_num_seqs=24)
    rng = random.Random(6)
    long, *others = [[rng.randrange(100) for _ in range(length)] for length in (45, 30, 28, 20)]
    ranks = Recorded(config, 200, [(24, 2), (1024, 24)])
    run = Run(ranks, config, 200)
    requests = run.add(greedy(long, 12, stream_id=0))
    for number, prompt in enumerate(others, start=1):
        run.step()
        run.step()
        requests += run.add(greedy(prompt, 12, stream_id=number))
    run.finish()
    assert answers(requests) == [ids[:12] for ids in transformers_greedy(folders["llama"], [long, *others], 12)]
    kinds = [kind for kind in ranks.kinds if kind != (24, 2)]
    assert kinds[:3] == [(1024, 24), None, None], "its own prompt, and the two behind it"


def test_a_long_context_among_many_decode_rows_goes_to_an_eager_step(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside long prompts: with places for many rows no context is cut into pieces. Beside few it is replayed."""
    monkeypatch.setattr(prompt_graphs, "MOST_DECODE_CONTEXT", 40)
    monkeypatch.setattr(prompt_graphs, "PROMPT_DECODES", (1, 2))
    ranks = Recorded(make_config(folders["llama"], max_num_batched_tokens=32), 128)
    seen = contexts_of(ranks)
    prompts = prompts_of(random.Random(7))
    run_all(ranks, ranks.runner.config, [prompts[9], *prompts])
    assert {longest > 40 for (_, places), longest in seen if places == 2} == {True, False}
    assert {longest > 40 for (_, places), longest in seen if places == 6} == {False}
    assert None in ranks.kinds


def test_tables_too_long_for_the_room_go_to_eager_steps(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows by blocks of a step's longest context, in two tables: room for all that could be would be larger than the
    model."""
    monkeypatch.setattr(prompt_graphs, "MOST_TABLE_ENTRIES", 12)
    config = make_config(folders["gemma3"], max_num_batched_tokens=24)
    prompts = prompts_of(random.Random(5))
    ranks = Recorded(config, 128)
    assert run_all(ranks, config, prompts) == run_all(InProcessRank(config, 128), config, prompts)
    assert {kind is None for kind in ranks.kinds} == {True, False}


def test_decode_rows_with_long_contexts_are_taken_first(folders: dict[str, Path]) -> None:
    """A multiprocessor that begins a long row last works alone at the end; nothing but the time tells."""
    config = make_config(folders["llama"], max_num_batched_tokens=32)
    ranks = Recorded(config, 128)
    prompts = ranks.runner.graphs.prompts
    assert prompts is not None
    begin, seen = prompts.begin, []

    def noted(output: SchedulerOutput) -> Any:
        begun = begin(output)
        if begun is not None:
            inputs, _ = begun
            num_decodes = int((inputs.num_tokens_R == 1).sum())
            contexts = inputs.end_R[:num_decodes]
            seen.append([int(contexts[place]) for place in inputs.metadata.order_R[:num_decodes]])
        return begun

    prompts.begin = noted  # type: ignore[method-assign]  # the same, noted
    run = Run(ranks, config, 128)
    for number, length in enumerate((5, 19, 9, 14, 7)):
        run.add(greedy(list(range(length)), 12, stream_id=number))
        run.step()
    run.finish()
    assert max(map(len, seen)) > 2
    assert all(contexts == sorted(contexts, reverse=True) for contexts in seen)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankHosts]:
    made = RankHosts(4, tmp_path_factory.mktemp("hosts"), str(Path(__file__).with_name("recorded_ranks.py")))
    yield made
    made.close()


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2), (2, 2)])
def test_several_ranks_replay_the_same_steps(
    tp_size: int, pp_size: int, folders: dict[str, Path], hosts: RankHosts, tmp_path: Path
) -> None:
    """Parts of layers and stages, with hidden states, sums and tokens going the same ways as between eager steps."""
    prompts = prompts_of(random.Random(3))
    want = [ids[: 6 + number % 5] for number, ids in enumerate(transformers_greedy(folders["llama"], prompts, 10))]
    config = make_config(
        folders["llama"], max_num_batched_tokens=40, tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size
    )
    before = [log.read_text().count("replayed") for log in hosts.logs]
    ranks = start(hosts, config, 128, tmp_path)
    try:
        assert run_all(ranks, config, prompts) == want
    finally:
        ranks.stop()
    count = tp_size * pp_size
    replayed = [log.read_text().count("replayed") - old for log, old in zip(hosts.logs, before, strict=True)][:count]
    assert replayed[0] > 5
    assert len(set(replayed)) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "gpt-oss"])
def test_on_a_card_recorded_steps_say_what_transformers_says(family: str, folders: dict[str, Path]) -> None:
    """The same requests launched kernel by kernel, and then really recorded."""
    prompts = prompts_of(random.Random(3))
    want = [ids[: 6 + number % 5] for number, ids in enumerate(transformers_greedy(folders[family], prompts, 10))]
    config = make_config(folders[family], max_num_batched_tokens=40, device="cuda", block_size=16)
    ranks = InProcessRank(config, 128, device_name="cuda")
    ranks.runner.warm_up([(1, 32), (8, 1)])
    assert run_all(ranks, config, prompts) == want
    ranks.runner.execute(SchedulerOutput(step_id=0, epoch=0, rows=[], finished=list(range(8))))
    ranks.runner.record_graphs()
    graphs = ranks.runner.graphs
    assert graphs is not None
    assert graphs.prompts is not None
    assert graphs.prompts.kinds == [(32, 8), (64, 8)]
    kinds: list[Kind] = []
    run = graphs.prompts.run
    graphs.prompts.run = lambda kind, inputs: (kinds.append(kind), run(kind, inputs))[1]  # type: ignore[func-returns-value,method-assign]  # the same, noted
    assert run_all(ranks, config, prompts) == want
    assert set(kinds) == {(32, 8), (64, 8)}
