"""From a model's name to a folder on this machine, and what follows: its public name, its tokenizer."""

from pathlib import Path
from typing import Final

from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy import settings
from argosy.deploy.tokenizer import Tokenizer
from argosy.workers.loading.resolve import commit_of, resolve_model

DEFAULT_MODEL_NAME: Final = "argosy-default"


def localize(config: ServingConfig) -> ServingConfig:
    """The config with folders instead of hub names; requests go on using the name that the user gave.

    What came from the hub is pinned to the commit that was found, so that all nodes read the same files. Raises
    `WeightError` when there is neither such a folder nor such a model on the hub.
    """
    model = config.model
    changes: dict[str, object] = {"served_model_name": model.served_model_name or (_public_name(model.model),)}
    folder = Path(model_folder(model.model, model.revision, model.download_dir))
    changes["model"] = str(folder)
    if not Path(model.model).expanduser().is_dir():
        changes |= {"hub_name": model.model, "revision": commit_of(folder) or model.revision}
    tokenizer_revision = model.tokenizer_revision or (None if model.tokenizer else model.revision)
    if model.tokenizer:
        changes["tokenizer"] = model_folder(model.tokenizer, tokenizer_revision, model.download_dir)
    elif model.tokenizer_revision and "hub_name" in changes:
        changes["tokenizer"] = model_folder(model.model, tokenizer_revision, model.download_dir)
    localized: ServingConfig = config.replace(model=model.replace(**changes))
    return localized


def model_folder(name: str, revision: str | None = None, download_dir: str | None = None) -> str:
    """Where the model of that name lies on this machine; fetched first when it is a hub name."""
    return str(resolve_model(name, revision=revision, download_dir=download_dir).resolve())


def load_tokenizer(config: ServingConfig) -> Tokenizer | None:
    """The tokenizer of a localized config; none when it is to be left out."""
    model = config.model
    if model.skip_tokenizer_init:
        return None
    return Tokenizer.load(model.tokenizer or model.model, chat_template=model.chat_template)


def _public_name(name: str) -> str:
    return DEFAULT_MODEL_NAME if name == settings.default_model() else name
