"""Strict JSON: what two readers could understand differently, or what costs more than it says, is a clean 400.

Refused: no UTF-8, duplicate keys, NaN and Infinity, halves of surrogate pairs, numbers too long to be meant, nesting
beyond 64 levels, and anything at the top but an object.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from argosy.cluster.protocol.errors import InvalidRequest

MAX_DEPTH: Final = 64
MAX_NUMBER_CHARS: Final = 400
# can't fail once it has begun (an unfinished string ends with the body), so it reads every byte once
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")


def read_json_object(body: bytes) -> dict[str, Any]:
    """The object in `body`. Raises `InvalidRequest` with `body` as the field."""
    if not body.strip():
        raise _refuse("empty", "send a JSON object")
    if _is_too_deep(body):
        raise _refuse("nesting", f"JSON may be nested at most {MAX_DEPTH} levels deep")
    try:
        value = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _refuse(f"byte {error.start}", "must be UTF-8") from error
    except RecursionError as error:
        raise _refuse("nesting", f"JSON may be nested at most {MAX_DEPTH} levels deep") from error
    except json.JSONDecodeError as error:
        # the parser's sentence names what it expected, never what it read
        raise _refuse(f"character {error.pos}", f"is not valid JSON: {error.msg}") from error
    if not isinstance(value, dict):
        raise _refuse(type(value).__name__, "must be a JSON object")
    if b"\\u" in body:
        _check_surrogates(value)
    return value


def _is_too_deep(body: bytes) -> bool:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for match in _BRACKET.finditer(_STRING.sub(b"", body)):
        depth += 1 if match.group() in b"[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _check_surrogates(value: object) -> None:
    """Walks without recursion; the depth is bounded already."""
    todo: list[tuple[str, object]] = [("body", value)]
    while todo:
        field, item = todo.pop()
        if isinstance(item, str):
            if _HALF_PAIR.search(item):
                raise InvalidRequest(field, "text", "holds half of a surrogate pair; send valid Unicode text")
        elif isinstance(item, Mapping):
            for key, inner in item.items():
                todo.append(("body", key))
                todo.append((key if field == "body" and key.isidentifier() and key.isascii() else field, inner))
        elif isinstance(item, list):
            todo.extend((field, inner) for inner in item)


def _refuse(what: str, fix: str) -> InvalidRequest:
    return InvalidRequest("body", what, fix)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _refuse(key, "this key is there twice in one object")
            seen.add(key)
    return found


def _no_constant(name: str) -> NoReturn:
    raise _refuse(name, "is not JSON; send a finite number")


def _number(text: str, kind: type[int] | type[float]) -> Any:
    if len(text) > MAX_NUMBER_CHARS:
        raise _refuse(f"a number of {len(text)} digits", f"a number has at most {MAX_NUMBER_CHARS} digits")
    return kind(text)


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=lambda text: _number(text, int)
)
