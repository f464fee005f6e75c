"""CPU or GPU, which dtype, how many free bytes: the only place that asks."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from argosy.cluster.protocol.errors import ConfigError
from argosy.placement.plan import RankInfo

_READ_BYTES_PER_SECOND = 2e10
_FLOPS_PER_SECOND = 1e11
_WORTH_SHARING_SECONDS = 300e-6
# Steps until the other number of threads is tried, at first and at most, and how many steps a trial has.
FIRST_TRIAL, LONGEST_PAUSE, TRIAL_STEPS = 16, 512, 4
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str, rank: RankInfo) -> torch.device:
    """The device of this rank. `wanted`: auto, cpu or cuda; `rank.gpu` is the index among the visible ones."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no CUDA device here; use device='cpu', or install a CUDA torch")
    index = rank.gpu or 0
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {rank.global_rank} wants GPU {index}, and torch sees {torch.cuda.device_count()} here; use fewer "
            "ranks a node, or look at CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", index)


def choose_dtype(wanted: str, spec_dtype: str) -> torch.dtype:
    """The dtype to compute in; "auto" is what the checkpoint is stored in."""
    name = spec_dtype if wanted == "auto" else wanted
    if name not in TORCH_DTYPES:
        raise ConfigError(f"dtype={name!r}: must be one of {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[name]


def set_up_device(device: torch.device, num_threads: int | None = None) -> None:
    """Make `device` this process's own: current CUDA device, or the number of CPU threads."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif num_threads is not None:
        torch.set_num_threads(num_threads)


class ThreadChoice:
    """How many of this CPU rank's threads a step is worth: one or all.

    Waking the others and waiting for them costs 2 to 50 us a product, more where other programs want the cores, so what
    is better depends on the machine and on what else it does. The first guess is by arithmetic: small steps run on one
    thread and leave the rest to the driver. A rank that waits for no other then compares seconds a token of either way,
    for steps of a similar number of tokens, and goes on trying the other one now and then.
    """

    def __init__(
        self,
        most: int,
        num_products: int,
        num_weights: int,
        itemsize: int,
        *,
        learns: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """`num_weights` is over all products of a step; figures of one core of a Zen 4 beside busy neighbours."""
        self._most = most
        self._seconds_to_read = num_weights * itemsize / _READ_BYTES_PER_SECOND / num_products
        self._seconds_a_token = 2 * num_weights / _FLOPS_PER_SECOND / num_products
        self._trials: dict[int, _Trial] | None = {} if learns and most > 1 else None
        self._clock = clock
        self._running: tuple[_Trial, bool, int, float] | None = None

    def choose(self, num_tokens: int) -> None:
        """Set torch's threads for a step of so many tokens (1 us)."""
        seconds = max(self._seconds_to_read, num_tokens * self._seconds_a_token)
        shares = seconds >= _WORTH_SHARING_SECONDS
        if self._trials is not None:
            trial = self._trials.setdefault(num_tokens.bit_length(), _Trial(shares))
            shares = trial.next_way()
            self._running = trial, shares, num_tokens, self._clock()
        torch.set_num_threads(self._most if shares else 1)

    def finished(self) -> None:
        """That step is over."""
        if self._running is not None:
            trial, shared, num_tokens, began = self._running
            trial.add(shared, (self._clock() - began) / num_tokens)
            self._running = None


class _Trial:
    """Seconds a token of steps on one thread and on all, and which way the next step goes."""

    def __init__(self, shares: bool):
        self._shares = shares
        self._seconds: list[float | None] = [None, None]  # on one thread, on all
        self._left = FIRST_TRIAL
        self._pause = FIRST_TRIAL

    def next_way(self) -> bool:
        """Whether the next step is shared: the better way but for `TRIAL_STEPS` of the other after each pause."""
        self._left -= 1
        return self._shares if self._left >= TRIAL_STEPS else not self._shares

    def add(self, shared: bool, seconds: float) -> None:
        """What a step took. The first of a trial only wakes the threads, and is not counted."""
        if self._left != TRIAL_STEPS - 1:
            known = self._seconds[shared]
            self._seconds[shared] = seconds if known is None else known + 0.25 * (seconds - known)
        if self._left > 0:
            return
        one, together = self._seconds
        better = self._shares if one is None or together is None else together < one
        self._pause = FIRST_TRIAL if better != self._shares else min(2 * self._pause, LONGEST_PAUSE)
        self._shares, self._left = better, self._pause


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Bytes of a card as the driver and torch report them.

    `allocated` is what tensors have and `reserved` what torch took from the driver for them; `graphs` is the memory
    that recorded graphs keep to themselves and is in neither. `used` is everybody's, other programs included.
    """

    total: int
    used: int = 0
    allocated: int = 0
    reserved: int = 0
    graphs: int = 0

    @property
    def outside(self) -> int:
        """What is not torch's: contexts, NCCL, loaded code, what the driver keeps of graphs, other programs."""
        return max(0, self.used - self.reserved - self.graphs)


class DeviceMemory:
    """The meter of a card."""

    def __init__(self, device: torch.device):
        self.device = device

    def read(self) -> MemoryReading:
        """How it stands now, after all work that was launched."""
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        allocated = reserved = graphs = 0
        for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call, unused-ignore]  # torch's own
            if segment["device"] != self.device.index:
                continue
            if tuple(segment["segment_pool_id"]) == (0, 0):
                allocated += segment["allocated_size"]
                reserved += segment["total_size"]
            else:
                graphs += segment["total_size"]
        return MemoryReading(total=total, used=total - free, allocated=allocated, reserved=reserved, graphs=graphs)

    def release(self) -> None:
        """Give the card back what no tensor uses."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def start_peak(self) -> int:
        """Count from here; returns the bytes of tensors now."""
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """The most bytes of tensors since then."""
        return torch.cuda.max_memory_allocated(self.device)


def describe_device(device: torch.device) -> str:
    """What people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
