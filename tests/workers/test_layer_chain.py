"""Layers that one token goes through in a launch behind each attention: the tokens of transformers."""

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
from argosy.workers.layers.layer_chain import LayerChain, is_wanted, open_layer_chain
from argosy.workers.quantization.base import UnquantizedMethod


def _in_torch(
    seen_1S: Tensor, weights: tuple[Any, ...], norms: tuple[Any, Any], bias_Q: Tensor | None, residual_1D: Tensor,
    out_1X: Tensor, *_: object, **__: object,
) -> Tensor:  # fmt: skip
    """What `kernels.layer_chain.chain` means."""
    o_DS, gate_up_UD, down_DI, qkv_XD = weights
    residual_1D += seen_1S @ o_DS.T
    gate, up = (ops.rms_norm(residual_1D, *norms[0]) @ gate_up_UD.T).chunk(2, dim=1)
    residual_1D += (torch.nn.functional.silu(gate) * up) @ down_DI.T
    if norms[1] is None:
        return out_1X  # the residual itself
    x_1D = ops.rms_norm(residual_1D, *norms[1])
    return out_1X.copy_(x_1D if qkv_XD is None else torch.nn.functional.linear(x_1D, qkv_XD, bias_Q))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_one_token_goes_through_the_chain(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With biases of q, k and v, and norms of heads; prompts and steps of several rows go as ever."""
    made: list[bool] = []

    def chain(*values: Any, **options: Any) -> Tensor:
        made.append(values[1][3] is None)
        return _in_torch(*values, **options)

    monkeypatch.setattr(UnquantizedMethod, "fuses", lambda *_: True)
    # weights stay as a GPU has them
    monkeypatch.setattr(UnquantizedMethod, "finish", lambda _, layer: setattr(layer, "native", None))
    folder = write_family(tmp_path, family)
    config = make_config(folder)
    rank = InProcessRank(config, 128)
    through = object.__new__(LayerChain)
    through._kernels, through._rank, through._sizes = SimpleNamespace(chain=chain), 0, {}  # type: ignore[assignment]
    through._bases_W = through._inner_I = through._counters = torch.zeros(0)
    rank.runner.model._chains = [through]
    run = Run(rank, config, 128)
    requests = [run.add(greedy(prompt, 3 + n, stream_id=n))[0] for n, prompt in enumerate(prompts())]
    run.finish()
    told = transformers_greedy(folder, prompts(), 3 + len(prompts()) - 1)
    assert answers(requests) == [tokens[: 3 + n] for n, tokens in enumerate(told)]
    layers = rank.runner.spec.num_layers
    assert made == ([False] * (layers - 1) + [True]) * (len(made) // layers)
    assert made


def test_only_measured_layers_of_plain_weights_have_one() -> None:
    """Nothing is measured for a CPU, and nobody asks for memory there."""
    parallel: Any = SimpleNamespace(device=torch.device("cpu"), tp_size=1)
    layers: Any = [object()]
    assert open_layer_chain(parallel, layers, width=4096, dtype=torch.bfloat16) is None


def test_groups_that_were_compared_with_nothing_yet_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody asks for it, to compare them."""
    monkeypatch.delenv("ARGOSY_LAYER_CHAIN", raising=False)
    assert [is_wanted(num_ranks) for num_ranks in (1, 2, 4, 8)] == [True, True, True, False]
    for asked, wanted in (("0", False), ("1", True)):
        monkeypatch.setenv("ARGOSY_LAYER_CHAIN", asked)
        assert [is_wanted(num_ranks) for num_ranks in (1, 2, 4, 8)] == [wanted] * 4
