"""The ring of e4m3 weights against its meaning: widths that no tile divides, tiles that programs share, pieces.

Its language has no interpreter: the products need a card. What chooses it, how a launch shares out the work, and what
adds up its pieces does not.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import Walked
from torch import Tensor

from argosy.kernels import fp8_gemm, fp8_ops, fp8_quantize, fp8_reference, fp8_ring, tuning
from argosy.kernels.fp8_reference import Rounding

Near = Callable[[Tensor, Tensor], None]
SIZES = (
    {"rows": 64, "width": 256, "stages": 6, "programs": 0, "early": 2},
    {"rows": 64, "width": 128, "stages": 3, "programs": 7, "early": 1},
    {"rows": 128, "width": 128, "stages": 6, "programs": 132, "early": 0},
    {"rows": 128, "width": 256, "stages": 2, "programs": 264, "early": 2},
    {"rows": 64, "width": 128, "stages": 12, "programs": 0, "early": 2, "pieces": 4},
)
SHAPES = ((4096, 6144), (14336, 4096), (512, 200), (1040, 72), (272, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("num_inputs", "num_outputs"), SHAPES)
def test_a_product_is_what_it_means(
    num_inputs: int, num_outputs: int, sizes: Mapping[str, int], device: torch.device, assert_near: Near
) -> None:
    """Again and again with the same bits, whoever is last; the counters are zero for the next launch."""
    weight = fp8_reference.quantize_weight(torch.randn(num_outputs, num_inputs, device=device) / 64)
    bias = torch.randn(num_outputs, device=device).bfloat16()
    for num_tokens in (1, 8, 13) if sizes is not SIZES[0] else (7, 8, 32):
        x = torch.randn(num_tokens, num_inputs, device=device).bfloat16()
        x[0] *= 20
        rows = fp8_quantize.quantize(x, Rounding())
        assert fp8_ring.takes(rows, weight, torch.bfloat16)
        for kept in (None, bias) if num_tokens == 8 else (None,):
            want = fp8_reference.linear(rows, weight, kept, torch.bfloat16)
            made = [fp8_ring.linear(rows, weight, kept, torch.bfloat16, sizes) for _ in range(3)]
            assert_near(made[0], want)
            assert all(torch.equal(made[0], other) for other in made[1:])
        if sizes.get("pieces", 1) > 1 and num_inputs % (128 * 4) == 0:
            pieces = fp8_ring.linear(rows, weight, None, torch.bfloat16, sizes, pieces=True)
            assert pieces.shape == (4, num_tokens, num_outputs)
            assert_near(pieces.sum(0).bfloat16(), fp8_reference.linear(rows, weight, None, torch.bfloat16))
    assert not tuning.counters(device).any()


def test_pieces_are_added_to_the_residual_as_their_sum_would_be(device: torch.device) -> None:
    """Rounded to the residual's numbers first, so that whether a product leaves pieces changes no bit."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    pieces = torch.randint(-64, 64, (3, 5, 200), device=device).float() / 8  # sums of these are exact
    residual, norm = (torch.randn(*s, device=device).to(dtype) for s in ((5, 200), (200,)))
    others = residual.clone()
    got = fp8_quantize.quantize(pieces, Rounding(), norm_weight_I=norm, eps=1e-5, residual_TI=residual)
    want = fp8_quantize.quantize(pieces.sum(0).to(dtype), Rounding(), norm_weight_I=norm, eps=1e-5, residual_TI=others)
    assert torch.equal(residual, others)
    assert torch.equal(got.values_TI.float(), want.values_TI.float())
    assert torch.equal(got.scale_TG, want.scale_TG)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize(("num_inputs", "inner"), [(4096, 1536), (272, 128), (1040, 640)])
def test_a_gate_comes_with_its_product(
    num_inputs: int, inner: int, rows: int, device: torch.device, assert_near: Near
) -> None:
    """Gate and up of the same outputs by the same program; a tile of both kinds of rows is refused."""
    weight = fp8_reference.quantize_weight(torch.randn(2 * inner, num_inputs, device=device) / 16)
    sizes = {"kernel": fp8_gemm.RING, **SIZES[0], "rows": rows, "stages": 3, "gated": 1}
    for num_tokens, bias in ((1, None), (8, torch.randn(2 * inner, device=device).bfloat16()), (11, None)):
        x = fp8_quantize.quantize(torch.randn(num_tokens, num_inputs, device=device).bfloat16(), Rounding())
        gate, up = fp8_reference.linear(x, weight, bias, torch.float32).chunk(2, dim=1)
        got = fp8_gemm.gated_linear(x, weight, bias, torch.bfloat16, sizes)
        assert got is not None
        assert_near(got, F.silu(gate) * up)
    narrow = fp8_reference.quantize_weight(torch.randn(2 * 96, num_inputs, device=device))
    assert fp8_gemm.gated_linear(x, narrow, None, torch.bfloat16, sizes) is None
    assert fp8_gemm.gated_linear(x, weight, None, torch.bfloat16, {**sizes, "gated": 0}) is None


@pytest.mark.gpu
def test_shapes_that_the_copy_engine_cannot_fetch_go_elsewhere(device: torch.device, assert_near: Near) -> None:
    """Sizes may name the ring for a shape; blocks, and rows that 16 does not divide, are multiplied all the same."""
    sizes = {"kernel": fp8_gemm.RING, **SIZES[0]}
    for num_inputs, block in ((200, None), (512, (128, 128))):
        weight = fp8_reference.quantize_weight(torch.randn(72, num_inputs, device=device), block)
        rows = fp8_ops.quantize_rows(
            torch.randn(3, num_inputs, device=device).bfloat16(), Rounding(128 if block else 0)
        )
        assert not fp8_ring.takes(rows, weight, torch.bfloat16)
        got = fp8_gemm.linear(rows, weight, None, torch.bfloat16, sizes)
        assert_near(got, fp8_reference.linear(rows, weight, None, torch.bfloat16))


class WalkedRing(Walked):
    """In place of the kernel: goes over the blocks that each program is given, by the kernel's own rules."""

    def walk(self, programs: int, values: tuple[Any, ...], named: Any) -> None:
        x_desc, w_desc, out, x_scale, w_scale, bias, part, counters, per, total, blocks, tokens, outputs, stride = (
            values
        )
        height, width = named.ROWS, named.WIDTH
        assert (list(x_desc.block_shape), list(w_desc.block_shape)) == ([named.TOKENS, width], [height, width])
        assert named.TOKENS % 8 == 0
        assert tokens <= named.TOKENS < tokens + 8
        assert 0 < named.STAGES * (named.HALVES * height + named.TOKENS) * width <= fp8_ring.RING_BYTES
        x, w = x_desc.base.float(), w_desc.base.float()
        shares, flat = defaultdict[int, list[tuple[int, Tensor]]](list), out.view(-1)

        def sums(tile: int, begin: int, count: int) -> Tensor:
            columns = slice(begin * width, (begin + count) * width)
            rows = torch.arange(tile * height, min((tile + 1) * height, outputs))
            return torch.stack([w[rows + half * outputs, columns] @ x[:, columns].T for half in range(named.HALVES)])

        def write(tile: int, made: Tensor, piece: int) -> None:
            rows = torch.arange(tile * height, min((tile + 1) * height, outputs))
            for half in range(named.HALVES):
                made[half] *= w_scale.view(-1)[rows + half * outputs, None] * x_scale.view(1, -1)
                if named.BIAS:
                    made[half] += bias[rows + half * outputs, None].float()
            y = F.silu(made[0]) * made[1] if named.HALVES == 2 else made[0]
            for token in range(tokens):
                flat[piece * tokens * stride + token * stride + rows] = y[:, token].to(out.dtype)

        for program in range(programs):
            at, end = program * per, min(program * per + per, total)
            assert at < end, "a program has nothing to do"
            while at < end:
                tile = at // blocks
                count = min((tile + 1) * blocks, end) - at
                made = sums(tile, at - tile * blocks, count)
                if count == blocks or named.PIECES:
                    write(tile, made, (at - tile * blocks) // per)
                else:
                    assert named.SHARED, "nobody adds up this tile's shares"
                    assert named.HALVES == 1, "of a gate and its product only one would be added up"
                    assert tile < counters.numel()
                    place = program * 2 + (at > program * per)
                    assert (place + 1) * height * named.TOKENS <= part.numel()
                    shares[tile].append((program, made))
                at += count
        for tile, held in shares.items():
            first, last = tile * blocks // per, ((tile + 1) * blocks - 1) // per
            assert [program for program, _ in held] == list(range(first, last + 1))
            write(tile, torch.stack([made for _, made in held]).sum(0), 0)


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> WalkedRing:
    walked = WalkedRing()
    monkeypatch.setattr(fp8_ring, "ring_kernel", walked)
    return walked


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(512, 200), (1040, 72), (272, 8), (2048, 320)])
def test_a_launch_shares_out_each_block_once(
    num_inputs: int, num_outputs: int, sizes: Mapping[str, int], ring: WalkedRing, assert_near: Near
) -> None:
    """Whole tiles or parts of them, by as many programs as were asked for or need be; pieces are left to the next."""
    weight = fp8_reference.quantize_weight(torch.randn(num_outputs, num_inputs) / 16)
    bias = torch.randn(num_outputs).bfloat16()
    for num_tokens, kept in ((1, None), (8, bias), (13, None)):
        rows = fp8_reference.quantize_rows(torch.randn(num_tokens, num_inputs).bfloat16(), Rounding())
        want = fp8_reference.linear(rows, weight, kept, torch.bfloat16)
        assert_near(fp8_ring.linear(rows, weight, kept, torch.bfloat16, sizes), want)
        left = fp8_ring.linear(rows, weight, kept, torch.bfloat16, sizes, pieces=True)
        assert_near(left.sum(0).bfloat16() if left.ndim == 3 else left, want)
        is_cut = sizes.get("pieces", 1) > 1 and num_inputs % (128 * 4) == 0 and kept is None
        assert not is_cut or left.shape[:-2] == (4,)
    assert {launch.EARLY for launch in ring.launches} == {sizes["early"]}


def test_a_launch_with_a_gate_takes_both_halves(ring: WalkedRing, assert_near: Near) -> None:
    """A place of the ring then holds twice as many rows, so that there are fewer of them; pieces are not for gates."""
    weight = fp8_reference.quantize_weight(torch.randn(2 * 192, 976) / 16)
    rows = fp8_reference.quantize_rows(torch.randn(3, 976).bfloat16(), Rounding())
    for sizes in (SIZES[0] | {"stages": 9}, SIZES[1], SIZES[4]):
        for bias in (None, torch.randn(2 * 192).bfloat16()):
            gate, up = fp8_reference.linear(rows, weight, bias, torch.float32).chunk(2, dim=1)
            assert_near(fp8_ring.linear(rows, weight, bias, torch.bfloat16, sizes, gated=True), F.silu(gate) * up)
    assert [launch.STAGES for launch in ring.launches] == [6, 6, 3, 3, 12, 12]


def test_more_tiles_than_there_are_counters_are_not_shared(
    ring: WalkedRing, monkeypatch: pytest.MonkeyPatch, assert_near: Near
) -> None:
    """A counter says who is last of a tile."""
    monkeypatch.setattr(fp8_ring.tuning, "MAX_COUNTERS", 4)
    for num_outputs, is_shared in ((256, True), (257, False)):
        weight = fp8_reference.quantize_weight(torch.randn(num_outputs, 640) / 16)
        rows = fp8_reference.quantize_rows(torch.randn(2, 640).bfloat16(), Rounding())
        got = fp8_ring.linear(rows, weight, None, torch.bfloat16, SIZES[1])
        assert_near(got, fp8_reference.linear(rows, weight, None, torch.bfloat16))
        assert ring.launches[-1].SHARED is is_shared
