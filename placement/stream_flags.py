"""Flags in GPU memory that a stream sets and waits for by itself, without a kernel and without the host.

A kernel that waits for another GPU needs a multiprocessor, and a matrix product leaves none; these operations of the
CUDA driver need none. Two ways to use a flag. Either its values only count up, and a wait is over when it is at its
value or beyond; or it is up or down, and who has waited for it takes it down again (`meeting`): the same operations
each time, which a recorded graph can repeat.
"""

import ctypes
import logging
from collections.abc import Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, modulo 2^32
_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32, CU_STREAM_MEM_OP_WRITE_VALUE_32


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams: 48 bytes, whatever the operation."""

    _fields_ = (
        ("operation", ctypes.c_uint), ("address", ctypes.c_uint64), ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint), ("alias", ctypes.c_uint64), ("unused", ctypes.c_uint64),
    )  # fmt: skip


class StreamFlags:
    """The driver's operations, one or several in a call, and its copies between addresses."""

    def __init__(self) -> None:
        driver: Any = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2
        for call in (self._write, self._wait):
            call.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
            call.restype = ctypes.c_int
        self._batch = driver.cuStreamBatchMemOp_v2
        self._batch.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)
        self._batch.restype = ctypes.c_int
        self._copy = driver.cuMemcpyDtoDAsync_v2
        self._copy.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        self._copy.restype = ctypes.c_int

    def write(self, stream: "torch.cuda.Stream", address: int, value: int) -> None:
        """Once all before it in `stream` is done and visible to the other GPUs, the flag is `value`."""
        _check(self._write(stream.cuda_stream, address, value & 0xFFFFFFFF, 0))

    def wait(self, stream: "torch.cuda.Stream", address: int, value: int) -> None:
        """What follows in `stream` waits until the flag is at least `value`."""
        _check(self._wait(stream.cuda_stream, address, value & 0xFFFFFFFF, _AT_LEAST))

    def meeting(self, tell: Sequence[int], hear: Sequence[int]) -> Any:
        """For `meet`: put up the flags at `tell`, wait until those at `hear` are up, take these down again.

        Nobody may put up a flag that is up: who tells must have heard, by another flag, that the last was heard.
        """
        steps = [(_WRITE, address, 1) for address in tell] + [(_WAIT, address, 1) for address in hear]
        steps += [(_WRITE, address, 0) for address in hear]
        return (_Operation * len(steps))(
            *(_Operation(operation, address, value, _AT_LEAST, 0, 0) for operation, address, value in steps)
        )

    def meet(self, stream: "torch.cuda.Stream", meeting: Any) -> None:
        """In one call. Before that all that `stream` did is visible to the other GPUs."""
        _check(self._batch(stream.cuda_stream, len(meeting), ctypes.byref(meeting), 0))

    def copy(self, stream: "torch.cuda.Stream", target: int, source: int, num_bytes: int) -> None:
        """By a copy engine, between cards or on one."""
        _check(self._copy(target, source, num_bytes, stream.cuda_stream))

    def can_be_recorded(self, device: torch.device) -> bool:
        """Whether a graph repeats them: tried, and looked at."""
        words = torch.zeros(4, dtype=torch.int32, device=device)
        first, second, source, target = (words.data_ptr() + 4 * place for place in range(4))
        words[2] = 9
        meeting = self.meeting([first, second], [first])
        make_stream: Any = torch.cuda.Stream  # torch gives it no types
        stream, graph = make_stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.meet(stream, meeting)
                self.copy(stream, target, source, 4)
            for _ in range(2):
                words[1], words[3] = 0, 0
                graph.replay()
                if words.tolist() != [0, 1, 9, 9]:
                    return False
        except RuntimeError as error:
            logger.info("long steps over the group are not recorded: %s", error)
            return False
        return True


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver refused an operation on a flag in a stream: CUresult {status}")


def open_stream_flags(device: torch.device) -> StreamFlags | None:
    """The operations, or None where the driver has them not (tried on memory of this GPU)."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        flags, word = StreamFlags(), torch.zeros(1, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device)
        flags.write(stream, word.data_ptr(), 7)
        flags.wait(stream, word.data_ptr(), 7)
        return flags if int(word) == 7 else None
    except (OSError, AttributeError, RuntimeError) as error:
        logger.info("sums over the group are not overlapped with products: %s", error)
        return None
