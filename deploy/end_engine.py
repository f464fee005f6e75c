"""End engines that a killed server left in a Ray cluster: `python -m argosy.deploy.end_engine [NAME ...]`.

A server that is stopped ends its engine. One that is killed can't: in a cluster that is not its own, engine and doors
go on and hold devices and a port. Without a name, what runs is listed.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import ray

from argosy.cluster.driver_actor import NAMESPACE, DriverHandle
from argosy.cluster.protocol.errors import ChannelClosed, ServingError
from argosy.deploy import doors
from argosy.deploy.doors import ENGINE_PREFIX
from argosy.deploy.ray_session import RaySession
from argosy.placement import ray_cluster


def main(words: Sequence[str] | None = None) -> int:
    """The command line above; 1 when an engine could not be found."""
    parser = argparse.ArgumentParser(
        prog="python -m argosy.deploy.end_engine", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as argosy-1f2e3d4c; none: list what runs")
    parser.add_argument("--ray-address", default=os.environ.get("RAY_ADDRESS", "auto"), help="default: $RAY_ADDRESS")
    args = parser.parse_args(words)
    try:
        session = RaySession.open(args.ray_address, num_cpus=1)
        try:
            for name in args.names:
                end(name)
                print(f"ended {name}")
            if not args.names:
                print("\n".join(running()) or "no engine runs here")
        finally:
            session.close()
    except ServingError as error:
        print(f"argosy: {error}", file=sys.stderr)
        return 1
    return 0


def running() -> list[str]:
    """The names of all engines in the cluster that this process is connected to, and of those that left doors only."""
    rows = ray.util.list_named_actors(all_namespaces=True)
    names = {row["name"] for row in rows if row["namespace"] == NAMESPACE and row["name"].startswith(ENGINE_PREFIX)}
    return sorted(names | set(doors.engines_with_doors()))


def end(name: str) -> None:
    """Close that engine's doors, stop its driver and ranks and give back their room.

    Raises `ChannelClosed` when there is none of it.
    """
    had_doors = doors.end(name)
    try:
        driver = DriverHandle.find(name)
    except ChannelClosed:
        if had_doors:
            return
        raise
    driver.on_stopped = lambda: ray_cluster.release(f"{name}-ranks")
    driver.stop()


if __name__ == "__main__":
    raise SystemExit(main())
