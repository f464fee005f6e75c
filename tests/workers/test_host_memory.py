"""Pinned memory without a card: what is asked of the driver, and that it is told before pages go."""

import gc
from types import SimpleNamespace

import pytest
import torch

from argosy.cluster.protocol.errors import PlacementImpossible
from argosy.workers import host_memory
from argosy.workers.host_memory import check_host_room, pinned_bytes

CUDA = torch.device("cuda", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A driver that notes what it is asked; it refuses more than 8 MiB."""
    noted: list[tuple[str, int]] = []

    def register(address: int, size: int, flags: int) -> int:
        noted.append(("pin", address))
        return 2 if size > 8 << 20 else 0

    def unregister(address: int) -> int:
        noted.append(("unpin", address))
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(host_memory.torch.cuda, "cudart", lambda: runtime)
    return noted


def test_pages_are_unpinned_with_the_last_tensor_that_looks_at_them(calls: list[tuple[str, int]]) -> None:
    """The next mapping may get the same address, and would be refused, or taken for this one."""
    memory = pinned_bytes(5000, CUDA)
    address = memory.data_ptr()
    assert memory.nbytes == 5000
    view = memory[100:200].view(torch.float32)
    del memory
    gc.collect()
    view.fill_(1.0)
    assert calls == [("pin", address)]
    del view
    gc.collect()
    assert calls == [("pin", address), ("unpin", address)]


def test_a_driver_that_refuses_is_quoted(calls: list[tuple[str, int]]) -> None:
    """With the size and a way out; nothing stays behind."""
    with pytest.raises(PlacementImpossible, match=r"refuses to pin 10\.0 MiB .* \(error 2\): raise 'ulimit -l'"):
        pinned_bytes(9 << 20, CUDA)
    gc.collect()
    assert [what for what, _ in calls] == ["pin"]


def test_room_is_asked_for_all_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would find room for itself; two don't."""
    free = SimpleNamespace(available=host_memory.KEPT_FREE + (3 << 30))
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: free)
    check_host_room(2 << 30, "x", "y")
    with pytest.raises(PlacementImpossible, match=r"x needs 2\.0 GiB .* for each of 2 ranks; 3\.0 GiB are free: y"):
        check_host_room(2 << 30, "x", "y", num_ranks=2)
