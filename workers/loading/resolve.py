"""From what a user names as model to a folder on this machine: a path, or a name on the Hugging Face hub.

The one place that fetches. The door fetches first and pins the commit; a rank on another node, where the door's folder
does not exist, fetches the same commit by the same name. Who may read what is the hub library's affair: it takes
HF_TOKEN, or the token of `hf auth login`, and neither is ever part of our settings.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from argosy.cluster.protocol.errors import WeightError
from argosy.placement.model_sources import why_not_served

HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# never .py, .bin or .pt: no code and no pickle of a stranger comes onto this machine
WANTED_FILES: Final = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "tokenizer*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_model(
    model: str, *, hub_name: str | None = None, revision: str | None = None, download_dir: str | None = None
) -> Path:
    """The folder of `model`: a path, or a hub name at `revision` (a branch, tag or commit; default: main).

    `hub_name` is where a path came from on another machine. A commit is looked for in the cache first; a branch is
    asked for at the hub, and taken from the cache where there is no network. `download_dir` replaces the hub's own
    cache. Raises `WeightError` in one line when there is no such folder and the hub has no answer.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise WeightError(model, "", "is a file; name the folder that holds config.json and *.safetensors")
    if hub_name is not None:
        return fetch(hub_name, revision, download_dir)
    if why := why_not_served(model):
        raise WeightError(model, "", why)
    if not HUB_NAME.fullmatch(model):
        raise WeightError(model, "", "is neither a folder here nor a name on the Hugging Face hub")
    return fetch(model, revision, download_dir)


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None


def fetch(
    name: str,
    revision: str | None = None,
    download_dir: str | None = None,
    *,
    files: Sequence[str] = WANTED_FILES,
) -> Path:
    """The folder of a hub name in the cache, with those of its `files` that are not there yet downloaded."""
    # lazy: most models are folders, and the hub client takes a second to import
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download(*, local_only: bool) -> Path:
        found = snapshot_download(
            name,
            revision=revision,
            cache_dir=Path(download_dir).expanduser() if download_dir else None,
            allow_patterns=list(files),
            local_files_only=local_only,
        )
        return Path(found)

    where = f"{name}@{revision}" if revision else name
    if revision is not None and _COMMIT.fullmatch(revision):
        try:
            return download(local_only=True)
        except (LocalEntryNotFoundError, ValueError, OSError):
            pass
    try:
        return download(local_only=False)
    except GatedRepoError as error:
        raise WeightError(where, "", "its owner lets only some read it: ask on its page, then set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise WeightError(where, "", "the model has no such revision; name a branch, a tag or a commit") from error
    except RepositoryNotFoundError as error:
        raise WeightError(
            where, "", "is no folder here, and no such model is on the hub (or HF_TOKEN is missing)"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else "the hub can't be reached"
        text = f"is no folder here, not in the Hugging Face cache, and can't be downloaded: {why}"
        raise WeightError(where, "", text) from error
