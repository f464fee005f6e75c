"""Messages of a conversation from outside, by HTTP or from Python, as chat templates want them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from argosy.cluster.protocol.errors import InvalidRequest

_MAX_ROLE_CHARS: Final = 32
_PASSED_ON: Final = ("name", "tool_call_id", "reasoning", "reasoning_content")


def read_messages(given: Sequence[Mapping[str, Any]], *, field: str = "messages") -> list[dict[str, Any]]:
    """The conversation as templates want it: each content one text. Anything but text is refused, naming the field."""
    if not given:
        raise InvalidRequest(field, "an empty list", "a conversation needs at least one message")
    return [_read_message(f"{field}[{place}]", message) for place, message in enumerate(given)]


def _read_message(field: str, given: Mapping[str, Any]) -> dict[str, Any]:
    role = given.get("role")
    if not isinstance(role, str) or not role or len(role) > _MAX_ROLE_CHARS:
        shown = repr(role) if role is None or isinstance(role, str | int | float) else type(role).__name__
        raise InvalidRequest(f"{field}.role", shown, "must be 'system', 'user', 'assistant' or 'tool'")
    content = given.get("content")
    if content is None and role != "assistant":
        raise InvalidRequest(f"{field}.content", None, "must be text or a list of text parts")
    message: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": _read_content(f"{field}.content", content) if content is not None else "",
    }
    for name in _PASSED_ON:
        value = given.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise InvalidRequest(f"{field}.{name}", type(value).__name__, "must be text")
            message[name] = value
    if given.get("tool_calls") is not None:
        message["tool_calls"] = _read_tool_calls(f"{field}.tool_calls", given["tool_calls"])
    return message


def _read_content(field: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequest(field, type(content).__name__, "must be text or a list of text parts")
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(kind, str):
            raise InvalidRequest(f"{field}[{place}]", type(part).__name__, "must be {'type': 'text', 'text': ...}")
        if kind != "text":
            raise InvalidRequest(
                f"{field}[{place}].type", kind, "this model reads text only; send parts of type 'text'"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{field}[{place}].text", type(part.get("text")).__name__, "must be text")
        texts.append(part["text"])
    return "\n".join(texts)


def _read_tool_calls(field: str, given: Any) -> list[dict[str, Any]]:
    """Calls of earlier turns; templates want their arguments as objects."""
    if not isinstance(given, list | tuple):
        raise InvalidRequest(field, type(given).__name__, "must be a list")
    calls = []
    for place, call in enumerate(given):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidRequest(
                f"{field}[{place}].function", type(function).__name__, "must have a name and arguments"
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"{field}[{place}].function.arguments", "text", "must be JSON") from error
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls
