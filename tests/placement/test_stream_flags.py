"""What a stream is told of flags, without a driver: the operations of a meeting, as the driver reads them."""

import ctypes

import pytest

pytest.importorskip("torch")
from argosy.placement.stream_flags import StreamFlags

WAIT, WRITE = 1, 2  # as the driver counts them


def test_a_meeting_tells_all_then_hears_all_and_leaves_its_flags_down() -> None:
    """In this order, or a peer's next flag would be taken down before it was heard; each operation has 48 bytes."""
    meeting = object.__new__(StreamFlags).meeting([0x7F00_0000_0010, 0x7F00_0000_0020], [0x10, 0x14])
    steps = [(step.operation, step.address, step.value) for step in meeting]
    tell = [(WRITE, 0x7F00_0000_0010, 1), (WRITE, 0x7F00_0000_0020, 1)]
    assert steps == [*tell, (WAIT, 0x10, 1), (WAIT, 0x14, 1), (WRITE, 0x10, 0), (WRITE, 0x14, 0)]
    assert ctypes.sizeof(meeting) == 48 * len(steps)
    words = (ctypes.c_uint64 * (6 * len(steps))).from_buffer(meeting)
    assert list(words[:6]) == [WRITE, 0x7F00_0000_0010, 1, 0, 0, 0]  # write at once; no alias
    assert list(words[12:18]) == [WAIT, 0x10, 1, 0, 0, 0]  # at least
