"""Templates that run away, eat memory, refuse or answer, each without harm to the next question."""

import asyncio
import time
from typing import Any

import psutil
import pytest

from argosy.cluster.protocol.errors import InvalidRequest
from argosy.deploy.chat_template import ChatTemplate
from argosy.deploy.template_process import TemplateProcess

SOURCE = """{%- for message in messages -%}
{%- if message.content == "loop" -%}
{%- for a in range(99999) -%}{%- for b in range(99999) -%}x{%- endfor -%}{%- endfor -%}
{%- elif message.content == "eat" -%}{{ message.content * 10000000000 }}
{%- elif message.content == "refuse" -%}{{ raise_exception("not that") }}
{%- else -%}<{{ bos_token }}{{ message.content }}{{ kind }}>{%- endif -%}
{%- endfor -%}"""
TEMPLATE = ChatTemplate({"default": SOURCE}, {"bos_token": "^"})


def say(*words: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": word} for word in words]


def test_answers_and_refusals_are_those_of_the_template_itself() -> None:
    """Letters of all kinds, options, and the sentence of a refusal."""

    async def main() -> None:
        templates = TemplateProcess(TEMPLATE)
        await templates.start()
        for text in ("hi", "\u00fc\u2028 \U0001f642\n", "x" * 500_000):
            there = await templates.render(say(text, "b"), template_kwargs={"kind": 7})
            assert there == TEMPLATE.render(say(text, "b"), template_kwargs={"kind": 7})
        with pytest.raises(InvalidRequest, match="not that"):
            await templates.render(say("refuse"))
        with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
            await templates.render(say("a"), template_kwargs={"messages": 1})
        await templates.close()
        await templates.close()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("word", ["loop", "eat"])
def test_a_template_that_runs_away_costs_one_request(word: str) -> None:
    """The loop goes on turning meanwhile, the process is gone, and the next question is answered."""

    async def main() -> None:
        templates = TemplateProcess(TEMPLATE, render_seconds=0.5)
        assert await templates.render(say("a")) == "<^a>"
        (process,) = psutil.Process().children()
        num_turns = 0
        asking = asyncio.create_task(templates.render(say(word)))
        while not asking.done():
            num_turns += 1
            await asyncio.sleep(0.01)
        with pytest.raises(InvalidRequest, match=r"did not end within 0\.5 s, or needed too much memory"):
            await asking
        assert num_turns > 2 or word == "eat"
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        assert await templates.render(say("b")) == "<^b>"
        await templates.close()
        assert psutil.Process().children() == []

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_question_that_is_called_off_does_not_answer_the_next() -> None:
    """The client left while its conversation was rendered."""

    async def main() -> None:
        templates = TemplateProcess(TEMPLATE, render_seconds=30.0)
        await templates.start()
        asking = asyncio.create_task(templates.render(say("loop")))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        began = time.monotonic()
        assert await templates.render(say("c")) == "<^c>"
        assert time.monotonic() - began < 25
        await templates.close()

    asyncio.run(asyncio.wait_for(main(), 60))
