"""The chain of a layer's products for one token, each program of each rank a thread over arrays that stand for memory.

Triton's lower language has no interpreter, so its words are stood in for here: what is asked for lands at once or not
before it is waited for, words are written in any order, and programs run at any pace. That shows every index, which
place of the ring is used when, and who waits for which turn; not layouts, which only a card has.
"""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from argosy.kernels import layer_chain

HELPERS = [
    "_as_tiles", "_copy_tile", "_share", "_ask", "_each", "_multiply", "_now", "_trap_if_late",
    "_look", "_receive", "_chain_kernel", "tile_layout", "power_of_two", "count_tiles",
]  # fmt: skip
EPS, FIRST_TURN = 1e-5, 65533  # turns are kept in 16 bits: these go round


class Numbers:
    """A tensor of the language: an array with its operators."""

    def __init__(self, array: Any):
        self.array = np.asarray(array)

    def __bool__(self) -> bool:
        return bool(self.array)

    def to(self, dtype: Any, bitcast: bool = False) -> "Numbers":
        return Numbers(self.array.view(dtype) if bitcast else self.array.astype(dtype))

    def __getitem__(self, place: Any) -> "Numbers":
        return Numbers(self.array[place])


def _operator(name: str) -> Callable[[Numbers, Any], Any]:
    def apply(self: Numbers, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        found = getattr(self.array, name)(other.array if isinstance(other, Numbers) else other)
        return Numbers(found)

    return apply


for _name in [
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "or",
    "and",
    "xor",
    "lt",
    "gt",
    "ge",
    "ne",
]:
    setattr(Numbers, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Places in an array."""

    def __init__(self, memory: Any, places: Any = 0):
        self.memory, self.places = memory, places

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.memory, self.places + (other.array if isinstance(other, Numbers) else other))

    __radd__ = __add__

    def to(self, dtype: Any) -> "Pointer":
        return self

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.memory.dtype.type)


class Addresses:
    """Of the ranks' memory."""

    def __init__(self, memories: list[Any]):
        self.memories = memories

    def __add__(self, rank: int) -> Any:
        return SimpleNamespace(address=Pointer(self.memories[rank]))


class Shared:
    """A place in a program's own memory."""

    def __init__(self, array: Any):
        self.array, self.dtype = array, array.dtype.type

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> "Shared":
        return Shared(self.array.reshape(shape))

    reinterpret = _reinterpret

    def index(self, place: Any) -> "Shared":
        return Shared(self.array[int(place)])

    def load(self, layout: Any) -> Numbers:
        return Numbers(self.array.copy())

    def store(self, numbers: Numbers) -> None:
        self.array[...] = numbers.array


class Language(threading.local):
    """`gl` and the copies behind it, for the program that this thread is."""

    int16, int32, int64, float32 = np.int16, np.int32, np.int64, np.float32
    SliceLayout = BlockedLayout = SwizzledSharedLayout = staticmethod(lambda *_: None)
    pointer_type = staticmethod(lambda dtype: dtype)
    static_range = staticmethod(range)
    convert_layout = multiple_of = staticmethod(lambda numbers, _: numbers)
    minimum = staticmethod(lambda a, b: Numbers(np.minimum(a.array, b)))
    where = staticmethod(lambda which, a, b: Numbers(np.where(which.array, a.array, b)))
    max = staticmethod(lambda numbers, axis: Numbers(numbers.array.max(axis)))
    sum = staticmethod(lambda numbers, axis: Numbers(numbers.array.sum(axis)))
    reduce = staticmethod(lambda both, axis, _: tuple(Numbers(one.array.sum(axis)) for one in both))
    exp2 = staticmethod(lambda numbers: Numbers(np.exp2(numbers.array)))
    sqrt = staticmethod(lambda numbers: Numbers(np.sqrt(numbers.array)))
    arange = staticmethod(lambda begin, end, _: Numbers(np.arange(begin, end, dtype=np.int32)))

    def begin(self, program: int, lands_at_once: bool) -> None:
        self.program, self.lands_at_once = program, lands_at_once
        self.open: list[Callable[[], None]] = []
        self.asked: list[Any] = []  # places that the open group writes
        self.groups: list[list[Callable[[], None]]] = []

    def program_id(self, axis: int) -> int:
        return self.program

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        return Shared(np.full(shape, np.nan, dtype))

    def load(self, pointer: Any, mask: Any = None, other: float = 0, volatile: bool = False) -> Any:
        if hasattr(pointer, "address"):
            return pointer.address
        if volatile:
            time.sleep(0)  # others may write
        if mask is None:
            return pointer.memory[pointer.places]
        inside = np.broadcast_to(mask.array, np.shape(pointer.places))
        found = np.where(inside, pointer.memory[np.where(inside, pointer.places, 0)], other)
        return Numbers(found.astype(pointer.memory.dtype))

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        if mask is None:
            pointer.memory[pointer.places] = value
            return
        values = np.broadcast_to(value.array, np.shape(pointer.places))
        places = np.flatnonzero(np.broadcast_to(mask.array, np.shape(pointer.places)))
        for place in np.random.default_rng().permutation(places):
            pointer.memory[pointer.places[place]] = values[place]

    def copy_in(self, there: Shared, pointer: Pointer, mask: Numbers) -> None:
        inside, places = np.broadcast_arrays(mask.array, pointer.places)
        assert there.array.shape == inside.shape

        assert not any(np.shares_memory(there.array, other) for other in self.asked), "two tiles in one place"
        self.asked.append(there.array)

        def land() -> None:
            there.array[...] = np.where(inside, pointer.memory[np.where(inside, places, 0)], 0)

        self.open.append(land)

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open, self.asked = [], []
        if self.lands_at_once:
            self.wait_group(0, keep=True)

    def wait_group(self, allowed: int, keep: bool = False) -> None:
        for group in self.groups[: len(self.groups) - allowed]:
            for land in group:
                land()
            group.clear()
        if not keep:
            del self.groups[: max(0, len(self.groups) - allowed)]


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> Language:
    """The kernel's functions as Python's, over arrays."""
    spoken = Language()
    for name in HELPERS:
        monkeypatch.setattr(layer_chain, name, getattr(layer_chain, name).fn)
    monkeypatch.setattr(layer_chain, "_now", lambda turn: 0)
    monkeypatch.setattr(layer_chain, "_trap_if_late", lambda began: None)
    monkeypatch.setattr(layer_chain, "gl", spoken)
    monkeypatch.setattr(layer_chain, "async_copy", spoken)
    monkeypatch.setattr(layer_chain, "copy_in", spoken.copy_in)
    monkeypatch.setattr(layer_chain, "RENAMED", False)
    return spoken


def _norm(x: Any, weight: Any) -> Any:
    wide = x.astype(np.float32)
    return (wide / np.sqrt((wide * wide).mean() + EPS) * weight.astype(np.float32)).astype(np.float16)


def _times(weight: Any, x: Any) -> Any:
    return weight.astype(np.float32) @ x.astype(np.float32)


class Rank:
    """Its weights, a layer each, and its memory."""

    def __init__(self, seed: int, world: int, programs: int, widths: tuple[int, int, int, int], layers: int):
        random = np.random.default_rng(seed)
        seen, hidden, inner, qkv = widths

        def some(*shape: int) -> Any:
            return (random.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float16)

        self.layers = [
            {"o": some(hidden, seen), "gate_up": some(2 * inner, hidden), "down": some(hidden, inner),
             "qkv": some(qkv, hidden), "bias": some(qkv), "seen": 4 * some(seen)}
            for _ in range(layers)
        ]  # fmt: skip
        self.words, self.inner = (
            np.zeros(16 + layer_chain.inbox_words(world, hidden), np.int32),
            np.zeros(inner, np.int32),
        )
        self.counters = np.full(programs, FIRST_TURN, np.int32)
        self.residual = np.zeros(hidden, np.float16)
        self.outs = [np.full(qkv if at + 1 < layers else hidden, np.nan, np.float16) for at in range(layers)]


@pytest.mark.parametrize(
    ("world", "programs", "widths", "slot", "stages", "bias", "normed"),
    [
        (1, 2, (16, 32, 48, 32), 128, 3, False, True),
        (2, 3, (32, 64, 48, 80), 128, 4, True, True),  # widths that fill no tile, tiles that are not dealt evenly
        (2, 4, (16, 64, 112, 48), 256, 7, False, False),  # a ring that holds more than a product
        (4, 3, (16, 96, 48, 32), 256, 2, False, True),
        (1, 2, (16, 48, 32, 32), 1024, 2, False, True),  # more rows in a tile than outputs are left
    ],
)
def test_ranks_say_what_the_layers_mean(
    language: Language, world: int, programs: int, widths: tuple[int, int, int, int], slot: int, stages: int,
    bias: bool, normed: bool,
) -> None:  # fmt: skip
    """Three layers, the last one with nothing behind it; also when the count of turns begins anew."""
    seen, hidden, inner, qkv = widths
    random = np.random.default_rng(7)
    ranks = [Rank(seed, world, programs, widths, 3) for seed in range(world)]
    norms = random.standard_normal((3, 2, hidden)).astype(np.float16)
    residual = random.standard_normal(hidden).astype(np.float16)
    for rank in ranks:
        rank.residual[:] = residual
    problems: list[object] = []

    def run_rank(number: int) -> None:
        rank = ranks[number]
        for at, layer in enumerate(rank.layers):
            last = at == 2

            def run_program(program: int, layer: Any = layer, at: int = at, last: bool = last) -> None:
                try:
                    language.begin(program, lands_at_once=(program + at + number) % 2 == 0)
                    names = ("seen", "o", "gate_up", "down", "qkv", "bias")
                    layer_chain._chain_kernel(
                        *(Pointer(layer[name].ravel()) for name in names), Pointer(norms[at, 0]), Pointer(norms[at, 1]),
                        Pointer(rank.residual), Pointer(rank.outs[at]), Addresses([one.words for one in ranks]),
                        Pointer(rank.inner), Pointer(rank.counters), 16, number, EPS, EPS,
                        SEEN=seen, HIDDEN=hidden, INNER=inner, QKV=0 if last else qkv, BIAS=bias and not last,
                        NORM=normed, WORLD=world, SLOT=slot, STAGES=stages, PROGRAMS=programs,
                        CUT=1 + normed, WAIT=True, PDL=False, num_warps=4,
                    )  # fmt: skip
                except Exception as problem:  # shown where they are joined
                    problems.append(problem)

            _run_all(run_program, programs, problems)

    _run_all(run_rank, world, problems)
    assert problems == []
    for at in range(3):
        parts = [_times(r.layers[at]["o"], r.layers[at]["seen"]).astype(np.float16).astype(np.float32) for r in ranks]
        residual = (residual + sum(parts)).astype(np.float16)
        x, parts = _norm(residual, norms[at, 0]), []
        for rank in ranks:
            gate, up = np.split(_times(rank.layers[at]["gate_up"], x), 2)
            middle = (gate / (1 + np.exp(-gate)) * up).astype(np.float16)
            parts.append(_times(rank.layers[at]["down"], middle).astype(np.float16).astype(np.float32))
        residual = (residual + sum(parts)).astype(np.float16)
        x = _norm(residual, norms[at, 1])
        for rank in ranks:
            told = x.astype(np.float32) if at == 2 else _times(rank.layers[at]["qkv"], x)
            if bias and at < 2:
                told = told + rank.layers[at]["bias"]
            if at < 2 or normed:
                np.testing.assert_allclose(rank.outs[at].astype(np.float32), told, rtol=4e-3, atol=4e-3)
    for rank in ranks:
        np.testing.assert_allclose(rank.residual, residual, rtol=4e-3, atol=4e-3)
        np.testing.assert_array_equal(rank.residual, ranks[0].residual)  # bit by bit


def test_words_that_come_after_those_looked_at_first_are_waited_for(language: Language) -> None:
    """Some words are read again and again; when they have come, others of the same turn may still be under way."""
    size, senders, stamp = 160, 2, 5 << 16
    language.begin(0, lands_at_once=True)
    numbers = np.random.default_rng(3).standard_normal((senders, size)).astype(np.float16)
    came = numbers.view(np.uint16).astype(np.int32) | stamp
    words = np.zeros((senders, size), np.int32)
    arrive = [slice(size - 32, size), slice(40, size), slice(0, size)]  # the tiles dealt last, and not in order
    seen: list[int] = []
    load = language.load

    def load_late(pointer: Any, mask: Any = None, other: float = 0, volatile: bool = False) -> Any:
        if volatile:
            seen.append(np.size(pointer.places))
            turn = len(seen) // (3 * senders)
            if len(seen) % (3 * senders) == 0 and turn <= len(arrive):
                words[:, arrive[turn - 1]] = came[:, arrive[turn - 1]]
        return load(pointer, mask, other=other, volatile=volatile)

    language.load = load_late  # type: ignore[method-assign]  # a slow wire
    found = layer_chain._receive(
        Pointer(words.ravel()), language.arange(0, 256, None), stamp, size, senders, np.float16, 1, True
    )
    np.testing.assert_allclose(found.array[:size], numbers.astype(np.float32).sum(0), rtol=1e-6)
    assert seen[0] == 32
    assert seen[-1] == 256


def _run_all(run: Callable[[int], None], count: int, problems: list[object]) -> None:
    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        if thread.is_alive():
            problems.append("somebody waits for ever")
            return
