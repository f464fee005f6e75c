"""Products of 1 to 8 tokens with 4 or 8 bits by Hopper's kernel without meetings, against plain torch."""

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

from argosy.kernels import packed_linear, packed_reference, packed_stream, reference

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels" / "compile_for.py"
HAS_ASSEMBLER = (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()
Near = Callable[[Tensor, Tensor], None]
SIZES = {"kernel": packed_linear.STREAM, "warps": 16, "split": 4, "depth": 4}


def make(num_in: int, num_out: int, scales: torch.dtype, bits: int = 4) -> packed_reference.PackedWeight:
    numbers = torch.randint(0, 1 << bits, (num_out, num_in), device="cuda")
    scale = (torch.rand(num_out, num_in // 128, device="cuda") + 0.1).to(scales) / (4 << bits)
    zero = torch.randint(0, 1 << bits, scale.shape, device="cuda").to(scales)
    return packed_reference.pack(numbers, scale, zero, bits=bits, group=128)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("bits", "num_in", "num_out", "tokens", "sizes", "dtype", "scales"),
    [
        (4, 1024, 24, 1, {}, torch.bfloat16, torch.float16),  # rows that fill no tile, fewer tiles than programs
        (4, 1024, 24, 7, {"split": 2}, torch.float16, torch.bfloat16),
        (4, 1024, 4800, 1, {"warps": 4, "split": 1}, torch.float16, torch.float16),
        (4, 1024, 4800, 8, {"warps": 8, "depth": 1}, torch.bfloat16, torch.bfloat16),
        (4, 4096, 6144, 2, {"depth": 8}, torch.bfloat16, torch.bfloat16),
        (4, 14336, 4096, 1, {"split": 8}, torch.bfloat16, torch.bfloat16),
        (4, 14336, 4096, 8, {"split": 2, "parts": 4}, torch.bfloat16, torch.bfloat16),
        (4, 1536, 2080, 3, {"split": 2, "parts": 2, "warps": 8}, torch.float16, torch.float16),
        (
            4,
            640,
            96,
            5,
            {"split": 1, "depth": 3, "warps": 8},
            torch.bfloat16,
            torch.float16,
        ),  # a step that is left over
        (4, 1024, 24, 1, {"half": 1}, torch.bfloat16, torch.float16),
        (4, 4096, 2080, 7, {"half": 1, "depth": 2}, torch.bfloat16, torch.bfloat16),
        (4, 14336, 288, 8, {"half": 1, "split": 2, "parts": 4}, torch.bfloat16, torch.bfloat16),
        (4, 1536, 2080, 3, {"half": 1, "split": 2, "parts": 2, "warps": 8}, torch.float16, torch.float16),
        (8, 1024, 56, 1, {"depth": 2}, torch.bfloat16, torch.bfloat16),
        (8, 4096, 2080, 8, {"depth": 2, "parts": 2}, torch.bfloat16, torch.float16),
    ],
)
def test_a_few_tokens_times_a_plain_weight(
    bits: int, num_in: int, num_out: int, tokens: int, sizes: dict[str, int], dtype: torch.dtype, scales: torch.dtype,
    assert_near: Near,
) -> None:  # fmt: skip
    weight, ways = make(num_in, num_out, scales, bits), SIZES | sizes
    wide = torch.randn(tokens, num_in + 64, device="cuda").to(dtype)  # rows that do not follow each other
    x, bias = wide[:, :num_in], torch.randn(num_out, device="cuda").to(dtype)
    if not packed_stream.takes(x, weight):
        pytest.skip("for Hopper")
    scale_OG, zero_OG = (one.double().repeat_interleave(128, 1) for one in packed_reference.scales_and_zeros(weight))
    plain = (packed_reference.unpack(weight) - zero_OG) * scale_OG  # not rounded, as it is not on the card
    want = F.linear(x.double(), plain)
    assert_near(packed_linear.linear(x, weight, sizes=ways), want.to(dtype))
    assert_near(packed_linear.linear(x, weight, bias, sizes=ways), (want + bias.double()).to(dtype))
    residual = torch.randn(tokens, num_out, device="cuda").to(dtype)
    after = (want + residual.double()).to(dtype)
    assert packed_linear.linear(x, weight, residual_TO=residual, sizes=ways) is residual
    assert_near(residual, after)
    if packed_linear.can_gate(weight):
        gate, up = (want + bias.double()).chunk(2, -1)
        assert_near(packed_linear.linear(x, weight, bias, gated=True, sizes=ways), (F.silu(gate) * up).to(dtype))
    norm = torch.rand(num_in, device="cuda").to(dtype) + 0.5  # with `parts` a launch of its own makes it
    normed = reference.rms_norm(x, norm, 1e-5)
    assert_near(
        packed_linear.linear(x, weight, bias, norm_weight_I=norm, eps=1e-5, sizes=ways | {"norm": 1}),
        (F.linear(normed.double(), plain) + bias.double()).to(dtype),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("early", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 8])
def test_products_that_follow_each_other_do_not_overtake(tokens: int, early: int, assert_near: Near) -> None:
    """Each begins to fetch while those before run; what it multiplies is theirs all the same."""
    weights = [make(4096, 4096, torch.bfloat16) for _ in range(6)]
    x = torch.randn(tokens, 4096, device="cuda").bfloat16()
    if not packed_stream.takes(x, weights[0]):
        pytest.skip("for Hopper")
    want = x
    for weight in weights:
        want = F.normalize(F.linear(want.float(), packed_reference.dequantize(weight).float()).bfloat16(), dim=-1)

    def chain() -> Tensor:
        made = x
        for weight in weights:
            made = F.normalize(packed_linear.linear(made, weight, sizes=SIZES | {"early": early, "split": 8}), dim=-1)
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
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e6, 1e30])
def test_inputs_of_any_size_are_multiplied_in_float16(size: float, tokens: int, assert_near: Near) -> None:
    """bfloat16 reaches as far as float32: inputs are brought near each other by a power of two."""
    weight = make(2048, 96, torch.bfloat16)
    x = (torch.randn(tokens, 2048, device="cuda") * size).bfloat16()
    if not packed_stream.takes(x, weight):
        pytest.skip("for Hopper")
    want = F.linear(x.double(), packed_reference.dequantize(weight).double())
    got = packed_linear.linear(x, weight, sizes=SIZES | {"half": 1})
    assert_near((got.double() / size).bfloat16(), want / size)
    x[:, 5] = float("nan")
    assert packed_linear.linear(x, weight, sizes=SIZES | {"half": 1}).isnan().all()


def test_programs_share_tiles_evenly() -> None:
    """Each has as many tiles as any other, or one less; none has more than there is room for."""
    for num_tiles in (1, 96, 131, 132, 133, 256, 384, 896, 1792, 5000):
        for warps, split, parts in ((16, 2, 1), (16, 8, 1), (8, 1, 1), (16, 2, 4)):
            sizes = {"warps": warps, "split": split, "parts": parts}
            groups = packed_stream.groups_of(num_tiles, sizes, 132)
            most = -(-num_tiles // groups)
            assert most <= warps // split
            assert groups <= num_tiles
            assert groups * parts <= 132 or most == warps // split


def test_inputs_must_find_room() -> None:
    """One token of any model does; eight of 14336 inputs only where programs share them."""
    words, pairs = packed_reference.shapes(4096, 14336, bits=4, group=128)
    weight = packed_reference.PackedWeight(
        torch.empty(words, dtype=torch.int32, device="meta"), torch.empty(pairs, dtype=torch.float16, device="meta"),
        4, 128, 14336, 4096,
    )  # fmt: skip
    assert packed_stream.fits(weight, 1, SIZES | {"split": 8})
    assert not packed_stream.fits(weight, 8, SIZES | {"split": 8})
    assert packed_stream.fits(weight, 8, SIZES | {"split": 2, "parts": 4})
    assert not packed_stream.fits(weight, 1, SIZES | {"split": 8, "parts": 4})  # 112 blocks are no multiple of 32


@pytest.mark.skipif(not HAS_ASSEMBLER, reason="this Triton came without NVIDIA's assembler")
def test_it_compiles_for_a_hopper_card(tmp_path: Path) -> None:
    """Sixteen warps find registers: of one token nothing goes to memory."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run(
        [sys.executable, SCRIPT, "packed_stream"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = [line for line in ran.stdout.splitlines() if "stream_kernel" in line]
    assert len(lines) == 9
    assert all(" 0 spilled" in line for line in lines if "1 tokens" in line), ran.stdout
