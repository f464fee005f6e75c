"""Requests for `argosy simulate`: when they come, how long they are, which prefix they share; seeded and streamed.

A trace file has one request a line, JSON such as {"arrival": 0.25, "input": 512, "output": 128, "prefix": 3,
"prefix_len": 256} (the last two optional), or CSV with the same names in its first line.
"""

import csv
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.simulated_cluster import Arrival
from argosy.deploy import workload

MAX_REQUESTS: Final = 100_000_000
MAX_TOKENS: Final = 10_000_000
Arrivals = Literal["poisson", "even", "bursts", "at-once"]
Lengths = Literal["fixed", "lognormal", "uniform"]


class WorkloadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A workload in words. Lengths are means for "lognormal", and the middle of 50 to 150 % for "uniform"."""

    num_requests: int = 1000
    arrivals: Arrivals = "poisson"
    rate: float = 1.0  # requests a second, on average
    burst_size: int = 50  # requests that come together
    lengths: Lengths = "fixed"
    input_len: int = 512
    output_len: int = 256
    max_len: int = 4096  # of prompt and answer together
    num_prefixes: int = 0  # shared by requests in turn, at random
    prefix_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_requests", 1, MAX_REQUESTS),
            ("burst_size", 1, MAX_REQUESTS),
            ("input_len", 1, MAX_TOKENS),
            ("output_len", 1, MAX_TOKENS),
            ("num_prefixes", 0, 1_000_000),
            ("prefix_len", 0, MAX_TOKENS),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}={value}: must be from {low} to {high}")
        if not 0.0 < self.rate < math.inf:
            raise ConfigError(f"rate={self.rate:g}: must be above 0 requests a second")
        if self.prefix_len and self.num_prefixes and self.prefix_len >= self.input_len:
            raise ConfigError(f"prefix_len={self.prefix_len}: must be below input_len={self.input_len}")

    @property
    def expected_seconds(self) -> float:
        """From the first to the last arrival."""
        return 0.0 if self.arrivals == "at-once" else self.num_requests / self.rate


def generate(spec: WorkloadSpec) -> Iterator[Arrival]:
    """The requests of a spec, one at a time, in order of their arrival."""
    moments = _moments(spec, random.Random(f"{spec.seed}/arrivals"))
    lengths = random.Random(f"{spec.seed}/lengths")
    prefixes = random.Random(f"{spec.seed}/prefixes")
    draw = _drawer(spec, lengths)
    for seconds in moments:
        input_len, output_len = draw(spec.input_len), draw(spec.output_len)
        prefix = int(prefixes.random() * spec.num_prefixes) if spec.num_prefixes else -1
        prefix_len = spec.prefix_len if prefix >= 0 else 0
        input_len = max(input_len, prefix_len + 1)
        input_len = min(input_len, spec.max_len - 1)
        yield Arrival(seconds, input_len, min(output_len, spec.max_len - input_len), prefix, prefix_len)


def _moments(spec: WorkloadSpec, rng: random.Random) -> Iterator[float]:
    now = 0.0
    for number in range(spec.num_requests):
        if spec.arrivals == "poisson":
            now += -math.log(1.0 - rng.random()) / spec.rate
        elif spec.arrivals == "even":
            now = number / spec.rate
        elif spec.arrivals == "bursts" and number and number % spec.burst_size == 0:
            now += -math.log(1.0 - rng.random()) * spec.burst_size / spec.rate
        yield now


def _drawer(spec: WorkloadSpec, rng: random.Random) -> Callable[[int], int]:
    sigma = 0.9  # as in chat logs: see workload.lognormal

    def fixed(mean: int) -> int:
        return mean

    def uniform(mean: int) -> int:
        return max(1, round(mean * (0.5 + rng.random())))

    def lognormal(mean: int) -> int:
        u, v = 1.0 - rng.random(), rng.random()
        normal = math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * v)
        return max(1, min(8 * mean, round(math.exp(math.log(mean) - sigma * sigma / 2 + sigma * normal))))

    return {"fixed": fixed, "uniform": uniform, "lognormal": lognormal}[spec.lengths]


def named(name: str) -> Iterator[Arrival]:
    """A workload of `argosy bench` by its name: all its requests at once."""
    vocab = 32_000  # lengths don't depend on it
    shared: dict[tuple[int, ...], int] = {}
    for request in workload.make(name, vocab=vocab):
        prefix, prefix_len = -1, 0
        if name.startswith("prefix") and len(request.prompt) > 64:
            prefix_len = len(request.prompt) - 64
            prefix = shared.setdefault(tuple(request.prompt[:prefix_len]), len(shared))
        yield Arrival(0.0, len(request.prompt), request.max_tokens, prefix, prefix_len)


def read_trace(path: str | Path) -> list[Arrival]:
    """The requests of a trace file, in order of arrival. Raises `ConfigError` with file and line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace file {path}: {error}") from error
    lines = text.splitlines()
    rows: Iterator[tuple[int, Any]]
    if lines and not lines[0].lstrip().startswith("{"):
        rows = ((number, row) for number, row in enumerate(csv.DictReader(lines), start=2))
    else:
        rows = ((number, _json(path, number, line)) for number, line in enumerate(lines, start=1) if line.strip())
    found = [_arrival(path, number, row) for number, row in rows]
    if not found:
        raise ConfigError(f"trace file {path}: holds no request")
    return sorted(found, key=lambda arrival: arrival.seconds)


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"trace file {path}, line {number}: is no JSON ({error})") from error


def _arrival(path: Path, number: int, row: Any) -> Arrival:
    if not isinstance(row, dict):
        raise ConfigError(f"trace file {path}, line {number}: must be an object with arrival, input and output")

    def value(name: str, low: float, high: float, default: float | None = None) -> float:
        given = row.get(name)
        if given in (None, "") and default is not None:
            return default
        try:
            found = float(given)  # type: ignore[arg-type]  # what is no number raises
        except (TypeError, ValueError):
            found = math.nan
        if not low <= found <= high:
            raise ConfigError(
                f"trace file {path}, line {number}: {name}={given!r} must be a number from {low:g} to {high:g}"
            )
        return found

    return Arrival(
        value("arrival", 0.0, 1e12),
        int(value("input", 1, MAX_TOKENS)),
        int(value("output", 1, MAX_TOKENS)),
        int(value("prefix", -1, 2**19, -1)),
        int(value("prefix_len", 0, MAX_TOKENS, 0)),
    )
