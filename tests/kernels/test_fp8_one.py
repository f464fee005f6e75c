"""One token with e4m3 weights in a launch of its own, against its meaning in plain torch: on a card.

How a launch shares out the work needs none.
"""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import OnCard, Walked
from torch import Tensor

from argosy.kernels import fp8_one, fp8_reference, fp8_ring, paged_attention, tuning
from argosy.kernels.fp8_reference import Rounding

Near = Callable[[Tensor, Tensor], None]
CASES = (  # inputs, weight rows, gated, pieces, added, width, programs
    (4096, 6144, False, 1, 0, 256, 0),
    (4096, 6144, False, 1, 4, 256, 5),
    (4096, 28672, True, 1, 2, 128, 132),
    (4096, 4096, False, 2, 0, 256, 0),
    (14336, 4096, False, 4, 0, 256, 0),
    (14336, 4096, False, 2, 0, 256, 0),
    (512, 200, False, 2, 0, 128, 3),
    (768, 384, True, 1, 1, 128, 0),
    (3072, 128, False, 3, 0, 256, 1),
)


def check_case(
    case: tuple[int, int, bool, int, int, int, int], early: int, device: torch.device, assert_near: Near
) -> None:
    """The product twice, against plain torch."""
    num_inputs, num_rows, gated, pieces, added, width, programs = case
    sizes = {"width": width, "stages": 3, "pieces": pieces, "programs": programs, "early": early}
    weight = fp8_reference.quantize_weight(torch.randn(num_rows, num_inputs, device=device) / 64)
    x = torch.randn(1, num_inputs, device=device).bfloat16()
    norm = torch.randn(num_inputs, device=device).bfloat16() if pieces == 1 else None
    bias = torch.randn(num_rows, device=device).bfloat16() if pieces == 1 else None
    parts = torch.randn(added, 1, num_inputs, device=device) if added else None
    kept = torch.zeros_like(x) if added else None
    for _ in range(2):
        got = fp8_one.linear(
            x, weight, bias, sizes, norm=None if norm is None else (norm, 1e-5), parts_P1I=parts, kept_1I=kept,
            gated=gated,
        )  # fmt: skip
    total = x.clone()
    if parts is not None and kept is not None:
        total += parts.sum(0).bfloat16()
        assert_near(kept, total)
        total = kept  # its last bits hang on the order of a sum
    if norm is None:
        rows = fp8_reference.quantize_rows(total, Rounding())
    else:
        rows = fp8_reference.norm_and_quantize(total, norm, 1e-5, Rounding())
    want = fp8_reference.linear(rows, weight, bias, torch.float32)
    if gated:
        gate, up = want.chunk(2, dim=1)
        want = F.silu(gate) * up
    assert got.shape == ((pieces, 1, num_rows) if pieces > 1 else want.shape)
    assert_near(got.sum(0).bfloat16() if pieces > 1 else got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("early", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_product_that_rounds_is_what_it_means(
    case: tuple[int, int, bool, int, int, int, int], early: int, device: torch.device, assert_near: Near
) -> None:
    """With the norm of a residual and what is added to it, which is kept; with pieces that are left; with a gate."""
    check_case(case, early, device, assert_near)


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of whole places, no more inputs than there is room for; nothing on a CPU."""
    weight = fp8_reference.quantize_weight(torch.randn(128, 512))
    assert not fp8_one.takes(weight, {"width": 256, "pieces": 1})

    monkeypatch.setattr(fp8_one, "is_hopper", lambda device: True)
    for shape, width, pieces, fits in (
        ((128, 512), 256, 2, True), ((128, 512), 256, 4, False), ((200, 512), 256, 1, False),
        ((4096, 14336), 256, 2, True), ((4096, 14336), 256, 1, False),
    ):  # fmt: skip
        found = fp8_one.takes(weight._replace(values_OI=OnCard(*shape)), {"width": width, "pieces": pieces})  # type: ignore[arg-type]  # only a shape
        assert found == fits, (shape, width, pieces)


def test_attention_beside_it_has_sizes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a few groups over a cache of 16 bits."""
    monkeypatch.setattr(paged_attention.tuning, "pick", lambda kernel, key, device: (kernel, key))
    monkeypatch.setattr(paged_attention.tuning, "device_facts", lambda device: SimpleNamespace(num_sms=132))
    cache = torch.zeros(1, 16, 8, 128, dtype=torch.bfloat16)
    assert paged_attention.ring_sizes(1, cache) == ("paged_attention", "h128_few_rings")
    assert paged_attention.ring_sizes(5, cache) is None
    assert paged_attention.ring_sizes(1, cache.to(torch.float8_e4m3fn)) is None


class WalkedLaunch(Walked):
    """In place of the kernel: goes over the tiles that each program is given, by the kernel's own rules."""

    def walk(self, programs: int, values: tuple[Any, ...], named: Any) -> None:
        w_desc, x_1I, parts, norm, kept, w_scale, bias, out, tiles, outputs, stride_part, eps = values
        assert list(w_desc.block_shape) == [64, named.WIDTH]
        assert named.OWN % named.WIDTH == 0
        assert tuning.next_power_of_two(named.OWN) == named.OWN_POWER
        assert programs % named.PIECES == 0
        total = x_1I.clone()
        if named.PARTS:
            added = [parts.view(-1)[part * stride_part :][: named.INPUTS] for part in range(named.PARTS)]
            total = (total.float() + torch.stack(added).sum(0).to(total.dtype).float()).to(total.dtype)
            kept.copy_(total)
        weight = fp8_reference.Fp8Weight(w_desc.base, w_scale, None)
        if named.NORM:
            rows = fp8_reference.norm_and_quantize(total, norm, eps, Rounding())
        else:
            rows = fp8_reference.quantize_rows(total, Rounding())
        seen = Counter[tuple[int, int]]()
        for program in range(programs):
            piece, first, step = program % named.PIECES, program // named.PIECES, programs // named.PIECES
            columns = slice(piece * named.OWN, (piece + 1) * named.OWN)
            cut = rows._replace(values_TI=rows.values_TI[:, columns])
            for tile in range(first, tiles, step):
                seen[tile, piece] += 1
                here = torch.arange(tile * 64, min((tile + 1) * 64, outputs))
                made = [
                    fp8_reference.linear(
                        cut,
                        weight._replace(values_OI=weight.values_OI[here + half * outputs, columns],
                                        scale=w_scale[here + half * outputs]),
                        bias[here + half * outputs] if named.BIAS else None, torch.float32,
                    )
                    for half in range(named.HALVES)
                ]  # fmt: skip
                y = F.silu(made[0]) * made[1] if named.HALVES == 2 else made[0]
                out.view(-1)[piece * outputs + here] = y[0].to(out.dtype)
        assert seen == Counter({(tile, piece): 1 for tile in range(tiles) for piece in range(named.PIECES)})


@pytest.mark.parametrize(
    ("case", "programs"),
    [
        ((512, 640, False, 1, 0, 256, 0), 10), ((512, 640, False, 1, 4, 128, 3), 3),
        ((512, 640, False, 2, 0, 256, 3), 6),
        ((768, 384, True, 1, 1, 128, 0), 3), ((768, 384, True, 1, 0, 256, 132), 3),
        ((768, 128, False, 3, 2, 256, 1), 3),
        ((512, 200, False, 2, 0, 128, 0), 8),
    ],
    ids=str,
)  # fmt: skip
def test_a_launch_shares_out_each_tile_once(
    case: tuple[int, int, bool, int, int, int, int],
    programs: int,
    monkeypatch: pytest.MonkeyPatch,
    assert_near: Near,
) -> None:
    """Each program its piece of the inputs, and no more programs than tiles; what is given goes where it belongs."""
    launch = WalkedLaunch()
    monkeypatch.setattr(fp8_one, "one_kernel", launch)
    check_case(case, 1, torch.device("cpu"), assert_near)
    assert [each.programs for each in launch.launches] == [programs] * 2


def test_measured_sizes_suit_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that did not would be left aside without a word, or have no room for its ring beside the token."""
    monkeypatch.setattr(fp8_one, "is_hopper", lambda device: True)
    entries = tuning._tuned("nvidia_h200")["fp8_one"]
    assert entries
    nobody: Any = None
    for key, sizes in entries.items():
        num_inputs, num_outputs = map(int, key.split("x"))
        weight: Any = fp8_reference.Fp8Weight(OnCard(num_outputs, num_inputs), nobody, None)  # type: ignore[arg-type]  # only a shape
        assert fp8_one.takes(weight, sizes), key
        token_bytes = 8 * tuning.next_power_of_two(num_inputs // sizes["pieces"])
        assert token_bytes + sizes["stages"] * 64 * sizes["width"] <= fp8_ring.RING_BYTES, key
