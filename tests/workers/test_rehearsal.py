"""Steps that are gone through before the first start: what a rank says afterwards, and how steps are recorded."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from recorded_rig import KINDS
from rig import InProcessRank, Run, answers, greedy, make_config, transformers_greedy, write_family

from argosy.kernels import compile_ahead
from argosy.kernels.compile_ahead import NotLoaded
from argosy.workers import cuda_graphs, prompt_graphs, rehearsal, step_recording, worker
from argosy.workers.recording import Recorder


def test_a_rehearsed_rank_answers_as_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that is warmed up or recorded ran, by no kernel of Triton's here; nothing of it is left behind."""
    folder, mark = write_family(tmp_path, "llama"), tmp_path / "mark"
    ran: list[str] = []
    record_size, record_kind = cuda_graphs.CUDAGraphRunner._record_size, prompt_graphs.PromptGraphs.record
    for owner, name, real in (
        (cuda_graphs.CUDAGraphRunner, "_record_size", record_size), (prompt_graphs.PromptGraphs, "record", record_kind),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, lambda *args, name=name, real=real: (ran.append(name), real(*args)))
    monkeypatch.setattr(rehearsal, "_mark_of", lambda runner: mark)
    monkeypatch.setattr(step_recording, "graph_sizes", lambda runner: [1, 2, 4, 8])
    monkeypatch.setattr(step_recording, "recorded_prompts", lambda runner: KINDS)
    config = make_config(folder, max_num_batched_tokens=40)
    ranks = InProcessRank(config, 1)
    ranks.runner.batch.lives_on_device = True
    for staging in ranks.runner.batch._staging:
        staging.is_shared = False
    rehearsal.rehearse(ranks.runner)
    assert ran.count("_record_size") == 4
    assert ran.count("record") == len(KINDS)
    assert ranks.runner.kv_cache is None
    assert ranks.runner.graphs is None
    assert mark.exists()
    ranks.runner.allocate(128)
    rng = random.Random(5)
    prompts = [[rng.randrange(100) for _ in range(length)] for length in (3, 30, 1, 17, 40)]
    run = Run(ranks, config, 128)
    requests = [run.add(greedy(prompt, 8, stream_id=number))[0] for number, prompt in enumerate(prompts)]
    run.finish()
    assert answers(requests) == transformers_greedy(folder, prompts, 8)


@pytest.mark.parametrize(
    ("device", "ranks", "threads", "is_marked", "is_due"),
    [("cuda", (1, 1), 4, False, True), ("cuda", (1, 1), 4, True, False), ("cuda", (1, 1), 1, False, False),
     ("cuda", (2, 1), 4, False, False), ("cuda", (1, 2), 4, False, False), ("cpu", (1, 1), 4, False, False)],
)  # fmt: skip
def test_one_rank_on_a_card_rehearses_until_it_is_marked(
    device: str, ranks: tuple[int, int], threads: int, is_marked: bool, is_due: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Over several ranks sums would be waited for; one core compiles one after the other anyway."""
    runner: Any = type("Runner", (), {"device": torch.device(device), "rank": type("Rank", (), {})})
    runner.rank.tp_size, runner.rank.pp_size = ranks
    mark = tmp_path / "mark"
    if is_marked:
        mark.touch()
    monkeypatch.setattr(rehearsal, "_mark_of", lambda runner: mark)
    monkeypatch.setattr(rehearsal, "_num_threads", lambda: threads)
    assert rehearsal.is_due(runner) is is_due
    monkeypatch.setenv("ARGOSY_REHEARSAL", "0")
    assert not rehearsal.is_due(runner)


def test_the_mark_is_of_this_model_these_limits_and_these_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And lies where the compiled kernels do, so that both go together."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    monkeypatch.setattr(compile_ahead, "cache_folder", lambda: tmp_path)
    folder = write_family(tmp_path, "llama")
    ranks = [
        InProcessRank(make_config(folder, **settings), 1).runner
        for settings in ({}, {}, {"max_num_seqs": 4}, {"block_size": 8}, {"enforce_eager": True})
    ]
    marks = [rehearsal._mark_of(runner) for runner in ranks]
    assert marks[0] == marks[1]
    assert len(set(marks)) == 4
    assert all(mark.parent == tmp_path for mark in marks)
    ranks[0].cache_dtype = torch.float16
    assert rehearsal._mark_of(ranks[0]) != marks[0]


class Captures(Recorder):
    """A recorder without a card: a capture fails until what it needs was run outside of one."""

    def __init__(self, *, alone: bool, loaded: bool) -> None:
        self._alone, self.loaded, self.said = alone, loaded, list[str]()
        self._stream = type("Stream", (), {"synchronize": lambda _: self.said.append("waited")})()
        self.capturing = False

    def _capture(self, run: Any) -> tuple[Any, Any]:
        self.capturing = True
        try:
            return None, run()
        finally:
            self.capturing = False

    def step(self) -> str:
        """What is recorded."""
        if self.capturing and not self.loaded:
            raise NotLoaded
        self.loaded = True
        self.said.append("recorded" if self.capturing else "ran")
        return "made"


@pytest.mark.parametrize(
    ("alone", "loaded", "said"),
    [(True, True, ["recorded"]), (True, False, ["ran", "waited", "recorded"]),
     (False, True, ["ran", "waited", "recorded"]), (False, False, ["ran", "waited", "recorded"])],
)  # fmt: skip
def test_a_step_runs_before_it_is_recorded_only_where_it_has_to(alone: bool, loaded: bool, said: list[str]) -> None:
    """Alone, with all it needs on the device, it is recorded at once."""
    recorder = Captures(alone=alone, loaded=loaded)
    assert recorder.record(recorder.step) == (None, "made")
    assert recorder.said == said


@pytest.mark.parametrize(("tp_size", "alone"), [(1, True), (2, False)])
def test_a_group_runs_each_step_before_it_records_it(
    tp_size: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a rank that has loaded its kernels would go on, and one that has not would wait for it."""
    made: list[bool] = []
    graphs = SimpleNamespace(record=lambda recorder, on_progress: None)
    monkeypatch.setattr(step_recording, "graph_sizes", lambda runner: [1])
    monkeypatch.setattr(step_recording, "recorded_prompts", lambda runner: [])
    monkeypatch.setattr(step_recording, "make_graphs", lambda runner, rows, kinds: graphs)
    monkeypatch.setattr(step_recording, "Recorder", lambda device, alone=False: made.append(alone))
    runner: Any = SimpleNamespace(device=None, rank=SimpleNamespace(tp_size=tp_size))
    assert step_recording.record_graphs(runner, None) is graphs
    assert made == [alone]


@pytest.mark.parametrize(("is_card", "is_due"), [(True, True), (True, False), (False, True)])
def test_a_rank_compiles_before_it_measures(is_card: bool, is_due: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card, where it was not done: what that took of the device is given back, and its seconds are told apart."""
    said: list[object] = []
    monkeypatch.setattr(rehearsal, "is_due", lambda runner: is_due)
    monkeypatch.setattr(rehearsal, "rehearse", lambda runner: said.append("compiled"))
    monkeypatch.setattr(worker, "measure_num_blocks", lambda *about: said.append("measured"))
    rank = object.__new__(worker.Worker)
    meter = SimpleNamespace(release=lambda: said.append("released")) if is_card else None
    rank.ledger = SimpleNamespace(meter=meter)  # type: ignore[assignment]  # a stand-in
    rank._clock = SimpleNamespace(mark=said.append)  # type: ignore[assignment]  # a stand-in
    rank._progress = lambda phase, done: said.append(phase)  # type: ignore[method-assign]  # a stand-in
    rank._measure(SimpleNamespace())  # type: ignore[arg-type]  # a stand-in
    compiled = ["compiling kernels", "compiled", "released", "compiling kernels"]
    assert said == [*(compiled if is_card and is_due else []), "measured"]
