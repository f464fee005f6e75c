"""What the oracle model must answer: the next token as a hash of all tokens before it, in plain Python.

The oracle stands in for a real model in tests of everything around the model. It keeps token ids and positions in the
KV blocks and reads the whole context back for every token, so a block that was lost, mixed up, stale or someone else's
changes all tokens that follow; `workers/models/oracle.py` computes the same numbers through the real block tables, TP
sums and stages. All sums are of integers below 2**24, exact in float32.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

ARCHITECTURE: Final = "OracleForCausalLM"
NUM_LAYERS: Final = 4
NUM_HEADS: Final = 4
NUM_PARTS: Final = 7  # numbers of the hash; an eighth of the hidden state carries the token id
MODULUS: Final = 4093
PRIME: Final = 2**31 - 1


def part_weight(layer: int, head: int, part: int, position: int, kind: int) -> int:
    """How much a token (kind 0) or its position (kind 1) counts for one part of the hash; from 1 to MODULUS - 1."""
    seed = position * 7919 + layer * 104729 + head * 1299709 + part * 15485863 + kind * 32452843 + 12345
    mixed = (seed % PRIME * 48271 + 11) % PRIME
    mixed = (mixed * 16807 + 7) % PRIME
    return 1 + mixed % (MODULUS - 1)


@lru_cache(maxsize=1 << 16)
def _weights(position: int) -> tuple[tuple[int, int], ...]:
    """For each part: what multiplies token + 1 at this position, and what is added for the position itself."""
    places = [(layer, head) for layer in range(NUM_LAYERS) for head in range(NUM_HEADS)]
    return tuple(
        (
            sum(part_weight(layer, head, part, position, 0) for layer, head in places) % MODULUS,
            sum(part_weight(layer, head, part, position, 1) for layer, head in places) * (position + 1) % MODULUS,
        )
        for part in range(NUM_PARTS)
    )


def token_of_parts(parts: Sequence[int], vocab_size: int) -> int:
    """The token that a whole hash stands for."""
    mixed = 1
    for part in parts:
        mixed = (mixed * 48271 + part + 1) % PRIME
    return mixed * 16807 % PRIME % vocab_size


class OracleStream:
    """The hash of a growing list of tokens."""

    def __init__(self, token_ids: Sequence[int], vocab_size: int):
        self.vocab_size, self.num_tokens = vocab_size, 0
        self._parts = [0] * NUM_PARTS
        for token_id in token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """One more token."""
        weights = _weights(self.num_tokens)
        self._parts = [
            (part + scale * (token_id + 1) + offset) % MODULUS
            for part, (scale, offset) in zip(self._parts, weights, strict=True)
        ]
        self.num_tokens += 1

    @property
    def next_token(self) -> int:
        """What follows."""
        return token_of_parts(self._parts, self.vocab_size)


def oracle_next_token(token_ids: Sequence[int], vocab_size: int) -> int:
    """The token that the oracle gives after these."""
    return OracleStream(token_ids, vocab_size).next_token


def oracle_continuation(token_ids: Sequence[int], num_tokens: int, vocab_size: int) -> list[int]:
    """The next `num_tokens` tokens, greedily."""
    stream, answer = OracleStream(token_ids, vocab_size), []
    for _ in range(num_tokens):
        answer.append(stream.next_token)
        stream.append(answer[-1])
    return answer


def write_oracle_model(folder: Path, *, vocab_size: int = 997, max_position: int = 2048) -> Path:
    """A folder with a `config.json` alone, for `load_format: dummy`, that is served by the oracle. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "oracle",
        "hidden_size": NUM_PARTS + 1,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS,
        "head_dim": 2,
        "intermediate_size": NUM_HEADS,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position,
        "dtype": "float32",
        "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
