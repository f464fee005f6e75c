"""`ray` with the environment that a node of our clusters needs: `python -m argosy.deploy.ray_node start --head ...`.

Ray and Ray Serve read these when they start, on each node, so that no later command can set them: a token without which
nobody is let in, how soon a lost host is noticed, HAProxy as Serve's front with its open ends closed, our limits in
Serve's own proxy, and no reports to others. What is set already stands.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from argosy.cluster.protocol.errors import ConfigError
from argosy.deploy import haproxy, proxy_guard

# A host that was cut off is noticed after 9 s instead of 66; any shorter, and one that stalls would be taken for dead.
_HEALTH: Final = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
# Serve starts HAProxy anew whenever a replica comes or goes; the old one must live until its last answer has ended.
_REPLICAS_COME_AND_GO: Final = {
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "600",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
}
_NO_TOKEN: Final = (
    "this node has no Ray token: run 'ray get-auth-token --generate' where you call 'ray up' and have "
    "~/.ray/auth_token on all nodes (ray_cluster.yaml does), or set RAY_AUTH_MODE=disabled on a network of your own"
)


def main(words: Sequence[str]) -> int:
    """Become `ray` with these words; returns only when that is refused."""
    try:
        environment = {**node_environment(os.environ, Path.home()), **os.environ}
    except ConfigError as error:
        print(f"argosy: {error}", file=sys.stderr)
        return 2
    os.execve(sys.executable, [sys.executable, "-m", "ray.scripts.scripts", *words], environment)


def node_environment(given: Mapping[str, str], home: Path) -> dict[str, str]:
    """What a node's Ray must find in its environment. Raises `ConfigError` when anybody could use the node."""
    found = {**_HEALTH, "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0", **proxy_guard.ENVIRONMENT}
    if "RAY_AUTH_MODE" not in given:
        has_token = any(given.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
        if not has_token and not (home / ".ray" / "auth_token").is_file():
            raise ConfigError(_NO_TOKEN)
        found["RAY_AUTH_MODE"] = "token"
    folder = home / haproxy.NODE_FOLDER
    if "RAY_SERVE_ENABLE_HA_PROXY" not in given and len(os.fsencode(folder)) <= haproxy.MOST_FOLDER_BYTES:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        found |= haproxy.environment(folder) | _REPLICAS_COME_AND_GO
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
