"""Block sizes as data: measured per GPU in `tuned/<gpu>.json`, and what every launcher asks about its device.

Nothing is tuned at run time: a size search in a server is a slow first request and a different answer on every start.
A file maps kernel -> shape key -> sizes; `benchmarks/kernels/tune_kernels.py` writes it. A launcher that finds no
entry falls back to its own rule, so an unknown GPU or shape runs, only perhaps a little slower.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

MAX_COUNTERS = 1 << 14
HOPPER_SHARED_BYTES = 232448  # that a program may have of a multiprocessor of an H100 or H200
LEAST_SHARED_BYTES = 101376  # the same of an A10G, L4, L40S or of cards for desks
# Triton's lower language changes from version to version: what is written in it was compiled with each of these.
GLUON_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
TUNED = Path(__file__).parent / "tuned"
Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What launchers ask about a GPU."""

    slug: str  # the name in lower case with underscores, the stem of its file in tuned/
    num_sms: int
    overlaps: bool  # may start a kernel while its predecessor drains (programmatic dependent launch, capability 9.0)
    knows_ptx: bool = False
    shared_bytes: int = HOPPER_SHARED_BYTES  # on chip, that one program may have
    adds_bf16: bool = True  # in one instruction (capability 9.0)


@cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of a device; a CPU tensor only comes here under the Triton interpreter and is given a small GPU's facts."""
    if device.type != "cuda":
        return DeviceFacts(slug="interpreter", num_sms=8, overlaps=False)
    properties = torch.cuda.get_device_properties(device)
    is_nvidia = torch.version.hip is None
    slug = properties.name.lower().replace(" ", "_").replace("-", "_")
    is_new = is_nvidia and properties.major >= 9
    guess = HOPPER_SHARED_BYTES if is_new and properties.major < 12 else LEAST_SHARED_BYTES
    return DeviceFacts(
        slug, properties.multi_processor_count, overlaps=is_new, knows_ptx=is_nvidia, adds_bf16=is_new,
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", guess),
    )  # fmt: skip


@cache
def _tuned(slug: str) -> Mapping[str, Mapping[str, Sizes]]:
    path = TUNED / f"{slug}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def pick(kernel: str, key: str, device: torch.device) -> Sizes | None:
    """The sizes measured for this kernel and shape on this device, or None."""
    return _tuned(device_facts(device).slug).get(kernel, {}).get(key)


def knows(kernel: str, device: torch.device) -> bool:
    """Whether anything was measured for this kernel on this device."""
    return kernel in _tuned(device_facts(device).slug)


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch keywords for a kernel that calls `gdc_wait` first: `PDL` for its code, `launch_pdl` for the launch.

    Every kernel of the room waits for its predecessor before it touches memory another kernel may write, and lets its
    successor start early: measured 0.7 us instead of 1.1 a kernel in a graph.
    """
    return {"PDL": True, "launch_pdl": True} if device_facts(device).overlaps else {"PDL": False}


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


@cache
def counters(device: torch.device) -> torch.Tensor:
    """Zeros, int32 [MAX_COUNTERS], one buffer a device, for kernels whose last program joins what the others left.

    Every launch leaves them zero. Launches on one stream follow each other and may share it; launches that run at the
    same time on two streams may not. It must exist before a graph is captured: zeroed inside, it would be zeroed there.
    """
    if device.type == "cuda":
        assert not torch.cuda.is_current_stream_capturing(), "run this operation once before capturing it in a graph"
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
