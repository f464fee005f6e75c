"""Flags in GPU memory that a stream sets and waits for by itself, without a kernel and without the host.

A kernel that waits for another GPU needs a multiprocessor, and a matrix product leaves none; these operations of the
CUDA driver need none. Values only count up: a wait is over when the flag is at its value or beyond.
"""

import ctypes
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, modulo 2^32


class StreamFlags:
    """The driver's two operations."""

    def __init__(self) -> None:
        driver: Any = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2
        for call in (self._write, self._wait):
            call.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
            call.restype = ctypes.c_int

    def write(self, stream: "torch.cuda.Stream", address: int, value: int) -> None:
        """Once all before it in `stream` is done and visible to the other GPUs, the flag is `value`."""
        _check(self._write(stream.cuda_stream, address, value & 0xFFFFFFFF, 0))

    def wait(self, stream: "torch.cuda.Stream", address: int, value: int) -> None:
        """What follows in `stream` waits until the flag is at least `value`."""
        _check(self._wait(stream.cuda_stream, address, value & 0xFFFFFFFF, _AT_LEAST))


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
