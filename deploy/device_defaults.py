"""How much a step may hold where nobody said so: what suits the card of this machine, found without torch.

A large card is fast enough to compute many requests at once and has room for their keys and values; on a small one, or
a CPU, each step would take too long. The driver's own machine is looked at; say it by flags where its ranks run on
other cards.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

from argosy.cluster.protocol.config import SchedulerConfig

_CARDS: Final = Path("/proc/driver/nvidia/gpus")


class StepSize(NamedTuple):
    """Most requests and most tokens in a step."""

    max_num_seqs: int
    max_num_batched_tokens: int


PLAIN: Final = StepSize(SchedulerConfig().max_num_seqs, SchedulerConfig().max_num_batched_tokens)
LARGE: Final = StepSize(1024, 8192)
MIDDLE: Final = StepSize(512, 4096)
_LARGE: Final = re.compile(r"\b(A100|A800|GH200|H20|H100|H200|H800|B100|B200|B300|GB200|GB300)\b")
_MIDDLE: Final = re.compile(r"\b(A40|A6000|L40|L40S|RTX 6000|RTX PRO 6000)\b")


def fill(known: Mapping[str, object], card: str | None = None) -> dict[str, object]:
    """Those settings with the step's size added where it was not given; `card` is the name of the GPU, if known."""
    names = ("max_num_seqs", "max_num_batched_tokens")
    if all(name in known for name in names):
        return dict(known)
    on_cpu = known.get("device") == "cpu"
    size = PLAIN if on_cpu else step_size(first_card() if card is None else card)
    seqs, tokens = known.get(names[0], size.max_num_seqs), known.get(names[1], size.max_num_batched_tokens)
    if isinstance(seqs, int) and isinstance(tokens, int) and seqs > tokens:  # the one that was given decides
        seqs, tokens = (seqs, seqs) if names[0] in known else (max(1, tokens), tokens)  # 0 is refused by its own name
    return {**known, names[0]: seqs, names[1]: tokens}


def step_size(card: str) -> StepSize:
    """For a card by its name; "" is none."""
    name = card.upper()
    return LARGE if _LARGE.search(name) else MIDDLE if _MIDDLE.search(name) else PLAIN


@lru_cache(maxsize=1)
def first_card() -> str:
    """Name of the first NVIDIA card that this process may use; "" without one."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return ""
    for file in sorted(_CARDS.glob("*/information")):  # at once, where asking the driver takes up to a second
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    if shutil.which("nvidia-smi") is None:
        return ""
    return next((line.split(",")[0] for line in read_gpus()), "")


def read_gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA card; empty where there is none or no driver."""
    return ask_driver("name,memory.total,driver_version")


def ask_driver(columns: str, *, units: bool = True) -> list[str]:
    """A line for each NVIDIA card with these columns of `nvidia-smi --help-query-gpu`; empty where nobody answers."""
    query = ["nvidia-smi", f"--query-gpu={columns}", f"--format=csv,noheader{'' if units else ',nounits'}"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []
