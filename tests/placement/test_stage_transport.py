"""Hidden states from stage to stage and tokens back, between real processes over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

DEADLINE_SECONDS = 60.0


def stage(pp_rank: int, port: int) -> None:
    """What each of the two processes does. The first never waits for the second to take what it sent."""
    import torch

    from argosy.cluster.protocol.errors import WorkerFailed
    from argosy.placement.plan import make_plan
    from argosy.placement.process_groups import destroy_parallel, init_parallel
    from argosy.placement.stage_transport import StageTransport

    rank = make_plan(2, 1, 2).ranks[pp_rank]
    parallel = init_parallel(rank, f"127.0.0.1:{port}", torch.device("cpu"), 30.0)
    transport = StageTransport(parallel, 8, torch.float32, timeout_seconds=20.0)
    sizes = [1, 300, 7, 4096, 2, 33]
    if rank.is_first_stage:
        for step, size in enumerate(sizes):
            hidden = torch.full((size, 8), float(step))
            transport.send(hidden)
            del hidden  # the transport keeps what is under way
        transport.flush()
        print("sent all")
        table = torch.zeros(3, dtype=torch.int64)
        print("tokens", [transport.receive_tokens(table).tolist() for _ in range(2)])
        sys.stdin.readline()  # stays, silent, until the other has seen its deadline pass
    else:
        for step in range(2):  # taken long after they were sent: neither they nor the hidden states wait
            transport.send_tokens(torch.tensor([step, 7, 8]))
        for step, size in enumerate(sizes):
            assert torch.equal(transport.receive(size), torch.full((size, 8), float(step)))
        transport.timeout_seconds = 0.3
        try:
            transport.receive(1)
        except WorkerFailed as error:
            print(f"failed as it should: {error}", flush=True)
        os._exit(0)  # a receive that was given up can't be taken back: such a rank leaves at once
    destroy_parallel(parallel)


def test_stages_hand_over_in_order_and_never_wait_for_ever() -> None:
    """Six micro-batches of ragged sizes, and tokens of two steps the other way round; then the first stage falls
    silent, and the second says whom it waited for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(pp_rank), str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for pp_rank in range(2)
    ]  # fmt: skip
    try:
        second, _ = processes[1].communicate(timeout=DEADLINE_SECONDS)
        first, _ = processes[0].communicate("\n", timeout=DEADLINE_SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=DEADLINE_SECONDS)
    assert "sent all\ntokens [[0, 7, 8], [1, 7, 8]]" in first, first
    assert "failed as it should: rank 1: no hidden states came from rank 0" in second, second


if __name__ == "__main__":
    stage(int(sys.argv[1]), int(sys.argv[2]))
