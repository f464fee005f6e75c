"""A process that plays ranks as `rig.be_ranks`, their steps recorded by a `FakeRecorder` (`recorded_rig`)."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from recorded_rig import KINDS, FakeRecorder, Forgetful
from rig import be_ranks

from argosy.workers import model_runner
from argosy.workers.cuda_graphs import CUDAGraphRunner
from argosy.workers.model_runner import ModelRunner
from argosy.workers.step_recording import make_graphs


def record_graphs(runner: ModelRunner, on_progress: Callable[[float], None] | None) -> CUDAGraphRunner:
    """In place of the real one."""
    runner.backend, runner.batch.lives_on_device = Forgetful(), True
    with torch.inference_mode():
        graphs = make_graphs(runner, 8, KINDS)
        graphs.record(FakeRecorder())  # type: ignore[arg-type]  # a stand-in
    prompts = graphs.prompts
    assert prompts is not None
    run = prompts.run

    def counted(kind: tuple[int, int], inputs: object) -> torch.Tensor:
        print("replayed", kind, flush=True)
        return run(kind, inputs)  # type: ignore[arg-type]  # handed on

    prompts.run = counted  # type: ignore[method-assign,assignment]  # the same, counted
    return graphs


if __name__ == "__main__":
    model_runner.record_graphs = record_graphs  # type: ignore[attr-defined]  # the name it imported
    be_ranks()
