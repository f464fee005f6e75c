"""C that is compiled for this very machine when it is first wanted, and kept: a shared library, or None.

Nobody has to have a compiler: without one, or where it fails, the caller goes on with torch. What is compiled is one
file of ours, by `cc` as a child process, for the instructions of this processor; the library's name says what it was
made from, so another source, compiler or processor makes another one. The folder is the user's own and nobody else may
write there, since what lies in it is run.

OpenMP's threads are torch's: the library is linked with no runtime of its own and finds the one that torch has loaded,
so both take turns with the same threads.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

COMPILERS: Final = ("gcc", "cc", "clang")
COMPILE_SECONDS: Final = 60.0  # 2 to 4 on an idle core
FLAGS: Final = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wl,-z,now")
OPENMP: Final = ("libgomp", "libiomp", "libomp")


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The library made from one C file. None: there is no compiler here, or it can't make it; a log line says why."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        logger.info("no C compiler (%s): CPU steps stay with torch", ", ".join(COMPILERS))
        return None
    runtime = _find_openmp()
    if runtime is not None:
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    try:
        return _load_or_make(source, compiler, [*FLAGS, *_flags_here(), *(["-fopenmp"] if runtime else [])])
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.warning("%s could not be compiled by %s, torch does its work: %s", source.name, compiler, said[-500:])
        return None


def _load_or_make(source: Path, compiler: str, flags: list[str]) -> ctypes.CDLL:
    made_of = [source.read_bytes(), compiler, *flags, platform.machine(), _processor(), os.stat(compiler).st_mtime_ns]
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]
    folder = _own_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="argosy-native-") as once:
            return _make(source, compiler, flags, Path(once) / f"{name}.so")
    library = folder / f"{source.stem}-{name}.so"
    if library.is_file():
        with contextlib.suppress(OSError):  # cut off, or of another machine: made again
            return ctypes.CDLL(str(library))
    return _make(source, compiler, flags, library)


def _make(source: Path, compiler: str, flags: list[str], library: Path) -> ctypes.CDLL:
    """Compile, put in place at once (others may be doing the same), load."""
    handle, made = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        objects = [flag for flag in flags if flag not in ("-shared", "-Wl,-z,now")]
        command = [compiler, *objects, "-c", str(source), "-o", f"{made}.o"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        # without -fopenmp, which would name a runtime of the compiler's beside torch's
        command = [compiler, "-shared", "-Wl,-z,now", f"{made}.o", "-o", made]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        loaded = ctypes.CDLL(made)
        os.replace(made, library)
        return loaded
    finally:
        for left in (made, f"{made}.o"):
            with contextlib.suppress(OSError):  # moved, or never made
                os.unlink(left)


def _flags_here() -> list[str]:
    """For this processor. The widest vectors must be asked for on those of AMD and Intel."""
    if platform.machine() in ("x86_64", "AMD64"):
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"]


def _processor() -> str:
    """What this processor is and can: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _find_openmp() -> str | None:
    """The OpenMP runtime that this process has loaded, as torch does."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    paths = [line.split(maxsplit=5)[-1] for line in lines if "/" in line]
    return next((path for path in paths if Path(path).name.startswith(OPENMP)), None)


def _own_folder() -> Path | None:
    """Where libraries are kept; None where this user has no folder that is his alone."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "argosy" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError:
        return None
    others_write = bool(about.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    return folder if about.st_uid == os.getuid() and not others_write and os.access(folder, os.W_OK) else None
