"""The devices that the stages of a pipeline get on this machine, found without torch: for a split by their room."""

import os
from collections.abc import Sequence

import psutil

from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy.device_defaults import ask_driver, first_card
from argosy.placement.topology import Gpu

_MIB = 2**20


def local_devices(config: ServingConfig) -> list[Gpu]:
    """For each stage of a replica on this machine its device with the least free memory; empty: not known."""
    parallel = config.parallel
    num_ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if parallel.device == "cpu" or (parallel.device == "auto" and not first_card()):
        memory = psutil.virtual_memory().available
        return [Gpu(index=stage, model="CPU", memory_bytes=memory) for stage in range(parallel.pipeline_parallel_size)]
    cards = visible(read_cards(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if len(cards) < num_ranks:
        return []
    starts = range(0, num_ranks, parallel.tensor_parallel_size)  # rank i has card i
    groups = [cards[start : start + parallel.tensor_parallel_size] for start in starts]
    return [min(group, key=lambda gpu: gpu.usable_bytes) for group in groups]


def visible(cards: Sequence[Gpu], setting: str | None) -> list[Gpu]:
    """Those that a process sees with this value of CUDA_VISIBLE_DEVICES: indexes or UUIDs."""
    if setting is None:
        return list(cards)
    found = []
    for name in setting.split(","):
        word = name.strip()
        named = [gpu for gpu in cards if word and (word == str(gpu.index) or gpu.uuid.startswith(word))]
        if not named:
            break  # as the driver does: what comes after it is not seen
        found.append(named[0])
    return found


def read_cards() -> list[Gpu]:
    """The NVIDIA cards of this machine as the driver has them now; empty where it can't be asked."""
    cards = []
    for line in ask_driver("index,name,memory.total,memory.used,uuid", units=False):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 5 and all(fields[at].isdigit() for at in (0, 2, 3)):
            total, used = int(fields[2]) * _MIB, int(fields[3]) * _MIB
            cards.append(
                Gpu(index=int(fields[0]), model=fields[1], memory_bytes=total, free_bytes=total - used, uuid=fields[4])
            )
    return cards
