"""An engine as plain processes: what dies, what is noticed, and that nothing is left. Ranks cost nothing here."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from engine_rig import driver_process, rank_processes, tokens_of

from argosy.cluster.driver_client import DriverClient
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError, ServingError, WeightError, WorkerFailed
from argosy.cluster.protocol.messages import EngineInfo
from argosy.cluster.protocol.sampling import FinishReason, TokenParams
from argosy.deploy.launch import Engine, launch_engine
from argosy.deploy.local_launch import LocalBoot, LocalCommand
from argosy.deploy.owned_folder import short_temp_folder
from argosy.placement.plan import PlacementPlan
from argosy.workers.zero_cost_rank import expected_token

ZERO_COST = "argosy.workers.zero_cost_rank"
MODEL = str(Path(__file__).parents[2] / "argosy" / "default_model")
NUM_TOKENS = 900


def settings(**more: object) -> ServingConfig:
    return ServingConfig.from_mapping({"model": MODEL, "max_model_len": 1024, **more})


@pytest.fixture(autouse=True)
def _leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test: no process of ours, no file in the temporary folder, no shared memory."""
    short = tempfile.mkdtemp(prefix="t", dir=short_temp_folder(20))
    monkeypatch.setattr(tempfile, "tempdir", short)
    shared, before = set(os.listdir("/dev/shm")), set(psutil.Process().children(recursive=True))
    yield
    ours = [p for p in psutil.Process().children(recursive=True) if p not in before and "argosy." in str(p.cmdline())]
    assert ours == []
    assert os.listdir(short) == []
    assert {name for name in os.listdir("/dev/shm") if "argosy" in name} <= shared
    os.rmdir(short)


def as_edge(engine: Engine, body: Callable[[DriverClient], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        client = await DriverClient.connect(engine.address, engine.secret)
        async with asyncio.timeout(40.0):
            await body(client)
        await client.close()

    asyncio.run(main())


def disturbed_streams_are_exact(engine: Engine, disturb: Callable[[], None]) -> None:
    """Streams that were under way when something was done to the ranks end with the tokens they would have had."""

    async def body(client: DriverClient) -> None:
        streams = [client.submit([first, 1], TokenParams(max_tokens=NUM_TOKENS)) for first in range(4)]
        seen = [await anext(stream) for stream in streams]
        disturb()
        # ranks without a model are quick, and those four may have been over: there is work after it as well
        streams += [client.submit([first, 1], TokenParams(max_tokens=NUM_TOKENS)) for first in range(4, 8)]
        for first, stream in enumerate(streams):
            before = seen[first] if first < len(seen) else []
            token_ids, reason = await tokens_of(stream)
            assert (reason or before[-1].finish_reason) is FinishReason.LENGTH
            told = [token for delta in before for token in delta.token_ids]
            assert told + token_ids == [expected_token(first, 2 + i) for i in range(NUM_TOKENS)]

    as_edge(engine, body)


def wait_for_epoch(engine: Engine, epoch: int) -> None:
    deadline = time.monotonic() + 10.0
    while (status := engine.status()).epoch != epoch or status.state != "ready":
        assert time.monotonic() < deadline, status
        time.sleep(0.01)


LOOKS = """
import gc
from argosy.deploy import local_launch


class Loop:
    def __init__(self, *args, **fields): self.made_of = [object()]
    def run(self): print(gc.get_threshold()[2], gc.get_freeze_count() > 10_000)
    def stop(self): pass


local_launch.DriverLoop = Loop
local_launch.main()
"""


def test_a_driver_s_process_looks_for_garbage_seldom_before_its_first_step(tmp_path: Path) -> None:
    """Its loop, in whose place one stands that tells, begins with what the start left set aside."""
    boot = LocalBoot(
        config=settings(),
        plan=PlacementPlan(ranks=()),
        info=EngineInfo(
            model=MODEL, max_model_len=64, vocab_size=100, num_blocks=0, block_size=4, tensor_parallel_size=1,
            pipeline_parallel_size=1, dtype="float32", max_logprobs=1, max_num_seqs=4,
        ),
        folder=str(tmp_path / "engine"),
        secret="s",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LOOKS], input=msgspec.json.encode(boot) + b"\n", capture_output=True, timeout=60
    )
    assert done.stderr.decode() == "1000 True\n"  # the answers' pipe is for answers alone


def test_a_killed_rank_costs_a_pause_and_no_token() -> None:
    """kill -9 of one of two: both are replaced, every stream goes on."""
    phases: list[str] = []
    config = settings(tensor_parallel_size=2)
    with launch_engine(
        config, backend="local", rank_module=ZERO_COST, on_progress=lambda p, f: phases.append(p)
    ) as engine:
        assert (engine.info.num_blocks, engine.info.max_model_len) == (4096, 1024)
        before = rank_processes(engine)
        disturbed_streams_are_exact(engine, before[1].kill)
        wait_for_epoch(engine, 1)
        assert not any(process.is_running() for process in before)
        assert len(rank_processes(engine)) == 2
    assert phases[-1] == "ready"


def test_a_rank_that_hangs_is_replaced_after_the_step_deadline() -> None:
    """A stopped process is alive to everybody: only the deadline tells."""
    with launch_engine(settings(step_deadline_seconds=0.5), backend="local", rank_module=ZERO_COST) as engine:
        (rank,) = rank_processes(engine)
        disturbed_streams_are_exact(engine, rank.suspend)
        wait_for_epoch(engine, 1)


def test_a_killed_driver_takes_its_ranks_along_and_edges_hear_of_it() -> None:
    """kill -9 of the driver: ranks see the end of their connection, streams end as lost."""
    engine = launch_engine(settings(tensor_parallel_size=2), backend="local", rank_module=ZERO_COST)
    ranks = rank_processes(engine)

    async def body(client: DriverClient) -> None:
        streams = [client.submit([first, 1], TokenParams(max_tokens=NUM_TOKENS)) for first in range(32)]
        await anext(streams[0])
        driver_process(engine).kill()
        reasons = [(await tokens_of(stream))[1] for stream in streams]
        assert reasons[-1] is FinishReason.LOST  # the first may have been over already

    as_edge(engine, body)
    assert psutil.wait_procs(ranks, timeout=10.0)[1] == []
    engine.close()
    engine.close()


def test_the_driver_ends_with_its_owner() -> None:
    """A notebook's kernel is killed: its end of the pipe closes, and the driver stops by itself."""
    engine = launch_engine(settings(), backend="local", rank_module=ZERO_COST)
    processes = [driver_process(engine), *rank_processes(engine)]
    engine._driver._process.stdin.close()  # type: ignore[attr-defined]  # a process here
    assert psutil.wait_procs(processes, timeout=15.0)[1] == []
    engine.close()


def test_the_driver_ends_with_an_owner_that_died_while_it_asked() -> None:
    """The answer finds nobody: the driver was left running for ever by the error."""
    engine = launch_engine(settings(), backend="local", rank_module=ZERO_COST)
    driver: Any = engine._driver
    processes = [psutil.Process(driver.pid), *rank_processes(engine)]
    driver._process.stdout.close()
    driver._write(LocalCommand())
    driver._process.stdin.close()
    assert psutil.wait_procs(processes, timeout=15.0)[1] == []
    engine.close()


@pytest.mark.parametrize(
    ("more", "rank_module", "kind", "text"),
    [
        ({}, "argosy.workers.no_such_module", WorkerFailed, "No module named"),
        ({"num_gpu_blocks_override": 20}, ZERO_COST, ConfigError, "--max-model-len 320"),
        ({"tensor_parallel_size": 3}, ZERO_COST, ConfigError, "tensor_parallel_size=3"),
        ({"max_model_len": 10_000_000}, ZERO_COST, ConfigError, "max_model_len=10000000"),
        ({"model": "/no/such/folder"}, ZERO_COST, WeightError, "/no/such/folder"),
        ({"quantization": "awq"}, ZERO_COST, ConfigError, "quantization='awq': the model's config.json has no"),
    ],
)
def test_what_can_not_start_says_why_in_one_line_and_soon(
    more: dict[str, Any], rank_module: str, kind: type[ServingError], text: str
) -> None:
    """The error is the one that stopped it, wherever that was; nothing is left (see the fixture)."""
    began = time.monotonic()
    with pytest.raises(kind, match=text) as caught:
        launch_engine(settings(**more), backend="local", rank_module=rank_module)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 15.0
