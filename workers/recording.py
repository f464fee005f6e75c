"""Recording what a function queues on a GPU as a CUDA graph, and keeping results that all recordings may write to."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Graph(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Queue all of it again."""


class Recorder:
    """Records on one stream into one pool of memory: of all that was recorded only one runs at a time."""

    def __init__(self, device: torch.device, *, alone: bool = False):
        """`alone`: no other rank takes part in what is recorded."""
        self._device, self._alone = device, alone
        make_stream: Any = torch.cuda.Stream  # torch gives it no types
        self._stream = make_stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While this is open, work is queued on the stream that is recorded, and nothing is collected."""
        torch.cuda.synchronize(self._device)
        gc.collect()
        gc.disable()  # a collection in mid-record would free device memory, which is not allowed then
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            gc.enable()
        torch.cuda.synchronize(self._device)

    def record(self, run: Callable[[], Made]) -> tuple[Graph, Made]:
        """What `run` queues, and what it returned: tensors that each replay writes to.

        Nothing may be compiled or loaded meanwhile, so what is not on the device yet is run once before. Where others
        take part, always: they would wait for one that has loaded what they have not.
        """
        if self._alone:
            from argosy.kernels.compile_ahead import NotLoaded, refusing_to_load  # Triton's: only where a card is

            with suppress(NotLoaded), refusing_to_load():  # half of a recording, which is dropped
                return self._capture(run)
        run()
        self._stream.synchronize()
        return self._capture(run)

    def _capture(self, run: Callable[[], Made]) -> tuple[Graph, Made]:
        # thread_local: NCCL's own thread looks at events meanwhile, which a global record would take for an error
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            made = run()
        return graph, made


class Rehearsal:
    """As a `Recorder` that records nothing: what would be recorded is run once, to see what it needs."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Nothing has to be kept away."""
        yield

    def record(self, run: Callable[[], Made]) -> tuple["Rehearsal", Made]:
        """Run it."""
        return self, run()

    def replay(self) -> None:
        """There is nothing to queue again."""


class _CudaMemory:
    """A tensor's memory without the tensor, as CUDA libraries hand it to each other."""

    def __init__(self, tensor: Tensor):
        self.__cuda_array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "typestr": f"<i{tensor.dtype.itemsize}",
            "version": 3,
        }


def borrow(tensor: Tensor) -> Tensor:
    """The same memory, which stays free for others to use: of all recorded steps only one runs at a time.

    Held as tensors, the logits of fifty recorded sizes would take 5 GB for a vocabulary of 128 K.
    """
    if not tensor.is_cuda or not tensor.is_contiguous():
        return tensor
    integers = torch.as_tensor(_CudaMemory(tensor), device=tensor.device)
    return integers.view(tensor.dtype) if integers.data_ptr() == tensor.data_ptr() else tensor
