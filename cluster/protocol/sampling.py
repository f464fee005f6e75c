"""How one request wants its tokens chosen, and why it ended.

`SamplingParams` is the user's word, with vLLM's names, defaults and rules (text allowed: stop strings, bad words).
`TokenParams` is what the driver and the ranks see: token ids and numbers only, everything worked out.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import IntEnum, StrEnum
from typing import Any, Final, TypeGuard

import msgspec

from argosy.cluster.protocol.errors import InvalidRequest

MAX_N = 128  # more multiplies one request's work beyond what one caller may ask for
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_TOKEN_LIST = 4096
MIN_TEMPERATURE = 0.01  # below it, logits / temperature overflows in half precision


NOTHING_ALLOWED: Final = "no token may be drawn: allowed_token_ids, bad_words and min_tokens together leave none"
"""A rank's word for wishes of one request that contradict each other."""
_NOT_YET: Final[Mapping[str, object]] = {
    "structured_outputs": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
    "flat_logprobs": False,
    "routed_experts_prompt_start": 0,
}


_SWITCHES: Final = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "skip_clone",
)
# names that scripts for other versions of vLLM use, and what to write instead
_OF_OTHER_VERSIONS: Final[Mapping[str, str]] = {
    "best_of": "ask for n answers with logprobs=1 and keep the one of the highest cumulative_logprob",
    "use_beam_search": "leave it out",
    "length_penalty": "it belongs to beam search: leave it out",
    "early_stopping": "it belongs to beam search: leave it out",
    "guided_decoding": "structured output is not supported yet: leave it out",
    "logits_processors": "use logit_bias, allowed_token_ids or bad_words",
    "truncate_prompt_tokens": "shorten the prompt before it is sent",
}


class FinishReason(StrEnum):
    """Why a request ended. Every request ends exactly once with one of these."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the model's length
    ABORT = "abort"  # its owner called it off or went away
    ERROR = "error"  # refused or failed; the error travels with it
    LOST = "lost"  # the cluster lost it too often


class RequestOutputKind(IntEnum):
    """What each output of a stream holds."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class _NamedFields(type(msgspec.Struct)):  # type: ignore[misc]  # the metaclass has no name of its own in msgspec
    """Makes values by their fields' names, and says which name was meant when there is none such."""

    def __call__(cls, *values: Any, **fields: Any) -> Any:
        known = cls.__struct_fields__
        if values:
            raise InvalidRequest(known[0], values[0], f"has no name: write {cls.__name__}({known[0]}=...)")
        for name in fields:
            if name not in known:
                raise InvalidRequest(name, fields[name], _unknown_name(name, known))
        return super().__call__(**fields)


class SamplingParams(
    msgspec.Struct, metaclass=_NamedFields, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """How tokens are chosen and when the answer ends. Names, defaults and rules are vLLM's.

    Raises `InvalidRequest` naming the field when there is no such field or a value can't be served, also where one is
    assigned later (`params.max_tokens = 5`); the value from before stays then.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: Mapping[str, Any] | None = None
    # vLLM's, known by name so that scripts load: their defaults are taken, anything else is refused (`_NOT_YET`)
    structured_outputs: Any = None
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    flat_logprobs: bool = False
    routed_experts_prompt_start: int = 0
    skip_clone: bool = False  # nothing is cloned here anyway

    def __post_init__(self) -> None:
        self._normalise()
        self._check()
        if self.temperature == 0.0:
            put = msgspec.structs.force_setattr
            put(self, "top_p", 1.0)
            put(self, "top_k", 0)
            put(self, "min_p", 0.0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__struct_fields__:
            raise InvalidRequest(name, value, _unknown_name(name, self.__struct_fields__))
        before = getattr(self, name)
        try:
            super().__setattr__(name, value)
            self._normalise()
            self._check()
        except InvalidRequest:
            super().__setattr__(name, before)
            raise

    def _check(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, 0, 2**31 - 1, hint="0 or -1 means all tokens")
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        top = self.max_tokens if self.max_tokens is not None else 2**31 - 1
        _integer("min_tokens", self.min_tokens, 0, top, hint="it may not exceed max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _integer(name, value, -1, 2**31 - 1, hint="-1 means the whole vocabulary")
        for name in _SWITCHES:
            _switch(name, getattr(self, name))
        if self.skip_reading_prefix_cache is not None:
            _switch("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
        if self.extra_args is not None and not isinstance(self.extra_args, Mapping):
            raise _wrong("extra_args", self.extra_args, "must map names to values")
        if self.output_kind not in tuple(RequestOutputKind):
            names = ", ".join(f"RequestOutputKind.{kind.name}" for kind in RequestOutputKind)
            raise _wrong("output_kind", self.output_kind, f"must be one of {names}")
        for name, default in _NOT_YET.items():
            if getattr(self, name) != default:
                raise InvalidRequest(name, getattr(self, name), "is not supported yet; leave it out")
        self._check_stop()
        self._check_ids()
        if self.temperature == 0.0 and self.n > 1:
            raise InvalidRequest("n", self.n, "must be 1 when temperature is 0: greedy answers would all be equal")

    def _normalise(self) -> None:
        put = msgspec.structs.force_setattr
        if isinstance(self.stop, str):
            put(self, "stop", (self.stop,))
        put(self, "stop", tuple(self.stop or ()) if _is_list(self.stop) or self.stop is None else self.stop)
        if self.top_k == -1:
            put(self, "top_k", 0)
        if self.seed == -1:
            put(self, "seed", None)
        if isinstance(self.temperature, int) and not isinstance(self.temperature, bool):
            put(self, "temperature", float(self.temperature))
        if isinstance(self.temperature, float) and 0.0 < self.temperature < MIN_TEMPERATURE:
            put(self, "temperature", MIN_TEMPERATURE)

    def _check_stop(self) -> None:
        stops = self.stop
        if not isinstance(stops, tuple) or not all(isinstance(s, str) for s in stops):
            raise _wrong("stop", stops, "must be a string or a list of strings")
        if len(stops) > MAX_STOP_STRINGS:
            raise InvalidRequest("stop", f"{len(stops)} strings", f"at most {MAX_STOP_STRINGS} stop strings")
        for text in stops:
            if not text:
                raise InvalidRequest("stop", text, "a stop string may not be empty")
            if len(text) > MAX_STOP_STRING_CHARS:
                raise InvalidRequest("stop", text, f"a stop string has at most {MAX_STOP_STRING_CHARS} characters")
        if stops and not self.detokenize:
            raise InvalidRequest("stop", stops, "stop strings need detokenize=True; use stop_token_ids without it")

    def _check_ids(self) -> None:
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_list(value) or not all(_is_int(i) and 0 <= i < 2**31 for i in value):
                raise _wrong(name, value, "must be a list of token ids (integers from 0)")
            if len(value) > MAX_TOKEN_LIST:
                raise InvalidRequest(name, f"{len(value)} ids", f"at most {MAX_TOKEN_LIST} ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids", [], "must hold at least one token id, or be left out")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise _wrong("logit_bias", self.logit_bias, "must map token ids to numbers from -100 to 100")
            if len(self.logit_bias) > MAX_LOGIT_BIAS:
                raise InvalidRequest("logit_bias", f"{len(self.logit_bias)} entries", f"at most {MAX_LOGIT_BIAS}")
            clean = {}
            for key, value in self.logit_bias.items():
                token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
                if not _is_int(token_id) or not 0 <= token_id < 2**31:
                    raise _wrong("logit_bias", key, "keys are token ids (integers from 0)")
                _number("logit_bias", value, -math.inf, math.inf)
                clean[token_id] = max(-100.0, min(100.0, float(value)))
            msgspec.structs.force_setattr(self, "logit_bias", clean)
        if self.bad_words is not None and (
            not _is_list(self.bad_words) or not all(isinstance(w, str) and w for w in self.bad_words)
        ):
            raise _wrong("bad_words", self.bad_words, "must be a list of non-empty strings")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    def replace(self, **changes: Any) -> "SamplingParams":
        """A copy with some fields changed, checked again."""
        return msgspec.structs.replace(self, **changes)

    def clone(self) -> "SamplingParams":
        """A copy: what is assigned to one does not change the other."""
        return copy.copy(self)


class TokenParams(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """Edge -> driver -> ranks: the numbers of `SamplingParams`, with all text turned to token ids.

    `seed` is always set: draws are a function of (seed, position), so a request that is preempted, moved or
    recovered draws what it would have drawn.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()  # empty under ignore_eos
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    read_prefix_cache: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether logits go to the draw as they are: no penalty, bias, ban or allowed list."""
        return (
            self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
            and self.repetition_penalty == 1.0
            and self.min_tokens == 0
            and not (self.logit_bias or self.allowed_token_ids or self.bad_word_ids)
        )


def _unknown_name(name: str, known: Sequence[str]) -> str:
    if name in _OF_OTHER_VERSIONS:
        return f"is not served; {_OF_OTHER_VERSIONS[name]}"
    near = get_close_matches(name, known, n=1)
    return f"there is no such field; did you mean {near[0]!r}?" if near else "there is no such field; leave it out"


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _wrong(field: str, value: object, fix: str) -> InvalidRequest:
    """Text in quotes: `top_p=0.9: must be a number` would be a riddle where somebody wrote "0.9"."""
    return InvalidRequest(field, repr(value) if isinstance(value, str) else value, fix)


def _switch(name: str, value: object) -> None:
    if not isinstance(value, int) or value not in (True, False):
        raise _wrong(name, value, "must be true or false")


def _integer(name: str, value: object, low: int, high: int, *, hint: str = "") -> None:
    if not _is_int(value) or not low <= value <= high:
        endless = high == 2**31 - 1 and not (_is_int(value) and value > high)  # said where it is what was passed
        bound = f"must be an integer from {low}" + ("" if endless else f" to {high}")
        raise _wrong(name, value, f"{bound}; {hint}" if hint else bound)


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    if not _is_finite(value) or not low <= value <= high or (above and value == low):
        least = f" above {low:g}" if above else f" from {low:g}" if math.isfinite(low) else ""
        most = f" to {high:g}" if math.isfinite(high) else ""
        raise _wrong(name, value, f"must be a finite number{least}{most}")
