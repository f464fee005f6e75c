"""From a model's name to a folder on this machine: a path as it is, a hub name fetched once into the hub's cache."""

import os
from pathlib import Path
from typing import Final

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import WeightError
from argosy.deploy import settings
from argosy.deploy.tokenizer import Tokenizer

# everything but other formats of the same weights
_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
DEFAULT_MODEL_NAME: Final = "argosy-default"


def localize(config: ServingConfig) -> ServingConfig:
    """The config with folders instead of hub names; requests go on using the name that the user gave.

    Raises `WeightError` when there is neither such a folder nor such a model on the hub.
    """
    model = config.model
    folder = model_folder(model.model)
    names = model.served_model_name or (_public_name(model.model),)
    tokenizer = model_folder(model.tokenizer) if model.tokenizer else None
    localized: ServingConfig = config.replace(
        model=model.replace(model=folder, served_model_name=names, tokenizer=tokenizer)
    )
    return localized


def model_folder(name: str) -> str:
    """Where the model of that name lies on this machine; fetched first when it is a hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.exists():
        raise WeightError(name, "", "is a file; name the folder that holds config.json and *.safetensors")
    if not settings.is_hub_name(name):
        raise WeightError(name, "", "no such folder, and no hub name such as Qwen/Qwen3-0.6B either")
    return _fetch(name)


def load_tokenizer(config: ServingConfig) -> Tokenizer | None:
    """The tokenizer of a localized config; none when it is to be left out."""
    model = config.model
    if model.skip_tokenizer_init:
        return None
    return Tokenizer.load(model.tokenizer or model.model, chat_template=model.chat_template)


def _public_name(name: str) -> str:
    return DEFAULT_MODEL_NAME if name == settings.default_model() else name


def _fetch(name: str) -> str:
    # Only when a hub name is given: it takes 0.3 s to import and is not needed for folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return str(snapshot_download(name, allow_patterns=list(_FILES)))
    except RepositoryNotFoundError as error:
        raise WeightError(
            name, "", "no such folder here, and no such model on the hub (or it needs HF_TOKEN)"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        where = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else "the hub can't be reached"
        raise WeightError(name, "", f"no such folder here, and it can't be fetched: {where}") from error
