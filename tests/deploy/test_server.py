"""What `argosy serve` checks before it starts anything, and what it says when it is ready."""

import os
import signal
import socket
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ClusterError, ConfigError, WeightError
from argosy.cluster.protocol.messages import EngineInfo, StatsReply
from argosy.deploy import model_folder, server, settings
from argosy.workers.loading import resolve


def config(**given: object) -> ServingConfig:
    """Settings for the model that ships."""
    made, _ = settings.make_config({"model": settings.default_model(), **given})
    return model_folder.localize(made)


def test_a_taken_port_is_said_in_one_line_before_anything_starts() -> None:
    """The second server on a machine."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is taken"):
            server.check_port(config(port=port))
    server.check_port(config(port=port))


def test_port_0_is_one_that_is_free() -> None:
    """It is a number that `--port` takes, and HAProxy ended the start with its own words after half a minute."""
    chosen = server.with_port(config(port=0)).server.port
    assert chosen > 0
    server.check_port(config(port=chosen))
    assert server.with_port(config(port=8123)).server.port == 8123


@pytest.mark.parametrize("names", ["", [""], ["a", " "]])
def test_an_empty_name_of_what_is_served_is_refused(names: object) -> None:
    """`--served-model-name "$NAME"` with nothing set served a model that nobody could name."""
    with pytest.raises(ConfigError, match="served_model_name='': must be a name"):
        config(served_model_name=names)


def test_an_address_of_another_machine_is_refused() -> None:
    """A typo in --host."""
    with pytest.raises(ConfigError, match="no such address"):
        server.check_port(config(host="no.such.host.invalid"))


def test_keys_from_flags_are_kept_in_a_private_file(tmp_path: Path) -> None:
    """Settings are printed and sent around; keys are not."""
    changed = server.with_api_keys(config(), ("first-key", "second-key"), tmp_path)
    file = Path(str(changed.server.api_keys_file))
    assert file.read_text() == "first-key\nsecond-key\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="leave one out"):
        server.with_api_keys(changed, ("third-key",), tmp_path)
    for wrong in ("short", "# a comment", "two words", "a-line\nmore"):  # not by the name of a file that nobody wrote
        with pytest.raises(ConfigError, match=r"--api-key, \$ARGOSY_API_KEY or \$VLLM_API_KEY: a key has at least 8"):
            server.with_api_keys(config(), (wrong,), tmp_path)


def test_what_the_doors_will_read_is_read_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short key or a missing template costs a second, not a start."""
    keys = tmp_path / "keys"
    keys.write_text("short\n")
    with pytest.raises(ConfigError, match="at least 8"):
        server.check_doors(config(api_keys_file=str(keys)))
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(WeightError, match=r"generation_config\.json: top_p: 7"):
        server.check_doors(config(generation_config=str(tmp_path)))
    with pytest.raises(ConfigError, match="generation_config='nowhere'"):
        server.check_doors(config(generation_config="nowhere"))
    server.check_doors(config(host="0.0.0.0"))
    assert "anybody who reaches" in capsys.readouterr().err


def test_the_ready_block_can_be_pasted() -> None:
    """Address, model, layout, memory, a curl line, how to stop."""
    info = EngineInfo(
        model="m", max_model_len=2048, vocab_size=9, num_blocks=100, block_size=16, tensor_parallel_size=2,
        pipeline_parallel_size=1, dtype="bfloat16", max_logprobs=20, max_num_seqs=8, layout="TP2 x PP1, layers 0-7",
    )  # fmt: skip
    rank = SimpleNamespace(ledger={"weights": 3 << 30, "free": 1 << 30, "total": 4 << 30})
    engine: Any = SimpleNamespace(info=info, ranks=(rank,))
    text = server.ready_block(config(port=8123, host="0.0.0.0"), engine, 12.34)
    assert "weights 3.00 + free 1.00 = 4.00 GiB" in text
    assert "http://127.0.0.1:8123/v1" in text
    assert "TP2 x PP1" in text
    assert "100 blocks x 16 = 1600 tokens" in text
    assert "curl http://127.0.0.1:8123/v1/completions" in text
    assert "ready after 12.3 s" in text
    assert '"model": "argosy-default"' in text


def test_the_ledger_of_every_rank_is_shown_at_start() -> None:
    """A stage that has more layers has less room: the first rank's bytes do not tell. Of many ranks some lines do."""
    ledgers = [{"weights": weights << 30, "free": 1 << 30, "total": (weights + 1) << 30} for weights in range(1, 11)]
    assert server.memory_of(ledgers[:2]).split("\n") == [
        "weights 1.00 + free 1.00 = 2.00 GiB of rank 0",
        "            weights 2.00 + free 1.00 = 3.00 GiB of rank 1",
    ]
    lines = server.memory_of(ledgers).split("\n")
    assert len(lines) == 9
    assert "rank 7" in lines[7]
    assert "2 more ranks" in lines[8]
    assert "argosy doctor" in lines[8]


@pytest.mark.anyio
async def test_draining_waits_for_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions find a request running, the third none; then doors have some, a while, always, or no say."""
    running = [2.0, 1.0, 0.0, 0.0, 0.0]
    at_doors: list[int | None] = [3, 1, 0]
    told = []

    class Client:
        def drain(self) -> None:
            told.append("drain")

        async def stats(self) -> StatsReply:
            return StatsReply(values={"argosy_requests_running": running.pop(0)})

    async def connect(address: str, secret: str, *, timeout_seconds: float) -> Client:
        return Client()

    monkeypatch.setattr(server, "connect_engine", connect)
    monkeypatch.setattr(server, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(server, "_LAST_BYTES_SECONDS", 0.0)
    assert await server.drain("address", "secret", 5.0, lambda: at_doors.pop(0))
    assert (told, len(running), at_doors) == (["drain"], 2, [])
    assert await server.drain("address", "secret", 5.0, lambda: None)
    monkeypatch.setattr(server, "_DOORS_SECONDS", 0.1)  # who follows a job's results stays for hours
    assert await server.drain("address", "secret", 5.0, lambda: 1)
    assert running == []


@pytest.fixture
def anyio_backend() -> str:
    """asyncio is what we run on."""
    return "asyncio"


def test_a_model_is_a_folder_a_hub_name_or_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go on using the name that was given; the model that ships has a short one."""
    assert config().model.served_model_name == (model_folder.DEFAULT_MODEL_NAME,)
    assert model_folder.model_folder(str(tmp_path)) == str(tmp_path.resolve())
    (tmp_path / "file").touch()
    with pytest.raises(WeightError, match="is a file"):
        model_folder.model_folder(str(tmp_path / "file"))
    with pytest.raises(WeightError, match="neither a folder here nor a name"):
        model_folder.model_folder("./missing")
    monkeypatch.setattr(resolve, "fetch", lambda name, revision, folder: tmp_path)
    assert model_folder.model_folder("org/model") == str(tmp_path.resolve())


def test_a_model_from_the_hub_is_pinned_to_its_commit(tmp_path: Path) -> None:
    """Whoever reads the settings later, here or on another node, reads the same files."""
    commit, repo = "c" * 40, tmp_path / "models--org--model"
    for name, target in (("main", commit), ("v1", "d" * 40)):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / name).write_text(target)
        (repo / "snapshots" / target).mkdir(parents=True)
        (repo / "snapshots" / target / "config.json").write_text("{}")
    found = config(model="org/model", download_dir=str(tmp_path), tokenizer_revision="v1").model
    assert (found.hub_name, found.revision, found.served_model_name) == ("org/model", commit, ("org/model",))
    assert Path(found.model) == repo / "snapshots" / commit
    assert Path(str(found.tokenizer)) == repo / "snapshots" / ("d" * 40)
    again = model_folder.localize(ServingConfig(model=found)).model
    assert again == found


def test_a_ray_cluster_is_joined_only_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By flag or in the environment, the flag first; "local" is one of our own whatever the environment says."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert server.with_ray_address(config()).parallel.ray_address is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert server.with_ray_address(config()).parallel.ray_address == "auto"
    assert server.with_ray_address(config(ray_address="10.0.0.1:6379")).parallel.ray_address == "10.0.0.1:6379"
    assert server.with_ray_address(config(ray_address="local")).parallel.ray_address is None


def test_a_cluster_that_is_not_there_is_said_in_seconds() -> None:
    """Ray itself tries for a minute."""
    pytest.importorskip("ray")
    from argosy.deploy.ray_session import RaySession

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with pytest.raises(ClusterError, match=rf"127.0.0.1:{port}.*nobody answers there"):
        RaySession.open(f"127.0.0.1:{port}", num_cpus=1)


@pytest.mark.parametrize(
    ("noted", "running", "found"),
    [
        (None, {"127.0.0.1:4000"}, None),  # a server's own
        ("10.0.0.1:6379", {"127.0.0.1:4000"}, None),  # what was noted has ended
        (None, set(), None),
        ("127.0.0.1:6379", {"127.0.0.1:6379", "127.0.0.1:4000"}, "127.0.0.1:6379"),
        ("10.0.0.1:6379", {"10.0.0.1:6379", "127.0.0.1:4000", "10.0.0.2:6379"}, "10.0.0.1:6379"),
        (None, {"10.0.0.2:6379", "127.0.0.1:4000"}, "10.0.0.2:6379"),
    ],
)
def test_auto_is_no_cluster_that_a_server_here_keeps_for_itself(
    noted: str | None, running: set[str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`argosy doctor --ray-address auto` beside an `argosy serve` of its own cluster said nothing for six minutes."""
    services = pytest.importorskip("ray._private.services")
    from argosy.deploy import ray_session

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: frozenset(running))
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: noted)
    if found is not None:
        assert ray_session._find_cluster() == found
        return
    with pytest.raises(ClusterError, match="no Ray cluster was found on this machine") as caught:
        ray_session.RaySession.open("auto", num_cpus=1)
    assert ("theirs alone" in str(caught.value)) == bool(running)


def test_an_address_that_is_no_interface_of_this_machine_is_refused() -> None:
    """203.0.113.0/24 is for documentation."""
    with pytest.raises(ConfigError, match="no address of this machine"):
        server.check_port(config(host="203.0.113.7"))


def test_a_storm_of_signals_is_one_wish_and_a_later_one_another() -> None:
    """Handlers interrupt each other; the first version waited for its own lock when two came within microseconds."""
    with server._StopSignals() as stop:
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        stop.wait()
        assert stop.is_set
        time.sleep(1.1 * server._SAME_SIGNAL_SECONDS)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
