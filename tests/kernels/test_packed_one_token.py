"""Products of one token with 4 or 8 bits by Hopper's own kernels, against plain torch."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from argosy.kernels import packed_linear, packed_reference, packed_stream, packed_vector, reference

Near = Callable[[Tensor, Tensor], None]
Compiled = Callable[[str], list[str]]
Sizes = dict[str, int]
VECTOR = {"kernel": packed_linear.VECTOR, "warps": 8, "blocks": 1}
STREAM = {"kernel": packed_linear.STREAM, "warps": 16, "split": 4, "depth": 4}
KERNELS: dict[int, ModuleType] = {packed_linear.VECTOR: packed_vector, packed_linear.STREAM: packed_stream}


def make(num_in: int, num_out: int, scales: torch.dtype, bits: int = 4) -> packed_reference.PackedWeight:
    numbers = torch.randint(0, 1 << bits, (num_out, num_in), device="cuda")
    scale = (torch.rand(num_out, num_in // 128, device="cuda") + 0.1).to(scales) / (4 << bits)
    zero = torch.randint(0, 1 << bits, scale.shape, device="cuda").to(scales)
    return packed_reference.pack(numbers, scale, zero, bits=bits, group=128)


def weight_at_nowhere(num_in: int, num_out: int, bits: int) -> packed_reference.PackedWeight:
    """The shape of one, for what looks at that alone."""
    words, pairs = packed_reference.shapes(num_out, num_in, bits=bits, group=128)
    return packed_reference.PackedWeight(
        torch.empty(words, dtype=torch.int32, device="meta"), torch.empty(pairs, dtype=torch.float16, device="meta"),
        bits, 128, num_in, num_out,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("bits", "num_in", "num_out", "sizes"),
    [
        (4, 1024, 24, VECTOR),  # rows that fill no tile, fewer tiles than programs
        (4, 1024, 4800, VECTOR | {"warps": 4}),
        (4, 4096, 2096, VECTOR | {"blocks": 2}),
        (4, 4096, 6144, VECTOR | {"warps": 16, "blocks": 2}),
        (4, 14336, 4096, VECTOR | {"blocks": 2}),
        (4, 2048, 96, VECTOR | {"warps": 4, "blocks": 2}),
        (8, 1024, 56, VECTOR),
        (8, 4096, 2080, VECTOR | {"blocks": 2}),
        (4, 1024, 24, STREAM),
        (4, 1024, 4800, STREAM | {"warps": 4, "split": 1}),
        (4, 4096, 6144, STREAM | {"warps": 4, "per_sm": 4}),
        (4, 14336, 4096, STREAM | {"split": 8}),
        (4, 640, 96, STREAM | {"split": 1, "depth": 3, "warps": 8}),  # a step that is left over
        (4, 1024, 24, STREAM | {"half": 1}),
        (4, 4096, 2080, STREAM | {"half": 1, "warps": 8, "depth": 2, "per_sm": 2}),
    ],
)
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_token_times_a_plain_weight(
    bits: int, num_in: int, num_out: int, sizes: Sizes, scales: torch.dtype, dtype: torch.dtype, assert_near: Near
) -> None:
    weight = make(num_in, num_out, scales, bits)
    x, bias = torch.randn(1, num_in, device="cuda").to(dtype), torch.randn(num_out, device="cuda").to(dtype)
    if not KERNELS[sizes["kernel"]].takes(x, weight):
        pytest.skip("for Hopper")
    scale_OG, zero_OG = (one.double().repeat_interleave(128, 1) for one in packed_reference.scales_and_zeros(weight))
    plain = (packed_reference.unpack(weight) - zero_OG) * scale_OG  # not rounded, as it is not on the card
    want = F.linear(x.double(), plain)
    assert_near(packed_linear.linear(x, weight, sizes=sizes), want.to(dtype))
    assert_near(packed_linear.linear(x, weight, bias, sizes=sizes), (want + bias.double()).to(dtype))
    residual = torch.randn(1, num_out, device="cuda").to(dtype)
    after = (want + residual.double()).to(dtype)
    assert packed_linear.linear(x, weight, residual_TO=residual, sizes=sizes) is residual
    assert_near(residual, after)
    if packed_linear.can_gate(weight):
        gate, up = (want + bias.double()).chunk(2, -1)
        assert_near(packed_linear.linear(x, weight, bias, gated=True, sizes=sizes), (F.silu(gate) * up).to(dtype))
    norm = torch.rand(num_in, device="cuda").to(dtype) + 0.5  # for `packed_vector` a launch of its own makes it
    normed = reference.rms_norm(x, norm, 1e-5)
    assert_near(
        packed_linear.linear(x, weight, bias, norm_weight_I=norm, eps=1e-5, sizes=sizes | {"norm": 1}),
        (F.linear(normed.double(), plain) + bias.double()).to(dtype),
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes", [VECTOR | {"blocks": 2}, *(STREAM | {"split": 8, "early": early} for early in (0, 1, 2))]
)
def test_products_that_follow_each_other_do_not_overtake(sizes: Sizes, assert_near: Near) -> None:
    """Each begins to fetch while those before run; what it multiplies is theirs all the same."""
    weights = [make(4096, 4096, torch.bfloat16) for _ in range(6)]
    x = torch.randn(1, 4096, device="cuda").bfloat16()
    if not KERNELS[sizes["kernel"]].takes(x, weights[0]):
        pytest.skip("for Hopper")
    want = x
    for weight in weights:
        want = F.normalize(F.linear(want.float(), packed_reference.dequantize(weight).float()).bfloat16(), dim=-1)

    def chain() -> Tensor:
        made = x
        for weight in weights:
            made = F.normalize(packed_linear.linear(made, weight, sizes=sizes), dim=-1)
        return made

    assert_near(chain(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = chain()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert_near(made, want)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e6, 1e30])
def test_inputs_of_any_size_are_multiplied_in_float16(size: float, assert_near: Near) -> None:
    """bfloat16 reaches as far as float32: inputs are brought near each other by a power of two."""
    weight = make(2048, 96, torch.bfloat16)
    x = (torch.randn(1, 2048, device="cuda") * size).bfloat16()
    if not packed_stream.takes(x, weight):
        pytest.skip("for Hopper")
    want = F.linear(x.double(), packed_reference.dequantize(weight).double())
    got = packed_linear.linear(x, weight, sizes=STREAM | {"half": 1})
    assert_near((got.double() / size).bfloat16(), want / size)
    x[:, 5] = float("nan")
    assert packed_linear.linear(x, weight, sizes=STREAM | {"half": 1}).isnan().all()


def test_programs_share_tiles_evenly() -> None:
    """Each has as many tiles as any other, or one less; none has more than there is room for."""
    for num_tiles in (1, 96, 131, 132, 133, 256, 384, 896, 1792, 5000):
        for warps, split, per_sm in ((16, 2, 1), (16, 8, 1), (8, 1, 1), (4, 4, 4)):
            programs = packed_stream.programs_of(num_tiles, {"warps": warps, "split": split, "per_sm": per_sm}, 132)
            most = -(-num_tiles // programs)
            assert most <= warps // split
            assert programs <= num_tiles
            assert programs <= 132 * per_sm or most == warps // split


def test_inputs_must_find_room_and_be_shared_out() -> None:
    """Shared memory holds the inputs of any layer of ours; blocks are shared by warps without a remainder."""
    weight = weight_at_nowhere(14336, 4096, 4)
    assert packed_stream.fits(weight, STREAM | {"split": 8})
    assert not packed_stream.fits(weight, STREAM | {"split": 32})  # 112 blocks are no multiple
    assert not packed_stream.fits(weight_at_nowhere(106496, 4096, 4), STREAM | {"split": 8})


def test_sizes_are_for_any_shape() -> None:
    """What nobody has tuned: warps share all blocks evenly."""
    for bits in (4, 8):
        for num_in, num_out in ((4096, 6144), (14336, 4096), (3584, 8192), (7168, 8192), (1536, 4096), (512, 48)):
            sizes = packed_vector.default_sizes(weight_at_nowhere(num_in, num_out, bits))
            assert num_in // 128 % (sizes["warps"] * sizes["blocks"]) == 0


def test_vectors_leave_room_for_many_warps_of_a_hopper_card(compiled_for_hopper: Compiled) -> None:
    """Sixteen at least on a multiprocessor, with nothing on the stack."""
    lines = [line.split() for line in compiled_for_hopper("packed_vector") if "vector_kernel" in line]
    assert len(lines) == 4
    for registers, _, spilled, _, shared, *_ in lines:
        assert (int(registers) <= 128, int(spilled), int(shared) <= 4096) == (True, 0, True), lines


def test_streams_compile_for_a_hopper_card(compiled_for_hopper: Compiled) -> None:
    """Sixteen warps find registers: nothing goes to memory."""
    lines = [line for line in compiled_for_hopper("packed_stream") if "stream_kernel" in line]
    assert len(lines) == 4
    assert all(" 0 spilled" in line for line in lines), lines
