"""`argosy doctor`: what this machine has, whether it is enough, and how to mend what is not.

Reads versions from package metadata and GPUs from `nvidia-smi`, so that it answers in a second and where torch or Ray
would not even import.
"""

import json
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import Final, Literal, NamedTuple

import psutil

from argosy.cluster.protocol.errors import ConfigError, ServingError
from argosy.cluster.protocol.ledger import HOST, TOTAL, describe_ledger, gib
from argosy.cluster.protocol.model_spec import read_model_spec
from argosy.deploy import settings
from argosy.deploy.device_defaults import read_gpus
from argosy.deploy.owned_folder import MOST_RAY_BYTES, RAY_PREFIX, parent_of

_GIB: Final = 1 << 30
_MOST_METRICS: Final = 1 << 22  # bytes of a server's figures
_PACKAGES: Final = {  # name: (least version, needed for)
    "torch": ((2, 11), "the models"),
    "ray": ((2, 55), "the cluster"),
    "transformers": ((4, 57), "tokenizers of older models"),
    "tokenizers": ((0, 21), "text"),
    "safetensors": ((0, 5), "weights"),
    "msgspec": ((0, 19), "messages"),
    "httpx": ((0, 27), "the client"),
    "fastapi": ((0, 100), "the HTTP door"),
}
_MIN_TRITON: Final = (3, 6)


class Finding(NamedTuple):
    """One line of the table."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def main(*, model: str | None, port: int, as_json: bool) -> int:
    """Print the table; 0 when nothing fails."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port={port}: must be from 0 to 65535")
    findings = list(examine(model, port))
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        print(table(findings))
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def examine(model: str | None, port: int) -> Iterator[Finding]:
    """All checks, in the order in which one would mend them."""
    yield _python()
    yield from (_package(name) for name in _PACKAGES)
    gpus = read_gpus()
    yield _gpus(gpus)
    if gpus:
        yield _triton()
    yield _cores()
    yield _memory()
    yield _shared_memory()
    yield _temporary_folder()
    yield _open_files()
    yield _port(port)
    yield from _rank_memory(port)
    yield _model(model)


def table(findings: list[Finding]) -> str:
    """The findings in columns, and a sentence at the end."""
    width = max(len(f.name) for f in findings)
    lines = [f"{f.state:<5} {f.name:<{width}}  {f.found}" + (f"\n      -> {f.fix}" if f.fix else "") for f in findings]
    num_failed = sum(f.state == "fail" for f in findings)
    num_warned = sum(f.state == "warn" for f in findings)
    port_is_taken = any(f.name.startswith("port ") and f.state != "ok" for f in findings)
    if num_failed:
        lines.append(f"\n{num_failed} to mend before 'argosy serve' can work.")
    else:
        warned = f" ({num_warned} warning{'s' if num_warned > 1 else ''})" if num_warned else ""
        lines.append(f"\nReady: 'argosy serve' should work here{', on another port' if port_is_taken else ''}{warned}.")
    return "\n".join(lines)


def is_port_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _python() -> Finding:
    found = sys.version.split()[0]
    if sys.version_info >= (3, 14):
        return Finding("Python", "warn", found, "not tried yet; 3.11 to 3.13 are supported")
    return Finding("Python", "ok", found)


def _package(name: str) -> Finding:
    least, purpose = _PACKAGES[name]
    found, fix = _version(name), f"pip install '{name}>={'.'.join(map(str, least))}'"
    if found is None:
        return Finding(name, "fail", f"not installed; needed for {purpose}", fix)
    return Finding(name, "ok", found) if _numbers(found) >= least else Finding(name, "fail", found, fix)


def _triton() -> Finding:
    found = _version("triton")
    if found is None or _numbers(found) < _MIN_TRITON:
        return Finding(
            "triton", "fail", found or "not installed; needed for the GPU kernels", "pip install 'triton>=3.6'"
        )
    return Finding("triton", "ok", found)


def _gpus(gpus: list[str]) -> Finding:
    if gpus:
        return Finding("GPUs", "ok", f"{len(gpus)}: {gpus[0]}" + (" and more" if len(gpus) > 1 else ""))
    return Finding(
        "GPUs",
        "warn",
        "none; models run on the CPU",
        "fine for small models; with an NVIDIA card, install its driver until nvidia-smi lists it",
    )


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if usable < 2:
        return Finding("CPU cores", "warn", str(usable), "2 or more: one for the model, one for Ray and the doors")
    return Finding("CPU cores", "ok", str(usable))


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{memory.available / _GIB:.1f} GiB free of {memory.total / _GIB:.1f}"
    if memory.available < 2 * _GIB:
        return Finding("memory", "warn", found, "Ray and a small model want 2 GiB; stop something or add memory")
    spare = (memory.available - 2 * _GIB) / _GIB
    return Finding("memory", "ok", f"{found}; up to {spare:.1f} of it for --swap-space and --cpu-offload-gb")


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("/dev/shm", "warn", "missing", "Ray falls back to the temporary folder, which is slower")
    usage = shutil.disk_usage("/dev/shm")
    found = f"{usage.free / _GIB:.2f} GiB free"
    if usage.free < 128 << 20:
        return Finding("/dev/shm", "fail", found, "Ray's object store needs 128 MiB; in Docker: --shm-size=1g")
    return Finding("/dev/shm", "ok", found)


def _temporary_folder() -> Finding:
    folder = parent_of(RAY_PREFIX, MOST_RAY_BYTES)
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {free / _GIB:.1f} GiB free"
    if folder != tempfile.gettempdir():
        found += f" (not {tempfile.gettempdir()}, where names of Ray's sockets would be too long)"
    if free < _GIB:
        return Finding("temporary folder", "warn", found, "Ray stops placing work on a full disk; free some space")
    return Finding("temporary folder", "ok", found)


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return Finding("open files", "warn", str(soft), "ulimit -n 65536: each connection is an open file")
    return Finding("open files", "ok", str(soft))


def _port(port: int) -> Finding:
    if is_port_free("127.0.0.1", port):
        return Finding(f"port {port}", "ok", "free")
    return Finding(f"port {port}", "warn", "taken", f"argosy serve --port {port + 1}, or stop what listens there")


def _rank_memory(port: int) -> Iterator[Finding]:
    """Where the bytes of each rank went, if a server of ours listens there and lets its figures be read."""
    key = os.environ.get("ARGOSY_API_KEY", "")
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {key}"} if key else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=3.0) as answer:
            text = answer.read(_MOST_METRICS).decode("utf-8", "replace")
    except (OSError, ValueError, HTTPException):
        return
    ledgers: dict[str, dict[str, int]] = {}
    for is_total, labels, value in re.findall(r"^argosy_rank_memory_(total_)?bytes\{(.*)\} (\S+)$", text, re.MULTILINE):
        found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        replica = f"replica {found['replica']} " if "replica" in found else ""
        where = HOST if found.get("place") == "host" else ""
        purpose = TOTAL if is_total else where + found.get("purpose", "?")
        ledgers.setdefault(f"{replica}rank {found.get('rank', '?')}", {})[purpose] = int(float(value))
    for name, ledger in ledgers.items():
        yield Finding(f"{name} memory", "ok", describe_ledger(ledger))


def _model(model: str | None) -> Finding:
    """What `argosy serve` would refuse: config, headers of the weights, tokenizer and chat template are read."""
    try:
        folder = Path(settings.choose_model(model)).expanduser()
        if not folder.is_dir():
            if not settings.is_hub_name(str(model)):
                return Finding("model", "fail", f"{model} is no folder here", "name a folder, or a model on the hub")
            return Finding("model", "warn", f"{model} is no folder here", "a hub name is fetched by 'argosy serve'")
        spec = read_model_spec(folder)
    except ServingError as error:
        return Finding("model", "fail", str(error), "name a folder with config.json, tokenizer.json and *.safetensors")
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not weights:
        return Finding("model", "fail", f"{folder} has no *.safetensors", "fetch the weights in safetensors form")
    if not any((folder / name).is_file() for name in settings.TOKENIZER_FILES):
        fix = "fetch tokenizer.json as well, or name the folder of a tokenizer with 'argosy serve --tokenizer'"
        return Finding("model", "fail", f"{folder} has no tokenizer", fix)
    if problem := _unreadable(folder):
        return Finding("model", "fail", problem, "fetch or copy that file again, or mend it")
    found = f"{folder.name}: {spec.architecture}, {spec.num_layers} layers, {gib(weights, 2)} of weights"
    if weights > psutil.virtual_memory().available and not read_gpus():
        return Finding("model", "warn", found, "the weights don't fit this machine's free memory")
    return Finding("model", "ok", found)


def _unreadable(folder: Path) -> str:
    """What is wrong with the weights' files or the tokenizer; nothing where what reads them is not installed."""
    try:
        from argosy.deploy.tokenizer import Tokenizer
        from argosy.workers.loading.checkpoint import Checkpoint  # torch
    except ImportError:
        return ""
    try:
        Checkpoint.open(folder)
        Tokenizer.load(str(folder))
    except ServingError as error:
        return str(error)
    return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
