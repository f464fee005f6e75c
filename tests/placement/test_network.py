"""The interface that leads to the others is found without anybody naming it."""

import pytest

psutil = pytest.importorskip("psutil")

from argosy.placement.network import choose_interface, interface_of, own_address_towards  # noqa: E402  # needs psutil


def test_loopback_leads_to_loopback() -> None:
    """Ranks of one machine need no other network, and none may be asked for."""
    environment: dict[str, str] = {}
    name = choose_interface("127.0.0.1", environment)
    assert "127.0.0.1" in {entry.address for entry in psutil.net_if_addrs()[name]}
    assert environment == {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def test_what_the_operator_set_stands() -> None:
    """Whoever names an interface knows why."""
    environment = {"GLOO_SOCKET_IFNAME": "ib0"}
    choose_interface("127.0.0.1", environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_host_that_no_way_leads_to_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process groups' own deadline then says who could not be reached."""

    def no_way(host: str) -> str:
        raise OSError("no route")

    monkeypatch.setattr("argosy.placement.network.own_address_towards", no_way)
    environment: dict[str, str] = {}
    assert choose_interface("203.0.113.9", environment) == ""
    assert environment == {}


def test_an_address_of_nobody_has_no_interface() -> None:
    """203.0.113.0/24 is for documentation."""
    assert interface_of("203.0.113.9") == ""
    assert own_address_towards("127.0.0.1") == "127.0.0.1"
