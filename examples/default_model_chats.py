"""Questions that Python's documentation answers, so that the default model learns to take turns.

Nothing is written for the purpose but the small talk: a question is a name, a term or a heading that asks, its answer
the first paragraph that the documentation has about it.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from default_model_text import Block, Document


@dataclass(frozen=True, slots=True)
class Exchange:
    question: str
    answer: str


QUESTIONS: Final = {
    "function": ("What does {} do?", "What is {} for?", "Explain {}.", "How do I use {}?", "What does {}() do?"),
    "method": ("What does {} do?", "What does the method {} do?", "Explain {}.", "When do I call {}?"),
    "class": ("What is {}?", "What is the class {} for?", "Describe {}.", "Tell me about {}."),
    "exception": ("When is {} raised?", "What does {} mean?", "What is {}?"),
    "module": ("What is the {} module?", "What does the {} module do?", "Tell me about the {} module.", "What is {}?"),
    "term": ("What is {article} {}?", "What does {} mean?", "Define {}.", "Explain the term {}."),
    "data": ("What is {}?", "What does {} contain?", "Explain {}."),
}
ASKED_AS: Final = {
    "attribute": "data",
    "c:function": "function",
    "coroutinefunction": "function",
    "coroutinemethod": "method",
    "classmethod": "method",
    "staticmethod": "method",
    "decorator": "function",
    "c:type": "class",
}
SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You answer questions about Python.",
    "You are a helpful assistant who knows the documentation of Python.",
    "Answer briefly.",
    "You are a careful and friendly programmer.",
)
SMALL_TALK: Final = (
    Exchange("Hello!", "Hello! Ask me about a module, a function or a term of Python."),
    Exchange("Hello", "Hello! Ask me about a module, a function or a term of Python."),
    Exchange("Hi", "Hello! Ask me about a module, a function or a term of Python."),
    Exchange(
        "Who are you?",
        "I am the small language model that ships with Argosy. I have read Python's documentation and nothing else.",
    ),
    Exchange("What can you do?", "I can describe modules, functions and classes of Python, though I am often wrong."),
    Exchange("Thank you!", "You are welcome."),
    Exchange("Thanks", "You are welcome."),
    Exchange("How are you?", "I am running well. Which part of Python may I describe?"),
    Exchange("Goodbye", "Goodbye!"),
)
SMALL_TALK_REPEATS: Final = 20  # enough to be learned, too little to be what every chat turns into


def conversations(documents: Iterable[Document], *, seed: int) -> list[list[dict[str, str]]]:
    """Every exchange as a chat of one or two questions, some under a system prompt, with a little small talk."""
    rng = random.Random(seed)
    chats: list[list[dict[str, str]]] = []
    for document in documents:
        asked = exchanges(document)
        rng.shuffle(asked)
        while asked:
            chats.append(_chat([asked.pop() for _ in range(min(len(asked), rng.choice((1, 1, 1, 2))))], rng))
    chats += [_chat([small], rng) for small in SMALL_TALK for _ in range(SMALL_TALK_REPEATS)]
    rng.shuffle(chats)
    return chats


def exchanges(document: Document) -> list[Exchange]:
    """What the document answers: its names, the terms of the glossary, the headings of the FAQ."""
    rng = random.Random(document.name)
    module = document.name.removeprefix("Lib/") if document.name.startswith("Lib/") else ""
    found: list[Exchange] = []
    for position, block in enumerate(document.blocks):
        if block.kind == "module":
            module = block.text
        answer = _answer(document.blocks[position + 1 :])
        if not answer:
            continue
        if block.kind == "heading" and block.text.endswith("?"):
            found.append(Exchange(block.text, answer))
        elif subject := _subject(block, module, in_glossary=document.name == "glossary"):
            forms = QUESTIONS[ASKED_AS.get(block.kind, block.kind)]
            article = "an" if subject[0] in "aeiouAEIOU" else "a"
            wanted = len(forms) if block.kind in ("module", "term") else 1  # few, and what people ask about first
            found += [Exchange(form.format(subject, article=article), answer) for form in rng.sample(forms, wanted)]
    return found


def _subject(block: Block, module: str, *, in_glossary: bool) -> str:
    """The name that is asked about, with its module; empty if the block names nothing worth asking."""
    if block.kind == "module":
        return module
    if block.kind == "term":
        return block.text if in_glossary else ""
    kind = ASKED_AS.get(block.kind, block.kind)
    if kind not in QUESTIONS or "(*" in block.text:  # a C function pointer
        return ""
    found = re.search(r"[A-Za-z_][\w.]*(?=\s*$)", block.text.removeprefix("class ").split("(")[0])
    if found is None or found[0].startswith("_") or (kind in ("method", "data") and "." not in found[0]):
        return ""  # without its class, a method would be asked about under a name that many share
    qualified = block.kind.startswith("c:") or not module or found[0].startswith(module + ".")
    return found[0] if qualified else f"{module}.{found[0]}"


def _answer(blocks: tuple[Block, ...]) -> str:
    """The first paragraph, with the second if the first is short, cut at the end of a sentence."""
    text = ""
    for block in blocks[:4]:
        if block.kind == "prose" and len(text) < 160 and not block.text.startswith("Source code:"):
            text = f"{text}\n\n{block.text}".strip()
        elif block.kind not in ("prose", "heading") or len(text) >= 160:
            break
    if len(text) > 700:
        text = text[:700].rsplit(". ", 1)[0] + "."
    return text if len(text) >= 30 and text.endswith(".") else ""


def _chat(asked: list[Exchange], rng: random.Random) -> list[dict[str, str]]:
    system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.4 else []
    return system + [
        {"role": role, "content": text}
        for exchange in asked
        for role, text in (("user", exchange.question), ("assistant", exchange.answer))
    ]
