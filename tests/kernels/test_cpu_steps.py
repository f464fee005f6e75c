"""What is compiled for CPU steps means what the reference says, in one thread and in two."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from argosy.kernels import cpu_steps, native, reference
from argosy.kernels.cpu_steps import CpuSteps

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2)}
BLOCK = 4


@pytest.fixture(params=DTYPES, ids=str)
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuSteps:
    """The functions; all work is worth two threads where a test sets them."""
    found = cpu_steps.open_cpu_steps(request.param)
    if found is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(cpu_steps, "SHARED_NUMBERS", 1)
    monkeypatch.setattr(cpu_steps, "SHARED_PRODUCTS", 1)
    return found


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> object:
    """As many of torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def _close(got: Tensor, want: Tensor) -> None:
    rtol, atol = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), want.float(), rtol=rtol, atol=atol)


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 64), (3, 257), (40, 96)])
def test_a_norm_alone_and_with_the_addition_before_it(steps: CpuSteps, num_tokens: int, width: int) -> None:
    """The sum stays in the residual."""
    torch.manual_seed(0)
    x, delta, weight = (_randn(*shape, dtype=steps.dtype) for shape in [(num_tokens, width)] * 2 + [(width,)])
    _close(steps.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    residual = x.clone()
    got = steps.rms_norm(residual, weight, 1e-5, delta)
    want, summed = reference.add_rms_norm(delta, x.clone(), weight, 1e-5)
    _close(got, want)
    torch.testing.assert_close(residual, summed, rtol=0, atol=0)


@pytest.mark.usefixtures("threads")
def test_a_gate(steps: CpuSteps) -> None:
    """Also far from zero, where e^x ends."""
    torch.manual_seed(0)
    both = _randn(5, 2 * 43, dtype=steps.dtype)
    both[0, :4] = torch.tensor([-200.0, 200.0, -88.5, 0.0])
    _close(steps.silu_and_mul(both), reference.silu_and_mul(both))


def test_a_number_that_is_none_stays_none(steps: CpuSteps) -> None:
    """A model that went wrong must be seen to."""
    x = torch.ones(2, 32, dtype=steps.dtype)
    x[1, 3] = float("nan")
    assert steps.rms_norm(x, torch.ones(32, dtype=steps.dtype), 1e-5).isnan().any(1).tolist() == [False, True]
    assert steps.silu_and_mul(x).isnan().any(1).tolist() == [False, True]


# (queries, tokens in the cache after the step) of each row
ROWS = {
    "decode": [(1, 1), (1, 64), (1, 65), (1, 7), (1, 130)],
    "alone": [(1, 90)],
    "prompts": [(2, 2), (33, 33), (70, 70), (130, 130)],
    "mixed": [(1, 30), (1, 0), (1, 9), (5, 69), (64, 100)],
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", list(ROWS))
@pytest.mark.parametrize(
    ("heads", "window", "rotated", "interleaved", "normed"),
    [
        ((4, 2, 32), None, 32, False, False),
        ((4, 4, 16), 9, 16, True, False),
        ((6, 2, 48), None, 16, False, True),
        ((20, 1, 64), 40, 0, False, False),
        ((66, 1, 16), None, 16, False, False),
    ],
    ids=["grouped", "window", "normed", "unrotated", "one_kv_head"],
)
def test_a_layer_sees_what_the_reference_sees(
    steps: CpuSteps,
    rows: str,
    heads: tuple[int, int, int],
    window: int | None,
    rotated: int,
    interleaved: bool,
    normed: bool,
) -> None:
    """Rotated, stored and attended to, over blocks in any order; padding gives zeros and is not stored."""
    torch.manual_seed(1)
    num_heads, num_kv_heads, size = heads
    shape = ROWS[rows]
    widest = -(-max(length for _, length in shape) // BLOCK) + 1
    table = torch.randperm(len(shape) * widest + 1)[: len(shape) * widest].view(len(shape), widest).int()
    starts = torch.tensor([0, *(count for count, _ in shape)]).cumsum(0).int()
    lengths = torch.tensor([length for _, length in shape]).int()
    positions = torch.tensor([max(at, 0) for count, length in shape for at in range(length - count, length)] + [0])
    slots = torch.tensor(
        [
            int(table[row, at // BLOCK]) * BLOCK + at % BLOCK if at >= 0 else -1
            for row, (count, length) in enumerate(shape)
            for at in range(length - count, length)
        ]
        + [-1]  # a token of no row
    )
    dtype = steps.dtype
    qkv = _randn(len(slots), (num_heads + 2 * num_kv_heads) * size, dtype=dtype)
    caches = [_randn(len(shape) * widest + 1, BLOCK, num_kv_heads, size, dtype=dtype) for _ in "kv"]
    angles = torch.arange(256)[:, None] * 0.3 ** torch.arange(rotated // 2)
    turns = torch.cat((angles.cos(), angles.sin()), 1) if rotated else None
    weight = _randn(num_heads + num_kv_heads, size, dtype=dtype) if normed else None
    want_caches = [cache.clone() for cache in caches]
    spent = qkv.clone()
    if weight is not None:
        qk = spent.view(len(slots), -1, size)[:, : num_heads + num_kv_heads]
        qk.copy_(reference.rms_norm(qk, torch.ones(size, dtype=dtype), 1e-6) * weight)
    q = reference.rope_and_store(
        spent, positions, turns, *want_caches, slots, num_heads=num_heads, interleaved=interleaved
    )
    want = reference.prefill_attention(
        q, *want_caches, starts, lengths.clamp(min=1), table, scale=size**-0.5, sliding_window=window
    ).flatten(1)
    covered = int(starts[-1])
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            want[starts[row] : starts[row + 1]] = 0
    got = steps.attend(
        qkv, positions, turns, *caches, slots, starts, lengths, table, num_rows=len(shape), num_heads=num_heads,
        scale=size**-0.5, most_context=int(lengths.max()), window=window, interleaved=interleaved, norm_XH=weight,
        eps=1e-6,
    )  # fmt: skip
    _close(got[:covered], want[:covered])
    assert got[covered:].count_nonzero() == 0
    for cache, expected in zip(caches, want_caches, strict=True):
        _close(cache, expected)


def test_float16_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled for it."""

    def refuse(source: Path) -> None:
        raise AssertionError(source)

    monkeypatch.setattr(native, "load", refuse)
    assert cpu_steps.open_cpu_steps(torch.float16) is None


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 5, 6, 7, 49, 100])
@pytest.mark.parametrize(("num_in", "num_out", "bias"), [(32, 64, False), (18, 70, True), (2050, 130, False)])
def test_a_product(steps: CpuSteps, num_in: int, num_out: int, bias: bool, num_tokens: int) -> None:
    """Any number of rows; outputs that don't fill their last panel; more inputs than are taken at once."""
    torch.manual_seed(0)
    x, weight = _randn(num_tokens, num_in, dtype=steps.dtype), _randn(num_out, num_in, dtype=steps.dtype)
    added = _randn(num_out, dtype=steps.dtype) if bias else None
    assert steps.packs(weight)
    got = steps.linear(x, steps.pack(weight), num_out, added)
    want = torch.nn.functional.linear(x.float(), weight.float(), None if added is None else added.float())
    rtol, atol = TOLERANCE[steps.dtype]
    torch.testing.assert_close(got.float(), want, rtol=rtol, atol=atol * num_in**0.5)


def test_rows_that_lie_apart_are_taken_together(steps: CpuSteps) -> None:
    """As a part of wider rows is."""
    torch.manual_seed(0)
    x, weight = _randn(5, 96, dtype=steps.dtype)[:, 16:48], _randn(64, 32, dtype=steps.dtype)
    packed = steps.pack(weight)
    torch.testing.assert_close(steps.linear(x, packed, 64), steps.linear(x.contiguous(), packed, 64))


def test_an_odd_number_of_inputs_is_left_to_torch_in_16_bits() -> None:
    """They are taken two by two."""
    for dtype in DTYPES:
        steps = cpu_steps.open_cpu_steps(dtype)
        if steps is not None:
            assert steps.packs(torch.zeros(4, 3, dtype=dtype)) == (dtype == torch.float32)
