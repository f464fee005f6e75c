"""Processes of ranks that all files of this room share, so that importing torch four times is paid once."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
if TYPE_CHECKING:
    from rig import RankHosts


@pytest.fixture(scope="session")
def _all_hosts() -> Iterator[list["RankHosts"]]:
    made: list[RankHosts] = []
    yield made
    for each in made:
        each.close()


@pytest.fixture
def hosts(_all_hosts: list["RankHosts"], tmp_path_factory: pytest.TempPathFactory) -> "RankHosts":
    """Four processes; others when one of them has ended, so that a test that fails is alone with it."""
    from rig import RankHosts  # here: a run of other files has no use for its imports

    if not _all_hosts or any(process.poll() is not None for process in _all_hosts[-1].processes):
        _all_hosts.append(RankHosts(4, tmp_path_factory.mktemp("hosts")))
    return _all_hosts[-1]
