"""A Ray cluster of our own on this machine, or one that was named: never somebody else's by accident.

Ours has its own temporary folder and free ports, listens on loopback, has no dashboard and asks for a token. It ends
with this process, however that ends (Ray's processes share its fate).
"""

import atexit
import contextlib
import importlib
import logging
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, Final

import ray
from ray._private.authentication.authentication_token_generator import generate_new_authentication_token

from argosy.cluster.driver_actor import NAMESPACE
from argosy.cluster.protocol.errors import ClusterError
from argosy.deploy.owned_folder import MOST_RAY_BYTES, RAY_PREFIX, make_owned_folder

_OBJECT_STORE_BYTES: Final = 100 * 1024 * 1024  # steps and tokens don't travel as Ray objects: the least will do
_OWN_CLUSTER: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray replaces a loopback address by the machine's outward one and then listens on every interface, except where it
    # takes itself to be confined to one machine. That switch is named after the systems that it was made for.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_REACH_SECONDS: Final = 3.0
_VITAL: Final = {"raylet": "raylet", "gcs_server": "GCS"}  # Ray's names for kinds of its processes, and everybody's
_AUTH: Final = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class RaySession:
    """This process's connection to Ray. `close` undoes only what `open` did."""

    def __init__(self, *, folder: str = "", connected: bool = False, environment: dict[str, str | None] | None = None):
        self._folder, self._connected = folder, connected
        self._environment = environment or {}
        self._abandoned = False

    @property
    def is_own(self) -> bool:
        """Whether the cluster was started here and ends with us."""
        return bool(self._folder)

    @property
    def is_ending(self) -> bool:
        """Whether parts of our own cluster have ended by themselves.

        So it is when a signal goes to the whole process group, as service managers and `timeout` send it. The rest of
        the cluster answers nothing any more, which takes Ray a minute to notice, and only has to be ended.
        """
        node: Any = ray._private.worker._global_node
        return self.is_own and (self._abandoned or node is None or bool(node.dead_processes()))

    @property
    def folder(self) -> str:
        """Our own cluster's private folder, removed at the end; empty for a cluster that isn't ours."""
        return self._folder

    @classmethod
    def open(cls, address: str | None, *, num_cpus: int, num_gpus: int | None = None) -> "RaySession":
        """The session this process already has; else the cluster at `address`; else one of our own."""
        if ray.is_initialized():
            return cls()
        if address:
            return cls._join(address)
        return cls._start(num_cpus, num_gpus)

    @classmethod
    def _join(cls, address: str) -> "RaySession":
        if address == "auto":
            address = _find_cluster()
        _check_reachable(address)
        environment: dict[str, str | None] = {}
        if "RAY_AUTH_MODE" not in os.environ and _has_token():
            environment = {"RAY_AUTH_MODE": None}  # unset again at the end
            os.environ["RAY_AUTH_MODE"] = "token"
            _forget_cached_auth()
        session = cls(connected=True, environment=environment)
        try:
            _check_admitted(address)
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            session.close()
            raise ClusterError(f"no Ray cluster can be joined at {address!r}: {_one_line(error)}") from error
        except ClusterError:
            session.close()
            raise
        return session

    @classmethod
    def _start(cls, num_cpus: int, num_gpus: int | None) -> "RaySession":
        folder = make_owned_folder(RAY_PREFIX, MOST_RAY_BYTES)  # mode 0700: the token and all logs are in it
        changes = dict(_OWN_CLUSTER)
        if "RAY_AUTH_MODE" not in os.environ:  # an explicit choice of the operator stands
            changes |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_write_token(Path(folder)))}
        environment = {name: os.environ.get(name) for name in (*changes, *_AUTH)}
        session = cls(folder=folder, connected=True, environment=environment)
        os.environ.update(changes)
        if "RAY_AUTH_TOKEN_PATH" in changes:
            os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over our file
        _forget_cached_auth()
        _confine_to_loopback(True)
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                namespace=NAMESPACE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=folder,
                _node_ip_address="127.0.0.1",
            )
        except (
            BaseException
        ) as error:  # whatever stops Ray from starting, Ctrl-C too: undo our part, say it in one line
            session.close()
            if not isinstance(error, Exception):
                raise
            raise ClusterError(f"a local Ray cluster could not be started: {_one_line(error)}") from error
        return session

    def abandon(self) -> None:
        """End our own cluster, which has lost its raylet or its GCS, and have this process exit with 1 when it ends.

        Ray's own way says goodbye to them first and, where nobody hears it, ends the process on the spot: without a
        word of what happened, and with the session's folder left. `close` is still to be called.
        """
        assert self.is_own
        self._connected, self._abandoned = False, True
        node: Any = ray._private.worker._global_node
        node.kill_all_processes(check_alive=False, allow_graceful=False)
        atexit.unregister(ray.shutdown)
        atexit.register(_exit_before_ray)

    def close(self) -> None:
        """Leave, and end the cluster if it is ours. May be called twice."""
        if self._connected:
            self._connected = False
            ray.shutdown()
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if self._environment:
            _forget_cached_auth()
        if self._folder:
            if self._environment:
                _confine_to_loopback(False)
            shutil.rmtree(self._folder, ignore_errors=True)
        self._environment = {}


def _find_cluster() -> str:
    """Where "auto" leads: what `ray start` noted, else a cluster that a process of this machine belongs to.

    Ray would also take those that servers and engines here keep for themselves: it asks for one at the machine's
    outward address, where ours don't listen, and gives up after six minutes. They, too, are on loopback and noted
    nowhere. Raises `ClusterError` when there is no other.
    """
    named = os.environ.get("RAY_ADDRESS", "auto")  # it goes before "auto", as Ray has it
    if named not in ("", "auto"):
        return named
    services: Any = importlib.import_module("ray._private.services")
    noted = services.find_bootstrap_address(None)
    running = sorted(services.find_gcs_addresses())
    others = [one for one in running if one == noted or not one.startswith(("127.", "localhost:", "[::1]:"))]
    if not others:
        private = "; what runs are clusters of servers or engines of this machine, which are theirs alone"
        raise ClusterError(
            f"no Ray cluster was found on this machine{private if running else ''}: start one with 'ray up' or "
            "'ray start --head', or name one by its host:port with --ray-address"
        )
    return str(noted if noted in others else others[0])


def _check_reachable(address: str) -> None:
    """Say in a second what Ray would take a minute to find out: that nobody listens there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # a form of Ray's own
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster can be joined at {address!r}: nobody answers there ({error}); start it with 'ray up' or "
            "'ray start --head', or name another with --ray-address"
        ) from error


def _has_token() -> bool:
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return given or (Path.home() / ".ray" / "auth_token").is_file()


def _check_admitted(address: str) -> None:
    """Ask the cluster one small thing: with a wrong token `ray.init` tries for twenty seconds and does not say why."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:  # Ray's insides: where they have moved, `ray.init` says what it can
        grpc: Any = importlib.import_module("grpc")
        utils: Any = importlib.import_module("ray._private.grpc_utils")
        messages: Any = importlib.import_module("ray.core.generated.gcs_service_pb2")
        services: Any = importlib.import_module("ray.core.generated.gcs_service_pb2_grpc")
    except ImportError:
        return
    with contextlib.closing(utils.init_grpc_channel(address)) as channel:
        try:
            ask = services.NodeInfoGcsServiceStub(channel).GetClusterId
            ask(messages.GetClusterIdRequest(), timeout=_REACH_SECONDS)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ClusterError(
                    f"the Ray cluster at {address!r} wants its token: copy ~/.ray/auth_token from where 'ray up' was "
                    "called, or set RAY_AUTH_TOKEN_PATH to a file with it"
                ) from error


def _write_token(folder: Path) -> Path:
    path = folder / "auth_token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(generate_new_authentication_token())
    return path


def _forget_cached_auth() -> None:
    """Ray reads mode and token once, possibly when it was imported; make it read again."""
    with contextlib.suppress(ImportError, AttributeError):  # a Ray that keeps neither
        raylet: Any = ray._raylet
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def _confine_to_loopback(confined: bool) -> None:
    """The switch above, for this process, which may have imported Ray before it was set."""
    with contextlib.suppress(ImportError, AttributeError):  # a Ray without the switch
        constants: Any = ray._private.ray_constants
        constants.ENABLE_RAY_CLUSTER = not confined


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def lost_part() -> str:
    """Which process of a cluster that this process started has died without which it can't go on; else nothing."""
    node: Any = ray._private.worker._global_node
    died = {kind for kind, _ in node.dead_processes()} if node is not None else set()
    return next((name for kind, name in _VITAL.items() if kind in died), "")


def _exit_before_ray() -> None:
    """What Ray's library does after the interpreter's end is to crash, where nobody said goodbye to its cluster."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def has_live_nodes() -> bool:
    """Whether the cluster that this process is connected to has a node that lives."""
    nodes: Any = ray.nodes  # Ray gives it no types
    return any(node["Alive"] for node in nodes())
