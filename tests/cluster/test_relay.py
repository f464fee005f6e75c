"""Two ranks of a node that is not the driver's: one connection over the network, both hear everything."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from argosy.cluster.protocol.channel import RELAY, Channel, Listener
from argosy.cluster.protocol.errors import ChannelClosed
from argosy.cluster.protocol.messages import FromRank, Hello, Ping, Pong, StopWorker, ToRank, WorkerError
from argosy.cluster.protocol.relay import RelayChannel


class Node:
    """The driver's end of one TCP connection, the relay and its neighbour."""

    def __init__(self, folder: Path):
        self.listener = Listener.bind("tcp:127.0.0.1:0")
        relay_address = f"unix:{folder}/node/relay"
        self.relay = Channel.connect(self.listener.address + RELAY + relay_address, ToRank)
        self.driver = Channel(self.listener.accept(5.0), FromRank)
        self.neighbour = Channel.connect(relay_address, ToRank)

    def close(self) -> None:
        for channel in (self.neighbour, self.relay, self.driver):
            channel.close()
        self.listener.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()
    assert list(tmp_path.iterdir()) == []


def hello(node: Node) -> None:
    for rank, channel in enumerate((node.relay, node.neighbour)):
        channel.send(Hello(role="rank", secret="s", global_rank=rank))
        assert node.driver.recv(5.0).global_rank == rank


def test_one_frame_reaches_both_and_both_answer_over_one_connection(node: Node) -> None:
    """The neighbour's words travel whole between the relay's own."""
    assert isinstance(node.relay, RelayChannel)
    hello(node)
    for nonce in range(100):
        node.driver.send(Ping(nonce=nonce))
        assert node.relay.recv(5.0) == Ping(nonce=nonce)
        assert node.neighbour.recv(5.0) == Ping(nonce=nonce)
        senders = [
            threading.Thread(target=channel.send, args=(Pong(global_rank=rank, nonce=nonce, step_id=0),))
            for rank, channel in enumerate((node.relay, node.neighbour))
        ]
        for sender in senders:
            sender.start()
        assert {node.driver.recv(5.0).global_rank for _ in range(2)} == {0, 1}
        for sender in senders:
            sender.join()


def test_the_driver_is_told_which_neighbour_went_away(node: Node) -> None:
    """Its end of the connection is not the driver's: the relay has to say it."""
    hello(node)
    node.neighbour.close()
    error = node.driver.recv(5.0)
    assert isinstance(error, WorkerError)
    assert (error.global_rank, error.code) == (1, "worker_lost")


def test_the_end_of_the_relay_is_the_end_of_its_neighbours(node: Node) -> None:
    """No rank outlives the group."""
    hello(node)
    node.relay.close()
    with pytest.raises(ChannelClosed):
        node.neighbour.recv(5.0)
    with pytest.raises(ChannelClosed):
        node.driver.recv(5.0)


def test_the_last_word_is_passed_on(node: Node) -> None:
    """Stop reaches the neighbour before the relay leaves."""
    hello(node)
    node.driver.send(StopWorker())
    assert isinstance(node.relay.recv(5.0), StopWorker)
    assert isinstance(node.neighbour.recv(5.0), StopWorker)
