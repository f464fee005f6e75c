"""Text to ids and back: the Hugging Face folder of a model through the `tokenizers` library alone.

`transformers` takes seconds to import and is only asked when a folder has no `tokenizer.json`. What it does on top of
the file is done here as well: special tokens of `tokenizer_config.json` become special; truncation, padding and
`add_bos_token` are ignored, since the file's own post-processing says where the ends go. No code from a model folder
is ever run.
"""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken

from argosy.cluster.protocol.config_json import read_json
from argosy.cluster.protocol.errors import InvalidRequest, WeightError
from argosy.deploy.chat_template import ChatTemplate, load_chat_template
from argosy.deploy.settings import TOKENIZER_FILES

LARGE_TEXT_CHARS: Final = 8192  # from here on encoding takes over 1 ms and leaves the event loop
NAMED_SPECIAL_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_CHAT_OPTIONS: Final = frozenset(
    {"tools", "documents", "add_generation_prompt", "continue_final_message", "template_kwargs"}
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The vocabulary of one model, its special tokens and its chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens)
        added = backend.get_added_tokens_decoder()
        self.added_tokens: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")
        decoder = backend.decoder
        decoder_facts = json.loads(decoder.__getstate__()) if decoder is not None else {}
        self.is_byte_level = decoder_facts.get("type") == "ByteLevel"
        self.has_byte_fallback = not self.is_byte_level and any(
            part.get("type") == "ByteFallback" for part in (decoder_facts, *decoder_facts.get("decoders", ()))
        )
        # a lower bound of a text's tokens, to refuse the hopeless before it is encoded; only where nothing is dropped
        self._longest_piece = max(map(len, vocabulary), default=1) if self.is_byte_level else None
        self._bytes_of: dict[int, bytes] = {}
        self._text_of: dict[int, str] = {}
        self._threads: ThreadPoolExecutor | None = None

    @classmethod
    def load(cls, folder: str | Path, *, chat_template: str | None = None) -> "Tokenizer":
        """Read a model folder. `chat_template` overrides the folder's: a path, or the template itself."""
        folder = Path(folder)
        settings = _read_if_there(folder / "tokenizer_config.json")
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises bare Exception for anything wrong in the file
                raise WeightError(file.name, "", f"can't be read: {error}") from error
        else:
            backend = _backend_from_transformers(folder)
        special_tokens = _special_token_texts(settings, _read_if_there(folder / "special_tokens_map.json"))
        _register_special_tokens(backend, settings, special_tokens)
        template = load_chat_template(folder, settings, special_tokens, chat_template)
        return cls(backend, special_tokens=special_tokens, chat_template=template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; `add_special_tokens` puts the beginning (and end) token where the model wants it."""
        check_text("prompt", text)
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """`encode`, off the event loop when the text is large."""
        if len(text) < LARGE_TEXT_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: self.encode(text, add_special_tokens=add_special_tokens)
        )

    def least_num_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, at no cost; 0 where nothing can be said."""
        return -(-len(text) // self._longest_piece) if self._longest_piece else 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`."""
        if skip_special_tokens:
            token_ids = [token_id for token_id in token_ids if token_id not in self.special_ids]
        # special tokens were left out above, also those that only tokenizer_config.json calls special
        return str(self._backend.decode(token_ids, skip_special_tokens=False))

    def piece(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None for an id that has no token."""
        return self._backend.id_to_token(token_id)

    def token_text(self, token_id: int) -> str:
        """What one token alone reads as, for logprobs (bytes that are no whole character read as U+FFFD)."""
        text = self._text_of.get(token_id)
        if text is None:
            text = self._text_of[token_id] = self.decode((token_id,))
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""
        found = self._bytes_of.get(token_id)
        if found is None:
            found = self._bytes_of[token_id] = self._find_bytes(token_id)
        return found

    def byte_token_value(self, token_id: int) -> int | None:
        """The byte behind a byte-fallback token ("<0x0A>"), None for all others."""
        piece = self.piece(token_id)
        match = _BYTE_TOKEN.fullmatch(piece) if piece is not None and len(piece) == 6 else None
        return int(match.group(1), 16) if match else None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool = False, **options: Any
    ) -> str | list[int]:
        """What transformers' tokenizers have by that name: the text of a conversation, or with `tokenize` its ids.

        `options` are those of `chat_text`; others go to the template, such as enable_thinking=False.
        """
        known = {name: options.pop(name) for name in _CHAT_OPTIONS & options.keys()}
        more = {**(known.pop("template_kwargs", None) or {}), **options}
        text = self.chat_text(messages, **known, template_kwargs=more or None)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation, by the model's chat template."""
        if self.chat_template is None:
            raise InvalidRequest(
                "messages", "chat", "this model has no chat template; use completions, or start with --chat-template"
            )
        return self.chat_template.render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return self._backend.token_to_id(text) if text is not None else None

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        if piece is None:
            return b""
        if self.is_byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
            except KeyError:  # an added token with characters of its own, such as a space
                return piece.encode()
        if self.has_byte_fallback and (value := self.byte_token_value(token_id)) is not None:
            return bytes((value,))
        return self.token_text(token_id).encode()


def check_text(field: str, text: str) -> None:
    """Refuse text that is no Unicode text (half of a surrogate pair can't be encoded)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            field, f"character {error.start}", "holds half of a surrogate pair; send valid Unicode text"
        ) from error


def _byte_characters() -> dict[str, int]:
    """Byte-level vocabularies write each byte as one printable character: itself where it is, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in printable}
    table.update((chr(0x100 + place), byte) for place, byte in enumerate(b for b in range(256) if b not in printable))
    return table


_BYTE_OF_CHARACTER: Final = _byte_characters()


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text_of_token(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_token_texts(settings: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """Name of the special token -> its text."""
    found = {}
    for name in NAMED_SPECIAL_TOKENS:
        text = _text_of_token(settings.get(name))
        if text is None and name not in settings:
            text = _text_of_token(older.get(name))
        if text is not None:
            found[name] = text
    return found


def _register_special_tokens(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Tokens that only `tokenizer_config.json` calls special (or knows at all) are special here too."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed = settings.get("added_tokens_decoder") or {}
    for _, facts in sorted(listed.items(), key=lambda item: int(item[0])):
        if facts["content"] not in known:
            flags = {name: bool(facts.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            token = AddedToken(facts["content"], special=bool(facts.get("special")), **flags)
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            known[token.content] = token
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or ()
    names = [*special_tokens.values(), *filter(None, map(_text_of_token, extra if isinstance(extra, list) else ()))]
    backend.add_special_tokens([name for name in dict.fromkeys(names) if name not in known])


def _backend_from_transformers(folder: Path) -> tokenizers.Tokenizer:
    """Folders with only `vocab.json`/`merges.txt` or a SentencePiece file: transformers knows how to convert them."""
    if not folder.is_dir():
        raise WeightError(str(folder), "", "is not a folder")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if not (folder / "config.json").is_file():
            raise WeightError(str(folder), "", "holds neither config.json nor a tokenizer: name a model's folder")
        raise WeightError(folder.name, "tokenizer.json", "is missing: the folder holds no tokenizer")
    from transformers import AutoTokenizer  # here, because importing it takes seconds

    try:
        converted = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a converter meets in a foreign file
        raise WeightError(folder.name, "tokenizer", f"can't be converted: {error}") from error
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise WeightError(folder.name, "tokenizer", "has no fast form; convert it to tokenizer.json first")
    return backend
