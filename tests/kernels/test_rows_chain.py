"""The chain of a layer's products for a few tokens, each program of each rank two threads over arrays: one fetches.

As for one token there is no interpreter, so the language's words are stood in for here; barriers are counted.
What stays on a card and is not there yet is all ones, in two places that launches use in turn: so launches follow each
other here with different numbers of tokens.
"""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_layer_chain import EPS, Addresses, Language, Numbers, Pointer, Rank, Shared, _run_all

from argosy.kernels import layer_chain, rows_chain

HELPERS = [
    "sums_layout", "tokens_layout", "ceil_of", "owned", "_as_tiles", "_fetch_product", "_fetch", "_multiply", "_look",
    "_own", "_look_at_squares", "_scale_of", "_read", "_as_numbers", "_receive", "_work", "_rows_kernel",
]  # fmt: skip
BORROWED = ["_share", "power_of_two"]


class Wide(Language):
    """What this kernel says beyond that of one token."""

    DotOperandLayout = NVMMADistributedLayout = NVMMASharedLayout = staticmethod(lambda *_: None)
    zeros = staticmethod(lambda shape, dtype, _: Numbers(np.zeros(shape, dtype)))
    reshape = staticmethod(lambda numbers, shape: Numbers(numbers.array.reshape(shape)))
    permute = staticmethod(lambda numbers, order: Numbers(numbers.array.transpose(order)))
    split = staticmethod(lambda numbers: (Numbers(numbers.array[..., 0]), Numbers(numbers.array[..., 1])))

    def load(self, pointer: Any, mask: Any = None, other: float = 0, volatile: bool = False) -> Any:
        if mask is None and not hasattr(pointer, "address") and np.ndim(pointer.places):
            return Numbers(pointer.memory[pointer.places])
        return super().load(pointer, mask, other, volatile)

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        return Shared(np.zeros(shape, dtype) if dtype is np.int64 else np.full(shape, np.nan, dtype))

    def warp_specialize(self, partitions: Any, warps: list[int], registers: list[int]) -> None:
        (work, of_work), (fetch, of_fetch) = partitions
        program = self.program

        def run() -> None:
            self.begin(program, lands_at_once=True)
            fetch(*of_fetch)

        fetches = threading.Thread(target=run, daemon=True)
        fetches.start()
        work(*of_work)
        fetches.join(20)
        assert not fetches.is_alive(), "weights that nobody wanted were asked for"


class Barriers:
    """`mbarrier`, and copies that complete one: each counts the phases that are over."""

    MBarrierLayout = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.missing: dict[int, int] = {}

    def init(self, barrier: Any, count: int) -> None:
        assert count == 1
        barrier.array[0] = 0

    def wait(self, barrier: Any, phase: int) -> None:
        began = time.monotonic()
        while int(barrier.array[0]) % 2 == int(phase):
            time.sleep(0)
            assert time.monotonic() - began < 20, "somebody waits for ever"

    def arrive(self, barrier: Any) -> None:
        barrier.array[0] += 1

    def expect(self, barrier: Any, num_bytes: int) -> None:
        self.missing[barrier.array.ctypes.data] = num_bytes

    def copy_in(self, source: Any, place: list[Any], barrier: Any, there: Any) -> None:
        """What lies outside becomes zeros, and counts."""
        found = np.zeros(there.array.shape, there.array.dtype)
        inside = source[tuple(slice(int(at), int(at) + size) for at, size in zip(place, found.shape, strict=True))]
        found[tuple(slice(0, size) for size in inside.shape)] = inside
        there.array[...] = found
        key = barrier.array.ctypes.data
        self.missing[key] -= found.nbytes
        if self.missing[key] == 0:
            barrier.array[0] += 1


def _times(rows: Any, tokens: Any, acc: Any) -> Numbers:
    assert not np.isnan(tokens.array).any()
    return Numbers(
        acc.array + np.einsum("pri,pit->prt", rows.array.astype(np.float32), tokens.array.astype(np.float32))
    )


def _larger(a: Any, b: Any) -> Numbers:
    a, b = np.broadcast_arrays(a.array, b.array)
    return Numbers(np.maximum(a.view(np.uint16), b.view(np.uint16)).view(np.int16))


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> Wide:
    """The kernel's functions as Python's, over arrays."""
    spoken = Wide()
    for name in HELPERS:
        monkeypatch.setattr(rows_chain, name, getattr(rows_chain, name).fn)
    for name in BORROWED:
        monkeypatch.setattr(rows_chain, name, getattr(layer_chain, name).fn)
    for room in (rows_chain, layer_chain):
        monkeypatch.setattr(room, "gl", spoken)
    barriers = Barriers()
    monkeypatch.setattr(rows_chain, "mbarrier", barriers)
    monkeypatch.setattr(rows_chain, "copy_in", barriers.copy_in)
    monkeypatch.setattr(rows_chain, "RENAMED", False)
    monkeypatch.setattr(rows_chain, "COLUMNS", 16)
    monkeypatch.setattr(rows_chain, "mma_v2", _times)
    monkeypatch.setattr(rows_chain, "_larger", _larger)
    monkeypatch.setattr(rows_chain, "_now", lambda turn: 0)
    monkeypatch.setattr(rows_chain, "_trap_if_late", lambda began: None)
    monkeypatch.setattr(rows_chain, "ROWS", 16)
    return spoken


def _norm(x: Any, weight: Any) -> tuple[Any, Any]:
    """(times the weight, in 16 bits; what the product is multiplied by)."""
    wide = x.astype(np.float32)
    scale = 1 / np.sqrt((wide * wide).mean(1, keepdims=True) + EPS)
    return (wide * weight.astype(np.float32)).astype(np.float16).astype(np.float32), scale


@pytest.mark.parametrize(
    ("world", "programs", "widths", "warps", "blocks", "stages", "halves", "bias", "counts"),
    [
        (1, 2, (32, 64, 48, 32), 2, 2, 3, 2, False, (8, 8, 8)),
        (2, 3, (64, 96, 80, 48), 2, 2, 4, 1, True, (3, 8, 1)),  # parts that are not filled, tiles not dealt evenly
        (2, 4, (32, 64, 96, 48), 2, 4, 7, 2, False, (1, 2, 7)),  # a ring that holds more than a product
        (4, 3, (32, 96, 48, 32), 4, 4, 2, 1, False, (5, 5, 2)),
    ],
)
def test_ranks_say_what_the_layers_mean(
    language: Wide, world: int, programs: int, widths: tuple[int, int, int, int], warps: int, blocks: int, stages: int,
    halves: int, bias: bool, counts: tuple[int, ...],
) -> None:  # fmt: skip
    """Three launches of different numbers of tokens, the last one with nothing behind it, across the end of turns."""
    seen, hidden, inner, qkv = widths
    random = np.random.default_rng(7)
    ranks = [Rank(seed, world, programs, widths, 3) for seed in range(world)]
    norms = (1 + random.standard_normal((3, 2, hidden)) / 4).astype(np.float16)
    starts = [random.standard_normal((count, hidden)).astype(np.float16) for count in counts]
    for number, rank in enumerate(ranks):
        own = np.random.default_rng(100 + number)
        rank.words = np.zeros(16 + rows_chain.inbox_words(world, hidden), np.int32)
        rank.boxes = np.full(4 * rows_chain.box_words(hidden, inner) + 4096, -1, np.int16)
        rank.residuals = [start.copy() for start in starts]
        rank.seens = [(2 * own.standard_normal((count, seen))).astype(np.float16) for count in counts]
        rank.outs = [np.full((count, qkv), np.nan, np.float16) for count in counts]
    problems: list[object] = []

    def run_rank(number: int) -> None:
        rank = ranks[number]
        for at, layer in enumerate(rank.layers):
            last = at == 2

            def run_program(program: int, layer: Any = layer, at: int = at, last: bool = last) -> None:
                try:
                    language.begin(program, lands_at_once=(program + at + number) % 2 == 0)
                    gate_up = layer["gate_up"].reshape(2, inner, hidden)
                    rows_chain._rows_kernel(
                        Pointer(rank.seens[at].ravel()), layer["o"], gate_up, layer["down"], layer["qkv"],
                        Pointer(layer["bias"]), Pointer(norms[at, 0]), Pointer(norms[at, 1]),
                        Pointer(rank.residuals[at].reshape(-1)), Pointer(rank.outs[at].reshape(-1)),
                        Addresses([one.words for one in ranks]), Pointer(rank.boxes), Pointer(rank.counters), 16,
                        number, counts[at], EPS, EPS,
                        SEEN=seen, HIDDEN=hidden, INNER=inner, QKV=0 if last else qkv, BIAS=bias and not last,
                        WORLD=world, HALVES=halves, BLOCKS=blocks, STAGES=stages, PROGRAMS=programs, WORDS=8,
                        WAIT=True, PDL=False, num_warps=warps,
                    )  # fmt: skip
                except Exception as problem:
                    problems.append(problem)
                    raise

            _run_all(run_program, programs, problems)

    _run_all(run_rank, world, problems)
    assert problems == []
    for at, residual in enumerate(starts):

        def of(weight: Any, x: Any) -> Any:
            return (x.astype(np.float32) @ weight.astype(np.float32).T).astype(np.float32)

        parts = [of(r.layers[at]["o"], r.seens[at]).astype(np.float16).astype(np.float32) for r in ranks]
        after = (residual + sum(parts)).astype(np.float16)
        x, scale = _norm(after, norms[at, 0])
        parts = []
        for rank in ranks:
            gate, up = np.split(of(rank.layers[at]["gate_up"], x) * scale, 2, axis=1)
            middle = (gate / (1 + np.exp(-gate)) * up).astype(np.float16)
            pieces = zip(np.split(rank.layers[at]["down"], halves, 1), np.split(middle, halves, 1), strict=True)
            parts += [of(weight, some).astype(np.float16).astype(np.float32) for weight, some in pieces]
        after = (after + sum(parts)).astype(np.float16)
        x, scale = _norm(after, norms[at, 1])
        for rank in ranks:
            np.testing.assert_allclose(rank.residuals[at], after, rtol=4e-3, atol=4e-3)
            np.testing.assert_array_equal(rank.residuals[at], ranks[0].residuals[at])  # bit by bit
            if at < 2:
                told = of(rank.layers[at]["qkv"], x) * scale
                told = told + rank.layers[at]["bias"] if bias else told
                np.testing.assert_allclose(rank.outs[at].astype(np.float32), told, rtol=6e-3, atol=6e-3)
