"""The product of one token with 4 or 8 bits by Hopper's own kernel, against plain torch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from argosy.kernels import packed_linear, packed_reference, packed_vector

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels" / "compile_for.py"
HAS_ASSEMBLER = (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()
Near = Callable[[Tensor, Tensor], None]
SIZES = {"kernel": packed_linear.VECTOR, "warps": 8, "blocks": 1}


def make(num_in: int, num_out: int, scales: torch.dtype, bits: int = 4) -> packed_reference.PackedWeight:
    numbers = torch.randint(0, 1 << bits, (num_out, num_in), device="cuda")
    scale = (torch.rand(num_out, num_in // 128, device="cuda") + 0.1).to(scales) / (4 << bits)
    zero = torch.randint(0, 1 << bits, scale.shape, device="cuda").to(scales)
    return packed_reference.pack(numbers, scale, zero, bits=bits, group=128)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("bits", "num_in", "num_out", "sizes"),
    [
        (4, 1024, 24, {}),  # rows that fill no tile, fewer tiles than programs
        (4, 1024, 4800, {"warps": 4}),
        (4, 4096, 2096, {"blocks": 2}),
        (4, 4096, 6144, {"warps": 16, "blocks": 2}),
        (4, 14336, 4096, {"blocks": 2}),
        (4, 2048, 96, {"warps": 4, "blocks": 2}),
        (8, 1024, 56, {}),
        (8, 4096, 2080, {"blocks": 2}),
    ],
)
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_token_times_a_plain_weight(
    bits: int, num_in: int, num_out: int, sizes: dict[str, int], scales: torch.dtype, dtype: torch.dtype,
    assert_near: Near,
) -> None:  # fmt: skip
    weight, ways = make(num_in, num_out, scales, bits), SIZES | sizes
    x, bias = torch.randn(1, num_in, device="cuda").to(dtype), torch.randn(num_out, device="cuda").to(dtype)
    if not packed_vector.takes(x, weight):
        pytest.skip("for Hopper")
    scale_OG, zero_OG = (one.double().repeat_interleave(128, 1) for one in packed_reference.scales_and_zeros(weight))
    plain = (packed_reference.unpack(weight) - zero_OG) * scale_OG  # not rounded, as it is not on the card
    want = F.linear(x.double(), plain)
    assert_near(packed_linear.linear(x, weight, sizes=ways), want.to(dtype))
    assert_near(packed_linear.linear(x, weight, bias, sizes=ways), (want + bias.double()).to(dtype))
    residual = torch.randn(1, num_out, device="cuda").to(dtype)
    after = (want + residual.double()).to(dtype)
    assert packed_linear.linear(x, weight, residual_TO=residual, sizes=ways) is residual
    assert_near(residual, after)
    if packed_linear.can_gate(weight):
        gate, up = (want + bias.double()).chunk(2, -1)
        assert_near(packed_linear.linear(x, weight, bias, gated=True, sizes=ways), (F.silu(gate) * up).to(dtype))


@pytest.mark.gpu
def test_products_that_follow_each_other_do_not_overtake(assert_near: Near) -> None:
    """Each begins to fetch while those before run; what it multiplies is theirs all the same."""
    weights = [make(4096, 4096, torch.bfloat16) for _ in range(6)]
    x = torch.randn(1, 4096, device="cuda").bfloat16()
    if not packed_vector.takes(x, weights[0]):
        pytest.skip("for Hopper")
    want = x
    for weight in weights:
        want = F.normalize(F.linear(want.float(), packed_reference.dequantize(weight).float()).bfloat16(), dim=-1)

    def chain() -> Tensor:
        made = x
        for weight in weights:
            made = F.normalize(packed_linear.linear(made, weight, sizes=SIZES | {"blocks": 2}), dim=-1)
        return made

    assert_near(chain(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = chain()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert_near(made, want)


def test_sizes_are_for_any_shape() -> None:
    """What nobody has tuned: warps share all blocks evenly."""
    for bits in (4, 8):
        for num_in, num_out in ((4096, 6144), (14336, 4096), (3584, 8192), (7168, 8192), (1536, 4096), (512, 48)):
            words, pairs = packed_reference.shapes(num_out, num_in, bits=bits, group=128)
            weight = packed_reference.PackedWeight(
                torch.empty(words, dtype=torch.int32, device="meta"),
                torch.empty(pairs, dtype=torch.float16, device="meta"), bits, 128, num_in, num_out,
            )  # fmt: skip
            sizes = packed_vector.default_sizes(weight)
            assert num_in // 128 % (sizes["warps"] * sizes["blocks"]) == 0


@pytest.mark.skipif(not HAS_ASSEMBLER, reason="this Triton came without NVIDIA's assembler")
def test_it_compiles_for_a_hopper_card_and_leaves_room_for_many_warps(tmp_path: Path) -> None:
    """Sixteen at least on a multiprocessor, with nothing on the stack."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run(
        [sys.executable, SCRIPT, "packed_vector"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines() if "vector_kernel" in line]
    assert len(lines) == 4
    for registers, _, spilled, _, shared, *_ in lines:
        assert (int(registers) <= 128, int(spilled), int(shared) <= 4096) == (True, 0, True), ran.stdout
