"""Many chats with a running server, their words as they come:  .venv/bin/python examples/many_chats.py [URL]

`make serve` starts such a server. The same works with the official `openai` package and `base_url=URL + "/v1"`.
"""

import asyncio
import sys

from argosy import AsyncClient

QUESTIONS = ["What does len do?", "What is a tuple?", "How is a file opened?"]


async def ask(client: AsyncClient, question: str) -> str:
    """One chat; the server runs all of them in the same steps."""
    pieces = []
    async for piece in client.stream_chat([{"role": "user", "content": question}], max_tokens=40, temperature=0):
        pieces.append(piece)
    return f"{question}\n    in {len(pieces)} pieces: {''.join(pieces)!r}"


async def main() -> None:
    """In the order of the questions."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    async with AsyncClient(url) as client:
        for answer in await asyncio.gather(*(ask(client, question) for question in QUESTIONS)):
            print(answer)


if __name__ == "__main__":
    asyncio.run(main())
