"""One token of e4m3 through five launches a layer, in plain torch: the tokens of the way that larger batches take."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import rig
from rig import InProcessRank, Run, answers, greedy, make_config, write_family
from test_parallel_ranks import prompts

from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.kernels import fp8_one, fp8_ops, fp8_reference, ops, tuning
from argosy.kernels.fp8_reference import Fp8Weight, Rounding
from argosy.workers.layers import fp8_one_token
from argosy.workers.layers.attention import Attention
from argosy.workers.layers.fp8_one_token import Fp8OneToken, open_fp8_one_token
from argosy.workers.layers.norm import RMSNorm

ONE = {"pieces": 1}


def _in_torch(
    x_1I: Tensor, weight: Fp8Weight, bias_O: Tensor | None, sizes: dict[str, int], *,
    norm: tuple[Tensor, float] | None = None, parts_P1I: Tensor | None = None, kept_1I: Tensor | None = None,
    gated: bool = False,
) -> Tensor:  # fmt: skip
    """What `fp8_one.linear` means. The second piece of a sum is nothing, so that adding it changes no bit."""
    if parts_P1I is not None and kept_1I is not None:
        assert kept_1I.data_ptr() != x_1I.data_ptr()
        x_1I = kept_1I.copy_(x_1I + parts_P1I.sum(0))
    if norm is None:
        rows = fp8_reference.quantize_rows(x_1I, Rounding())
    else:
        rows = fp8_reference.norm_and_quantize(x_1I, *norm, Rounding())
    y = fp8_reference.linear(rows, weight, bias_O, x_1I.dtype)
    y = ops.silu_and_mul(y) if gated else y
    return y if sizes["pieces"] == 1 else torch.stack((y, torch.zeros_like(y)))


@pytest.fixture
def stays_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay as a card has them."""
    monkeypatch.setattr(fp8_ops, "has_e4m3", lambda device: True)


def rank_of(folder: Path, quantization: str | None, monkeypatch: pytest.MonkeyPatch) -> InProcessRank:
    """One whose weights are rounded while they load."""
    monkeypatch.setattr(rig, "read_model_spec", lambda path: read_model_spec(path, None, quantization))
    return InProcessRank(make_config(folder, quantization=quantization), 128)


@pytest.mark.usefixtures("stays_e4m3")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_one_token_says_what_it_says_among_others(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With biases of q, k and v, and norms of heads; prompts and steps of several rows go as ever."""
    folder = write_family(tmp_path, family)
    config = make_config(folder, quantization="fp8")
    said: list[list[list[int]]] = []
    made: list[bool] = []
    beside: list[bool] = []
    attend = Attention.attend

    def seen(self: Attention, qkv: Tensor, positions: Tensor, ctx: Any, shape: Any = None) -> Tensor:
        beside.append((shape or self.shape).beside_rings)
        return attend(self, qkv, positions, ctx, shape)

    monkeypatch.setattr(Attention, "attend", seen)

    def first(
        x: Tensor, weight: Fp8Weight, bias: Tensor | None, *, norm_weight_I: Tensor, eps: float, **_: Any
    ) -> Tensor:
        rows = fp8_reference.norm_and_quantize(x, norm_weight_I, eps, Rounding())  # as on a card with sizes
        return fp8_reference.linear(rows, weight, bias, x.dtype)

    monkeypatch.setattr(fp8_ops, "fused_linear", first)

    def linear(*values: Any, **options: Any) -> Tensor:
        made.append(options.get("gated", False))
        return _in_torch(*values, **options)

    for opens in (False, True):
        rank = rank_of(folder, "fp8", monkeypatch)
        if opens:
            through = object.__new__(Fp8OneToken)
            through._kernels = SimpleNamespace(linear=linear)  # type: ignore[assignment]  # a stand-in
            through._sizes = [ONE, {"pieces": 2}, ONE, ONE]
            rank.runner.model._chains = [through]
        run = Run(rank, config, 128)
        requests = [run.add(greedy(prompt, 3 + n, stream_id=n))[0] for n, prompt in enumerate(prompts())]
        run.finish()
        said.append(answers(requests))
    assert said[0] == said[1]
    assert beside.count(True) == made.count(True)  # attention of those steps by sizes of its own
    layers = rank.runner.spec.num_layers
    assert made.count(True) % layers == 0
    assert len(made) == made.count(True) // layers * (4 * layers - 1)
    assert made


@pytest.mark.usefixtures("stays_e4m3")
def test_what_the_launches_can_not_do_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes for all four products, on a card, for one rank, with scales by row."""
    folder = write_family(tmp_path, "llama")
    model = rank_of(folder, "fp8", monkeypatch).runner.model
    blocks = rank_of(folder, "fp8_block", monkeypatch).runner.model
    plain = rank_of(folder, None, monkeypatch).runner.model
    card: Any = SimpleNamespace(device=torch.device("cuda"), tp_size=1)
    asked: list[str] = []

    def pick(kernel: str, key: str, device: torch.device) -> Any:
        asked.append(key)
        return ONE if kernel == "fp8_one" else None

    monkeypatch.setattr(tuning, "pick", pick)
    monkeypatch.setattr(fp8_one, "takes", lambda weight, sizes: True)

    def opened(layers: Any = model._stack, parallel: Any = card, dtype: torch.dtype = torch.bfloat16) -> Any:
        return open_fp8_one_token(parallel, layers, width=64, dtype=dtype)

    found = opened()
    assert found is not None
    assert [found.takes(n) for n in (1, 2)] == [True, False]
    stack = model._stack[0]
    products = (stack.attention.qkv_proj, stack.attention.o_proj, stack.mlp.gate_up_proj, stack.mlp.down_proj)
    assert asked == ["{1}x{0}".format(*product.weight.shape) for product in products]
    assert opened([]) is None
    assert opened(blocks._stack) is None
    assert opened(plain._stack) is None
    assert opened(dtype=torch.float32) is None
    assert opened(parallel=SimpleNamespace(device=torch.device("cuda"), tp_size=2)) is None
    assert opened(parallel=SimpleNamespace(device=torch.device("cpu"), tp_size=1)) is None
    monkeypatch.setattr(stack.mlp.down_proj, "has_bias", True)
    assert opened() is None
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "pick", lambda kernel, key, device: None if key == asked[2] else ONE)
    monkeypatch.setattr(fp8_one, "takes", lambda weight, sizes: True)
    assert opened() is None
    monkeypatch.setattr(tuning, "pick", lambda *_: ONE)
    assert opened() is not None
    monkeypatch.setattr(fp8_one, "takes", lambda weight, sizes: False)
    assert opened() is None


@dataclass(frozen=True)
class _Shape:
    beside_rings: bool = False


@pytest.mark.parametrize("is_last", [False, True])
def test_a_stage_hands_on_what_was_added_up(is_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the last stage the residual with all that the last layer added, behind it the norm of that."""
    added = {"o": 1.0, "down": 2.0}

    def linear(x_1I: Tensor, weight: str, bias: object, sizes: object, *, kept_1I: Any = None, **more: Any) -> Tensor:
        if kept_1I is not None:
            kept_1I.copy_(x_1I + more["parts_P1I"].sum(0))
        return torch.full((2, 1, 8) if weight in added else (1, 8), added.get(weight, 0.0) / 2)

    monkeypatch.setattr(fp8_one_token, "weight_of", lambda product: product.name)
    products = {name: SimpleNamespace(name=name, bias=None) for name in ("qkv", "o", "gate_up", "down")}
    norm = SimpleNamespace(weight=torch.ones(8), eps=1e-6)
    attention = SimpleNamespace(
        qkv_proj=products["qkv"], o_proj=products["o"], attend=lambda qkv, *_: qkv, shape=_Shape()
    )
    mlp = SimpleNamespace(gate_up_proj=products["gate_up"], down_proj=products["down"])
    layer: Any = SimpleNamespace(attention=attention, mlp=mlp, input_norm=norm, mlp_norm=norm)
    through = object.__new__(Fp8OneToken)
    through._kernels, through._sizes = SimpleNamespace(linear=linear), [ONE] * 4  # type: ignore[assignment]  # a stand-in
    residual_1D = torch.arange(8.0)[None]
    last = RMSNorm(8, 1e-6, dtype=torch.float32)
    last.weight = torch.nn.Parameter(torch.full((8,), 2.0))
    context: Any = None
    made_1D = through.through(
        [layer, layer], [None, last if is_last else None], torch.zeros(1, 8), residual_1D, torch.zeros(1), context
    )
    want_1D = torch.arange(8.0)[None] + 2 * (1.0 + 2.0)
    torch.testing.assert_close(made_1D, last(want_1D) if is_last else want_1D)
