"""The life of `argosy serve`: check, start an engine and the doors, say how to use them, wait, drain, leave nothing."""

import asyncio
import contextlib
import importlib
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ClusterError, ConfigError
from argosy.cluster.protocol.ledger import describe_ledger
from argosy.cluster.replica_client import connect_engine
from argosy.deploy import haproxy, proxy_guard
from argosy.deploy.doctor import is_port_free
from argosy.deploy.http_auth import MIN_KEY_BYTES, ApiKeys
from argosy.deploy.live_figures import watching
from argosy.deploy.model_folder import load_tokenizer, localize
from argosy.deploy.node_watch import NodeWatch
from argosy.deploy.owned_folder import make_owned_folder
from argosy.deploy.progress import StartProgress
from argosy.deploy.token_params import read_generation_config
from argosy.placement.ports import free_port

if TYPE_CHECKING:
    from argosy.deploy.launch import Engine

_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_UNFINISHED: Final = ("argosy_requests_running", "argosy_requests_waiting")
_POLL_SECONDS: Final = 0.1
_RANKS_SHOWN: Final = 8
_SAME_SIGNAL_SECONDS: Final = 0.3  # apart, two signals are two wishes
_LAST_BYTES_SECONDS: Final = 0.3  # from the driver's last token to the client's socket, through the doors
_DOORS_SECONDS: Final = 5.0  # that the doors may take for what they have; who follows a job would wait for its end
_WITHOUT_GCS_SECONDS: Final = 45.0  # after 60 s Ray ends every process that can't reach it
_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last: the terminal or its ssh has gone


def run(config: ServingConfig, *, api_keys: tuple[str, ...] = ()) -> int:
    """Serve until a signal says to stop; the exit code."""
    config = localize(with_ray_address(config))
    check_port(config)
    config = with_port(config)
    stop = _StopSignals()
    with stop, _private_folder() as folder:
        config = with_api_keys(config, api_keys, folder)
        check_doors(config)
        _set_environment(folder)
        # Ray reads its environment when it is imported, so only now.
        from argosy.deploy.launch import launch_engine

        progress = StartProgress()
        print(f"Starting {config.model.served_model_name[0]}", file=sys.stderr, flush=True)
        with _joined(config):
            engine = launch_engine(config, backend="ray", on_progress=progress, on_note=progress.note)
            stop.install()  # Ray puts its own handler for SIGTERM in place when it starts
            try:
                if not stop.is_set:
                    doors = _doors_folder(config, folder)
                    host, port = config.server.host, config.server.port
                    with haproxy.keeps_door(doors, host, port) if doors == folder else contextlib.nullcontext():
                        _serve(config, engine, progress, stop, doors)
            finally:
                engine.close()
    with contextlib.suppress(OSError):  # the terminal is gone
        print("Stopped.", file=sys.stderr, flush=True)
    return 0


def with_ray_address(config: ServingConfig) -> ServingConfig:
    """The config with the Ray cluster that the operator named, by flag or in the environment; "local" is our own."""
    address = config.parallel.ray_address or os.environ.get("RAY_ADDRESS")
    chosen: ServingConfig = config.replace(
        parallel=config.parallel.replace(ray_address=None if address == "local" else address or None)
    )
    return chosen


def with_port(config: ServingConfig) -> ServingConfig:
    """Port 0 is any that is free, chosen here: HAProxy takes none that it is not told, and people are told it, too."""
    if config.server.port:
        return config
    chosen: ServingConfig = config.replace(server=config.server.replace(port=free_port(config.server.host)))
    return chosen


def check_port(config: ServingConfig) -> None:
    """Say it before anything else starts."""
    host, port = config.server.host, config.server.port
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise ConfigError(f"host={host!r}: no such address on this machine ({error})") from error
    if not is_port_free(host, 0):
        raise ConfigError(f"host={host!r}: is no address of this machine; use 127.0.0.1, 0.0.0.0, or one of its own")
    if port and not is_port_free(host, port):
        left = " ('python -m argosy.deploy.end_engine' names what a killed server left in a cluster)"
        raise ConfigError(
            f"port {port} on {host} is taken; stop what listens there{left if config.parallel.ray_address else ''}, or "
            "choose another with --port"
        )


def check_doors(config: ServingConfig) -> None:
    """Read now what each replica of the doors will read, so that a mistake costs a second and not a start."""
    keys = ApiKeys.read(config.server.api_keys_file)
    load_tokenizer(config)
    read_generation_config(config.model.model, config.model.generation_config)
    if not keys and config.server.host not in _LOOPBACK:
        print(
            f"argosy: anybody who reaches {config.server.host}:{config.server.port} may use this server; "
            "--api-keys-file names a file of keys",
            file=sys.stderr,
        )


def with_api_keys(config: ServingConfig, api_keys: tuple[str, ...], folder: Path) -> ServingConfig:
    """Keys from flags go into a file that only this user reads: command lines and settings are seen by others."""
    if not api_keys:
        return config
    if config.server.api_keys_file is not None:
        raise ConfigError("both --api-key and --api-keys-file were given; leave one out")
    if any(len(key.encode()) < MIN_KEY_BYTES or key.startswith("#") or key != "".join(key.split()) for key in api_keys):
        raise ConfigError(
            f"--api-key, $ARGOSY_API_KEY or $VLLM_API_KEY: a key has at least {MIN_KEY_BYTES} characters, no spaces, "
            "and no # in front"
        )
    file = folder / "api_keys"
    file.touch(mode=0o600)
    file.write_text("".join(f"{key}\n" for key in api_keys), encoding="utf-8")
    changed: ServingConfig = config.replace(server=config.server.replace(api_keys_file=str(file)))
    return changed


def ready_block(config: ServingConfig, engine: "Engine", seconds: float) -> str:
    """What to know and to paste once it serves."""
    info, server, scheduler = engine.info, config.server, config.scheduler
    name = config.model.served_model_name[0]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(server.host, server.host)
    url = f"http://{host}:{server.port}"
    key = " -H 'Authorization: Bearer <key>'" if server.api_keys_file else ""
    rows = {
        "address": f"{url}/v1",
        "model": f"{name} ({info.dtype} on {info.device}, up to {info.max_model_len} tokens)",
        "layout": info.layout or f"TP{info.tensor_parallel_size} x PP{info.pipeline_parallel_size}",
        "KV cache": f"{info.num_blocks} blocks x {info.block_size} = {info.num_blocks * info.block_size} tokens",
        **({"memory": memory_of([rank.ledger for rank in engine.ranks])} if engine.ranks else {}),
        "a step": f"up to {scheduler.max_num_seqs} requests and {scheduler.max_num_batched_tokens} tokens",
        "stop": "Ctrl-C (running requests may end; a second Ctrl-C stops at once)",
    }
    body = f'{{"model": "{name}", "prompt": "Return a list of", "max_tokens": 32}}'
    lines = [f"\nArgosy is ready after {seconds:.1f} s.\n", *(f"  {label:<9} {text}" for label, text in rows.items())]
    lines += ["\nTry it:\n", f"  curl {url}/v1/completions{key} \\"]
    lines += ["    -H 'Content-Type: application/json' \\", f"    -d '{body}'\n"]
    return "\n".join(lines)


def memory_of(ledgers: Sequence[Mapping[str, int]]) -> str:
    """Where the bytes of each rank went, a line each; of many ranks the first, and who tells the rest."""
    lines = [f"{describe_ledger(ledger)} of rank {rank}" for rank, ledger in enumerate(ledgers[:_RANKS_SHOWN])]
    if len(ledgers) > _RANKS_SHOWN:
        lines.append(f"{len(ledgers) - _RANKS_SHOWN} more ranks: argosy doctor --port, or /metrics")
    return f"\n{'':12}".join(lines)


async def drain(address: str, secret: str, seconds: float, num_open: Callable[[], int | None]) -> bool:
    """Have the driver refuse new requests and wait until those it has are answered; False when time ran out first.

    Then the doors get some seconds for theirs, the `num_open` of them (None: nobody knows): last bytes of answers, and
    requests that were on their way and are refused.
    """
    deadline = time.monotonic() + seconds
    try:
        client = await connect_engine(address, secret, timeout_seconds=min(5.0, seconds))
        client.drain()
        while time.monotonic() < deadline:
            values = (await client.stats()).values
            if not any(values.get(name, 0.0) for name in _UNFINISHED):
                await _wait_for_doors(min(deadline, time.monotonic() + _DOORS_SECONDS), num_open)
                return True
            await asyncio.sleep(_POLL_SECONDS)
    except ClusterError:  # no driver, nothing to wait for
        return False
    return False


async def _wait_for_doors(deadline: float, num_open: Callable[[], int | None]) -> None:
    await asyncio.sleep(_LAST_BYTES_SECONDS)
    while num_open() and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)


class _StopSignals:
    """The first signal asks for an orderly end, the second for an immediate one.

    A handler may be called in the middle of another call of itself, so it takes no lock: with an `Event`, two signals
    within microseconds (`timeout` passes on what its group got as well) waited for each other for ever.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._before: dict[int, object] = {}

    @property
    def is_set(self) -> bool:
        """Whether somebody asked to stop."""
        return self._asked_at is not None

    def wait(self, lost: Callable[[], str] = lambda: "") -> str:
        """Until somebody asks to stop, or nothing can be served any more: then what was lost, as `lost` said it."""
        while not self.is_set:
            if (what := lost()) and not self.is_set:  # a signal to the whole group ends Ray's processes as well
                return what
            time.sleep(_POLL_SECONDS)
        return ""

    def install(self) -> None:
        """Be the one who hears of signals, whoever was so before."""
        for number in _STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: it is meant to outlive its terminal
            before = signal.signal(number, self._on_signal)
            self._before.setdefault(number, before)

    def __enter__(self) -> "_StopSignals":
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # it came from there

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is not None:
            if now - self._asked_at < _SAME_SIGNAL_SECONDS:
                return  # one wish, told twice
            raise KeyboardInterrupt
        self._asked_at = now
        with contextlib.suppress(OSError):  # nobody may be there to read it
            os.write(2, b"\nStopping: no new requests; running ones may end. Again to stop at once.\n")


def _doors_folder(config: ServingConfig, own: Path) -> Path:
    """Where HAProxy's files are: with us, or where `ray_node` put them when this node joined a cluster."""
    return Path.home() / haproxy.NODE_FOLDER if config.parallel.ray_address else own


@contextlib.contextmanager
def _joined(config: ServingConfig) -> Iterator[None]:
    """Connected to a cluster that is not ours; whose doors are taken is said before an engine starts."""
    if not config.parallel.ray_address:
        yield  # our own is started with the engine
        return
    from argosy.deploy import doors
    from argosy.deploy.ray_session import RaySession

    session = RaySession.open(config.parallel.ray_address, num_cpus=1)
    try:
        doors.check_free(config.server.port)
        yield
    finally:
        session.close()


def _serve(config: ServingConfig, engine: "Engine", progress: StartProgress, stop: _StopSignals, doors: Path) -> None:
    # As `launch_engine` above.
    from ray import serve
    from ray.exceptions import RayError

    from argosy.deploy.doors import serve_runs
    from argosy.deploy.ray_session import has_live_nodes, lost_part
    from argosy.deploy.serve_app import application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    progress("opening the doors", 0.0)
    was_there, lost = serve_runs(), ""
    try:
        try:
            host = haproxy.listen_at(doors, config.server.host)
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": config.server.port, "keep_alive_timeout_s": 75},
            )
        except (RuntimeError, RayError) as error:  # the proxy did not start: its own words are many lines long
            raise ClusterError(f"the HTTP doors did not open: {_last_line(str(error))}") from error
        try:
            serve.run(application(config, engine.address, engine.secret), name=engine.name, route_prefix="/")
        except (RuntimeError, TimeoutError) as error:  # Serve's words for "it did not start"; its status says why
            raise ClusterError(f"the HTTP doors did not open: {_reason(serve.status())}") from error
        progress("opening the doors", 1.0)
        progress.close()
        if not stop.is_set:
            with contextlib.suppress(BrokenPipeError):  # nobody reads it; clients may still come
                print(ready_block(config, engine, progress.seconds), flush=True)
        is_on = not config.server.disable_log_stats
        with watching(engine.address, engine.secret, is_on=is_on), NodeWatch(has_live_nodes) as nodes:
            lost = stop.wait(lambda: "last node" if nodes.is_lost else lost_part())
        if config.server.drain_seconds > 0 and lost in ("", "GCS"):  # without a raylet all actors end
            seconds = min(config.server.drain_seconds, _WITHOUT_GCS_SECONDS) if lost else config.server.drain_seconds
            asyncio.run(drain(engine.address, engine.secret, seconds, lambda: haproxy.num_open_requests(doors)))
        if lost:
            engine.has_lost_ray = True
            raise ClusterError(
                f"Ray lost its {lost}: killed, maybe for want of memory, or with an agent of Ray's that it shares its "
                "fate with, and nothing can be started there again; start the server anew"
            )
    finally:
        _hush_ray()
        if was_there:
            serve.delete(engine.name)  # others of this cluster go on
        elif not (lost or engine.is_ending):
            serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's


def _reason(status: Any) -> str:
    """The last line of each message that Serve keeps: the error that stopped a replica."""
    apps = status.applications.values()
    messages = [d.message for app in apps for d in app.deployments.values()] + [app.message for app in apps]
    return "; ".join(_last_line(text) for text in messages if text.strip()) or "no reason given"


def _last_line(text: str) -> str:
    """The last line that names an error, or else the last one at all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    return next((line for line in reversed(lines) if "Error: " in line), lines[-1])


def _hush_ray() -> None:
    """Ray says on our standard output that tasks of actors failed which are being ended on purpose."""
    worker: Any = importlib.import_module("ray._private.worker")
    worker._worker_logs_enabled = False


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """For what may not outlive this server; readable by this user only."""
    name = make_owned_folder("argosy-serve-", haproxy.MOST_FOLDER_BYTES)
    try:
        yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


def _set_environment(folder: Path) -> None:
    """Before Ray is imported here and starts anything that inherits it."""
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    if "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ:  # "0" keeps Serve's own proxy
        os.environ.update(haproxy.environment(folder))
    os.environ.update(proxy_guard.ENVIRONMENT)
