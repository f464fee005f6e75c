"""`ray up` over two hosts out of namespaces, a stage on each, says what one host says. Skipped where there are none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from hosts import missing_here  # noqa: E402  # the scripts here run by themselves, too


@pytest.mark.end_to_end
@pytest.mark.skipif(bool(missing_here()), reason=f"hosts out of namespaces: {missing_here()}")
def test_a_cluster_of_two_hosts_from_ray_up_to_ray_down() -> None:
    """The repository's own ray_cluster.yaml, with tokens; tokens of the answers equal to those of one host."""
    command = [sys.executable, str(HERE / "ray_up.py"), "--hosts", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, stdin=subprocess.DEVNULL, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same_tokens_as_one_host"]
    assert "PP2" in result["layout"]
    assert list(result["ranks"].values()) == [1, 1]  # a stage on each host
