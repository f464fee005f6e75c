"""Layers that a few tokens go through in a launch behind each attention: the tokens of transformers."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from rig import InProcessRank, Run, answers, greedy, make_config, transformers_greedy, write_family
from test_parallel_ranks import prompts

from argosy.kernels import ops
from argosy.workers.layers.rows_chain import RowsChain, open_chains
from argosy.workers.quantization.base import UnquantizedMethod


def _in_torch(
    seen_TS: Tensor, weights: tuple[Any, ...], norms: tuple[Any, Any], bias_Q: Tensor | None, residual_TD: Tensor,
    out_TX: Tensor | None,
) -> None:  # fmt: skip
    """What `kernels.rows_chain.chain` means."""
    o_DS, gate_up_UD, down_DI, qkv_XD = weights
    residual_TD += seen_TS @ o_DS.T
    gate, up = (ops.rms_norm(residual_TD, *norms[0]) @ gate_up_UD.T).chunk(2, dim=1)
    residual_TD += (torch.nn.functional.silu(gate) * up) @ down_DI.T
    if out_TX is not None:
        out_TX.copy_(torch.nn.functional.linear(ops.rms_norm(residual_TD, *norms[1]), qkv_XD, bias_Q))


@pytest.mark.parametrize(("family", "least"), [("llama", 2), ("qwen2", 1), ("qwen3", 2)])
def test_a_few_tokens_go_through_the_chain(
    family: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With biases of q, k and v, and norms of heads; what is behind the last layer is normed by a launch of its own."""
    made: list[tuple[int, bool]] = []

    def chain(*values: Any, **options: Any) -> None:
        made.append((len(values[0]), values[1][3] is None))
        _in_torch(*values[:6])

    monkeypatch.setattr(UnquantizedMethod, "fuses", lambda *_: True)
    # weights stay as a GPU has them
    monkeypatch.setattr(UnquantizedMethod, "finish", lambda _, layer: setattr(layer, "native", None))
    folder = write_family(tmp_path, family)
    config = make_config(folder)
    rank = InProcessRank(config, 128)
    through = object.__new__(RowsChain)
    through._kernels, through._rank = SimpleNamespace(chain=chain, TOKENS=8), 0  # type: ignore[assignment]
    through._sizes = {"least": least, "most": 4}
    through._bases_W = through._boxes = through._counters = torch.zeros(0)
    rank.runner.model._chains = [through]
    run = Run(rank, config, 128)
    requests = [run.add(greedy(prompt, 4 + 2 * n, stream_id=n))[0] for n, prompt in enumerate(prompts())]
    run.finish()
    told = transformers_greedy(folder, prompts(), 4 + 2 * (len(prompts()) - 1))
    assert answers(requests) == [tokens[: 4 + 2 * n] for n, tokens in enumerate(told)]
    layers = rank.runner.spec.num_layers
    assert [is_last for _, is_last in made] == ([False] * (layers - 1) + [True]) * (len(made) // layers)
    counts = {count for count, _ in made}
    assert min(counts) == least
    assert 2 < max(counts) <= 4


def test_only_measured_layers_of_plain_weights_have_one() -> None:
    """Nothing is measured for a CPU, and nobody asks for memory there."""
    parallel: Any = SimpleNamespace(device=torch.device("cpu"), tp_size=1)
    layers: Any = [object()]
    assert open_chains(parallel, layers, 4096, torch.bfloat16) == []
