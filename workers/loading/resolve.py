"""From what a user names as model to a folder on this machine: a path, or a name on the Hugging Face hub."""

import re
from pathlib import Path

from argosy.cluster.protocol.errors import WeightError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# never .py, .bin or .pt: no code and no pickle of a stranger comes onto this machine
WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "tokenizer*"]


def resolve_model(model: str) -> Path:
    """The folder of `model`. A hub name is looked for in the local cache first, then downloaded.

    Raises `WeightError` in one line when there is no such folder and the hub has no answer.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise WeightError(model, "", "is a file; name the folder that holds config.json")
    if not HUB_NAME.fullmatch(model):
        raise WeightError(model, "", "is neither a folder here nor a name on the Hugging Face hub")
    # lazy: most models are folders, and the hub client takes a second to import
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=WANTED_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):
        pass
    try:
        return Path(snapshot_download(model, allow_patterns=WANTED_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightError(
            model, "", f"is no folder here, not in the Hugging Face cache, and can't be downloaded ({reason:.200})"
        ) from error
