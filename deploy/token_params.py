"""From `SamplingParams` (text allowed) to `TokenParams` (numbers only), and the one check of token ids from outside."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from argosy.cluster.admission import check_num_logprobs
from argosy.cluster.protocol.config_json import read_json
from argosy.cluster.protocol.errors import ConfigError, ContextTooLong, InvalidRequest, WeightError
from argosy.cluster.protocol.messages import EngineInfo
from argosy.cluster.protocol.sampling import SamplingParams, TokenParams
from argosy.deploy.tokenizer import Tokenizer, check_text

MAX_LOGPROB_TOKEN_IDS: Final = 128
MAX_BAD_WORDS: Final = 256
MAX_BAD_WORD_CHARS: Final = 1024
_GENERATION_DEFAULTS: Final = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


class TokenParamsBuilder:
    """Knows what a request may ask of one engine: its vocabulary, its length, its limits and its ends."""

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None, generation_config: Mapping[str, Any]):
        self.info = info
        self._tokenizer = tokenizer
        self.num_usable_ids = min(info.vocab_size, tokenizer.vocab_size) if tokenizer else info.vocab_size
        self.sampling_defaults = _sampling_defaults(generation_config)
        given = generation_config.get("eos_token_id")
        ends = [*(given if isinstance(given, list) else [given]), *info.eos_token_ids]
        if tokenizer is not None:
            ends.insert(0, tokenizer.eos_token_id)
        self.eos_token_ids = tuple(dict.fromkeys(i for i in ends if isinstance(i, int) and 0 <= i < info.vocab_size))

    def check_token_ids(self, field: str, token_ids: Sequence[int]) -> None:
        """Refuse anything that is not a list of ids with a logit and a token. The only check of ids from outside."""
        if not token_ids:
            return
        if set(map(type, token_ids)) != {int}:
            wrong = next(value for value in token_ids if type(value) is not int)
            raise InvalidRequest(field, wrong, "token ids are integers")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.num_usable_ids:
            raise InvalidRequest(
                field, low if low < 0 else high, f"token ids of this model go from 0 to {self.num_usable_ids - 1}"
            )

    def check_prompt(self, field: str, token_ids: Sequence[int]) -> None:
        """Refuse a prompt that is empty, holds foreign ids, or leaves no room for one new token."""
        if not token_ids:
            raise InvalidRequest(field, "", "a prompt needs at least one token")
        if len(token_ids) >= self.info.max_model_len:
            raise ContextTooLong(len(token_ids), self.info.max_model_len)
        self.check_token_ids(field, token_ids)

    def build(self, params: SamplingParams, num_prompt_tokens: int) -> TokenParams:
        """The numbers for the driver. The prompt was checked before."""
        room = self.info.max_model_len - num_prompt_tokens
        for name in ("logprobs", "prompt_logprobs"):
            check_num_logprobs(name, getattr(params, name), self.info.vocab_size, self.info.max_logprobs)
        if params.min_tokens > room:
            raise InvalidRequest("min_tokens", params.min_tokens, f"this prompt leaves room for {room} tokens")
        logit_bias = tuple(sorted((params.logit_bias or {}).items()))
        for field, token_ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", params.allowed_token_ids),
            ("logprob_token_ids", params.logprob_token_ids),
            ("logit_bias", [token_id for token_id, _ in logit_bias]),
        ):
            self.check_token_ids(field, token_ids or ())
        if len(params.logprob_token_ids or ()) > MAX_LOGPROB_TOKEN_IDS:
            raise InvalidRequest(
                "logprob_token_ids", f"{len(params.logprob_token_ids or ())} ids", f"at most {MAX_LOGPROB_TOKEN_IDS}"
            )
        return TokenParams(
            max_tokens=min(room, params.max_tokens) if params.max_tokens is not None else room,
            temperature=float(params.temperature),
            # the most likely token is that of any part of the vocabulary
            top_p=float(params.top_p) if not params.is_greedy else 1.0,
            top_k=params.top_k if not params.is_greedy else 0,
            min_p=float(params.min_p) if not params.is_greedy else 0.0,
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            repetition_penalty=float(params.repetition_penalty),
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            min_tokens=params.min_tokens,
            eos_token_ids=() if params.ignore_eos else self.eos_token_ids,
            stop_token_ids=tuple(params.stop_token_ids or ()),
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            logprob_token_ids=tuple(params.logprob_token_ids or ()),
            logit_bias=logit_bias,
            allowed_token_ids=tuple(params.allowed_token_ids or ()),
            bad_word_ids=self._bad_word_ids(params.bad_words or ()),
            read_prefix_cache=params.prompt_logprobs is None and not params.skip_reading_prefix_cache,
        )

    def _bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it reads at the start of a line and after a space."""
        if not words:
            return ()
        if self._tokenizer is None:
            raise InvalidRequest("bad_words", f"{len(words)} words", "this server has no tokenizer; use logit_bias")
        if len(words) > MAX_BAD_WORDS:
            raise InvalidRequest("bad_words", f"{len(words)} words", f"at most {MAX_BAD_WORDS}")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            check_text("bad_words", word)
            if len(word) > MAX_BAD_WORD_CHARS or not word.strip():
                raise InvalidRequest("bad_words", word, f"a word has from 1 to {MAX_BAD_WORD_CHARS} characters")
            for written in (word.lstrip(), " " + word.lstrip()):
                found[tuple(self._tokenizer.encode(written, add_special_tokens=False))] = None
        return tuple(ids for ids in found if ids)


def read_generation_config(folder: str | Path, choice: str = "auto") -> dict[str, Any]:
    """`generation_config.json` of a model folder; nothing when the operator said "vllm" or there is none.

    Raises `WeightError` where its defaults would refuse every request that says nothing.
    """
    if choice == "vllm":
        return {}
    path = Path(folder if choice == "auto" else choice) / "generation_config.json"
    if not path.is_file():
        if choice == "auto":
            return {}
        raise ConfigError(f"generation_config={choice!r}: must be 'auto', 'vllm', or a folder with {path.name}")
    value = read_json(path)
    for key in _GENERATION_DEFAULTS:
        number = value.get(key)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise WeightError(path.name, key, f"must be a number, not {number!r}")
    try:
        SamplingParams(**_sampling_defaults(value))
    except InvalidRequest as error:
        raise WeightError(path.name, error.field, f"{error.value}: {error.fix}") from error
    return value


def _sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        ours: generation_config[theirs]
        for theirs, ours in _GENERATION_DEFAULTS.items()
        if generation_config.get(theirs) is not None
    }
