"""Ids to text a piece at a time: never half a character, and the pieces together are the text of the whole.

Byte-level vocabularies (Llama 3, Qwen, GPT-2) are bytes: each token's bytes go through an incremental UTF-8 decoder.
Other decoders (SentencePiece and the like) look at neighbours: the tokens that are still held back are decoded behind
those that came out last, and what exceeds the latter's text is new. Both cost the same for every token of an answer.
"""

import codecs
from collections.abc import Sequence
from typing import Final

from argosy.deploy.tokenizer import Tokenizer

_MAX_UNSETTLED_TOKENS: Final = 16  # no character has so many tokens: what is undecided by then stays as it is


class IncrementalDetokenizer:
    """The text of one answer while its tokens arrive."""

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ):
        self._tokenizer = tokenizer
        self._skipped: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._glue_added_tokens = not (skip_special_tokens or spaces_between_special_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._context: list[int] = []  # came out last; decides how the next token reads (spaces)
        self._held: list[int] = []  # not out yet

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that has become certain with these tokens; may be empty."""
        skipped = self._skipped
        if self._utf8 is not None:
            token_bytes = self._tokenizer.token_bytes
            return self._utf8.decode(b"".join([token_bytes(i) for i in token_ids if i not in skipped]))
        return "".join([self._push_one(token_id) for token_id in token_ids if token_id not in skipped])

    def flush(self) -> str:
        """The end of the text: what was held back, a broken character as U+FFFD."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        return self._settle(final=True)

    def _push_one(self, token_id: int) -> str:
        tokenizer = self._tokenizer
        last = (self._held or self._context or (-1,))[-1]
        if self._glue_added_tokens and token_id in tokenizer.added_tokens and last in tokenizer.added_tokens:
            text = self.flush() + tokenizer.added_tokens[token_id]
            self._context = [token_id]
            return text
        self._held.append(token_id)
        if tokenizer.has_byte_fallback and tokenizer.byte_token_value(token_id) is not None:
            return ""  # one wrong byte spoils its whole run of bytes, so a run is decided when it ends
        return self._settle(final=False)

    def _settle(self, *, final: bool) -> str:
        if not self._held:
            return ""
        known = self._tokenizer.decode(self._context)
        new = self._tokenizer.decode(self._context + self._held)[len(known) :]
        is_open = not new or (new.endswith("\ufffd") and not self._tokenizer.has_byte_fallback)
        if is_open and not final and len(self._held) < _MAX_UNSETTLED_TOKENS:
            return ""
        self._context, self._held = self._held, []
        return new


class StopStrings:
    """Finds stop strings in text that comes in pieces, and holds back what may become one.

    The result does not depend on where the pieces are cut: the stop string that is complete first wins.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False):
        self._stops = tuple(stops)
        self._include = include_in_output
        self._first_characters = frozenset(stop[0] for stop in self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(what is certain to belong to the answer, the stop string that was found or None)."""
        if not self._stops or not (text or self._held):
            return text, None
        text = self._held + text
        found = min(
            ((place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0), default=None
        )
        if found is not None:
            end, place, stop = found
            self._held = ""
            return text[: end if self._include else place], stop
        start = self._possible_start(text)
        self._held = text[start:]
        return text[:start], None

    def flush(self) -> str:
        """The text that was held back for a stop string that never came."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Where the earliest tail of `text` begins that a stop string begins with; its length when there is none."""
        for place in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[place] in self._first_characters:
                tail = text[place:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return place
        return len(text)
