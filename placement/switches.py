"""Switches of the environment of ranks, for who looks for the cause of something: docs/gpus.md has all of them."""

import os

from argosy.cluster.protocol.errors import ConfigError


def read_switch(name: str) -> bool | None:
    """Whether it is on; None where nobody set it. Raises `ConfigError`: "false" is no wish for the contrary."""
    text = os.environ.get(name, "").strip()
    if text not in ("", "0", "1"):
        raise ConfigError(f"{name}={text!r} in the environment of a rank: must be 0 or 1; leave it out for what suits")
    return text == "1" if text else None


def read_count(name: str, least: int) -> int | None:
    """The whole number that it is; None where nobody set it. Raises `ConfigError`."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ConfigError(f"{name}={text!r} in the environment of a rank: must be a whole number from {least} on")
    return int(text)
