"""The worker as a Ray actor: Ray places, watches and kills it; what it does comes over its own connection.

Nothing here imports torch; the process that owns the GPU does so in `run`, by naming the module to run.
"""

import os
from importlib import import_module
from typing import Any

import msgspec
import ray

from argosy.placement.ports import free_port


class WorkerActor:
    """One rank. Made an actor by `cluster.ray_executor`; `run` holds one thread for the rank's whole life."""

    @ray.method(concurrency_group="control")
    def where(self) -> tuple[str, str, int]:
        """This process's node id, its address, and its process id."""
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray's own
        return ray.get_runtime_context().get_node_id(), address, os.getpid()

    @ray.method(concurrency_group="control")
    def free_port(self, host: str) -> int:
        """A port of this node that was free a moment ago."""
        return free_port(host)

    def run(self, module: str, boot: bytes) -> int:
        """Be the rank that `boot` (JSON of a `WorkerBoot`) says, until the driver stops it or goes away."""
        _drop_thread_limit()
        # Imported here: this is the first moment in the process that has the device to itself.
        status: int = import_module(module).run_boot(boot)
        return status


def _drop_thread_limit() -> None:
    """Ray sets OMP_NUM_THREADS to the CPUs that it reserved. Ours is one, a place: the rank knows its share itself."""
    resources = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]  # Ray's own
    reserved = resources.get("CPU", 1.0)
    if os.environ.get("OMP_NUM_THREADS") == str(max(int(reserved), 1)):
        del os.environ["OMP_NUM_THREADS"]


def encode_boot(**fields: Any) -> bytes:
    """The JSON that `run` takes."""
    return msgspec.json.encode(fields)
