"""C of ours on somebody's machine: compiled once, kept where only he can write, and never in the way."""

import ctypes
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from argosy.kernels import native

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no C compiler here")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing remembered from other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.load.cache_clear()
    return tmp_path / "cache" / "argosy" / "native"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A function that says 7."""
    path = tmp_path / "seven.c"
    path.write_text("int say(void) { return 7; }\n")
    return path


def _said(library: ctypes.CDLL | None) -> int:
    assert library is not None
    answer: int = library.say()
    return answer


@needs_compiler
def test_what_was_compiled_once_is_found_again(source: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process runs no compiler."""
    assert _said(native.load(source)) == 7
    assert [path.name.startswith("seven-") for path in own_cache.iterdir()] == [True]
    assert own_cache.stat().st_mode & 0o077 == 0

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("compiled again")

    native.load.cache_clear()
    monkeypatch.setattr(subprocess, "run", refuse)
    assert _said(native.load(source)) == 7


@needs_compiler
def test_another_source_is_another_library(source: Path, own_cache: Path) -> None:
    """An upgrade must not run the code of the version before."""
    native.load(source)
    native.load.cache_clear()
    source.write_text("int say(void) { return 8; }\n")
    assert _said(native.load(source)) == 8
    assert len(list(own_cache.iterdir())) == 2


def test_without_a_compiler_there_is_no_library(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has to have one; a line says what it costs him."""
    monkeypatch.setenv("PATH", "/nowhere")
    with caplog.at_level(logging.INFO):
        assert native.load(source) is None
    assert "no C compiler" in caplog.text


@needs_compiler
def test_what_does_not_compile_is_said_and_left(
    source: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With what the compiler said; nothing half made stays behind."""
    source.write_text("int say(void) { return nothing_of_that_name; }\n")
    assert native.load(source) is None
    assert "nothing_of_that_name" in caplog.text
    assert list(own_cache.iterdir()) == []


@needs_compiler
def test_a_library_that_was_cut_short_is_made_again(source: Path, own_cache: Path) -> None:
    """A full disk leaves such files."""
    native.load(source)
    (kept,) = own_cache.iterdir()
    kept.unlink()  # its memory is in use: a new file in its place
    kept.write_bytes(b"\x7fELF")
    native.load.cache_clear()
    assert _said(native.load(source)) == 7


def _group_may_write(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def _is_a_file(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("")


@needs_compiler
@pytest.mark.parametrize("spoil", [_group_may_write, _is_a_file])
def test_where_others_write_nothing_is_kept(source: Path, own_cache: Path, spoil: Callable[[Path], None]) -> None:
    """What lies there is run: it is compiled each time instead, and leaves nothing."""
    spoil(own_cache)
    assert _said(native.load(source)) == 7
    assert own_cache.is_file() or list(own_cache.iterdir()) == []
