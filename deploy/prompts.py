"""What users of `LLM` hand over as prompts and parameters, brought to one form; all is checked before anything runs."""

from collections.abc import Iterable, Mapping, Sequence, Set
from operator import index
from typing import Any, Final, SupportsIndex

import msgspec

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.cluster.protocol.sampling import SamplingParams
from argosy.deploy.conversations import read_messages

_KEYS: Final = ("prompt", "prompt_token_ids", "cache_salt")
_FORMS: Final = "a prompt is a text, a list of token ids, or {'prompt': ...} or {'prompt_token_ids': [...]}"


class Prompt(msgspec.Struct, frozen=True):
    """One prompt: a text or token ids, never both."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str = ""

    @property
    def content(self) -> str | list[int]:
        """What to continue."""
        return self.token_ids if self.token_ids is not None else self.text or ""


def normalise_prompts(prompts: object) -> list[Prompt]:
    """One prompt or many, in any of the forms. Raises `InvalidRequest` naming the first that is none of them.

    Whatever gives them one by one will do: a generator, a column of a table, an array of numpy's or torch's.
    """
    prompts = _as_list(prompts)
    if isinstance(prompts, str | Mapping) or _is_token_ids(prompts):
        return [_prompt("prompts", prompts)]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InvalidRequest("prompts", prompts, f"{_FORMS}, or a list of these")
    return [_prompt(f"prompts[{place}]", prompt) for place, prompt in enumerate(prompts)]


def normalise_params(params: object, default: SamplingParams, num_prompts: int) -> list[SamplingParams]:
    """One for each prompt: the default, the same for all, or a list of as many."""
    if params is None:
        return [default] * num_prompts
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, Sequence) or isinstance(params, str | bytes):
        example = ", as SamplingParams(temperature=0.5)"
        raise InvalidRequest("sampling_params", repr(params), f"must be SamplingParams or a list of them{example}")
    for number, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise InvalidRequest(f"sampling_params[{number}]", repr(one), "must be SamplingParams")
    if len(params) != num_prompts:
        raise InvalidRequest("sampling_params", f"{len(params)} of them", f"there are {num_prompts} prompts")
    return list(params)


def normalise_priorities(priority: object, num_prompts: int) -> list[int]:
    """One for each prompt; lower is sooner."""
    if priority is None:
        return [0] * num_prompts
    if isinstance(priority, int) and not isinstance(priority, bool):
        return [priority] * num_prompts
    if not isinstance(priority, Sequence) or len(priority) != num_prompts or not all(type(p) is int for p in priority):
        raise InvalidRequest("priority", priority, f"must be a list of {num_prompts} integers, one for each prompt")
    return list(priority)


def normalise_conversations(messages: object) -> list[list[dict[str, Any]]]:
    """One conversation (a list of messages) or a list of them."""
    messages = _as_list(messages)
    fix = "must be a list of {'role': ..., 'content': ...}, or a list of such lists"
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InvalidRequest("messages", messages, fix)
    many = [messages] if isinstance(messages[0], Mapping) else messages
    for conversation in many:
        if not isinstance(conversation, Sequence) or isinstance(conversation, str | bytes) or not conversation:
            raise InvalidRequest("messages", conversation, fix)
        for message in conversation:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidRequest("messages", message, fix)
    return [
        read_messages(conversation, field="messages" if many[0] is messages else f"messages[{place}]")
        for place, conversation in enumerate(many)
    ]


def _as_list(value: object) -> object:
    """What holds several things in an order, and is no list yet, as one; anything else as it is."""
    if isinstance(value, list | tuple | str | bytes | Mapping | Set):
        return value
    if callable(to_list := getattr(value, "tolist", None)):
        return to_list()
    return list(value) if isinstance(value, Iterable) else value


def _is_token_ids(value: object) -> bool:
    """A flat list of whole numbers; an empty list is no prompts, not an empty prompt."""
    return _is_sequence(value) and len(value) > 0 and _is_id(value[0])  # type: ignore[index,arg-type]  # just checked


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_id(value: object) -> bool:
    """A whole number, or one of numpy's. Arrays of one number could be taken for one as well, and are lists here."""
    is_number = isinstance(value, int) or (isinstance(value, SupportsIndex) and not isinstance(value, Iterable))
    return is_number and not isinstance(value, bool)


def _prompt(field: str, given: object) -> Prompt:
    given = _as_list(given)
    if isinstance(given, str):
        return Prompt(given, None)
    if _is_sequence(given):
        return Prompt(None, _token_ids(field, given))
    if not isinstance(given, Mapping):
        raise InvalidRequest(field, given, _FORMS)
    unknown = [key for key in given if key not in _KEYS and given[key] is not None]
    if unknown:
        raise InvalidRequest(f"{field}.{unknown[0]}", given[unknown[0]], f"a prompt may hold {', '.join(_KEYS)}")
    salt = given.get("cache_salt") or ""
    if not isinstance(salt, str):
        raise InvalidRequest(f"{field}.cache_salt", salt, "must be a text")
    if given.get("prompt_token_ids") is not None:
        return Prompt(None, _token_ids(f"{field}.prompt_token_ids", given["prompt_token_ids"]), salt)
    if not isinstance(given.get("prompt"), str):
        raise InvalidRequest(field, dict(given), _FORMS)
    return Prompt(given["prompt"], None, salt)


def _token_ids(field: str, given: object) -> list[int]:
    given = _as_list(given)
    if not _is_sequence(given):
        raise InvalidRequest(field, given, "must be a list of token ids")
    ids: list[int] = list(given)  # type: ignore[call-overload]  # a sequence, as was just checked
    if set(map(type, ids)) == {int}:  # a look at each takes four times as long: 80 ms for a million tokens
        return ids
    for place, token_id in enumerate(ids):
        if not _is_id(token_id):
            raise InvalidRequest(f"{field}[{place}]", repr(token_id), "token ids are whole numbers")
    return [index(token_id) for token_id in ids]
