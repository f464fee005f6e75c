"""Argosy serves large language models on a Ray cluster.

The public names are loaded when first used, so that `import argosy` needs neither torch nor Ray:

    from argosy import LLM, SamplingParams
    LLM("path/to/model").generate("Once upon a time", SamplingParams(max_tokens=16))
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argosy.cluster.protocol.sampling import SamplingParams
    from argosy.deploy.client import AsyncClient, Client, Job
    from argosy.deploy.offline import LLM
    from argosy.deploy.outputs import CompletionOutput, RequestOutput

__version__ = "0.1.0"

_HOMES = {
    "LLM": "argosy.deploy.offline",
    "SamplingParams": "argosy.cluster.protocol.sampling",
    "RequestOutput": "argosy.deploy.outputs",
    "CompletionOutput": "argosy.deploy.outputs",
    "Client": "argosy.deploy.client",
    "AsyncClient": "argosy.deploy.client",
    "Job": "argosy.deploy.client",
}

__all__ = ["LLM", "AsyncClient", "Client", "CompletionOutput", "Job", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'argosy' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
