"""What one step computes, and the memory in which its parts go to the device. Letters as in `input_batch`."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from argosy.workers.attention.base import AttentionMetadata

IntArray = npt.NDArray[np.int64]
MAX_LAYOUTS = 256  # shapes of steady batches whose views are kept


@dataclass(slots=True)
class StepInputs:
    """What one step computes: tensors on the rank's device, and the host's knowledge of the same rows."""

    handles_R: IntArray
    num_tokens_R: IntArray | None  # None: one each
    end_R: IntArray  # tokens of the row that are computed after this step
    num_tokens: int
    token_ids_T: Tensor
    positions_T: Tensor
    metadata: AttentionMetadata
    sample_rows_S: IntArray | None  # places in the step's rows that sample; None: all of them
    hidden_rows_S: Tensor | None  # their last tokens' places among T; None: token i is row i
    handles_device_R: Tensor | None  # only where last tokens live on the device
    sample_handles_device_S: Tensor | None  # the same
    same_rows: bool  # the same handles as in the step before, all of them sampling

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return len(self.handles_R)

    @property
    def num_sampled(self) -> int:
        """Rows that sample a token."""
        return len(self.handles_R) if self.sample_rows_S is None else len(self.sample_rows_S)

    @property
    def sample_handles_S(self) -> IntArray:
        """Handles of the rows that sample."""
        return self.handles_R if self.sample_rows_S is None else self.handles_R[self.sample_rows_S]

    @property
    def sample_positions_S(self) -> IntArray:
        """For each row that samples, the index in the request's tokens of the one to be drawn."""
        return self.end_R if self.sample_rows_S is None else self.end_R[self.sample_rows_S]


class _Layout(NamedTuple):
    """Where the parts of a step with so many rows and blocks lie: host arrays and device tensors."""

    arrays: tuple[npt.NDArray[np.int64], ...]
    num_bytes: int
    tensors: list[Tensor]


class Staging:
    """Host memory for one step's inputs, packed, and its twin on the device. On a CPU both are the same memory."""

    def __init__(self, capacity_bytes: int, device: torch.device, twin: Tensor | None = None):
        """`twin`: the memory on the device, where several take turns to fill the same."""
        self.is_shared = device.type == "cpu"
        self._host = torch.zeros(capacity_bytes, dtype=torch.uint8, pin_memory=not self.is_shared)
        if self.is_shared:
            twin = self._host
        self._device = torch.zeros(capacity_bytes, dtype=torch.uint8, device=device) if twin is None else twin
        self._bytes = self._host.numpy()
        self._copied = None if self.is_shared else torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]  # torch's own
        self._used = 0
        self._parts: list[tuple[int, int, torch.dtype]] = []
        self._layouts: dict[tuple[int, int], _Layout] = {}
        self._tensors: list[Tensor] | None = None  # of the layout in use, if it is one of those kept

    def begin(self) -> None:
        """Start a new step; waits until the previous contents have left for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        self._used = 0
        self._parts.clear()
        self._tensors = None

    def take(self, count: int, is_long: bool) -> npt.NDArray[np.int64]:
        """Room for `count` integers (64 bit if `is_long`, else 32), to be filled before `send`."""
        start, size = self._used, count * (8 if is_long else 4)
        self._used = (start + size + 15) & ~15
        self._parts.append((start, start + size, torch.int64 if is_long else torch.int32))
        return self._bytes[start : start + size].view(np.int64 if is_long else np.int32)

    def layout(self, num_rows: int, num_blocks: int, num_groups: int = 1) -> tuple[npt.NDArray[np.int64], ...]:
        """The parts of a step with one token a row, as `InputBatch._stage_rows` takes them; kept for the next one."""
        found = self._layouts.get((num_rows, num_blocks))
        if found is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            tokens, positions = (self.take(num_rows, True) for _ in range(2))
            slots = self.take(num_groups * num_rows, True).reshape(num_groups, num_rows)
            lengths = self.take(num_rows, False)
            table = self.take(num_groups * num_rows * num_blocks, False).reshape(num_groups, num_rows, num_blocks)
            handles = self.take(0 if self.is_shared else num_rows, True)
            found = _Layout((tokens, positions, slots, lengths, table, handles), self._used, self._views())
            self._layouts[num_rows, num_blocks] = found
        self._used, self._tensors = found.num_bytes, found.tensors
        return found.arrays

    def send(self) -> list[Tensor]:
        """All parts on the device, in the order they were taken."""
        if self._copied is not None:
            self._device[: self._used].copy_(self._host[: self._used], non_blocking=True)
            self._copied.record()
        return self._tensors if self._tensors is not None else self._views()

    def _views(self) -> list[Tensor]:
        return [self._device[start:end].view(dtype) for start, end, dtype in self._parts]
