"""Weights of 4 and 8 bits: what packing keeps, and products by kernels against plain torch."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from argosy.kernels import packed_hopper, packed_linear, packed_reference, reference

Near = Callable[[Tensor, Tensor], None]
Compiled = Callable[[str], list[str]]
# bits, group, inputs, outputs: whole units, columns and rows that fill none, in as many blocks as warps share, two
# groups a unit, two planes
SHAPES = [(4, 128, 256, 24), (4, 32, 96, 5), (4, 32, 224, 20), (4, 64, 320, 17), (8, 128, 384, 9), (8, 32, 160, 33)]
PACKED_ONLY = [(8, 16, 48, 33), (4, 8, 24, 3)]
FEW = {"kernel": packed_linear.FEW, "tiles": 2, "split": 4, "ahead": 1}
MANY = {"kernel": packed_linear.MANY, "tiles": 4, "tokens": 16, "splits": 2, "stages": 2, "warps": 4, "sync": 1}
WAYS = [
    (1, FEW), (3, FEW | {"tiles": 1, "ahead": 0, "early": 1}), (9, FEW | {"split": 2, "wide": 2, "ahead": 0}),
    (2, MANY), (19, MANY | {"sync": 0}), (19, MANY | {"sync": 0, "warps": 2, "splits": 1}),
    (19, {"kernel": packed_linear.SLICES}),
]  # fmt: skip


def make(bits: int, group: int, num_in: int, num_out: int, device: torch.device) -> packed_reference.PackedWeight:
    numbers = torch.randint(0, 1 << bits, (num_out, num_in), device=device)
    scale = torch.rand(num_out, num_in // group, device=device).half() / 8 + 0.01
    zero = torch.randint(0, 1 << bits, scale.shape, device=device).half()
    weight = packed_reference.pack(numbers, scale, zero, bits=bits, group=group)
    return weight._replace(
        words_MUW=followed(weight.words_MUW, -1), pairs_MKR2=followed(weight.pairs_MKR2, float("nan"))
    )


def followed(tensor: Tensor, by: float) -> Tensor:
    """The same with other numbers behind it in memory: what reads beyond the end of a weight spoils its product."""
    wide = torch.full((tensor.numel() + 8192,), by, dtype=tensor.dtype, device=tensor.device)
    wide[: tensor.numel()] = tensor.flatten()
    return wide[: tensor.numel()].view(tensor.shape)


@pytest.mark.parametrize(("bits", "group", "num_in", "num_out"), SHAPES + PACKED_ONLY)
def test_numbers_come_back_as_they_were_packed(bits: int, group: int, num_in: int, num_out: int) -> None:
    numbers = torch.randint(0, 1 << bits, (num_out, num_in))
    scale = torch.rand(num_out, num_in // group)
    zero = torch.randint(0, 1 << bits, scale.shape).float()
    weight = packed_reference.pack(numbers, scale, zero, bits=bits, group=group)
    assert torch.equal(packed_reference.unpack(weight), numbers.int())
    for got, want in zip(packed_reference.scales_and_zeros(weight), (scale, zero), strict=True):
        assert torch.equal(got, want)
    plain = (numbers - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
    assert torch.equal(packed_reference.dequantize(weight), plain)


def test_a_number_lies_where_the_tensor_cores_take_it() -> None:
    """The arrangement that the file's head describes, number by number: a wrong one is only slow on a card."""
    numbers = torch.zeros(16, 64, dtype=torch.int64)
    for row, column in ((0, 0), (3, 1), (9, 2), (12, 8), (5, 18), (15, 63), (2, 36)):
        numbers[:] = 0
        numbers[row, column] = 11
        weight = packed_reference.pack(numbers, torch.ones(16, 1), torch.zeros(16, 1), bits=4, group=64)
        lane = row % 8 * 4 + column % 8 // 2
        word = column % 2 + 2 * (column // 32)
        field = column // 8 % 2 + 2 * (row // 8) + 4 * (column // 16 % 2)
        assert torch.nonzero(weight.words_MUW).tolist() == [[0, 0, lane * 4 + word]]
        assert int(weight.words_MUW[0, 0, lane * 4 + word]) >> (4 * field) & 15 == 11


@pytest.mark.parametrize(("bits", "symmetric", "bound"), [(4, True, 0.5), (4, False, 0.51), (8, True, 0.5)])
def test_rounding_is_within_half_a_step(bits: int, symmetric: bool, bound: float) -> None:
    plain = torch.randn(7, 256)
    weight = packed_reference.quantize(plain, bits=bits, group=64, symmetric=symmetric)
    step = packed_reference.scales_and_zeros(weight)[0].repeat_interleave(64, 1)
    off = (packed_reference.dequantize(weight) - plain).abs() / step
    assert float(off.max()) <= bound + 1e-3


@pytest.mark.parametrize(("bits", "group", "num_in", "num_out"), SHAPES)
@pytest.mark.parametrize(("tokens", "sizes"), WAYS)
def test_a_product_is_that_of_the_plain_weight(
    bits: int, group: int, num_in: int, num_out: int, tokens: int, sizes: dict[str, int], device: torch.device,
    assert_near: Near,
) -> None:  # fmt: skip
    """Behind each token's inputs stands nan, as others' numbers do in a product that several parts are cut from."""
    weight = make(bits, group, num_in, num_out, device)
    wide = torch.full((tokens, num_in + 128), float("nan"), device=device, dtype=torch.float16)
    x, bias = wide[:, :num_in].normal_(), torch.randn(num_out, device=device).half()
    want = (x.double() @ packed_reference.dequantize(weight).double().t() + bias.double()).half()
    assert_near(packed_linear.linear(x, weight, bias, sizes=sizes), want)
    assert_near(packed_linear.linear(x, weight, sizes=sizes), (want.double() - bias.double()).half())


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 128)])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 16, 40, 200, 300])
def test_bfloat16_activations_multiply_scales_of_either_kind(
    bits: int, group: int, scales: torch.dtype, tokens: int, device: torch.device, assert_near: Near
) -> None:
    numbers = torch.randint(0, 1 << bits, (1040, 2048), device=device)
    scale = (torch.rand(1040, 2048 // group, device=device) / 8 + 0.01).to(scales)
    zero = torch.randint(0, 1 << bits, scale.shape, device=device).to(scales)
    weight = packed_reference.pack(numbers, scale, zero, bits=bits, group=group)
    x = torch.randn(tokens, 2048, device=device).bfloat16()
    want = (x.double() @ packed_reference.dequantize(weight).double().t()).bfloat16()
    assert_near(packed_linear.linear(x, weight), want)


IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
# bits, group; groups of warps, tiles of each, tokens at once, places in the ring; programs
BY_HOPPER = [
    (4, 128, 4, 4, 64, 3, 132), (4, 128, 2, 4, 256, 3, 3), (4, 64, 2, 8, 128, 4, 0), (4, 128, 4, 4, 128, 4, 7),
    (8, 128, 4, 4, 32, 8, 132), (8, 64, 2, 4, 16, 4, 3),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs capability 9.0")
@pytest.mark.parametrize(("bits", "group", "wgs", "tiles", "at_once", "stages", "programs"), BY_HOPPER)
def test_hopper_multiplies_tiles_that_are_filled_and_such_that_are_not(
    bits: int, group: int, wgs: int, tiles: int, at_once: int, stages: int, programs: int, device: torch.device,
    assert_near: Near,
) -> None:  # fmt: skip
    """Rows, columns, tokens of no whole tile, programs that begin inside a tile; twice: counters are left at zero."""
    sizes = {"kernel": packed_linear.HOPPER, "wgs": wgs, "tiles": tiles, "tokens": at_once, "stages": stages}
    sizes["programs"] = programs
    sizes["late"] = int(programs == 3)
    for dtype, num_in, num_out, tokens in (
        (torch.bfloat16, 384, 1000, at_once + 7), (torch.float16, 2048, 264, at_once - 5), (torch.bfloat16, 128, 17, 1),
    ):  # fmt: skip
        weight = make(bits, group, num_in, num_out, device)
        wide = torch.randn(tokens, num_in + 8, device=device).to(dtype)
        x, bias = wide[:, :num_in], torch.randn(num_out, device=device).to(dtype)
        plain = packed_reference.dequantize(weight).double()
        want = x.double() @ plain.t()
        for _ in range(2):
            out = torch.full((tokens, num_out), float("nan"), device=device, dtype=dtype)
            packed_linear.linear(x, weight, sizes=sizes, out_TO=out)
            assert_near(out, want.to(dtype))
        assert_near(packed_linear.linear(x, weight, bias, sizes=sizes), (want + bias.double()).to(dtype))
        residual = torch.randn(tokens, num_out, device=device).to(dtype)
        after = want + residual.double()
        assert packed_linear.linear(x, weight, residual_TO=residual, sizes=sizes) is residual
        assert_near(residual, after.to(dtype))


def test_it_compiles_for_a_hopper_card_and_its_products_run_on(compiled_for_hopper: Compiled) -> None:
    """No register goes to memory, and the assembler does not make products wait for each other."""
    lines = [line for line in compiled_for_hopper("packed_many") if "hopper_kernel" in line]
    assert len(lines) == 4
    assert all(" 0 spilled" in line and "SERIALIZED" not in line for line in lines), lines


def test_sizes_are_for_any_shape(device: torch.device) -> None:
    """What nobody has tuned: rings that fit, tiles that the copy engine takes."""
    for bits, group in ((4, 128), (8, 64)):
        for num_out, num_in in ((96, 256), (28672, 4096)):
            words, pairs = packed_reference.shapes(num_out, num_in, bits=bits, group=group)
            weight = packed_reference.PackedWeight(
                torch.empty(words, dtype=torch.int32, device="meta"),
                torch.empty(pairs, dtype=torch.float16, device="meta"), bits, group, num_in, num_out,
            )  # fmt: skip
            for tokens in (1, 17, 64, 100, 256, 1000):
                sizes = packed_hopper.default_sizes(weight, tokens, 132)
                assert sizes["tokens"] in (16, 32, 64, 128, 256)
                assert 2 <= sizes["stages"] * packed_hopper.place_bytes(weight, sizes) <= packed_hopper.RING_BYTES


@pytest.mark.parametrize("sizes", [FEW, MANY])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_few_tokens_are_fused_with_gate_and_residual(
    tokens: int, sizes: dict[str, int], device: torch.device, assert_near: Near
) -> None:
    x = torch.randn(tokens, 192, device=device).half()
    for num_out in (96, 26):  # gates and ups in tiles of their own, and sharing one
        weight = make(4, 64, 192, num_out, device)
        plain = packed_reference.dequantize(weight).half()
        bias = torch.randn(num_out, device=device).half()
        want = reference.fused_linear(x, plain, bias, gated=True)
        assert_near(packed_linear.linear(x, weight, bias, gated=True, sizes=sizes), want)

        residual = torch.randn(tokens, num_out, device=device).half()
        want = reference.fused_linear(x, plain, residual_TO=residual.clone())
        got = packed_linear.linear(x, weight, residual_TO=residual, sizes=sizes)
        assert got is residual
        assert_near(got, want)


def test_many_tokens_go_by_slices_of_plain_weight(
    device: torch.device, assert_near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "SLICE_ROWS", 32)
    weight = make(4, 32, 128, 150, device)
    x, bias = torch.randn(6, 128, device=device).half(), torch.randn(150, device=device).half()
    sizes = {"kernel": packed_linear.SLICES, "slice_mb": 0}
    assert_near(packed_linear.linear(x, weight, bias, sizes=sizes), packed_reference.linear(x, weight, bias))
    residual = torch.randn(6, 150, device=device).half()
    want = packed_reference.linear(x, weight, None) + residual
    assert packed_linear.linear(x, weight, residual_TO=residual, sizes=sizes) is residual
    assert_near(residual, want)


def test_inputs_are_picked_in_an_order(device: torch.device) -> None:
    x = torch.randn(3, 100, device=device).half()
    order = torch.randint(0, 100, (1100,), device=device)
    assert torch.equal(packed_linear.pick_inputs(x, order), x[:, order])


def test_long_groups_are_cut(device: torch.device) -> None:
    plain = torch.randn(5, 384, device=device)
    weight = packed_reference.quantize(plain, bits=4, group=-1)
    assert weight.group == 128
    scale_OG, _ = packed_reference.scales_and_zeros(weight)
    assert torch.equal(scale_OG[:, 0], scale_OG[:, 2])


def test_the_way_goes_by_tokens_and_what_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that nobody tuned: read once for few tokens, words to the tensor cores for some, slices of plain
    weight above; two planes are two products, so for 8 bits earlier. A tuned way counts where this card can take it."""
    asked: list[str] = []
    tuned: dict[str, dict[str, int]] = {}

    def pick(kernel: str, key: str, device: torch.device) -> dict[str, int] | None:
        asked.append(key)
        return tuned.get(key)

    monkeypatch.setattr(packed_linear.tuning, "pick", pick)
    monkeypatch.setattr(packed_linear.tuning, "device_facts", lambda device: SimpleNamespace(num_sms=132))
    weights = {bits: make(bits, 128, 256, 32, torch.device("cpu")) for bits in (4, 8)}

    def way(bits: int, tokens: int) -> int:
        return packed_linear._sizes(weights[bits], torch.empty(tokens, 256))["kernel"]

    few, many, slices = packed_linear.FEW, packed_linear.MANY, packed_linear.SLICES
    assert [way(4, tokens) for tokens in (1, 16, 17, 256, 257, 1024)] == [few, few, many, many, slices, slices]
    assert [way(8, tokens) for tokens in (16, 17, 128, 129)] == [few, many, many, slices]
    asked.clear()
    assert way(4, 1025) == slices
    assert asked == [], "sizes are tuned for up to 1024 tokens; beyond, those of none apply"
    assert way(4, 100) == many
    assert asked == ["256x32x128"]
    tuned["256x32x128"] = {"kernel": packed_linear.HOPPER}
    assert way(4, 100) == many, "a card without that kernel"
    tuned["256x32x128"] = {"kernel": slices}
    assert way(4, 100) == slices
