"""End engines that a killed server left in a Ray cluster: `python -m argosy.deploy.end_engine [NAME ...]`.

A server that is stopped ends its engine. One that is killed can't, and in a cluster that is not its own the engine goes
on and holds its devices. Without a name, the engines that run are listed.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import ray

from argosy.cluster.driver_actor import NAMESPACE, DriverHandle
from argosy.cluster.protocol.errors import ServingError
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
    """The names of all engines in the cluster that this process is connected to."""
    rows = ray.util.list_named_actors(all_namespaces=True)
    return sorted(row["name"] for row in rows if row["namespace"] == NAMESPACE and row["name"].startswith("argosy-"))


def end(name: str) -> None:
    """Stop driver and ranks of that engine and give back their room. Raises `ChannelClosed` when there is none."""
    driver = DriverHandle.find(name)
    driver.on_stopped = lambda: ray_cluster.release(f"{name}-ranks")
    driver.stop()


if __name__ == "__main__":
    raise SystemExit(main())
