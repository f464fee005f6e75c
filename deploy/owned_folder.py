"""Folders among the temporary files that belong to one process and go with it, however it ends.

Whoever is killed with kill -9 can't clear up; the next one that makes a folder of the same kind does.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import psutil

RAY_PREFIX: Final = "argosy-ray-"
MOST_RAY_BYTES: Final = 38  # Ray adds 68: .../session_<date>_<pid>/sockets/plasma_store
_OWNER: Final = "owner"
_RANDOM_BYTES: Final = 8  # that tempfile puts behind the prefix


def make_owned_folder(prefix: str, most_bytes: int) -> str:
    """A new folder that only this user can read, in TMPDIR, or in /tmp where its path would exceed `most_bytes`.

    Removes the folders of that prefix whose owners have gone.
    """
    parent = parent_of(prefix, most_bytes)
    _remove_abandoned(parent, prefix)
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    Path(folder, _OWNER).write_text(_myself())
    return folder


def parent_of(prefix: str, most_bytes: int) -> str:
    """Where `make_owned_folder` makes it."""
    return short_temp_folder(most_bytes - len(f"/{prefix}") - _RANDOM_BYTES)


def short_temp_folder(most_bytes: int) -> str:
    """TMPDIR, or /tmp when that is too long: a socket's path has at most 107 bytes, the names below it included."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= most_bytes else "/tmp"


def _remove_abandoned(parent: str, prefix: str) -> None:
    for folder in Path(parent).glob(f"{prefix}*"):
        with contextlib.suppress(OSError, ValueError):  # removed by another meanwhile, or not ours
            if folder.lstat().st_uid != os.getuid():
                continue
            pid, created = (folder / _OWNER).read_text().split()
            with contextlib.suppress(psutil.NoSuchProcess):  # abandoned
                if psutil.Process(int(pid)).create_time() == float(created):
                    continue
            shutil.rmtree(folder, ignore_errors=True)


def _myself() -> str:
    """This process, so that a later one with the same number is not taken for it."""
    return f"{os.getpid()} {psutil.Process().create_time()}"
