"""Groups of ranks: alone, in time, too late, and on an address that is taken or open to strangers."""

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from argosy.cluster.protocol.errors import ConfigError, StartupTimeout, WorkerFailed  # noqa: E402  # after the skip
from argosy.placement.plan import make_plan  # noqa: E402  # after the skip
from argosy.placement.ports import free_port  # noqa: E402  # after the skip
from argosy.placement.process_groups import destroy_parallel, init_parallel  # noqa: E402  # after the skip

CPU = torch.device("cpu")


def member(tp_rank: int, ports: list[int]) -> None:
    """One of two ranks: sum, gather, broadcast, leave; then the same again in the next epoch."""
    for port in ports:
        rank = make_plan(2, 2, 1).ranks[tp_rank]
        parallel = init_parallel(rank, f"127.0.0.1:{port}", CPU, 30.0)
        mine = torch.full((2, 3), float(tp_rank + 1))
        assert torch.equal(parallel.all_gather_last_dim(mine)[0], torch.tensor([1.0, 1, 1, 2, 2, 2]))
        assert torch.equal(parallel.broadcast(mine.clone(), 1), torch.full((2, 3), 2.0))
        assert parallel.all_reduce(mine) is mine
        assert torch.equal(mine, torch.full((2, 3), 3.0))
        destroy_parallel(parallel)
        destroy_parallel(parallel)  # leaving twice is leaving


if __name__ == "__main__":
    member(int(sys.argv[1]), [int(port) for port in sys.argv[2:]])


def test_one_rank_opens_nothing() -> None:
    """A model on one card must not need a network."""
    parallel = init_parallel(make_plan(2, 1, 1).ranks[0], "no address at all", CPU, 0.1)
    x = torch.ones(2, 3)
    assert parallel.all_reduce(x) is x
    assert parallel.all_gather_last_dim(x) is x
    assert parallel.broadcast(x) is x
    assert (parallel.previous_rank, parallel.next_rank) == (None, None)
    assert not torch.distributed.is_initialized()
    destroy_parallel(parallel)


def test_two_ranks_meet_part_and_meet_again() -> None:
    """A replica is rebuilt: the same processes join the groups of the next epoch."""
    ports = [str(free_port("127.0.0.1")) for _ in range(2)]
    ranks = [subprocess.Popen([sys.executable, __file__, str(tp_rank), *ports]) for tp_rank in range(2)]
    try:
        assert [rank.wait(timeout=90) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("late", [0, 1])
def test_a_peer_that_never_comes_is_a_timeout(late: int) -> None:
    """The other node died while starting: this one says what it waited for, after the deadline and not later."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(StartupTimeout, match=f"process groups of 2 ranks at {address}"):
        init_parallel(make_plan(2, 2, 1).ranks[1 - late], address, CPU, 1.0)


def test_the_meeting_place_is_open_on_its_own_address_only() -> None:
    """The store asks nobody who they are: on a machine with a public network it must not listen there."""
    port = free_port("127.0.0.1")

    def wait_in_vain() -> None:
        with pytest.raises(StartupTimeout):
            init_parallel(make_plan(2, 2, 1).ranks[0], f"127.0.0.1:{port}", CPU, 2.0)

    waiting = threading.Thread(target=wait_in_vain)
    waiting.start()
    for _ in range(100):
        listeners = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        listeners += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
        ours = [fields[1] for fields in listeners if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")]
        if ours:
            break
        waiting.join(0.02)
    waiting.join()
    assert ours == [f"0100007F:{port:04X}"]


def test_a_taken_address_is_told() -> None:
    """Another job has the port."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(WorkerFailed, match="in use"):
            init_parallel(make_plan(2, 2, 1).ranks[0], address, CPU, 1.0)


def test_an_address_without_a_port_is_refused() -> None:
    """A mistake of whoever wrote the plan."""
    with pytest.raises(ConfigError, match="rendezvous='somewhere'"):
        init_parallel(make_plan(2, 2, 1).ranks[0], "somewhere", CPU, 1.0)
