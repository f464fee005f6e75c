"""Slices of safetensors files onto a GPU, as fast as the link: threads read pieces into pinned memory, copies follow.

Reading through the library's own mapping, one tensor at a time, gives 4 to 8 GB/s from the page cache; pieces read by
eight threads into buffers that the card copies from give 22 to 28. What the rank does not need of a tensor's first axis
is not read; a cut along other axes is made on the device.
"""

import math
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from argosy.workers.loading.checkpoint import TensorEntry

NUM_THREADS: Final = 8
PIECE_BYTES: Final = 16 * 2**20
NUM_BUFFERS: Final = 16
DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a tensor that is wanted: one slice an axis."""

    entry: TensorEntry
    source: tuple[slice, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut off; then the number of axes may differ, too."""
        return all(part == slice(None) for part in self.source)

    @property
    def rows(self) -> range:
        """Of the first axis; a number alone is one row."""
        shape = self.entry.shape
        if self.is_whole:
            return range(shape[0] if shape else 1)
        return range(shape[0])[self.source[0]]

    @property
    def byte_range(self) -> tuple[int, int]:
        """Where in the file the wanted rows begin, and how many bytes they are."""
        row_bytes = self.entry.num_bytes // max(self.entry.shape[0], 1) if self.entry.shape else self.entry.num_bytes
        return self.entry.offset + self.rows.start * row_bytes, len(self.rows) * row_bytes

    def cut(self, flat: Tensor) -> Tensor:
        """From the bytes of the wanted rows to the tensor."""
        shape = self.entry.shape
        typed = flat.view(DTYPES[self.entry.dtype])
        if self.is_whole:
            return typed.view(shape)
        return typed.view(len(self.rows), *shape[1:])[(slice(None), *self.source[1:])]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes on their way: from a place in a file to a place in a tensor's bytes on the device."""

    number: int  # of its slice
    path: Path
    offset: int
    num_bytes: int
    at: int


def read_slices(slices: Sequence[Slice], device: torch.device) -> Generator[Tensor, None, None]:
    """The slices in their order, each on `device` and only until the next is asked for. Raises `OSError`."""
    buffers = [
        torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(NUM_BUFFERS)
    ]
    copied: list[Any] = [None] * NUM_BUFFERS  # the event after which a buffer may be filled again
    files: dict[Path, int] = {}
    pieces = _pieces(slices)
    under_way: deque[tuple[_Piece, int, Future[None]]] = deque()
    num_sent = 0
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="read-weights") as threads:
        try:

            def send(piece: _Piece) -> None:
                nonlocal num_sent
                place = num_sent % NUM_BUFFERS
                num_sent += 1
                if piece.path not in files:
                    files[piece.path] = os.open(piece.path, os.O_RDONLY | os.O_CLOEXEC)
                work = threads.submit(_read, files[piece.path], piece, buffers[place], copied[place])
                under_way.append((piece, place, work))

            for piece in islice(pieces, NUM_BUFFERS):
                send(piece)
            for number, wanted in enumerate(slices):
                flat = torch.empty(wanted.byte_range[1], dtype=torch.uint8, device=device)
                while under_way and under_way[0][0].number == number:
                    piece, place, work = under_way.popleft()
                    work.result()
                    flat[piece.at : piece.at + piece.num_bytes].copy_(
                        buffers[place][: piece.num_bytes], non_blocking=True
                    )
                    if device.type == "cuda":
                        copied[place] = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]  # torch's own
                        copied[place].record()
                    if (following := next(pieces, None)) is not None:
                        send(following)
                yield wanted.cut(flat)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the buffers are ours until the last copy has ended
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
            for descriptor in files.values():
                os.close(descriptor)


def _pieces(slices: Sequence[Slice]) -> Iterator[_Piece]:
    for number, wanted in enumerate(slices):
        offset, num_bytes = wanted.byte_range
        for part in range(math.ceil(num_bytes / PIECE_BYTES)):
            at = part * PIECE_BYTES
            yield _Piece(number, wanted.entry.file, offset + at, min(PIECE_BYTES, num_bytes - at), at)


def _read(descriptor: int, piece: _Piece, buffer: Tensor, copied: Any) -> None:
    """On one of the threads: wait until the buffer is free, then fill it."""
    if copied is not None:
        copied.synchronize()
    array: Any = buffer.numpy()
    view = memoryview(array)[: piece.num_bytes]
    done = 0
    while done < piece.num_bytes:
        got = os.preadv(descriptor, [view[done:]], piece.offset + done)
        if got == 0:
            raise OSError(f"{piece.path.name} ended in the middle of a tensor")
        done += got
