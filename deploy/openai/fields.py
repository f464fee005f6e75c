"""The fields of completions and chat completions, OpenAI's and vLLM's, with their types and defaults.

A JSON null means the default. A wrong type is refused with the field's name. An unknown field is never a failure: its
name is collected, so that the answer can carry it in a header.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.cluster.protocol.sampling import SamplingParams
from argosy.deploy.http_io import Responder

log = logging.getLogger("argosy.http")

MAX_ANSWERS: Final = 256  # prompts x n (or best_of) of one HTTP request

MAX_SHOWN_CHARS: Final = 80  # of a value of the wrong type, in an error

# what we don't have yet and must not pretend to: name -> what to do instead
_NOT_YET: Final = {
    "structured_outputs": "structured outputs are not supported yet",
    "guided_json": "structured outputs are not supported yet",
    "guided_regex": "structured outputs are not supported yet",
    "guided_choice": "structured outputs are not supported yet",
    "guided_grammar": "structured outputs are not supported yet",
    "prompt_embeds": "embeddings are not accepted from requests; send text or token ids",
    "thinking_token_budget": "a thinking budget is not supported yet",
    "functions": "functions are not supported yet; leave them out",
    "audio": "audio is not supported",
    "prediction": "predicted outputs are not supported",
}
# fields of OpenAI's that change nothing here, and deserve no warning
_WITHOUT_EFFECT: Final = frozenset(
    {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
)


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries besides the answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class GenerateFields(msgspec.Struct, kw_only=True):
    """What both families have."""

    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str = "left"
    priority: int = 0
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    response_format: dict[str, Any] | None = None
    use_beam_search: bool = False

    def check_common(self) -> None:
        """What no other place checks."""
        if self.use_beam_search:
            raise InvalidRequest("use_beam_search", True, "beam search is not supported yet; set it to false")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", "given", "needs stream: true")
        if self.truncation_side not in ("left", "right"):
            raise InvalidRequest("truncation_side", self.truncation_side, "must be 'left' or 'right'")
        if self.cache_salt is not None and len(self.cache_salt) > 256:
            raise InvalidRequest("cache_salt", self.cache_salt, "has at most 256 characters")
        if self.request_id is not None and len(self.request_id) > 256:
            raise InvalidRequest("request_id", self.request_id, "has at most 256 characters")
        kind = "text" if self.response_format is None else self.response_format.get("type")
        if kind != "text":
            raise InvalidRequest("response_format", kind, "only {'type': 'text'} is supported yet")

    def sampling_params(self, defaults: Mapping[str, Any], **more: Any) -> SamplingParams:
        """`SamplingParams`: what the request says, else what the model's generation config says, else our defaults."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _TO_SAMPLING}
        for name in _NULLABLE:
            value = getattr(self, name)
            if value is None and name in defaults:
                value = defaults[name]
            if value is not None:
                values[name] = value
        values.update(more)
        return SamplingParams(**values)


_TO_SAMPLING: Final = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "logprob_token_ids",
)
_NULLABLE: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class CompletionFields(GenerateFields, kw_only=True):
    """`/v1/completions`."""

    prompt: Any = None
    suffix: str | None = None
    echo: bool = False
    best_of: int | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True


class ChatFields(GenerateFields, kw_only=True):
    """`/v1/chat/completions`."""

    messages: list[dict[str, Any]] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    modalities: list[str] | None = None
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    return_prompt_text: bool = False


Fields = TypeVar("Fields", bound=msgspec.Struct)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# what the library calls a kind, and what JSON does
_JSON_KINDS: Final = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_PYTHON_KIND = re.compile(rf"\b({'|'.join(_JSON_KINDS)})\b")
_STEP = re.compile(r"(\w+)|\[(\d+|\.\.\.)\]")
_WITH_ARTICLE: Final = {
    "string": "a string", "integer": "an integer", "number": "a number", "boolean": "true or false",
    "array": "an array", "object": "an object",
}  # fmt: skip
_JSON_KIND = re.compile(rf"\b({'|'.join(_WITH_ARTICLE)})\b")
_PLAIN_KIND = re.compile(r"a number|an integer|true or false")
_PATH = re.compile(r" - at `\$(?P<path>[^`]*)`$")


def read_fields(given: Mapping[str, Any], kind: type[Fields]) -> tuple[Fields, list[str]]:
    """The fields of `given`, checked for type, and the names that we don't know."""
    present = {name: value for name, value in given.items() if value is not None}
    for name in present.keys() & _NOT_YET.keys():
        raise InvalidRequest(name, "given", _NOT_YET[name])
    try:
        fields = msgspec.convert(present, kind)
    except msgspec.ValidationError as error:
        raise _explain(error, present) from error
    return fields, sorted(present.keys() - kind.__struct_fields__ - _WITHOUT_EFFECT)


def _explain(error: msgspec.ValidationError, given: Mapping[str, Any]) -> InvalidRequest:
    """The library's sentence ("Expected `int`, got `str` - at `$.n`") as one of ours.

    It shows what was sent if that is short and can't be a prompt: a number, or text in place of one or of a switch.
    """
    text = str(error)
    match = _PATH.search(text)
    path = match.group("path").lstrip(".") if match else ""
    sentence = _PATH.sub("", text).replace("`", "")
    if not path or path.startswith("["):  # in the keys or values of a mapping with names of the user's own
        path = path or "body"
    found = _PYTHON_KIND.sub(lambda kind: _JSON_KINDS[kind[0]], sentence).rpartition(", got ")
    wanted = found[0].lower().replace("expected", "must be").replace(" | ", " or ")
    wanted = _JSON_KIND.sub(lambda kind: _WITH_ARTICLE[kind[0]], wanted)
    value = _value_at(given, path)
    if isinstance(value, bool | int | float) or (isinstance(value, str) and _PLAIN_KIND.search(wanted)):
        shown = json.dumps(value, ensure_ascii=False)
        if len(shown) <= MAX_SHOWN_CHARS:
            return InvalidRequest(path[:80], shown, wanted or sentence)
    return InvalidRequest(path[:80], found[2] or "value", wanted or sentence)


def _value_at(given: Any, path: str) -> object:
    """What stands at a path like `stop[0]` or `stream_options.include_usage`. Of a mapping with names of the user's own
    (`logit_bias[...]`), whose values are numbers, the first one that is none."""
    for name, index in _STEP.findall(path):
        if isinstance(given, Mapping):
            given = given.get(name) if name else next(filter(_is_no_number, given.values()), None)
        elif isinstance(given, list) and index.isdigit():
            given = given[int(index)]
        else:
            return None
    return given


def _is_no_number(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)


_warned: set[str] = set()


def note_unknown(responder: Responder, names: Sequence[str]) -> None:
    """Say in a header which fields had no effect, and once for each name in the log."""
    if not names:
        return
    clean = [name if _PLAIN_NAME.fullmatch(name) else "?" for name in names[:20]]
    responder.add_header(b"x-argosy-ignored-fields", ", ".join(clean).encode())
    for name in clean:
        if name not in _warned and len(_warned) < 256:
            _warned.add(name)
            log.warning("requests hold the field %s, which is unknown here and has no effect", name)
