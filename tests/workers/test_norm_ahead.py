"""Layers whose norms come with the product before them, as a few rows on a GPU have it: the tokens of transformers."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from rig import InProcessRank, Run, answers, greedy, make_config, transformers_greedy, write_family
from test_parallel_ranks import prompts

from argosy.kernels import norm_ahead
from argosy.kernels.norm_ahead import NormAhead
from argosy.workers.quantization.base import UnquantizedMethod


@pytest.mark.parametrize(("family", "offload_gb"), [("llama", 0.0), ("qwen2", 0.0), ("llama", 1e-4)])
def test_norms_come_with_the_product_before_them(
    family: str, offload_gb: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks, whose last layer leaves tokens out, and decode steps; with layers whose weights come through
    the link, whose norms nobody may read before they are there, each layer's first norm has a launch of its own."""
    made: list[int] = []

    def between(residual_TD: Tensor, _: Tensor, __: Tensor, norm_weight_D: Tensor, eps: float) -> NormAhead:
        made.append(len(residual_TD))
        squares_PT = torch.full((3, 64), float("nan"))
        return NormAhead(torch.full_like(residual_TD, float("nan")), squares_PT, norm_weight_D, eps)

    monkeypatch.setattr(UnquantizedMethod, "fuses", lambda *_: True)
    # weights stay as a GPU has them
    monkeypatch.setattr(UnquantizedMethod, "finish", lambda _, layer: setattr(layer, "native", None))
    monkeypatch.setattr(norm_ahead, "between", between)
    folder = write_family(tmp_path, family)
    config = make_config(folder, cpu_offload_gb=offload_gb)
    rank = InProcessRank(config, 128)
    run = Run(rank, config, 128)
    requests = [run.add(greedy(prompt, 6, stream_id=n))[0] for n, prompt in enumerate(prompts())]
    run.finish()
    assert answers(requests) == transformers_greedy(folder, prompts(), 6)
    layers = rank.runner.spec.num_layers
    per_step = layers if offload_gb else 2 * layers - 1
    assert len(made) > per_step * 6
    assert len(made) % per_step == 0 or 0 in made  # a step that asks for no token ends within its last layer
