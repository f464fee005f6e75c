"""CPU or GPU, which dtype, how many free bytes: the only place that asks."""

from dataclasses import dataclass

import torch

from argosy.cluster.protocol.errors import ConfigError
from argosy.placement.plan import RankInfo

_READ_BYTES_PER_SECOND = 2e10
_FLOPS_PER_SECOND = 1e11
_WORTH_SHARING_SECONDS = 300e-6
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str, rank: RankInfo) -> torch.device:
    """The device of this rank. `wanted`: auto, cpu or cuda; `rank.gpu` is the index among the visible ones."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no CUDA device here; use device='cpu', or install a CUDA torch")
    index = rank.gpu or 0
    if index >= torch.cuda.device_count():
        raise ConfigError(f"rank {rank.global_rank} wants GPU {index}; torch sees {torch.cuda.device_count()}")
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
    """How many of this CPU rank's threads a step is worth: waking the others and waiting for them costs 10 to 50 us a
    product, more where other programs want the cores. Small steps run on one thread and leave the rest to the driver.
    """

    def __init__(self, most: int, num_products: int, num_weights: int, itemsize: int):
        """`num_weights` is over all products of a step; figures of one core of a Zen 4 beside busy neighbours."""
        self._most = most
        self._seconds_to_read = num_weights * itemsize / _READ_BYTES_PER_SECOND / num_products
        self._seconds_a_token = 2 * num_weights / _FLOPS_PER_SECOND / num_products

    def choose(self, num_tokens: int) -> None:
        """Set torch's threads for a step of so many tokens (0.2 us)."""
        seconds = max(self._seconds_to_read, num_tokens * self._seconds_a_token)
        torch.set_num_threads(self._most if seconds >= _WORTH_SHARING_SECONDS else 1)


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
