"""The device-side inputs of a decode step against their plain meaning."""

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

SCRIPT = """
import sys, torch
from argosy.kernels import decode_inputs, tables_reference
device = sys.argv[1]
generator = torch.Generator().manual_seed(int(sys.argv[2]))
for num_handles, max_blocks, block_size, num_rows in [(5, 3, 16, 4), (9, 300, 4, 7), (3, 1, 32, 1)]:
    rand = lambda high, *shape: torch.randint(0, high, shape, generator=generator)
    rows = torch.randperm(num_handles, generator=generator)[:num_rows].int()
    rows[rand(num_rows, 1)] = -1
    new_block = torch.where(rand(2, num_rows) > 0, rand(999, num_rows), -1).int()
    token = torch.where(rand(3, num_rows) > 1, rand(999, num_rows), -1).int()
    last, computed = rand(5000, num_handles), rand(max_blocks * block_size, num_handles).int()
    table = rand(999, num_handles, max_blocks).int()
    outs = [torch.full((num_rows,), -7), torch.full((num_rows,), -7), torch.full((num_rows,), -7),
            torch.full((num_rows,), -7, dtype=torch.int32), torch.full((num_rows, max_blocks), -7, dtype=torch.int32)]
    want = [t.clone() for t in (rows, new_block, token, last, computed, table, *outs)]
    got = [t.clone().to(device) for t in (rows, new_block, token, last, computed, table, *outs)]
    for options in ({"reach_blocks": 2, "advances": False}, {}):  # a window's table first, as for a second group
        tables_reference.prepare_decode(*want, block_size=block_size, **options)
        decode_inputs.prepare_decode(*got, block_size=block_size, **options)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=0, atol=0)
    logits = torch.randn(num_rows, 77, generator=generator)
    logits[0] = float("nan")
    logits[-1] = float("-inf")
    ids = rand(77, num_rows)
    want, got = [[t.clone().to(d) for t in (rows, ids, logits, last, ids)] for d in ("cpu", device)]
    tables_reference.remember_tokens(*want)
    decode_inputs.remember_tokens(*got)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=0, equal_nan=True)
print("equal")
"""


def _run(device: str, seed: int, interpret: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, device, str(seed)],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs below")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the next test runs it on the card")
@pytest.mark.parametrize("seed", [1, 2])
def test_the_kernel_does_what_the_reference_says(seed: int) -> None:
    """Rows with and without a new block, padding, one block and hundreds; run by the interpreter."""
    _run("cpu", seed, "1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_does_so_on_a_gpu() -> None:
    """The same on the card."""
    _run("cuda", 3, "0")
