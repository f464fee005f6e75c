"""Chat templates: programs in a sandbox that turn messages into one prompt. They come from the operator only.

A template is found in this order: the operator's override (a file or the text itself), `chat_template.jinja` in the
model folder, `chat_template` in `tokenizer_config.json` (one text, or a list of named ones), `chat_template.json`.
Requests can't bring one, and what they may set inside one is an allow-list of plain values.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from argosy.cluster.protocol.config_json import read_json
from argosy.cluster.protocol.errors import ConfigError, InvalidRequest, WeightError

MAX_TEMPLATE_KWARGS = 32
MAX_TEMPLATE_KWARG_CHARS = 1024
_OUR_NAMES = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
        "raise_exception",
        "strftime_now",
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
        "mask_token",
    }
)


class _TemplateRefused(jinja2.TemplateError):
    """The template itself called `raise_exception`: the messages don't fit it."""


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}` marks words for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """The compiled template(s) of a model, with the special tokens they may name."""

    def __init__(
        self, templates: Mapping[str, str], special_tokens: Mapping[str, str], *, origin: str = "chat template"
    ):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.sources, self.special_tokens = dict(templates), dict(special_tokens)
        self._templates: dict[str, jinja2.Template] = {}
        for name, text in templates.items():
            try:
                self._templates[name] = environment.from_string(text)
            except jinja2.TemplateError as error:
                raise WeightError(origin, name, f"is not a template that can be compiled: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`. Raises `InvalidRequest` when the template refuses them."""
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message", True, "set add_generation_prompt to false: both at once contradict each other"
            )
        template = (
            self._templates["tool_use"] if tools and "tool_use" in self._templates else self._templates["default"]
        )
        try:
            text = template.render(
                **self.special_tokens,
                **checked_template_kwargs(template_kwargs),
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
            )
        except _TemplateRefused as error:
            raise InvalidRequest("messages", str(error), "the model's chat template refuses these messages") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise InvalidRequest(
                "messages", type(error).__name__, "the model's chat template can't render these messages"
            ) from error
        return _cut_after_final_message(text, messages) if continue_final_message else text


def load_chat_template(
    folder: Path, settings: Mapping[str, Any], special_tokens: Mapping[str, str], override: str | None
) -> ChatTemplate | None:
    """The template that is in force for a model folder, or None when there is none."""
    if override is not None:
        return ChatTemplate({"default": _override_text(override)}, special_tokens, origin="--chat-template")
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.is_file():
        try:
            text = jinja_file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WeightError(jinja_file.name, "", f"can't be read: {error}") from error
        return ChatTemplate({"default": text}, special_tokens, origin=jinja_file.name)
    given, origin = settings.get("chat_template"), "tokenizer_config.json"
    json_file = folder / "chat_template.json"
    if given is None and json_file.is_file():
        given, origin = read_json(json_file).get("chat_template"), json_file.name
    if given is None:
        return None
    if isinstance(given, str):
        return ChatTemplate({"default": given}, special_tokens, origin=origin)
    if isinstance(given, list) and all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in given):
        named = {str(t["name"]): str(t["template"]) for t in given}
        named.setdefault("default", next(iter(named.values())))
        return ChatTemplate(named, special_tokens, origin=origin)
    raise WeightError(origin, "chat_template", "must be a text or a list of {name, template}")


def checked_template_kwargs(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """`chat_template_kwargs` of a request: plain values only, and none of our own names."""
    if not given:
        return {}
    if len(given) > MAX_TEMPLATE_KWARGS:
        raise InvalidRequest("chat_template_kwargs", f"{len(given)} entries", f"at most {MAX_TEMPLATE_KWARGS}")
    for name, value in given.items():
        field = f"chat_template_kwargs.{name}"[:80]
        if name in _OUR_NAMES or not name.isidentifier():
            raise InvalidRequest(field, name, "is not a name that a request may set")
        if not isinstance(value, bool | int | float | str | None):
            raise InvalidRequest(field, type(value).__name__, "must be a plain boolean, number or text")
        if isinstance(value, str) and len(value) > MAX_TEMPLATE_KWARG_CHARS:
            raise InvalidRequest(field, value, f"has at most {MAX_TEMPLATE_KWARG_CHARS} characters")
    return dict(given)


def _override_text(override: str) -> str:
    """An override is the template itself when it holds template syntax, else the path of a file."""
    if "{%" in override or "{{" in override or "\n" in override:
        return override
    try:
        return Path(override).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template={override!r}: is neither a template nor a file that can be read") from error


def _cut_after_final_message(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt up to the end of the last message's words, so that the model goes on with them."""
    final = messages[-1].get("content")
    words = final if isinstance(final, str) else ""
    place = text.rfind(words.strip())
    if not words.strip() or place < 0:
        raise InvalidRequest(
            "continue_final_message", True, "the last message has no text in the prompt that could be continued"
        )
    lead = len(words) - len(words.lstrip())
    whole = place - lead
    if whole >= 0 and text.startswith(words, whole):
        return text[: whole + len(words)]
    return text[: place + len(words.strip())]


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefused(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: not escaped for HTML, letters as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
