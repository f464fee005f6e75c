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
SIZES = {"kernel": packed_linear.VECTOR, "warps": 8, "blocks": 1, "places": 6, "per_sm": 1, "early": 1}


def make(num_in: int, num_out: int, scales: torch.dtype, bits: int = 4) -> packed_reference.PackedWeight:
    numbers = torch.randint(0, 1 << bits, (num_out, num_in), device="cuda")
    scale = torch.rand(num_out, num_in // 128, device="cuda").to(scales) / 8 + 0.01
    zero = torch.randint(0, 1 << bits, scale.shape, device="cuda").to(scales)
    return packed_reference.pack(numbers, scale, zero, bits=bits, group=128)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("bits", "num_in", "num_out", "sizes"),
    [
        (4, 1024, 24, {}),  # rows that fill no tile, fewer tiles than programs
        (4, 1024, 4800, {"places": 3, "early": 0}),
        (4, 4096, 2096, {"blocks": 2, "places": 5}),
        (4, 4096, 6144, {"warps": 16, "blocks": 2, "places": 4}),
        (4, 14336, 4096, {"blocks": 2, "places": 4, "per_sm": 2}),
        (4, 2048, 96, {"warps": 4, "blocks": 2, "places": 9, "per_sm": 4}),
        (8, 1024, 56, {"places": 5}),
        (8, 4096, 2080, {"blocks": 2, "places": 3}),
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
    plain = packed_reference.dequantize(weight).double()
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
            made = F.normalize(packed_linear.linear(made, weight, sizes=SIZES | {"blocks": 2, "places": 4}), dim=-1)
        return made

    assert_near(chain(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = chain()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert_near(made, want)


@pytest.mark.skipif(not HAS_ASSEMBLER, reason="this Triton came without NVIDIA's assembler")
def test_it_compiles_for_a_hopper_card_and_leaves_room_for_the_kernel_after_it(tmp_path: Path) -> None:
    """Two of them share a multiprocessor: 65,536 registers, 232,448 bytes."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run(
        [sys.executable, SCRIPT, "packed_vector"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines() if "vector_kernel" in line]
    assert len(lines) == 4
    for registers, _, spilled, _, shared, *_ in lines:
        assert (int(registers) <= 128, int(spilled), int(shared) <= 116_224) == (True, 0, True), ran.stdout
