"""One JSON object of a model folder, read key by key: what is missing or wrong is named with file, key and value."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from argosy.cluster.protocol.errors import WeightError

CONFIG_FILE: Final = "config.json"
MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises `WeightError` when it is absent, too large or not an object."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise WeightError(path.name, "", f"is larger than {MAX_CONFIG_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightError(str(path), "", "is missing: a model folder needs it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(str(path), "", f"is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightError(str(path), "", f"must hold a JSON object, not {type(value).__name__}")
    return value


class Reader:
    """Typed look-ups in one object. `names`: how this object spells our keys, where it spells them otherwise."""

    def __init__(self, file: str, values: Mapping[str, Any], prefix: str = "", names: Mapping[str, str] | None = None):
        self.file, self.values, self.prefix = file, values, prefix
        self.names = names or {}

    def spelt(self, key: str) -> str:
        """The key as this object has it."""
        other = self.names.get(key)
        return key if other is None or (other not in self.values and key in self.values) else other

    def get(self, key: str) -> Any:
        """The value as it stands; None when absent."""
        return self.values.get(self.spelt(key))

    def wrong(self, key: str, value: object, problem: str) -> WeightError:
        """The error for a value that can't be right."""
        shown = repr(value)
        return WeightError(self.file, self.prefix + self.spelt(key), f"{shown[:80]}: {problem}")

    def integer(self, key: str, low: int, high: int = 2**31 - 1, default: int | None = None) -> int:
        """A whole number from `low` to `high`; null counts as absent."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(key, value, f"must be an integer from {low} to {high}")
        return value

    def number(self, key: str, above: float, most: float, default: float | None = None) -> float:
        """A finite number above `above` and at most `most`."""
        value = self._get(key, default)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not ok or not above < value <= most:
            raise self.wrong(key, value, f"must be a number above {above:g} and at most {most:g}")
        return float(value)

    def optional_number(self, key: str, above: float, most: float) -> float | None:
        """The same; None where the file says nothing or null."""
        return None if self.get(key) is None else self.number(key, above, most)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers above 0."""
        value = self._get(key, None)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in value)
        ):
            raise self.wrong(key, value, f"must be a list of {count} numbers above 0")
        return tuple(float(x) for x in value)

    def boolean(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "must be true or false")
        return value

    def switch(self, rule: bool | str) -> bool:
        """A family's switch: fixed, or a config key."""
        return rule if isinstance(rule, bool) else self.boolean(rule)

    def _get(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            if default is None:
                raise WeightError(self.file, self.prefix + self.spelt(key), "is missing")
            return default
        return value
