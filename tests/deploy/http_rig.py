"""An application over a scripted engine, and one request straight into it: what tests of the HTTP doors share."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

import argosy
from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_app import build_http_app
from argosy.deploy.scripted_engine import ScriptedClient, tokens_script
from argosy.deploy.tokenizer import Tokenizer

MODEL = Path(argosy.__file__).parent / "default_model"
TOKENIZER = Tokenizer.load(MODEL)
WORDS = TOKENIZER.encode(" there is a way", add_special_tokens=False)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]
JSON = [(b"content-type", b"application/json")]


def gateway(client: ScriptedClient, **settings: Any) -> Gateway:
    """The embedded model over a scripted engine."""
    config = ServingConfig.from_mapping({"model": str(MODEL), "served_model_name": "tiny", **settings})
    return Gateway(client, TOKENIZER, config)


def call(app: Any, method: str, path: str, **more: Any) -> httpx.Response:
    """One request, straight into the application."""

    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
            return await http.request(method, path, **more)

    return asyncio.run(asyncio.wait_for(main(), 20))


def app_of(client: ScriptedClient | None = None, **settings: Any) -> Any:
    """The application."""
    door = gateway(client or ScriptedClient(tokens_script(WORDS)), **settings)
    return build_http_app(door, door.config.server)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events; the stream must have ended as a whole one."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
