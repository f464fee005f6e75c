"""The HTTP doors as a Ray Serve application: a replica is a process with a tokenizer and a connection to the driver.

Tokens come over that connection in one message a step, never as a Ray object each. `argosy serve` runs it; so does
anybody with a Ray cluster, by the builder:

    serve run argosy.deploy.serve_app:build model=Qwen/Qwen3-0.6B tensor_parallel_size=2
    serve deploy deploy/serve_config.yaml        # which explains itself; replicas by load, down to none
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
import ray
from ray import serve
from ray.serve import Application

from argosy.cluster.protocol.config import ServerConfig, ServingConfig
from argosy.cluster.protocol.errors import ChannelClosed, StartupTimeout
from argosy.cluster.replica_client import connect_engine
from argosy.deploy import settings
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_app import build_http_app
from argosy.deploy.launch import Engine, launch_engine
from argosy.deploy.model_folder import load_tokenizer, localize

logger = logging.getLogger(__name__)

_CONNECT_SECONDS: Final = 30.0
_HEALTH_PERIOD_SECONDS: Final = 5.0
_CORES_A_DOOR: Final = 8
_MOST_DOORS: Final = 8


# A replica is a process of its own. Serve asks for the app by a function without arguments, once the replica stands.
_app_of: dict[str, Any] = {}


def _app_of_this_replica() -> Any:
    return _app_of["this replica"]


def _set_app(app: Any) -> None:
    # A function, because Ray sends the class below by value: written there, the dict would be a copy of this one.
    _app_of["this replica"] = app


def confine_replica() -> None:
    """Have this replica take calls of other replicas at its node's own address alone.

    When its class stands, Serve opens a port for them on every network of the machine and unpickles what comes; a token
    is all that guards it. Where Ray has other code in that place nothing is changed.
    """
    with contextlib.suppress(ImportError, AttributeError):  # other code there
        from ray.serve._private import replica

        module: Any = replica
        listen: Callable[[Any, str], int] = module.add_port_to_grpc_server
        node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray's
        host = f"[{node}]" if ":" in node else node

        def listen_here(server: Any, address: str) -> int:
            return listen(server, address.replace("[::]:", f"{host}:", 1))

        module.add_port_to_grpc_server = listen_here


# No CPU is reserved: ranks are placed by the plan, and a small machine must not lack room for its own door.
@serve.deployment(
    name="Door", health_check_period_s=_HEALTH_PERIOD_SECONDS, ray_actor_options={"num_cpus": 0}, max_queued_requests=-1
)
@serve.ingress(_app_of_this_replica)
class Door:
    """One replica of the doors."""

    async def __init__(self, config_json: bytes, address: str, secret: str):  # type: ignore[misc]  # Serve awaits it
        config = msgspec.json.decode(config_json, type=ServingConfig)
        confine_replica()
        self._engine: Engine | None = None
        if not address:
            # Deployed without `argosy serve`: each replica has an engine of its own, and Serve has as many as it needs.
            self._engine = await asyncio.to_thread(launch_engine, config)
            address, secret = self._engine.address, self._engine.secret
        self._client = await connect_engine(
            address,
            secret,
            timeout_seconds=_CONNECT_SECONDS,
            patience_seconds=config.parallel.start_deadline_seconds,  # Ray starts a driver that died again
            max_moves=config.scheduler.max_recoveries,
        )
        name = serve.get_replica_context().replica_id.unique_id if num_doors(config.server) > 1 and address else ""
        gateway = Gateway(self._client, load_tokenizer(config), config)
        _set_app(build_http_app(gateway, config.server, door=name, sends_ids=False))

    async def __del__(self) -> None:
        """Serve calls it when the replica is to go: the engine that it started goes with it."""
        if engine := getattr(self, "_engine", None):
            await asyncio.to_thread(engine.close)

    async def check_health(self) -> None:
        """Raise when this replica can't serve any more: Serve then replaces it, and the new one connects anew."""
        if self._client.closed:
            raise ChannelClosed(f"the engine's driver has gone: {self._client.closed_reason}")
        try:
            await self._client.stats()
        except (StartupTimeout, ChannelClosed):
            # Busy, rebuilding its ranks, or beginning anew: /health says so to those who ask, and a new replica of the
            # doors would not help, but lose the answers that wait here.
            logger.warning("the driver did not answer a health check in time")


def application(config: ServingConfig, address: str, secret: str) -> Application:
    """The application in front of an engine that runs (`address`), or of one that the replica starts (empty)."""
    # The driver's bounded queue refuses, since it can say when to come back; Serve's own limit stays above it.
    most = config.scheduler.max_num_seqs + config.scheduler.max_num_waiting + 64
    door: Any = Door  # the decorator made a Deployment of it
    door = door.options(
        max_ongoing_requests=most,
        graceful_shutdown_timeout_s=config.server.drain_seconds,
        logging_config={"enable_access_log": False},  # a line for each request is an eighth of what it costs the door
    )
    if address:
        # beside the one proxy, on the head: a hop less, and no door open on the network between the nodes
        here = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
        door = door.options(ray_actor_options=here, num_replicas=num_doors(config.server))
    bound: Application = door.bind(msgspec.json.encode(config), address, secret)
    return bound


def num_doors(server: ServerConfig) -> int:
    """How many processes share the text and the events: one makes some 25,000 events a second on a fast core."""
    if server.api_server_count is not None:
        return server.api_server_count
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // _CORES_A_DOOR, _MOST_DOORS))


def build(args: Mapping[str, Any]) -> Application:
    """Builder for `serve run` and `serve deploy`; `args` are the flags of `argosy serve` by name."""
    given = {"model": settings.default_model(), **args}
    config, ignored = settings.make_config(settings.plan_what_is_open(given, "one"))
    if text := settings.describe_ignored(ignored):
        logger.warning(text)
    return application(localize(config), "", "")
