"""A person starts an engine with its own Ray cluster and presses Ctrl-C: nothing may be left of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

MODEL = Path(__file__).parents[2] / "argosy" / "default_model"
SCRIPT = """
import signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with Ctrl-C ignored
from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy.launch import launch_engine

config = ServingConfig.from_mapping({"model": sys.argv[1], "max_model_len": 512, "tensor_parallel_size": 2})
try:
    with launch_engine(config, rank_module="argosy.workers.zero_cost_rank") as engine:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Ray has put its own handler there
        print("ready", engine.address, flush=True)
        time.sleep(120)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [(signal.SIGINT, False, 130), (signal.SIGTERM, True, 143)],
    ids=["Ctrl-C", "terminated with all processes of the group"],
)
def test_whoever_is_stopped_leaves_no_process_no_file_and_no_shared_memory(
    short_tmp: str, number: signal.Signals, to_group: bool, code: int
) -> None:
    """Own cluster, own token, own folder; somebody else's cluster at RAY_ADDRESS is not even asked.

    Service managers and `timeout` signal Ray's processes as well; waiting for those to answer took more than a minute.
    """
    shared = set(os.listdir("/dev/shm"))
    environment = {**os.environ, "TMPDIR": short_tmp, "PYTHONSAFEPATH": "1", "RAY_ADDRESS": "127.0.0.1:1"}
    environment.pop("RAY_AUTH_MODE", None)
    owner = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(MODEL)], stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    assert owner.stdout is not None
    try:
        assert owner.stdout.readline().startswith(b"ready unix:")
        processes = psutil.Process(owner.pid).children(recursive=True)
        names = [" ".join(process.cmdline()) for process in processes]
        assert sum("ray::WorkerActor" in name for name in names) == 2
        assert sum("ray::DriverActor" in name for name in names) == 1
        (token,) = Path(short_tmp).glob("argosy-ray-*/auth_token")
        assert token.stat().st_mode & 0o777 == 0o600
        sockets = [c for process in processes for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert {c.laddr.ip.removeprefix("::ffff:") for c in sockets} == {"127.0.0.1"}
        if to_group:
            os.killpg(owner.pid, number)
        else:
            owner.send_signal(number)
        assert owner.wait(45.0) == code
        assert psutil.wait_procs(processes, timeout=20.0)[1] == []
        assert set(os.listdir("/dev/shm")) - shared == set()
    finally:
        owner.stdout.close()
        if owner.poll() is None:
            os.killpg(owner.pid, signal.SIGKILL)
            owner.wait()


RAYLET_KILLED = """
import os, signal, sys, time
from argosy.deploy.ray_session import RaySession, lost_part

import ray

session = RaySession.open(None, num_cpus=1)
assert lost_part() == ""
(raylet,) = ray._private.worker._global_node.all_processes["raylet"]
os.kill(raylet.process.pid, signal.SIGKILL)
while not lost_part():
    time.sleep(0.05)
print("lost its", lost_part())
session.abandon()
session.close()
print("said so")
"""


@pytest.mark.timeout(120)
def test_whoever_loses_the_raylet_can_still_say_so_and_clear_up(short_tmp: str) -> None:
    """A killed agent of Ray's takes its raylet along, and Ray's goodbye to that ended the process without a word."""
    assert _last_words(RAYLET_KILLED, short_tmp) == ["lost its raylet", "said so"]


AGENT_KILLED = """
import contextlib, os, signal, psutil
from argosy import LLM, SamplingParams
from argosy.cluster.protocol.errors import ClusterError

def named(title):
    found = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if title in " ".join(one.cmdline()):
                found.append(one)
    return found

with LLM(max_model_len=256) as llm:
    drivers = named("ray::DriverActor")
    (agent,) = named("ray::RuntimeEnvAgent")
    agent.send_signal(signal.SIGKILL)
    psutil.wait_procs(drivers, timeout=60)
    try:
        llm.generate("x" * 20, SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False)
    except ClusterError as error:
        print(error)
print("closed")
"""


@pytest.mark.timeout(180)
def test_a_script_whose_ray_lost_an_agent_hears_of_it(short_tmp: str) -> None:
    """The raylet ends with its agent, and the driver with it, which nobody starts again: it waited ten minutes."""
    lost, closed = _last_words(AGENT_KILLED, short_tmp)
    assert lost.startswith("Ray lost its raylet")
    assert closed == "closed"


def _last_words(script: str, folder: str) -> list[str]:
    """The last two lines of a script that ends with 1, but for what Ray says."""
    environment = {**os.environ, "TMPDIR": folder, "PYTHONSAFEPATH": "1"}
    owner = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, timeout=100, check=False
    )
    assert owner.returncode == 1
    return [line for line in owner.stdout.decode().splitlines() if "(raylet)" not in line][-2:]


UNCLOSED = """
import sys
from argosy import LLM, SamplingParams

llm = LLM(max_model_len=256)
assert len(llm.generate(["a"], SamplingParams(max_tokens=2), use_tqdm=False)) == 1
sys.exit(3)
"""


@pytest.mark.timeout(180)
def test_a_script_that_just_ends_ends_quietly(short_tmp: str) -> None:
    """Nobody closed its engine: who looks after drivers missed that one, and wrote a traceback behind the answers."""
    environment = {**os.environ, "TMPDIR": short_tmp, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", UNCLOSED]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert ended.returncode == 3
    assert "Traceback" not in ended.stderr, ended.stderr
    assert "never retrieved" not in ended.stderr, ended.stderr
