"""`/tokenize` and `/detokenize`: what a prompt costs, and what ids read as."""

from collections.abc import Mapping
from typing import Any

import msgspec

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.deploy.conversations import read_messages
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_io import HttpRequest, Responder
from argosy.deploy.openai.errors import missing
from argosy.deploy.openai.fields import note_unknown, read_fields


class TokenizeFields(msgspec.Struct, kw_only=True):
    """`/tokenize`: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None  # a prompt: true; messages: false, the template writes them
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeFields(msgspec.Struct, kw_only=True):
    """`/detokenize`."""

    model: str | None = None
    tokens: list[int] | None = None


async def serve_tokenize(gateway: Gateway, body: Mapping[str, Any], request: HttpRequest, responder: Responder) -> None:
    """Text or a conversation to ids."""
    fields, unknown = read_fields(body, TokenizeFields)
    note_unknown(responder, unknown)
    gateway.check_model(fields.model)
    if fields.messages is not None:
        if fields.prompt is not None:
            raise InvalidRequest("prompt", "given", "send a prompt or messages, not both")
        text = await gateway.render_conversation(
            read_messages(fields.messages),
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            template_kwargs=fields.chat_template_kwargs,
        )
        special = bool(fields.add_special_tokens)
    elif fields.prompt is not None:
        text, special = fields.prompt, fields.add_special_tokens is not False
    else:
        raise missing("prompt")
    token_ids = await gateway.tokenize(text, add_special_tokens=special, of_any_length=True)
    pieces = None
    if fields.return_token_strs and gateway.tokenizer is not None:
        pieces = [gateway.tokenizer.piece(token_id) for token_id in token_ids]
    await responder.json(
        {
            "count": len(token_ids),
            "max_model_len": gateway.info.max_model_len,
            "tokens": token_ids,
            "token_strs": pieces,
        }
    )


async def serve_detokenize(
    gateway: Gateway, body: Mapping[str, Any], request: HttpRequest, responder: Responder
) -> None:
    """Ids to text."""
    fields, unknown = read_fields(body, DetokenizeFields)
    note_unknown(responder, unknown)
    gateway.check_model(fields.model)
    if fields.tokens is None:
        raise missing("tokens")
    gateway.check_token_ids("tokens", fields.tokens)
    if gateway.tokenizer is None:
        raise InvalidRequest("tokens", "ids", "this server has no tokenizer")
    await responder.json({"prompt": gateway.tokenizer.decode(fields.tokens)})
