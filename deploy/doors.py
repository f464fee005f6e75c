"""The HTTP doors of a Ray cluster, which Ray Serve has once: whose they are, and how those of a killed server end.

The application of `argosy serve` has the name of its engine, so that both are found by one name.
"""

import importlib
from typing import Any, Final

import ray

from argosy.cluster.protocol.errors import ClusterError

ENGINE_PREFIX: Final = "argosy-"


def serve_runs() -> bool:
    """Whether this Ray cluster has a Ray Serve already."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return any(row["namespace"] == "serve" for row in named)


def listens_on() -> tuple[str, int]:
    """Host and port of the Ray Serve that runs."""
    context: Any = importlib.import_module("ray.serve.context")  # Ray's insides: its status does not say it
    config = context._get_global_client().http_config
    return str(config.host), int(config.port)


def engines_with_doors() -> list[str]:
    """Names of the engines, alive or not, that `argosy serve` opened doors for."""
    if not serve_runs():
        return []
    from ray import serve  # a second to import, for nothing where there is none

    return sorted(name for name in serve.status().applications if name.startswith(ENGINE_PREFIX))


def check_free(port: int) -> None:
    """Raise `ClusterError` where the cluster's doors are another server's, or can't be opened at this port.

    Serve keeps the port that it was started with: a second server would say that it is ready and never be reached, and
    the first would have lost its doors. A Serve that has no application, as it stays behind some, is ended.
    """
    if not serve_runs():
        return
    from ray import serve  # as above

    host, found = listens_on()
    if found != port and not serve.status().applications:
        serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's
        return
    if names := engines_with_doors():
        raise ClusterError(
            f"the doors of this Ray cluster, at {host}:{found}, are those of {names[0]}, and a cluster has them once; "
            "stop that server with Ctrl-C, or, where it was killed, end what it left: "
            f"python -m argosy.deploy.end_engine {names[0]}"
        )
    if found != port:
        raise ClusterError(
            f"Ray Serve of this cluster listens at {host}:{found} and takes no second port; end it with "
            "'serve shutdown -y', or have it serve the model as well: 'serve deploy', see deploy/serve_config.yaml"
        )


def end(name: str) -> bool:
    """Close the doors of that engine, and Serve with them where it has nothing else; False when there were none."""
    if name not in engines_with_doors():
        return False
    from ray import serve  # as above

    serve.delete(name)
    if not serve.status().applications:
        serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's
    return True
