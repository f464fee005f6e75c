"""The driver as a detached, named Ray actor: the loop in a thread of its own, and a door for those who look after it.

Ray starts it again when its process dies (`max_restarts=-1`): the constructor begins anew, with the same folder, secret
and name, removes what the predecessor left, and brings up new ranks. Requests of the predecessor are lost; their edges
see the connection end and hear of it.
"""

import contextlib
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from argosy.cluster.driver_loop import DriverLoop, DriverStatus, settle_garbage
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ChannelClosed, ConfigError
from argosy.cluster.protocol.messages import EngineInfo
from argosy.cluster.rank_processes import StartRanks

NAMESPACE: Final = "argosy"
_ANSWER_SECONDS: Final = 30.0
_EXIT_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.1
_REST_SECONDS: Final = 2.0  # between two lives, so that a driver that fails at once does not spin
_log = logging.getLogger(__name__)


class DriverBoot(msgspec.Struct, frozen=True, kw_only=True):
    """Launcher -> driver actor: what to run."""

    name: str
    config: ServingConfig
    info: EngineInfo
    folder: str  # private to this engine, on the driver's node; made when it is not there
    secret: str
    tcp_port: int = 0  # with edges or ranks on other nodes: where the door is; 0: a folder is enough


class DriverActor:
    """Use through `DriverHandle`."""

    def __init__(self, boot: bytes, start_ranks: StartRanks):
        self.boot = msgspec.msgpack.decode(boot, type=DriverBoot)
        _make_private(self.boot.folder)
        self._loop = DriverLoop(
            self.boot.config,
            start_ranks,
            info=self.boot.info,
            folder=self.boot.folder,
            secret=self.boot.secret,
            tcp_host=_node_address() if self.boot.tcp_port else "",
            tcp_port=self.boot.tcp_port,
        )
        self._is_stopping = False
        settle_garbage()
        self._thread = threading.Thread(target=self._run, name="driver-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run()
        status = self._loop.status()
        if status.error_code and status.info is not None and not self._is_stopping:
            # It served and can't any more. What stopped it may be gone later (a node that comes back): begin anew, as
            # after the death of this process. An engine that never got ready stays, so that its launcher reads why.
            _log.error("the driver begins anew after: %s", status.error_message)
            time.sleep(_REST_SECONDS)
            os._exit(1)

    def status(self) -> bytes:
        """How the driver is."""
        return msgspec.msgpack.encode(self._loop.status())

    def door(self) -> tuple[str, str, int]:
        """Where edges connect, what they must say, and this process's id."""
        return self._loop.address, self.boot.secret, os.getpid()

    def stop(self, drain_seconds: float) -> None:
        """Stop the loop and all ranks; returns when they are gone."""
        self._is_stopping = True
        self._loop.stop(drain_seconds)
        self._thread.join(timeout=drain_seconds + _EXIT_SECONDS)
        shutil.rmtree(self.boot.folder, ignore_errors=True)


class DriverHandle:
    """What others hold of a driver actor."""

    def __init__(self, actor: Any, name: str):
        self._actor, self.name = actor, name
        self.on_stopped: Callable[[], None] = lambda: None  # what to give back once nothing runs any more
        self.is_cut_off: Callable[[], bool] = lambda: False  # whether the cluster under it ends, and answers nothing

    @classmethod
    def create(cls, boot: DriverBoot, start_ranks: StartRanks) -> "DriverHandle":
        """Start the actor, on this process's node; `status` tells how it goes.

        Its edges know it by an address of that node, which also was asked for a free port: begun anew on another node,
        where Ray would as soon put it, it would never be found again.
        """
        here = ray.get_runtime_context().get_node_id()
        actor = (
            ray.remote(DriverActor)
            .options(
                name=boot.name,
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
                max_restarts=-1,
                max_task_retries=0,
                max_concurrency=4,
            )
            .remote(msgspec.msgpack.encode(boot), start_ranks)
        )
        return cls(actor, boot.name)

    @classmethod
    def find(cls, name: str) -> "DriverHandle":
        """The driver of that name in the cluster that this process is connected to."""
        try:
            return cls(ray.get_actor(name, namespace=NAMESPACE), name)
        except ValueError as error:
            raise ChannelClosed(f"no driver named {name!r} runs in this Ray cluster") from error

    def status(self) -> DriverStatus:
        """Ask how it is. Raises `ChannelClosed` when it can't be reached."""
        return msgspec.msgpack.decode(self._get(self._actor.status.remote(), _ANSWER_SECONDS), type=DriverStatus)

    def door(self) -> tuple[str, str, int]:
        """Where edges connect, what they must say, and the driver's process id."""
        address, secret, pid = self._get(self._actor.door.remote(), _ANSWER_SECONDS)
        return address, secret, pid

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Stop driver and ranks. May be called twice."""
        with contextlib.suppress(ChannelClosed):  # cut off: nothing to ask
            reference = self._actor.stop.remote(drain_seconds)
            deadline = time.monotonic() + drain_seconds + _EXIT_SECONDS + _ANSWER_SECONDS
            while time.monotonic() < deadline and not self.is_cut_off():
                if ray.wait([reference], timeout=_LOOK_SECONDS)[0]:
                    self._get(reference, _ANSWER_SECONDS)
                    break
        if self.is_cut_off():
            return  # it ends with its cluster
        with contextlib.suppress(ray.exceptions.RayError):  # dead already
            ray.kill(self._actor, no_restart=True)
        deadline = time.monotonic() + _EXIT_SECONDS
        while time.monotonic() < deadline:  # the name is free again once Ray has noticed
            with contextlib.suppress(ray.exceptions.RayError):  # no answer: look again
                if not any(row["name"] == self.name for row in ray.util.list_named_actors(all_namespaces=True)):
                    break
            time.sleep(0.02)
        self.on_stopped()

    def _get(self, reference: Any, seconds: float) -> Any:
        try:
            return ray.get(reference, timeout=seconds)
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ChannelClosed(f"the driver actor does not answer: {lines[-1].strip()}") from error


def _node_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray's own
    return address


def _make_private(folder: str) -> None:
    """A folder that is ours alone; refuses one that somebody else put there."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)  # on a node whose Ray keeps its files elsewhere
    with contextlib.suppress(FileExistsError):  # looked at below
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"{folder} is not a private folder of this user; remove it")
