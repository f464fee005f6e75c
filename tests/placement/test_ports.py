"""Ports for those who listen later."""

import random
import socket
from pathlib import Path

import pytest

from argosy.placement import ports


def test_no_outgoing_connection_is_given_the_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank binds it seconds later, when a busy host has opened hundreds of connections."""
    file = tmp_path / "range"
    file.write_text("32768\t60999\n")
    monkeypatch.setattr(ports, "_RANGE_FILE", file)
    found = {ports.free_port("127.0.0.1") for _ in range(50)}
    assert all(12_768 <= port < 32_768 for port in found)
    assert len(found) > 40, "engines that start together take other ones"


def test_a_port_that_somebody_listens_on_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "range"
    file.write_text("32768 60999")
    monkeypatch.setattr(ports, "_RANGE_FILE", file)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        first = taken.getsockname()[1]
        free = ports.free_port("127.0.0.1")
        monkeypatch.setattr(random, "sample", lambda population, count: [first, free])
        assert ports.free_port("127.0.0.1") == free


@pytest.mark.parametrize("said", ["1024 65535", "", None])
def test_where_no_port_is_left_below_the_system_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    """Or where it does not say which it gives away."""
    file = tmp_path / "range"
    if said is not None:
        file.write_text(said)
    monkeypatch.setattr(ports, "_RANGE_FILE", file)
    assert ports.free_port("127.0.0.1") > 1023
