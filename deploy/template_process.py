"""Chat templates in a process of their own: a template is a program, and one that runs away must not stop the doors.

The process answers one question after the other, each within a time that it sets itself an alarm for: so it ends also
when nobody is left to end it. Whoever waits kills it a moment later, and the next question starts another.

    python -m argosy.deploy.template_process      first the templates, then questions, on its standard input
"""

import asyncio
import contextlib
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO, Final

from argosy.cluster.protocol.errors import ClusterError, InvalidRequest
from argosy.deploy.chat_template import ChatTemplate

RENDER_SECONDS: Final = 2.0
_START_SECONDS: Final = 30.0
_GRACE_SECONDS: Final = 0.5  # for the alarm to come first
_MAX_MEMORY_BYTES: Final = 1 << 30  # of address space, the interpreter's own included
_HEAD = struct.Struct(">I")


class TemplateProcess:
    """The templates of a model, rendered elsewhere. Belongs to one event loop; `close` ends the process."""

    def __init__(self, template: ChatTemplate, *, render_seconds: float = RENDER_SECONDS):
        self._boot = {"sources": template.sources, "special_tokens": template.special_tokens, "seconds": render_seconds}
        self._seconds = render_seconds
        self.is_started = False
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()  # one question at a time

    async def start(self) -> None:
        """Have the process ready before the first question."""
        async with self._turn:
            await self._ready()
            self.is_started = True

    async def render(self, messages: Any, **options: Any) -> str:
        """As `ChatTemplate.render`; a template that takes too long, or too much memory, refuses the messages."""
        async with self._turn:
            process = await self._ready()
            try:
                async with asyncio.timeout(self._seconds + _GRACE_SECONDS):
                    answer = await _ask(process, {"messages": messages, **options})
            except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
                await self._end()
                fix = f"the model's chat template did not end within {self._seconds:g} s, or needed too much memory"
                raise InvalidRequest("messages", "a conversation", fix) from error
            except BaseException:  # called off in the middle: the answer would be taken for that of the next question
                await self._end()
                raise
        if "refused" in answer:
            raise InvalidRequest(*answer["refused"])
        return str(answer["text"])

    async def close(self) -> None:
        """End the process. May be called twice."""
        async with self._turn:
            self.is_started = False
            await self._end()

    async def _ready(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "argosy.deploy.template_process",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
            try:
                async with asyncio.timeout(_START_SECONDS):
                    await _ask(self._process, self._boot)
            except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
                await self._end()
                raise ClusterError("the process for chat templates did not start") from error
        return self._process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):  # ended already
                process.kill()
            await process.wait()


async def _ask(process: asyncio.subprocess.Process, question: Mapping[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    data = json.dumps(question).encode()
    process.stdin.write(_HEAD.pack(len(data)) + data)
    await process.stdin.drain()
    (length,) = _HEAD.unpack(await process.stdout.readexactly(_HEAD.size))
    answer: dict[str, Any] = json.loads(await process.stdout.readexactly(length))
    return answer


def main() -> int:
    """The process."""
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    boot = _read(source)
    if boot is None:
        return 0
    template = ChatTemplate(boot["sources"], boot["special_tokens"])
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _write(target, {})
    while (question := _read(source)) is not None:
        signal.setitimer(signal.ITIMER_REAL, boot["seconds"])  # nobody handles it: it ends the process
        answer: dict[str, Any]
        try:
            answer = {"text": template.render(question.pop("messages"), **question)}
        except InvalidRequest as error:
            answer = {"refused": list(error.args)}
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        _write(target, answer)
    return 0


def _read(source: BinaryIO) -> dict[str, Any] | None:
    head = source.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    value: dict[str, Any] = json.loads(source.read(*_HEAD.unpack(head)))
    return value


def _write(target: BinaryIO, answer: Mapping[str, Any]) -> None:
    data = json.dumps(answer).encode()
    target.write(_HEAD.pack(len(data)) + data)
    target.flush()


if __name__ == "__main__":
    sys.exit(main())
