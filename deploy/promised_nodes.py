"""How many nodes `ray up` promised: its workers join half a minute after it has returned, and a plan should know them.

`ray up` leaves its filled-out configuration on the head, in the home of the user that Ray runs as. On any other machine
there is none, and nothing is waited for.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import yaml

WAIT_SECONDS: Final = 120.0
_LOOK_SECONDS: Final = 0.5
_FILE: Final = "ray_bootstrap_config.yaml"


def promised_nodes(home: Path) -> int:
    """The head and the workers that are to be there at the least; 0 where nothing was promised."""
    try:
        content: Any = yaml.safe_load((home / _FILE).read_text(encoding="utf-8"))
        kinds = content["available_node_types"]
        head = content.get("head_node_type")
        workers = sum(int(kind.get("min_workers", 0)) for kind in kinds.values())
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError):
        return 0
    return workers + (head in kinds)


def wait_for_nodes(count_nodes: Callable[[], int], home: Path, tell: Callable[[str, float], None]) -> str:
    """Until as many nodes are alive as were promised, or the time is up; then a sentence about those that are not."""
    promised = promised_nodes(home)
    deadline = time.monotonic() + WAIT_SECONDS
    while (alive := count_nodes()) < promised:
        if time.monotonic() >= deadline:
            return (
                f"{alive} of the {promised} nodes that 'ray up' promised are there after {WAIT_SECONDS:g} s; going on "
                "without the rest ('ray monitor ray_cluster.yaml' says what keeps them)"
            )
        tell(f"waiting for nodes ({alive} of {promised})", alive / promised)
        time.sleep(_LOOK_SECONDS)
    return ""
