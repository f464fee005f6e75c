"""One Ray cluster for this folder, our own, which knows nothing of any other on the machine."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from argosy.cluster.oracle import write_oracle_model
from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy.owned_folder import short_temp_folder
from argosy.deploy.ray_session import RaySession


@pytest.fixture(scope="session")
def ray_session() -> Iterator[RaySession]:
    """The cluster: logical CPUs for four ranks, whatever the machine has."""
    os.environ["OMP_NUM_THREADS"] = "1"
    session = RaySession.open(None, num_cpus=8)
    assert session.is_own
    yield session
    session.close()


@pytest.fixture
def oracle_settings(tmp_path: Path) -> Callable[..., ServingConfig]:
    """Settings of the model whose next token is a hash of all that its blocks hold."""
    folder = write_oracle_model(tmp_path / "oracle")

    def make(**more: Any) -> ServingConfig:
        given = {"model": str(folder), "load_format": "dummy", "device": "cpu", "cpu_threads": 1, "max_model_len": 1024}
        given |= {"num_gpu_blocks_override": 600, "max_num_seqs": 16, "skip_tokenizer_init": True}
        return ServingConfig.from_mapping(given | more)

    return make


@pytest.fixture
def short_tmp() -> Iterator[str]:
    """A folder whose path leaves room for a socket's; what the test starts must leave it empty."""
    folder = tempfile.mkdtemp(prefix="t", dir=short_temp_folder(20))
    yield folder
    assert os.listdir(folder) == []
    os.rmdir(folder)


@pytest.fixture
def private_tmp(short_tmp: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where engines of this process put their folders."""
    monkeypatch.setattr(tempfile, "tempdir", short_tmp)
    return short_tmp
