"""The requests behind every figure: pure Python, seeded, the same on every machine, with a digest that says so.

The one source of randomness is `random.Random(seed).random()`, whose sequence the standard library keeps stable across
versions; normals are made from it by Box-Muller. `salt` changes token ids and not lengths, so that a warm-up or repeat
of the same shape never finds the prefixes that an earlier run left in the cache.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from argosy.cluster.protocol.errors import ConfigError

LOW_ID: Final = 1000  # ids below it (and the last 1000) are left out: special tokens sit there


class WorkloadRequest(msgspec.Struct, frozen=True):
    """One request: a prompt of token ids and how many new tokens it gets."""

    index: int
    prompt: list[int]
    max_tokens: int


Workload = list[WorkloadRequest]


def fixed(n: int, input_len: int, output_len: int, *, vocab: int, seed: int = 0, salt: int = 0) -> Workload:
    """`n` requests of exactly `input_len` prompt tokens and `output_len` new ones."""
    rng = _rng(seed, salt, "ids")
    return [WorkloadRequest(i, _ids(rng, input_len, vocab), output_len) for i in range(n)]


def lognormal(
    n: int,
    *,
    vocab: int,
    in_mean: float = 220.0,
    in_sigma: float = 1.0,
    in_max: int = 1024,
    out_mean: float = 190.0,
    out_sigma: float = 0.9,
    out_max: int = 1024,
    minimum: int = 4,
    seed: int = 0,
    salt: int = 0,
) -> Workload:
    """Lengths like a chat log's: two independent log-normals, clipped. The means are those before clipping."""
    lengths = _rng(seed, 0, "lengths")

    def draw(mean: float, sigma: float, top: int) -> int:
        size = math.exp(math.log(mean) - sigma * sigma / 2 + sigma * _normal(lengths))
        return max(minimum, min(top, round(size)))

    shapes = [(draw(in_mean, in_sigma, in_max), draw(out_mean, out_sigma, out_max)) for _ in range(n)]
    rng = _rng(seed, salt, "ids")
    return [WorkloadRequest(i, _ids(rng, size, vocab), new) for i, (size, new) in enumerate(shapes)]


def uniform(
    n: int, *, vocab: int, in_range: tuple[int, int], out_range: tuple[int, int], seed: int = 0, salt: int = 0
) -> Workload:
    """Lengths drawn evenly from two ranges, ends included."""
    lengths = _rng(seed, 0, "lengths")

    def draw(bounds: tuple[int, int]) -> int:
        low, high = bounds
        return low + int(lengths.random() * (high - low + 1))

    shapes = [(draw(in_range), draw(out_range)) for _ in range(n)]
    rng = _rng(seed, salt, "ids")
    return [WorkloadRequest(i, _ids(rng, size, vocab), new) for i, (size, new) in enumerate(shapes)]


def shared_prefix(
    n: int, prefix_len: int, unique_len: int, output_len: int, *, vocab: int, seed: int = 0, salt: int = 0
) -> Workload:
    """`n` requests with one common prefix of `prefix_len` tokens and `unique_len` own ones."""
    rng = _rng(seed, salt, "ids")
    prefix = _ids(rng, prefix_len, vocab)
    return [WorkloadRequest(i, prefix + _ids(rng, unique_len, vocab), output_len) for i in range(n)]


def decode(batch: int, *, vocab: int, output_len: int = 256, input_len: int = 128, salt: int = 0) -> Workload:
    """The decode-step workload: `batch` requests at once."""
    return fixed(batch, input_len, output_len, vocab=vocab, seed=5, salt=salt)


def poisson_arrivals(n: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds from the start at which each of `n` requests arrives, `rate` of them a second on average."""
    rng = _rng(seed, 0, "arrivals")
    now, arrivals = 0.0, []
    for _ in range(n):
        now += -math.log(1.0 - rng.random()) / rate
        arrivals.append(now)
    return arrivals


_Maker = Callable[[int, int], Workload]  # (vocab, salt)

WORKLOADS: Final[dict[str, _Maker]] = {
    "fixed512x256": lambda vocab, salt: fixed(512, 512, 256, vocab=vocab, seed=1, salt=salt),
    "chat1000": lambda vocab, salt: lognormal(1000, vocab=vocab, seed=2, salt=salt),
    "prefix256": lambda vocab, salt: shared_prefix(256, 2048, 64, 64, vocab=vocab, seed=3, salt=salt),
    # as many tokens as prefix256 with nothing in common
    "unshared256": lambda vocab, salt: fixed(256, 2112, 64, vocab=vocab, seed=3, salt=salt),
    "fixed256x128": lambda vocab, salt: fixed(256, 512, 128, vocab=vocab, seed=4, salt=salt),
    "decode1": lambda vocab, salt: decode(1, vocab=vocab, salt=salt),
    "decode8": lambda vocab, salt: decode(8, vocab=vocab, salt=salt),
    "decode64": lambda vocab, salt: decode(64, vocab=vocab, salt=salt),
    "decode256": lambda vocab, salt: decode(256, vocab=vocab, salt=salt),
    "decode512": lambda vocab, salt: decode(512, vocab=vocab, salt=salt),
    # for machines without a GPU
    "cpu64": lambda vocab, salt: uniform(64, vocab=vocab, in_range=(32, 256), out_range=(16, 128), seed=6, salt=salt),
    "cpu8": lambda vocab, salt: uniform(8, vocab=vocab, in_range=(8, 32), out_range=(4, 16), seed=8, salt=salt),
    "ttft512": lambda vocab, salt: fixed(1, 512, 1, vocab=vocab, seed=7, salt=salt),
}


def make(name: str, *, vocab: int, salt: int = 0) -> Workload:
    """The named workload for a vocabulary of `vocab` ids."""
    if name not in WORKLOADS:
        raise ConfigError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    return WORKLOADS[name](vocab, salt)


def digest(workload: Sequence[WorkloadRequest]) -> str:
    """A short fingerprint of the exact token ids and lengths."""
    hasher = hashlib.sha256()
    for request in workload:
        hasher.update(json.dumps([request.prompt, request.max_tokens], separators=(",", ":")).encode())
    return hasher.hexdigest()[:16]


def _ids(rng: random.Random, count: int, vocab: int) -> list[int]:
    span = vocab - LOW_ID - 1000
    if span < 1:
        raise ConfigError(f"a vocabulary of {vocab} ids is too small for a workload; at least {LOW_ID + 1001}")
    draw = rng.random
    return [LOW_ID + int(draw() * span) for _ in range(count)]


def _normal(rng: random.Random) -> float:
    u = 1.0 - rng.random()
    v = rng.random()
    return math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * v)


def _rng(seed: int, salt: int, part: str) -> random.Random:
    # a string seed is hashed with SHA-512 by random.seed (version 2): the same everywhere
    return random.Random(f"{seed}/{salt}/{part}")
