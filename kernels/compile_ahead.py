"""Kernels compiled side by side before anybody waits for one, and launches that refuse to load one.

Triton compiles a kernel when it is first launched, one after the other: 67 of an 8B model took 45 s of the first start
on a host whose cores had time for several. So a rank goes through its launches once without launching, which says what
they are, and threads compile them; the compiler proper holds no lock of Python's.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import AsyncCompileMode, knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MOST_THREADS = 16  # reading kernels is Python's and is done by one at a time: more threads had nothing to do
_EMPTY = {
    torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like, torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}  # fmt: skip


class NotLoaded(Exception):
    """A launch needs a kernel that is not on the device yet."""


def cache_folder() -> Path:
    """Where Triton keeps what it compiled."""
    return Path(knobs.cache.dir)


@contextmanager
def refusing_to_load() -> Iterator[None]:
    """While this is open a launch whose kernel is not on the device raises `NotLoaded`, and is not queued."""

    def refuse(*about: object) -> None:
        raise NotLoaded

    knobs.runtime.kernel_load_start_hook.add(refuse)
    try:
        yield
    finally:
        knobs.runtime.kernel_load_start_hook.remove(refuse)


@contextmanager
def compiling_ahead(num_threads: int) -> Iterator[None]:
    """While this is open launches launch nothing: each kind of them is compiled in one of so many threads.

    Ends when all are compiled. What does not compile says so when it is launched in earnest. New tensors hold zeros
    meanwhile: nothing writes what kernels would have left there, and whatever else was there is no index to go by.
    """
    kinds, known = _Kinds(), set[object]()
    run: Callable[..., Any] = JITFunction.run

    def rehearse(kernel: Any, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
        kind = kinds.of(kernel, args, options)
        if kind not in known:
            known.add(kind)
            run(kernel, *args, grid=grid, warmup=True, **options)

    threads = _Compilers(num_threads, thread_name_prefix="compile-kernels")
    with threads, AsyncCompileMode(threads, ignore_errors=True), _Zeros():
        JITFunction.run = rehearse
        try:
            yield
        finally:
            JITFunction.run = run


class _Compilers(ThreadPoolExecutor):
    """Threads that compile a kernel and what launches it: with Triton 3.6 that is C, for each list of arguments."""

    def submit(self, compiling: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As any executor."""

        def compile_both() -> Any:
            kernel = compiling(*args, **kwargs)
            driver.active.launcher_cls(kernel.src, kernel.metadata)
            return kernel

        return super().submit(compile_both)


class _Kinds:
    """Launches of equal kinds need one compiled kernel; a few of other kinds may need the same. Much quicker than
    Triton's own key, which a rehearsal would ask for 26,000 times."""

    def __init__(self) -> None:
        self._constants: dict[int, tuple[list[str], frozenset[str]]] = {}  # names of arguments, and of those fixed

    def of(self, kernel: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> object:
        """What tells this launch from others of the kernel. Options of the launch itself are fixed, too."""
        if (found := self._constants.get(id(kernel))) is None:
            fixed = frozenset(param.name for param in kernel.params if param.is_constexpr)
            found = self._constants[id(kernel)] = (list(kernel.arg_names), fixed)
        names, fixed = found
        by_place = tuple(_kind(value, names[place] in fixed) for place, value in enumerate(args))
        by_name = tuple((name, _kind(value, name in fixed or name not in names)) for name, value in options.items())
        return id(kernel), by_place, by_name


def _kind(value: Any, is_constant: bool) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, tuple):
        return tuple(_kind(each, is_constant) for each in value)
    if hasattr(value, "block_shape"):  # a descriptor of the copy engine's
        return type(value), value.base.dtype, tuple(value.block_shape), str(value.layout)
    if is_constant:
        return type(value), value if isinstance(value, Hashable) else repr(value)
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return type(value)


class _Zeros(TorchDispatchMode):
    """New tensors are zeroed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in _EMPTY:
            made.zero_()
        return made
