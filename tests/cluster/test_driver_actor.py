"""The actor around a driver's loop, made without Ray's own start."""

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("ray")

from argosy.cluster import driver_actor
from argosy.cluster.driver_loop import DriverStatus
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.messages import EngineInfo


def test_its_process_looks_for_garbage_seldom_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the start left is set aside: a look at all objects would be a pause for every rank."""
    told: list[str] = []
    ran = threading.Event()

    class Loop:
        def __init__(self, *_: object, **__: object):
            told.append("made")

        def run(self) -> None:
            told.append("runs")
            ran.set()

        def status(self) -> DriverStatus:
            return DriverStatus(state="stopped")

    monkeypatch.setattr(driver_actor, "DriverLoop", Loop)
    monkeypatch.setattr(driver_actor, "settle_garbage", lambda: told.append("settled"))
    info = EngineInfo(
        model="m", max_model_len=64, vocab_size=100, num_blocks=0, block_size=4, tensor_parallel_size=1,
        pipeline_parallel_size=1, dtype="float32", max_logprobs=1, max_num_seqs=4,
    )  # fmt: skip
    boot = driver_actor.DriverBoot(
        name="e", config=ServingConfig.from_mapping({"model": "m"}), info=info, folder=str(tmp_path / "e"), secret="s"
    )
    starts_none: Any = None
    driver_actor.DriverActor(msgspec.msgpack.encode(boot), starts_none)
    assert ran.wait(10.0)
    assert told == ["made", "settled", "runs"]
