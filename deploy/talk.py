"""`argosy chat` and `argosy complete`: a terminal in front of `Client`."""

import argparse
import sys
from typing import Any

from argosy.cluster.protocol.errors import ServingError
from argosy.deploy.client import Client


def main(args: argparse.Namespace) -> int:
    """Run one of the two commands; the exit code."""
    params = {"max_tokens": args.max_tokens, "temperature": args.temperature, "stop": args.stop, "seed": args.seed}
    params = {name: value for name, value in params.items() if value is not None}
    with Client(args.url, api_key=args.api_key) as client:
        if args.command == "complete":
            return _complete(client, args, params)
        messages = [{"role": "system", "content": args.system}] if args.system else []
        if args.text is not None or not sys.stdin.isatty():
            text = args.text if args.text is not None else sys.stdin.read()
            _say(client, args.model, [*messages, {"role": "user", "content": text}], params)
            return 0
        return _converse(client, args.model, messages, params)


def _complete(client: Client, args: argparse.Namespace, params: dict[str, Any]) -> int:
    text = args.text if args.text is not None else sys.stdin.read()
    pieces = client.stream_complete(text, model=args.model, **params)
    first = next(pieces, "")  # before the text is shown again: a refusal should stand alone
    print(text + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _converse(client: Client, model: str | None, messages: list[dict[str, str]], params: dict[str, Any]) -> int:
    name = model or client.models()[0]
    print(f"talking to {name}; Ctrl-D or an empty line ends it, Ctrl-C ends an answer")
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return 0
        if not text.strip():
            return 0
        messages.append({"role": "user", "content": text})
        try:
            answer = _say(client, name, messages, params)
        except KeyboardInterrupt:
            print()
            answer = ""
        except ServingError as error:  # one refused message (too long, say) does not end the conversation
            print(f"argosy: {error}", file=sys.stderr)
            answer = ""
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()


def _say(client: Client, model: str | None, messages: list[dict[str, str]], params: dict[str, Any]) -> str:
    pieces = []
    for piece in client.stream_chat(messages, model=model, **params):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(pieces)
