"""CPU or GPU, which dtype, how many free bytes: the only place that asks."""

import psutil
import torch

from argosy.cluster.protocol.errors import ConfigError
from argosy.placement.plan import RankInfo

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


def measure_free_bytes(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def measure_total_bytes(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def describe_device(device: torch.device) -> str:
    """What people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
