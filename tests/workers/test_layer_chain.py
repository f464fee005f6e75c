"""Layers that one token goes through in a launch behind each attention: the tokens of transformers."""

import sys
from dataclasses import dataclass
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
from argosy.workers.layers import layer_chain
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
        (_, next_norm), residual_1D, out_1X = values[2], values[4], values[5]
        assert (out_1X is residual_1D) == (next_norm is None)  # which is written before others have read it
        return _in_torch(*values, **options)

    monkeypatch.setattr(UnquantizedMethod, "fuses", lambda *_: True)
    # weights stay as a GPU has them
    monkeypatch.setattr(UnquantizedMethod, "finish", lambda _, layer: setattr(layer, "native", None))
    folder = write_family(tmp_path, family)
    config = make_config(folder)
    rank = InProcessRank(config, 128)
    through = object.__new__(LayerChain)
    through._kernels, through._rank, through._sizes = SimpleNamespace(chain=chain), 0, {}  # type: ignore[assignment]  # a stand-in
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


def _product(num_in: int, num_out: int, **more: Any) -> Any:
    return SimpleNamespace(method=UnquantizedMethod(), has_bias=False, share=num_in, num_out_own=num_out, **more)


def _layer(is_silu: bool = True) -> Any:
    attention = SimpleNamespace(qkv_proj=_product(4096, 1536), o_proj=_product(1024, 4096))
    mlp = SimpleNamespace(is_silu=is_silu, gate_up_proj=_product(4096, 7168), down_proj=_product(3584, 4096))
    return SimpleNamespace(attention=attention, mlp=mlp)


@dataclass
class _Opened:
    """In place of the chain: what it was opened with."""

    parallel: Any
    sizes: Any
    width: int
    inner: int


def test_what_the_launch_can_not_do_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of 8B on a card with sizes for it; then one thing after the other that they do not hold for."""
    from argosy.kernels import layer_chain as kernels

    sizes = {"slot": 16384, "stages": 6, "warps": 8, "per_sm": 1}
    asked: list[tuple[str, str]] = []

    def pick(kernel: str, key: str, device: Any) -> Any:
        asked.append((kernel, key))
        return sizes

    monkeypatch.delenv("ARGOSY_LAYER_CHAIN", raising=False)
    monkeypatch.setattr(layer_chain.tuning, "pick", pick)
    monkeypatch.setattr(layer_chain.tuning, "device_facts", lambda _: SimpleNamespace(num_sms=132))
    monkeypatch.setattr(kernels, "RUNS_HERE", True)
    monkeypatch.setattr(layer_chain, "LayerChain", _Opened)
    card: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), tp_size=4, shares_memory=True)

    def opened(layers: Any, parallel: Any = card, dtype: torch.dtype = torch.bfloat16) -> Any:
        return open_layer_chain(parallel, layers, width=4096, dtype=dtype)

    chain = opened([_layer(), _layer()])
    assert (chain.parallel, chain.sizes, chain.width, chain.inner) == (card, sizes, 4096, 3584)
    assert asked == [("layer_chain", "4096x1024x3584x4")]
    assert opened([_layer()], SimpleNamespace(device=card.device, tp_size=1, shares_memory=False)) is not None
    assert opened([_layer()], SimpleNamespace(device=card.device, tp_size=4, shares_memory=False)) is None
    assert opened([_layer()], SimpleNamespace(device=card.device, tp_size=8, shares_memory=True)) is None
    assert opened([_layer()], SimpleNamespace(device=SimpleNamespace(type="cpu"), tp_size=1)) is None
    assert opened([]) is None
    assert opened([_layer()], dtype=torch.float32) is None
    assert opened([_layer(), _layer(is_silu=False)]) is None
    for place in ("attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        part, name = place.split(".")
        packed, biased = _layer(), _layer()
        getattr(getattr(packed, part), name).method = object()
        getattr(getattr(biased, part), name).has_bias = True
        assert opened([_layer(), packed]) is None, place
        assert (opened([_layer(), biased]) is None) == (name != "qkv_proj"), place
    monkeypatch.setattr(kernels, "RUNS_HERE", False)
    assert opened([_layer()]) is None
    monkeypatch.setattr(kernels, "RUNS_HERE", True)
    sizes["slot"] = 4096
    assert opened([_layer()]) is None
    monkeypatch.setattr(layer_chain.tuning, "pick", lambda *_: None)
    assert opened([_layer()]) is None


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_its_words_have_room_for_all_ranks(monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> None:
    """Two inboxes a rank, of 4 bytes a number; a group's are where all can write, and a count for every program."""
    from argosy.kernels import layer_chain as kernels

    monkeypatch.setattr(layer_chain.tuning, "device_facts", lambda _: SimpleNamespace(num_sms=5))
    given: list[int] = []

    def shared_buffer(num_bytes: int) -> Any:
        given.append(num_bytes)
        return SimpleNamespace(addresses_W=torch.arange(num_ranks))

    parallel: Any = SimpleNamespace(
        rank=SimpleNamespace(tp_rank=0), tp_size=num_ranks, device=torch.device("cpu"), shared_buffer=shared_buffer
    )
    chain = LayerChain(parallel, {"slot": 16384, "per_sm": 2}, width=64, inner=48)
    room = given[0] if num_ranks > 1 else chain._own.numel()
    assert room == 4 * kernels.inbox_words(num_ranks, 64) == 4 * 2 * num_ranks * 64
    assert len(chain._bases_W) == num_ranks
    assert (chain._inner_I.dtype, chain._inner_I.tolist()) == (torch.int32, [0] * 48)
    assert chain._counters.tolist() == [0] * 10


@pytest.mark.parametrize("lean", [0, 1])
def test_each_launch_gets_what_is_its_own(lean: int) -> None:
    """A layer's weights, the next one's q, k and v with their biases, both norms; attention is packed where the card
    likes it, so that what is behind it finds room beside it."""
    packed: list[bool] = []
    launches: list[tuple[Any, ...]] = []

    def attend(qkv_1X: Tensor, positions_1: Tensor, ctx: object, shape: Any) -> Tensor:
        packed.append(shape.is_packed)
        return qkv_1X

    def chain(*values: Any, inbox_at: int) -> Tensor:
        launches.append(values)
        return torch.as_tensor(values[5])

    layers = [_layer(), _layer()]
    for number, layer in enumerate(layers):
        layer.attention.attend, layer.attention.shape = attend, _Shape()
        layer.mlp_norm = SimpleNamespace(weight=f"norm {number}", eps=1 + number)
        for place in ("attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            part, name = place.split(".")
            getattr(getattr(layer, part), name).weight = f"{name} {number}"
        layer.attention.qkv_proj.bias = f"bias {number}"
    behind: Any = [SimpleNamespace(weight="behind 0", eps=3), SimpleNamespace(weight="behind 1", eps=4)]
    through = object.__new__(LayerChain)
    through._kernels, through._rank = SimpleNamespace(chain=chain), 2  # type: ignore[assignment]  # a stand-in
    through._sizes, through._bases_W = {"lean": lean}, torch.zeros(1)
    through._inner_I, through._counters = torch.zeros(2), torch.zeros(3)
    context: Any = None
    residual_1D = torch.zeros(1, 8)
    through.through(layers, behind, torch.zeros(1, 8), residual_1D, torch.zeros(1), context)
    assert packed == [bool(lean)] * 2
    first, second = launches
    assert first[1] == ("o_proj 0", "gate_up_proj 0", "down_proj 0", "qkv_proj 1")
    assert second[1] == ("o_proj 1", "gate_up_proj 1", "down_proj 1", None)
    assert [launch[2] for launch in launches] == [
        (("norm 0", 1), ("behind 0", 3)), (("norm 1", 2), ("behind 1", 4))
    ]  # fmt: skip
    assert (first[3], second[3]) == ("bias 1", None)
    assert (first[5].shape, second[5].shape) == ((1, 1536), (1, 8))
    for launch in launches:
        assert launch[4] is residual_1D
        assert launch[5] is not residual_1D
        assert launch[6] is through._bases_W
        assert launch[7] is through._inner_I
        assert launch[8] is through._counters
        assert launch[9:] == (2, through._sizes)


@dataclass(frozen=True)
class _Shape:
    is_packed: bool = False


def test_groups_that_were_compared_with_nothing_yet_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody asks for it, to compare them."""
    monkeypatch.delenv("ARGOSY_LAYER_CHAIN", raising=False)
    assert [is_wanted(num_ranks) for num_ranks in (1, 2, 4, 8)] == [True, True, True, False]
    for asked, wanted in (("0", False), ("1", True)):
        monkeypatch.setenv("ARGOSY_LAYER_CHAIN", asked)
        assert [is_wanted(num_ranks) for num_ranks in (1, 2, 4, 8)] == [wanted] * 4
