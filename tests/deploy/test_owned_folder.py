"""Temporary folders go with their owners, also when those could not clear up."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from argosy.deploy.owned_folder import make_owned_folder

MAKE = "from argosy.deploy.owned_folder import make_owned_folder; print(make_owned_folder('kind-', 1000))"


def test_what_killed_owners_left_is_removed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of a living owner, of another kind, or of nobody known is not ours to remove."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    gone = subprocess.run([sys.executable, "-c", MAKE], env=environment, capture_output=True, text=True, check=True)
    abandoned = Path(gone.stdout.strip())
    assert abandoned.is_dir()
    (tmp_path / "kind-ofnobody").mkdir()
    other = Path(make_owned_folder("other-", 1000))
    assert abandoned.is_dir()
    mine = Path(make_owned_folder("kind-", 1000))
    second = Path(make_owned_folder("kind-", 1000))
    assert sorted(tmp_path.iterdir()) == sorted([mine, second, other, tmp_path / "kind-ofnobody"])
    assert mine.stat().st_mode & 0o777 == 0o700


def test_a_path_has_no_more_bytes_than_were_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets lie in it, and their paths are short; /tmp serves where TMPDIR is long."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = make_owned_folder("kind-of-test-", 40)
    assert Path(folder).parent == Path("/tmp")
    assert len(os.fsencode(folder)) <= 40
    Path(folder, "owner").unlink()
    Path(folder).rmdir()
