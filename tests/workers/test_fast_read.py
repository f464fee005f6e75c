"""Pieces of files by many threads must come out as the tensors that were saved, however they are cut."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from argosy.workers.loading import fast_read
from argosy.workers.loading.checkpoint import Checkpoint
from argosy.workers.loading.fast_read import Slice, read_slices

CPU = torch.device("cpu")
ALL = slice(None)


@pytest.fixture
def tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Some of each kind, in one file; most are several pieces, and those are more than there are buffers."""
    monkeypatch.setattr(fast_read, "PIECE_BYTES", 1000)
    monkeypatch.setattr(fast_read, "NUM_BUFFERS", 3)
    torch.manual_seed(3)
    tensors = {
        "matrix": torch.randn(70, 33),
        "half": torch.randn(129, 8).to(torch.bfloat16),
        "packed": torch.randint(-9, 9, (40, 5), dtype=torch.int32),
        "eight": torch.randn(16, 16).to(torch.float8_e4m3fn),
        "bias": torch.randn(999),
        "scale": torch.tensor(2.5),
        "cube": torch.randn(4, 6, 50),
        "nothing": torch.zeros(0, 7),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def test_every_cut_of_every_kind(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Whole ones, rows from the middle, columns, both, a scalar and none."""
    entries = Checkpoint.open(tmp_path).entries
    cuts: list[tuple[str, tuple[slice, ...]]] = [
        ("matrix", (ALL, ALL)), ("matrix", (slice(10, 55), ALL)), ("matrix", (ALL, slice(3, 20))),
        ("matrix", (slice(60, 70), slice(0, 1))), ("half", (slice(64, 129), ALL)), ("packed", (slice(0, 40), ALL)),
        ("eight", (slice(8, 16), slice(4, 8))), ("bias", (slice(500, 999),)), ("scale", ()), ("nothing", (ALL, ALL)),
        ("bias", (ALL, ALL)), ("scale", (ALL,)),
        ("cube", (slice(1, 3), ALL, slice(25, 50))),
    ]  # fmt: skip
    found = [part.clone() for part in read_slices([Slice(entries[name], cut) for name, cut in cuts], CPU)]
    for (name, cut), part in zip(cuts, found, strict=True):
        want = tensors[name] if all(piece == ALL for piece in cut) else tensors[name][cut]
        assert part.dtype == want.dtype
        assert part.shape == want.shape
        assert torch.equal(part.view(torch.uint8) if part.ndim else part, want.view(torch.uint8) if want.ndim else want)


def test_only_the_rows_that_are_wanted_are_read(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """A rank's share of a matrix cut by rows is its share of the bytes."""
    entry = Checkpoint.open(tmp_path).entries["matrix"]
    offset, num_bytes = Slice(entry, (slice(10, 20), ALL)).byte_range
    assert (offset - entry.offset, num_bytes) == (10 * 33 * 4, 10 * 33 * 4)


def test_a_file_that_shrank_is_an_error_and_no_tensor(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Between the check of the header and the reading."""
    entries = Checkpoint.open(tmp_path).entries
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    wanted = [Slice(entry, (ALL,) * len(entry.shape)) for entry in entries.values()]
    with pytest.raises(OSError, match="ended in the middle"):
        list(read_slices(wanted, CPU))
