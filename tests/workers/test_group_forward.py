"""When a step over a group is computed in halves: only where the cards have work for as long as the host takes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argosy.cluster.protocol.errors import ConfigError
from argosy.kernels import step_ops
from argosy.workers.layers.group_sum import NUM_PARTS, GroupSum, Left
from argosy.workers.layers.linear import RowParallelLinear
from argosy.workers.models.group_forward import LEAST_OVERLAP_TOKENS, GroupForward, least_overlapped
from argosy.workers.quantization.base import Fusion, UnquantizedMethod

LLAMA_8B = 436_207_616  # bytes of a layer's weights, over all ranks
LLAMA_70B = 1_711_276_032


def test_small_steps_stay_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer of 8B keeps two H200 for 1.15 ms; four do it in half the time, and 70B has more to do a layer."""
    monkeypatch.delenv("ARGOSY_OVERLAP_TOKENS", raising=False)
    over_two = least_overlapped(LLAMA_8B // 2, 8192, 2)
    over_four = least_overlapped(LLAMA_8B // 4, 8192, 4)
    assert 2500 < over_two < 3500
    assert over_two < over_four < 8192
    assert LEAST_OVERLAP_TOKENS <= least_overlapped(LLAMA_70B // 4, 16384, 4) < over_two


def test_the_bound_can_be_set_to_measure_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment, which ranks inherit."""
    monkeypatch.setenv("ARGOSY_OVERLAP_TOKENS", "1500")
    assert least_overlapped(1, 1, 2) == 1500
    monkeypatch.setenv("ARGOSY_OVERLAP_TOKENS", "128")  # all of them would be in the first half
    with pytest.raises(ConfigError, match=r"ARGOSY_OVERLAP_TOKENS='128' .* from 256 on"):
        least_overlapped(1, 1, 2)


@pytest.mark.parametrize(
    ("ranks", "width", "dtype", "ways"),
    [
        (2, 4096, torch.bfloat16, {0: "pull", 1: "push", 32: "push", 33: "pull", 4096: "pull"}),
        (4, 4096, torch.bfloat16, {1: "push", 16: "push", 17: "push scatter", 64: "push scatter", 65: "pull scatter"}),
        (4, 8192, torch.bfloat16, {1: "pull", 32: "pull", 33: "pull scatter"}),
        (2, 4096, torch.float32, {1: "pull"}),
    ],
)
def test_the_way_of_a_sum_follows_from_its_bytes(
    ranks: int, width: int, dtype: torch.dtype, ways: dict[int, str]
) -> None:
    """As measured on H200; where no row is sent with its flags, no memory is kept for that."""
    asked_bytes: list[int] = []
    parallel: Any = SimpleNamespace(
        rank=SimpleNamespace(tp_rank=0), tp_size=ranks, device=torch.device("cpu"), shared_buffer=asked_bytes.append
    )
    sums = GroupSum(parallel, max_tokens=4096, width=width, max_rows=64, dtype=dtype)
    assert {rows: sums.way_of(rows) for rows in ways} == ways
    assert sums.way_of(1, asked=True) == "pull"
    assert "scatter" not in sums.way_of(64, whole=True)
    parts = (NUM_PARTS + 1) * 4096 * width * dtype.itemsize
    assert (asked_bytes[0] - parts > 4 << 20) == sums.pushes == ("push" in ways.values())


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_one_token_alone_goes_through_a_launch_a_layer(num_tokens: int) -> None:
    """Its words have room for a single row, so two rows go by sums as ever."""
    went: list[str] = []

    def through(*_: object) -> torch.Tensor:
        went.append("chain")
        return torch.zeros(num_tokens, 8)

    def part(x_TD: torch.Tensor, *_: object, in_pieces: bool) -> Left:
        went.append(f"part of {len(x_TD)}")
        return Left()

    def add_norm(which: int, residual_TD: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return residual_TD

    stage: Any = object.__new__(GroupForward)
    attention = SimpleNamespace(qkv_proj=SimpleNamespace(product=lambda x_TD: x_TD), part=part)
    layer: Any = SimpleNamespace(
        input_norm=torch.clone, attention=attention, mlp=SimpleNamespace(part=part), mlp_norm=None
    )
    stage.sums = SimpleNamespace(part=lambda *_: None, takes_pieces=lambda _: True, add_norm=add_norm)
    chain = SimpleNamespace(through=through, takes=lambda count: count == 1)
    stage._chains, stage._embed, stage._copies = [chain], None, None
    stage._layers, stage._in_turn, stage._norms = [layer], lambda: [layer], [None, None]
    stage(None, torch.zeros(num_tokens, 8), torch.zeros(num_tokens), SimpleNamespace(asked_rows_S=None))
    assert went == (["chain"] if num_tokens == 1 else ["part of 2", "part of 2"])


@pytest.mark.parametrize("takes", [True, False])
def test_what_products_leave_goes_to_their_sums(takes: bool) -> None:
    """Attention's to the sum behind it, the MLP's to the next one; in pieces only where the sum adds those up."""
    asked: list[tuple[int, bool]] = []
    sums: list[tuple[Any, ...]] = []
    left = [Left(torch.full((3, 2, 8), float(number))) for number in range(4)]
    waiting = iter(left)

    def part(x_TD: torch.Tensor, *rest: Any, in_pieces: bool) -> Left:
        asked.append((rest[-1], in_pieces))
        return next(waiting)

    def add_norm(which: int, residual_TD: torch.Tensor, norm: object, *, left: Left) -> torch.Tensor:
        sums.append((which, norm, left))
        return residual_TD

    stage: Any = object.__new__(GroupForward)
    layers = [
        SimpleNamespace(
            input_norm=torch.clone, mlp=SimpleNamespace(part=part), mlp_norm=f"inner {number}",
            attention=SimpleNamespace(part=part),
        )
        for number in range(2)
    ]  # fmt: skip
    stage.sums = SimpleNamespace(
        part=lambda which, count: (which, count), takes_pieces=lambda count: takes and count == 2, add_norm=add_norm
    )
    stage._chains, stage._embed, stage._copies = [], None, None
    stage._layers, stage._in_turn, stage._norms = layers, lambda: layers, ["before", "between", "behind"]
    stage(None, torch.zeros(2, 8), torch.zeros(2), SimpleNamespace(asked_rows_S=None))
    assert asked == [((0, 2), takes), ((1, 2), takes)] * 2
    names = ("inner 0", "between", "inner 1", "behind")
    assert [(which, norm) for which, norm, _ in sums] == list(zip((0, 1) * 2, names, strict=True))
    assert all(one is other for (_, _, one), other in zip(sums, left, strict=True))


def test_pieces_are_pushed_in_the_place_of_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was left, what lies in the shared buffer is; sums that are pulled take no pieces."""
    buffer = SimpleNamespace(addresses_W=torch.arange(2))
    parallel: Any = SimpleNamespace(
        rank=SimpleNamespace(tp_rank=0), tp_size=2, device=torch.device("cpu"), shared_buffer=lambda num_bytes: buffer
    )
    sums = GroupSum(parallel, max_tokens=4096, width=4096, max_rows=64, dtype=torch.bfloat16)
    pushed: list[Any] = []

    def push_add_norm(
        bases_W: object, counters: object, rank: int, part: Any, residual_TD: Any, *_: Any, **__: Any
    ) -> Any:
        pushed.append(part)
        return residual_TD

    monkeypatch.setattr(sums, "_push", SimpleNamespace(MAX_ROWS=sums._push.MAX_ROWS, push_add_norm=push_add_norm))
    monkeypatch.setattr(sums, "part", lambda which, num_tokens: (which, num_tokens))
    residual_TD, pieces_PTD = torch.zeros(2, 4096), torch.zeros(3, 2, 4096)
    sums.add_norm(1, residual_TD, None, left=Left(pieces_PTD))
    sums.add_norm(1, residual_TD, None)
    assert pushed[0] is pieces_PTD
    assert pushed[1] == (1, 2)
    for rows in (1, 2, 64, 1000):
        assert sums.takes_pieces(rows) == sums.way_of(rows).startswith("push")
    assert (sums.takes_pieces(2), sums.takes_pieces(1000)) == (True, False)
    with pytest.raises(AssertionError, match="pull"):
        sums.add_norm(0, torch.zeros(1000, 4096), None, left=Left(pieces_PTD))


class _Method:
    """A product that gives what it was told to."""

    def __init__(self, gives: torch.Tensor):
        self._gives, self.asked = gives, list[Fusion]()

    def fuses(self, layer: object, x_TI: torch.Tensor) -> bool:
        return True

    def apply_fused(self, layer: object, x_TI: torch.Tensor, fusion: Fusion) -> torch.Tensor:
        self.asked.append(fusion)
        return self._gives


def test_a_part_is_in_its_place_or_in_pieces() -> None:
    """Three float32 pieces leave the place alone; what came in one piece lies there, whoever wrote it."""
    x_TI, place_TO = torch.zeros(2, 4), torch.zeros(2, 8)
    layer: Any = object.__new__(RowParallelLinear)
    torch.nn.Module.__init__(layer)
    pieces_PTO = torch.ones(3, 2, 8)
    for gives, in_pieces in ((pieces_PTO, True), (torch.ones(2, 8), True), (torch.full((2, 8), 2.0), False)):
        layer.method = _Method(gives)
        made = layer.part(x_TI, place_TO, in_pieces=in_pieces)
        assert (made is pieces_PTO) == (gives is pieces_PTO)
        assert torch.equal(place_TO, torch.zeros(2, 8) if made is not None else gives)
        (fusion,) = layer.method.asked
        assert fusion.out_TO is place_TO
        assert fusion.in_pieces is in_pieces


@pytest.mark.parametrize("in_pieces", [False, True])
def test_plain_weights_leave_pieces_where_sizes_say_so(in_pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bias, which each piece would add, and where somebody adds them up."""
    gemv = pytest.importorskip("argosy.kernels.gemv")
    x_TI: Any = SimpleNamespace(is_cuda=True)
    place_TO, pieces_PTO, written_TO = torch.zeros(2, 8), torch.ones(3, 2, 8), torch.ones(2, 8)
    monkeypatch.setattr(step_ops.ops, "fused_linear", lambda *_, **__: written_TO)
    method, layer = UnquantizedMethod(), SimpleNamespace(weight=torch.zeros(8, 4), bias=None)
    for left in (pieces_PTO, None):
        monkeypatch.setattr(gemv, "left_in_pieces", lambda *_, left=left: left)
        made_TO = method.apply_fused(layer, x_TI, Fusion(out_TO=place_TO, in_pieces=in_pieces))  # type: ignore[arg-type]  # stand-ins
        assert made_TO is (pieces_PTO if in_pieces and left is not None else written_TO)
    monkeypatch.setattr(gemv, "left_in_pieces", lambda *_: pieces_PTO)
    assert step_ops.part_of_sum(x_TI, layer.weight, torch.zeros(8), place_TO) is written_TO
