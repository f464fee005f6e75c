"""What stands in for a card where a launch is tried without one: a walk over its programs, tensors with a place."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


class Walked(ABC):
    """In place of a kernel: does what each program of a launch is told to, by the kernel's own rules."""

    def __init__(self) -> None:
        self.launches: list[SimpleNamespace] = []  # what each was given by name, and how many programs it had

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            self.launches.append(SimpleNamespace(programs=grid[0], **named))
            self.walk(grid[0], values, self.launches[-1])

        return launch

    @abstractmethod
    def walk(self, programs: int, values: tuple[Any, ...], named: Any) -> None:
        """Check what a launch of so many programs was given by place and by name, and write what it would."""


class OnCard:
    """A tensor of which only shape and place are asked."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, *shape: int, step: int = 0, at: int = 256):
        self.shape, self._step, self._at = shape, step or shape[1], at

    def stride(self, axis: int) -> int:
        return self._step if axis == 0 else 1

    def data_ptr(self) -> int:
        return self._at
