"""Links are tried as ranks would use them, with a deadline on everything and no answer for strangers."""

import socket

from argosy.placement.preflight_links import LinkServer, call_link, rounds_of_pairs

LOOPBACK = "127.0.0.1"


def test_a_link_is_measured_both_in_rate_and_in_latency() -> None:
    """Of one machine to itself: fast, and its clock agrees with itself."""
    server = LinkServer(LOOPBACK, "s" * 32)
    found = call_link("a", "b", LOOPBACK, server.port, "s" * 32)
    server.close()
    assert found.problem == ""
    assert found.gbytes_per_second > 0.01
    assert 0.0 < found.latency_us < 1e6
    assert abs(found.clock_offset_seconds) < 1.0


def test_a_stranger_gets_nothing() -> None:
    """The port is open to the network: without the secret it answers no ping and swallows no flood."""
    server = LinkServer(LOOPBACK, "s" * 32)
    found = call_link("a", "b", LOOPBACK, server.port, "x" * 32)
    server.close()
    assert found.problem.startswith("connects, then fails")


def test_nobody_there_is_an_answer_not_an_exception() -> None:
    """A port that was closed a moment ago."""
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
    assert call_link("a", "b", LOOPBACK, port, "s").problem == "unreachable: Connection refused"


def test_a_peer_that_accepts_and_says_nothing_costs_a_deadline() -> None:
    """As a half-broken path does: the handshake passes, larger packets don't."""
    with socket.create_server((LOOPBACK, 0)) as silent:
        found = call_link("a", "b", LOOPBACK, silent.getsockname()[1], "s" * 32)
    assert "large packets may be lost" in found.problem


def test_in_each_round_a_node_is_in_one_pair_and_all_pairs_come() -> None:
    """Calls that share a node would measure each other."""
    for num_nodes in range(1, 10):
        rounds = rounds_of_pairs(num_nodes)
        for pairs in rounds:
            ends = [end for pair in pairs for end in pair]
            assert len(ends) == len(set(ends))
        every = {pair for pairs in rounds for pair in pairs}
        assert every == {(a, b) for a in range(num_nodes) for b in range(num_nodes) if a != b}


def test_large_clusters_are_tried_in_bounded_time() -> None:
    """Each node still calls several others."""
    assert len(rounds_of_pairs(200)) == 24
