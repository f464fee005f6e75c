"""What a node is, as far as it can go wrong: gathered on the node itself in about a second, without torch and Ray.

Nothing here judges; `preflight_rules` compares the nodes. Whatever can't be read is left empty.
"""

import contextlib
import hashlib
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

import msgspec
import psutil

from argosy.placement.network import interface_of

PACKAGES: Final = ("argosy", "torch", "triton", "ray", "transformers", "tokenizers", "safetensors", "msgspec", "numpy")
NCCL_PACKAGES: Final = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
_VARIABLES: Final = ("NCCL_", "GLOO_", "CUDA_VISIBLE_DEVICES", "TORCH_NCCL_", "UCX_", "OMP_NUM_THREADS")
_SMI_SECONDS: Final = 8.0
_NAME_SECONDS: Final = 1.2
_GPU_COLUMNS: Final = (
    "index,uuid,name,memory.total,memory.used,driver_version,pcie.link.width.current,pcie.link.width.max,"
    "ecc.errors.uncorrected.volatile.total,compute_mode,mig.mode.current"
)


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One card, as its driver describes it. Numbers that the driver does not tell are -1."""

    index: int
    uuid: str
    name: str
    memory_mib: int
    used_mib: int
    driver: str
    pcie_width: int = -1
    pcie_width_max: int = -1
    ecc_errors: int = -1
    compute_mode: str = ""
    mig: str = ""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A model folder on one node: what is wrong with it, and marks by which nodes compare."""

    folder: str
    problem: str = ""  # one line; empty: sound
    num_bytes: int = 0  # of its weights
    marks: dict[str, str] = {}  # file -> a hash of its text, or of a weights file's size, header and samples


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One node."""

    address: str
    hostname: str
    python: str = ""
    system: str = ""
    packages: dict[str, str] = {}  # what is installed; a name that is missing is not installed
    code: str = ""  # a hash of our own sources
    gpus: tuple[GpuFacts, ...] = ()
    gpu_link: Literal["", "nvlink", "pcie"] = ""  # between all pairs of them; of unequal ones the slower; "": not known
    gpu_problem: str = ""  # why the driver did not answer, where there is one
    interface: str = ""  # that has `address`; empty: none
    interfaces: tuple[str, ...] = ()  # all there are
    mtu: int = 0
    speed_mbits: int = -1
    name_seconds: float = 0.0  # until the node knew its own name's address
    memory_bytes: int = 0
    free_memory_bytes: int = 0
    free_shm_bytes: int = 0
    temp_folder: str = ""
    free_temp_bytes: int = 0
    is_temp_writable: bool = True
    num_cpus: int = 0
    open_files: int = 0
    locked_memory: int = 0  # bytes that may be locked; -1: no limit
    infiniband: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    clock: float = 0.0
    model: ModelFacts | None = None


def gather_facts(address: str) -> NodeFacts:
    """Of this node, which others reach at `address`."""
    gpus, gpu_problem = read_gpus()
    gpus = visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    matrix = _topology_matrix() if len(gpus) > 1 else ""
    interface = interface_of(address)
    memory = psutil.virtual_memory()
    folder = os.environ.get("TMPDIR") or "/tmp"  # and not what `tempfile` would fall back to
    return NodeFacts(
        address=address,
        hostname=socket.gethostname(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=_packages(),
        code=hash_of_sources(),
        gpus=gpus,
        gpu_link=read_gpu_link(matrix, [gpu.index for gpu in gpus]),
        gpu_problem=gpu_problem,
        interface=interface,
        interfaces=tuple(sorted(name for _, name in socket.if_nameindex())),
        mtu=int(_read(f"/sys/class/net/{interface}/mtu") or 0) if interface else 0,
        speed_mbits=int(_read(f"/sys/class/net/{interface}/speed") or -1) if interface else -1,
        name_seconds=_seconds_for_own_name(),
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        free_shm_bytes=_free_bytes("/dev/shm"),
        temp_folder=folder,
        free_temp_bytes=_free_bytes(folder),
        is_temp_writable=_is_writable(folder),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        infiniband=tuple(sorted(os.listdir("/sys/class/infiniband"))) if Path("/sys/class/infiniband").is_dir() else (),
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        clock=time.time(),
    )


def read_gpus() -> tuple[tuple[GpuFacts, ...], str]:
    """The cards of this node, and why the driver did not answer where it should have."""
    query = ["nvidia-smi", f"--query-gpu={_GPU_COLUMNS}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi did not answer within {_SMI_SECONDS:g} s"
    except OSError:
        return (), ""  # no driver, no card
    if answer.returncode != 0:
        words = (answer.stdout + answer.stderr).strip().splitlines() or ["no message"]
        return (), f"nvidia-smi ended with {answer.returncode}: {words[0].strip()[:200]}"
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    width = len(_GPU_COLUMNS.split(","))
    return tuple(_gpu(row + [""] * (width - len(row))) for row in rows), ""


def visible_gpus(gpus: tuple[GpuFacts, ...], visible: str) -> tuple[GpuFacts, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves to programs; the others belong to somebody else. Empty: all."""
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if not names:
        return gpus
    return tuple(gpu for gpu in gpus if any(name == str(gpu.index) or gpu.uuid.startswith(name) for name in names))


def _topology_matrix() -> str:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # no such tool
        command = ["nvidia-smi", "topo", "-m"]
        return subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False).stdout
    return ""


def read_gpu_link(matrix: str, indexes: Sequence[int]) -> Literal["", "nvlink", "pcie"]:
    """What `nvidia-smi topo -m` says of the ways between these cards: NV18 is 18 NVLinks, all else goes over PCIe."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in matrix.splitlines()]
    ways = {int(row[0][3:]): row[1:] for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row}
    found = []
    for first in indexes:
        for second in (index for index in indexes if index != first):
            if first not in ways or len(ways[first]) <= second:
                return ""
            found.append(bool(re.fullmatch(r"NV\d+", ways[first][second])))
    return "" if not found else "nvlink" if all(found) else "pcie"


def hash_of_sources() -> str:
    """Equal where the same sources of ours are installed, whatever their version says."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for room in ("cluster", "kernels", "placement", "workers", "deploy"):
        for path in sorted((package / room).rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _gpu(row: list[str]) -> GpuFacts:
    return GpuFacts(
        index=_number(row[0]),
        uuid=row[1],
        name=row[2],
        memory_mib=_number(row[3]),
        used_mib=_number(row[4]),
        driver=row[5],
        pcie_width=_number(row[6]),
        pcie_width_max=_number(row[7]),
        ecc_errors=_number(row[8]),
        compute_mode=row[9],
        mig=row[10],
    )


def _number(text: str) -> int:
    return int(text) if text.isdigit() else -1


def _packages() -> dict[str, str]:
    found = {}
    for name in (*PACKAGES, *NCCL_PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):  # not installed: left out
            found[name] = metadata.version(name)
    return {name: version for name, version in found.items() if version}


def _seconds_for_own_name() -> float:
    """How long the resolver takes for the node's own name: gloo and torch ask it, and wait for dead servers."""
    words = [sys.executable, "-I", "-c", "import socket; socket.getaddrinfo(socket.gethostname(), None)"]
    began = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):  # the time is the answer
        subprocess.run(words, capture_output=True, timeout=_NAME_SECONDS, check=False)
    return round(time.monotonic() - began, 3)


def _free_bytes(folder: str) -> int:
    with contextlib.suppress(OSError):  # no such folder
        return shutil.disk_usage(folder).free
    return 0


def _is_writable(folder: str) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _read(path: str) -> str:
    with contextlib.suppress(OSError):  # no such file
        return Path(path).read_text().strip()
    return ""
