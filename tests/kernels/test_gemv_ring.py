"""The ring of 16-bit weights against its meaning: tokens that fill no tile, pieces, gates, residuals.

Its language has no interpreter: the products need a card. What it refuses, and what adds up its pieces, does not.
"""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from argosy.kernels import gemv, gemv_ring, gemv_split, group_push, group_sum, reference, tuning

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
