"""The text the default model learns from: Python's own documentation, cut into plain paragraphs.

Two sources, both under the PSF licence: the reStructuredText sources of the documentation (`--docs`) and what the
standard library of the running interpreter says about itself in docstrings and comments. Both become the same kind of
block, so that prose, code and questions with answers are taken from one list.
"""

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

# One document in 32 is never trained on. The choice is by name, so that a page of the manual and the docstrings of the
# module it describes fall on the same side.
HELD_OUT_SHARE: Final = 32

# Directives: those that describe a name, those with code in them, those whose words are simply read on.
SIGNATURE: Final = re.compile(
    "function|method|class|attribute|data|exception|decorator|(class|static|abstract|coroutine)method|coroutinefunction"
    "|envvar|opcode|pdbcommand|describe|c:(function|member|type|var|macro|struct)"
)
CODE: Final = re.compile("code-block|doctest|testcode|sourcecode|parsed-literal")
TRANSPARENT: Final = re.compile("note|warning|important|caution|impl-detail|topic|rubric|glossary|epigraph")
SKIPPED_FOLDERS: Final = re.compile("tests?|idle_test|site-packages|encodings|turtledemo|lib2to3|_bundled|__pycache__")
SKIPPED_PAGES: Final = re.compile("license|contents|copyright")  # licence texts of other owners, and link lists

DIRECTIVE: Final = re.compile(r"\.\. ([a-z][a-z:-]*)::\s*(.*)")
RULE: Final = re.compile(r"([=\-~^*#\"'+`.:_<>])\1{2,}")
TABLE_RULE: Final = re.compile(r"=+( +=+)+")
BULLET: Final = re.compile(r"(?:[*-]|#\.|\d+[.)])\s+")
FIELD: Final = re.compile(r":[a-z][\w -]*:(\s|$)")
ROLE: Final = re.compile(r":([a-z:]+):`([^`]+)`", re.DOTALL)
CREDIT: Final = re.compile(r"\s*\((?:Contributed|Patch|Suggested|Written|Implemented|Reported|See :issue)[^()]*\)")
LEGAL: Final = re.compile(r"copyright|permission|licen[cs]e|warrant", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of a document. `kind` is heading, prose, item, code, term, module, or a directive such as function."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    blocks: tuple[Block, ...]

    @property
    def held_out(self) -> bool:
        stem = self.name.rsplit("/", 1)[-1]
        topic = re.match(r"[A-Za-z_]+|.+", stem)
        assert topic is not None, self.name
        return hashlib.sha256(topic[0].encode()).digest()[0] % HELD_OUT_SHARE == 0


# ---------------------------------------------------------------------------------------------------------- documents


def read_documents(docs: Iterable[Path]) -> list[Document]:
    """Every document in a fixed order, each paragraph kept only where it is seen first."""
    documents = [document for folder in docs for document in _read_manual(folder)]
    documents += _read_standard_library(Path(sysconfig.get_path("stdlib")))
    return _without_repeats(documents)


def _read_manual(folder: Path) -> Iterator[Document]:
    for path in sorted((*folder.rglob("*.rst"), *folder.rglob("*.rst.txt"))):
        name = path.relative_to(folder).as_posix().removesuffix(".txt").removesuffix(".rst")
        if not SKIPPED_PAGES.fullmatch(name):
            yield Document(name, tuple(cut(path.read_text(encoding="utf-8"))))


def _read_standard_library(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if not any(map(SKIPPED_FOLDERS.fullmatch, parts)) and name != "pydoc_data.topics":
            blocks = tuple(_source_blocks(path.read_text(encoding="utf-8", errors="replace")))
            if blocks:
                yield Document(f"Lib/{name}", (Block("heading", name), *blocks))
    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", tuple(cut(text)))


def _source_blocks(source: str) -> Iterator[Block]:
    """What a module says in docstrings, then in comments of three lines or more."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a template, not a module
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or len(docstring) < 40 or LEGAL.search(docstring):
            continue
        if isinstance(node, ast.ClassDef):
            yield Block("class", f"class {node.name}")
        elif not isinstance(node, ast.Module):
            yield Block("function", f"{node.name}({ast.unparse(node.args)})")
        yield from cut(docstring, indented_is_code=True)
    for run in re.findall(r"(?:^[ \t]*# .*\n){3,}", source, re.MULTILINE):
        text = " ".join(line.strip().lstrip("# ") for line in run.splitlines())
        letters = sum(c.isalpha() or c.isspace() for c in text)
        if letters > 0.92 * len(text) and text.rstrip().endswith((".", ":", "!")) and not LEGAL.search(text):
            yield Block("prose", re.sub(r"\s+", " ", text))


def _without_repeats(documents: Iterable[Document]) -> list[Document]:
    """The help topics are the language reference again, and docstrings are often the manual: first one wins."""
    seen: set[bytes] = set()
    kept: list[Document] = []
    for document in documents:
        blocks: list[Block] = []
        for block in document.blocks:
            bare = re.sub(r"[^a-z0-9]", "", block.text.lower())
            key = hashlib.blake2b(bare.encode(), digest_size=12).digest()
            if len(bare) < 40 or key not in seen:
                blocks.append(block)
            seen.add(key)
        if sum(len(block.text) for block in blocks) > 200:
            kept.append(Document(document.name, tuple(blocks)))
    return kept


# -------------------------------------------------------------------------------------------------- reStructuredText


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def cut(text: str, *, indented_is_code: bool = False) -> Iterator[Block]:
    """Cut reStructuredText into blocks of plain text; unwrap paragraphs, drop tables, indexes and version notes."""
    lines = text.expandtabs().splitlines()
    at = 0

    def deeper(start: int, than: int) -> int:
        """The index after the lines that are blank or indented deeper."""
        while start < len(lines) and (not lines[start].strip() or _indent(lines[start]) > than):
            start += 1
        return start

    while at < len(lines):
        line, words = lines[at], lines[at].strip()
        indent = _indent(line)
        following = lines[at + 1].rstrip() if at + 1 < len(lines) else ""
        if not words or RULE.fullmatch(words) or FIELD.match(words) or words.startswith(("|", "+-")):
            at += 1
        elif TABLE_RULE.fullmatch(words):
            at += 1
            while at < len(lines) and not (TABLE_RULE.fullmatch(lines[at - 1].strip()) and not lines[at].strip()):
                at += 1
        elif words == ".." or words.startswith(".. "):
            found = DIRECTIVE.match(words)
            name, argument = (found[1], found[2]) if found else ("", "")
            if TRANSPARENT.fullmatch(name):
                lines[at] = " " * (indent + 3) + argument
            elif SIGNATURE.fullmatch(name):
                at += 1
                while at < len(lines) and _indent(lines[at]) > indent and not FIELD.match(lines[at].strip()):
                    if argument.endswith("\\"):
                        argument = argument[:-1].rstrip() + " " + lines[at].strip()
                    at += 1
                yield Block(name, plain(argument.rstrip("\\")))
            else:
                end = deeper(at + 1, indent)
                if CODE.fullmatch(name):
                    yield from _code(line for line in lines[at + 1 : end] if not FIELD.match(line.strip()))
                elif name in ("module", "currentmodule"):
                    yield Block("module", argument)
                at = end
        elif RULE.fullmatch(following) and len(following) >= len(words) - 1 and indent == 0:
            yield Block("heading", plain(words))
            at += 2
        elif words.startswith(">>>") or (indented_is_code and indent > 0):
            end = at
            while end < len(lines) and lines[end].strip():
                end += 1
            yield from _code(lines[at:end])
            at = end
        elif not BULLET.match(words) and following.strip() and _indent(following) > indent:
            yield Block("term", plain(words))
            at += 1
        else:
            bullet = BULLET.match(words)
            hang = indent + 1 if bullet else indent
            end = at + 1
            while end < len(lines) and lines[end].strip() and _indent(lines[end]) >= hang:
                end += 1
            prose = " ".join(part.strip() for part in lines[at:end])
            literal = prose.endswith("::")
            prose = plain(prose.removesuffix("::").rstrip() + ":" if literal else prose)
            if bullet:
                yield Block("item", "* " + BULLET.sub("", prose, count=1))
            elif prose != ":":
                yield Block("prose", prose)
            at = end
            if literal:
                at = deeper(end, indent)
                yield from _code(lines[end:at])


def _code(lines: Iterable[str]) -> Iterator[Block]:
    text = inspect.cleandoc("\n" + "\n".join(lines)).rstrip()
    if text.strip():
        yield Block("code", "\n".join("    " + line if line.strip() else "" for line in text.splitlines()))


def plain(text: str) -> str:
    """Take the markup out of a paragraph and leave what a reader of the page would see."""
    text = CREDIT.sub("", text)
    text = ROLE.sub(_role, text)
    text = re.sub(r"(?<!`)`(?!`)([^`<]+?)\s*<[^`>]+>`__?(?![\w`])", r"\1", text)
    text = re.sub(r"(?<!`)`(?!`)([^`]+)`__?(?![\w`])", r"\1", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = text.replace("\\*", "*").replace("\\ ", "").replace("|version|", "3").replace(" --- ", " - ")
    text = re.sub(r"\*\*([^*\n]+)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*])\*([A-Za-z][\w .,'/-]*)\*(?![\w*])", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


def _role(found: re.Match[str]) -> str:
    role, body = found[1].rsplit(":", 1)[-1], re.sub(r"\s+", " ", found[2])
    label = re.fullmatch(r"(.+?)\s*<.+>", body)
    if label:
        return label[1]
    if role in ("issue", "gh", "source"):
        return "" if role != "source" else body
    if role in ("pep", "rfc"):
        return f"{role.upper()} {body.split('#')[0]}"
    body = body.rsplit(".", 1)[-1] if body.startswith("~") else body.lstrip("!.")
    return body + "()" if role in ("func", "meth") and not body.endswith(")") else body


def sections(document: Document) -> Iterator[str]:
    """The document as text, cut at its headings; each is a text of its own that begins and ends."""
    parts: list[str] = []
    previous = ""
    for block in document.blocks:
        if block.kind == "module":
            continue
        if block.kind == "heading" and sum(map(len, parts)) > 600:
            yield "".join(parts)
            parts, previous = [], ""
        tight = block.kind == previous == "item" or previous == "term" or SIGNATURE.fullmatch(previous)
        parts += ["" if not parts else "\n" if tight else "\n\n", "# " * (block.kind == "heading") + block.text]
        previous = block.kind
    if sum(map(len, parts)) > 100:
        yield "".join(parts)
