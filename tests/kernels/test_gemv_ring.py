"""The ring of 16-bit weights against its meaning: tokens that fill no tile, pieces, gates, residuals.

Its language has no interpreter: the products need a card. How a launch shares out the work, and what adds up its
pieces, does not.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import OnCard, Walked
from torch import Tensor

from argosy.kernels import fp8_ring, gemv, gemv_ring, gemv_split, group_push, group_sum, reference, tuning

Near = Callable[[Tensor, Tensor], None]
SIZES = (
    {"rows": 64, "width": 128, "stages": 6, "pieces": 1, "early": 2},
    {"rows": 64, "width": 256, "stages": 2, "pieces": 2, "early": 1},
    {"rows": 128, "width": 128, "stages": 4, "pieces": 4, "early": 0},
    {"rows": 64, "width": 64, "stages": 12, "pieces": 8, "early": 1},
)
SHAPES = ((4096, 3072), (7168, 4096), (2048, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
def test_a_product_is_what_it_means(
    num_inputs: int, num_outputs: int, sizes: Mapping[str, int], device: torch.device, assert_near: Near
) -> None:
    """Again and again with the same bits, whoever is last; the counters are zero for the next launch."""
    for dtype in (torch.bfloat16, torch.float16):
        weight = (torch.randn(num_outputs, num_inputs, device=device) / 64).to(dtype)
        bias = torch.randn(num_outputs, device=device).to(dtype)
        for num_tokens in (2, 8, 13, 32, 61) if dtype == torch.bfloat16 else (8,):
            x = torch.randn(num_tokens, num_inputs, device=device).to(dtype)
            assert gemv_ring.takes(x, weight, sizes, gated=False)
            for kept in (None, bias):
                want = reference.fused_linear(x, weight, kept)
                made = [gemv_ring.linear(x, weight, kept, None, sizes) for _ in range(3)]
                assert_near(made[0], want)
                assert all(torch.equal(made[0], other) for other in made[1:])
            residual = torch.randn(num_tokens, num_outputs, device=device).to(dtype)
            want = residual + reference.fused_linear(x, weight)
            gemv_ring.linear(x, weight, None, residual, sizes, residual=True)
            assert_near(residual, want)
            pieces = gemv_ring.linear(x, weight, None, None, sizes, in_pieces=True)
            if sizes["pieces"] > 1:
                assert pieces.dtype == torch.float32
                assert pieces.shape == (sizes["pieces"], num_tokens, num_outputs)
                pieces = pieces.sum(0).to(dtype)
            assert_near(pieces, reference.fused_linear(x, weight))
    assert not tuning.counters(device).any()


@pytest.mark.gpu
@pytest.mark.parametrize(("num_inputs", "inner"), [(4096, 7168), (256, 64)])
def test_a_gate_comes_with_its_product(num_inputs: int, inner: int, device: torch.device, assert_near: Near) -> None:
    sizes = {"kernel": gemv.RING, **SIZES[0], "stages": 5, "library": 0}
    weight = (torch.randn(2 * inner, num_inputs, device=device) / num_inputs**0.5).bfloat16()
    for num_tokens, bias in ((2, None), (8, torch.randn(2 * inner, device=device).bfloat16()), (64, None)):
        x = torch.randn(num_tokens, num_inputs, device=device).bfloat16()
        got = gemv.fused_linear(x, weight, bias, gated=True, sizes=sizes)
        assert_near(got, reference.fused_linear(x, weight, bias, gated=True))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_a_norm_between_two_products(
    gated: bool, sizes: Mapping[str, int], device: torch.device, assert_near: Near
) -> None:
    """Left by a ring or by `gemv_split` for one of the other kind or the same; in place, and counters left at zero."""
    ring = {"kernel": gemv.RING, "library": 0, **sizes}
    split = {"kernel": gemv.SPLIT, "rows": 64, "width": 128, "stages": 4, "warps": 4, "splits": 2, "prefetch": 512,
             "early": 0}  # fmt: skip
    for before, behind in ((ring, ring), (ring, split), (split, ring)):
        behind = {**behind, "pieces": 1} if gated else behind
        for num_tokens in (2, 8, 13):
            x, residual = (torch.randn(num_tokens, n, device=device).bfloat16() for n in (2048, 1024))
            weight = (torch.randn(1024, 2048, device=device) / 32).bfloat16()
            next_weight = (torch.randn(768, 1024, device=device) / 16).bfloat16()
            norm = torch.randn(1024, device=device).bfloat16()
            want = reference.fused_linear(x.float(), weight.float(), residual_TO=residual.float())
            ahead = gemv_split.ahead_for(residual, norm, 1e-2, before)
            got = gemv.fused_linear(x, weight, residual_TO=residual, ahead=ahead, sizes=before)
            assert got is residual
            assert_near(got, want)
            exact = (residual.float(), next_weight.float())
            want = reference.fused_linear(*exact, norm_weight_I=norm.float(), eps=1e-2, gated=gated)
            assert_near(gemv.fused_linear(residual, next_weight, normed=ahead, gated=gated, sizes=behind), want)
    assert not tuning.counters(device).any()


@pytest.mark.gpu
def test_what_a_ring_cannot_take_goes_elsewhere(device: torch.device, assert_near: Near) -> None:
    """Sizes may name the ring for a shape; widths of no whole places and tiles are multiplied all the same."""
    for num_inputs, num_outputs in ((200, 128), (512, 72)):
        sizes = {"kernel": gemv.RING, **SIZES[0], "library": 0}
        weight = (torch.randn(num_outputs, num_inputs, device=device) / 16).bfloat16()
        x = torch.randn(5, num_inputs, device=device).bfloat16()
        assert not gemv_ring.takes(x, weight, sizes, gated=False)
        assert_near(gemv.fused_linear(x, weight, sizes=sizes), reference.fused_linear(x, weight))


@pytest.mark.parametrize("scatter", [False, True])
def test_pieces_are_sent_as_their_sum_would_be(scatter: bool, device: torch.device) -> None:
    """Whether a product leaves pieces changes no bit, as long as their sums are exact."""
    world, rows, width, at, dtype = 2, 5, 130, 256, torch.float16
    size = at + group_push.inbox_bytes(world, width)
    boxes = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(world)]
    bases_W = torch.tensor([box.data_ptr() for box in boxes], dtype=torch.int64, device=device)
    pieces = [torch.randint(-64, 64, (3, rows, width), device=device).float() / 8 for _ in range(world)]
    before, weight = (torch.randn(*s, device=device).to(dtype) for s in ((rows, width), (width,)))
    made: list[list[Tensor]] = []
    for left in (False, True):
        counters = [torch.zeros(group_sum.MAX_PROGRAMS, dtype=torch.int32, device=device) for _ in range(world)]
        for box in boxes:
            box.zero_()
        for _ in range(2 + scatter):  # without waiting, a rank sees what was sent in the round before
            residuals = [before.clone() for _ in range(world)]
            out = [
                group_push.push_add_norm(
                    bases_W, counters[rank], rank, pieces[rank] if left else pieces[rank].sum(0).to(dtype),
                    residuals[rank], weight, 1e-5, inbox_at=at, scatter=scatter, wait=False,
                )
                for rank in range(world)
            ]  # fmt: skip
        made.append([*out, *residuals])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    assert made[0][0].abs().sum() > 0


class WalkedRing(Walked):
    """In place of the kernel: does what each program is told to, by the kernel's own rules."""

    def walk(self, programs: int, values: tuple[Any, ...], named: Any) -> None:
        x_desc, w_desc, out, bias, part, counters, squares, next_values, next_norm, next_squares, *numbers = values
        per, total, blocks, tokens, inputs, outputs, num_parts, stride_out, stride_squares, eps = numbers
        height, width, pieces, halves = named.ROWS, named.WIDTH, named.PIECES, named.HALVES
        assert (list(x_desc.block_shape), list(w_desc.block_shape)) == ([named.TOKENS, width], [height, width])
        assert max(8, tuning.next_power_of_two(tokens)) == named.TOKENS
        room = fp8_ring.RING_BYTES - 3 * height * named.TOKENS  # what is left turns a tile around
        assert 0 < named.STAGES * (halves * height + named.TOKENS) * width * 2 <= room
        tiles = outputs // height
        assert (programs, total, per * pieces) == (tiles * pieces, tiles * blocks, blocks)
        assert not named.JOINED or (tiles <= counters.numel() and halves == 1)
        assert not named.JOINED or programs * height * named.TOKENS <= part.numel()
        x, w = x_desc.base.float(), w_desc.base.float()
        left_out = pieces > 1 and not named.JOINED
        for tile in range(tiles):
            here = torch.arange(tile * height, (tile + 1) * height)
            sums = []
            for piece in range(pieces):
                columns = slice(piece * per * width, min((piece + 1) * per, blocks) * width)
                sums.append([w[here + half * outputs, columns] @ x[:, columns].T for half in range(halves)])
            joined = sums if left_out else [[torch.stack(half).sum(0) for half in zip(*sums, strict=True)]]
            for place, (acc, *up) in enumerate(joined):
                added = [bias[here + half * outputs, None].float() if named.BIAS else 0.0 for half in range(halves)]
                if named.NORMED:
                    assert num_parts <= named.NORMED
                    of_token = [squares[:, token].sum() for token in range(tokens)]
                    assert stride_squares == squares.stride(0)
                    scale = (torch.stack(of_token) / inputs + eps).rsqrt()
                    acc, up = acc * scale, [one * scale for one in up]
                y = F.silu(acc + added[0]) * (up[0] + added[1]) if up else acc + added[0]
                flat = out.view(-1)[place * tokens * stride_out :]
                for token in range(tokens):
                    at = token * stride_out + here
                    row = y[:, token] + (flat[at].float() if named.RESIDUAL else 0.0)
                    flat[at] = row.to(out.dtype)
                    if named.NEXT:
                        next_squares[tile, token] = flat[at].float().square().sum()
                        next_values[token, here] = (flat[at].float() * next_norm[here].float()).to(out.dtype)


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> WalkedRing:
    walked = WalkedRing()
    monkeypatch.setattr(gemv_ring, "_ring_kernel", walked)
    return walked


@pytest.mark.parametrize("num_tokens", [2, 8, 13, 61])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_launch_shares_out_each_block_once(
    sizes: Mapping[str, int], num_tokens: int, ring: WalkedRing, assert_near: Near
) -> None:
    """A program a tile and piece; written, added to the residual, or left in pieces behind which none may start early:
    they are read before the wait."""
    x, weight, residual = (torch.randn(*s).bfloat16() for s in ((num_tokens, 512), (384, 512), (num_tokens, 384)))
    weight, bias, before = weight / 16, torch.randn(384).bfloat16(), residual.clone()
    for kept in (None, bias):
        assert_near(gemv_ring.linear(x, weight, kept, None, sizes), reference.fused_linear(x, weight, kept))
    assert gemv_ring.linear(x, weight, bias, residual, sizes, residual=True) is residual
    assert_near(residual, reference.fused_linear(x, weight, bias, residual_TO=before))
    assert [launch.EARLY for launch in ring.launches] == [sizes["early"]] * 3
    assert gemv_ring.linear(x, weight, None, residual, sizes) is residual
    assert_near(residual, reference.fused_linear(x, weight))
    made = gemv_ring.linear(x, weight, None, None, sizes, in_pieces=True)
    if sizes["pieces"] > 1:
        assert (made.dtype, made.shape) == (torch.float32, (sizes["pieces"], num_tokens, 384))
        made = made.sum(0).bfloat16()
    assert_near(made, reference.fused_linear(x, weight))
    assert {launch.STAGES for launch in ring.launches} == {
        min(sizes["stages"], 512 // sizes["width"] // sizes["pieces"])
    }
    assert [launch.EARLY for launch in ring.launches[3:]] == [{0: 0, 1: 2, 2: 2}[sizes["early"]]] * 2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_launch_leaves_a_norm_and_the_next_takes_it(
    sizes: Mapping[str, int], gated: bool, ring: WalkedRing, assert_near: Near
) -> None:
    """The squares of each tile are its own; a gate comes with its product, of inputs that are not cut."""
    x, residual = torch.randn(5, 512).bfloat16(), torch.randn(5, 512).bfloat16()
    weight, behind = (torch.randn(512, 512) / 16).bfloat16(), (torch.randn(768, 512) / 16).bfloat16()
    norm, bias = torch.randn(512).bfloat16(), torch.randn(768).bfloat16()
    want = reference.fused_linear(x, weight, residual_TO=residual.clone())
    ahead = gemv_split.ahead_for(residual, norm, 0.5, sizes)
    gemv_ring.linear(x, weight, None, residual, sizes, residual=True, ahead=ahead)
    assert_near(residual, want)
    sizes = {**sizes, "pieces": 1} if gated else sizes
    exact = reference.fused_linear(residual.float(), behind.float(), bias.float(), norm_weight_I=norm.float(), eps=0.5,
                                   gated=gated)  # fmt: skip
    assert_near(gemv_ring.linear(residual, behind, bias, None, sizes, gated=gated, normed=ahead), exact)
    assert [(launch.NEXT, bool(launch.NORMED)) for launch in ring.launches] == [(True, False), (False, True)]


def test_a_ring_leaves_room_for_what_goes_out(ring: WalkedRing, assert_near: Near) -> None:
    """64 tokens turn a tile of 64 outputs around in shared memory: thirteen places of 16 KB, not fourteen."""
    x, weight = torch.randn(64, 2048).bfloat16(), (torch.randn(64, 2048) / 32).bfloat16()
    sizes = {"rows": 64, "width": 64, "stages": 32, "pieces": 1}
    assert_near(gemv_ring.linear(x, weight, None, None, sizes), reference.fused_linear(x, weight))
    assert [(launch.STAGES, launch.EARLY) for launch in ring.launches] == [(13, 2)]


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles and pieces of aligned rows, up to 64 tokens; gates of uncut inputs; a counter for each tile."""
    monkeypatch.setattr(gemv_ring, "is_hopper", lambda device: True)

    def takes(x: OnCard, weight: OnCard, *, pieces: int = 1, gated: bool = False) -> bool:
        sizes = {"rows": 64, "width": 128, "pieces": pieces}
        return gemv_ring.takes(x, weight, sizes, gated=gated)  # type: ignore[arg-type]  # only shapes

    x, weight = OnCard(8, 1024), OnCard(384, 1024)
    assert takes(x, weight)
    assert takes(x, weight, pieces=8)
    assert not takes(x, weight, pieces=3)
    assert takes(x, weight, gated=True)
    assert not takes(x, weight, gated=True, pieces=2)
    assert not takes(x, OnCard(320, 1024), gated=True)  # 160 of each half
    assert not takes(x, OnCard(380, 1024))
    assert [takes(OnCard(count, 1024), weight) for count in (0, 1, 64, 65)] == [False, True, True, False]
    assert not takes(OnCard(8, 1000), OnCard(384, 1000))
    for odd in (OnCard(384, 1024, step=1028), OnCard(384, 1024, at=264)):
        assert not takes(x, odd)
    assert takes(x, OnCard(64 * tuning.MAX_COUNTERS, 1024))
    assert not takes(x, OnCard(64 * (tuning.MAX_COUNTERS + 1), 1024))
    monkeypatch.setattr(gemv_ring, "is_hopper", lambda device: False)
    assert not takes(x, weight)


def test_measured_sizes_suit_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that did not would be left aside without a word. Pieces are left to a sum where there are some."""
    monkeypatch.setattr(gemv_ring, "is_hopper", lambda device: True)
    entries = {
        key: sizes for key, sizes in tuning._tuned("nvidia_h200")["gemv"].items() if sizes["kernel"] == gemv.RING
    }
    assert entries
    for key, sizes in entries.items():
        num_inputs, num_outputs, most_tokens = map(int, key.split("x"))
        weight = OnCard(num_outputs, num_inputs)
        for num_tokens in (2, most_tokens):
            assert gemv_ring.takes(OnCard(num_tokens, num_inputs), weight, sizes, gated=False), key  # type: ignore[arg-type]  # only shapes
        assert sizes["pieces"] > 1 or not sizes.get("left", 0), key
