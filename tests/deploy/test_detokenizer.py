"""Pieces of text: never half a character, together the whole, and stop strings wherever they are cut."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

import argosy
from argosy.deploy.detokenizer import IncrementalDetokenizer, StopStrings
from argosy.deploy.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer.load(Path(argosy.__file__).parent / "default_model")


def sentencepiece_like() -> Tokenizer:
    """Llama 2's way: words that begin with a lower one eighth block, single characters, and bytes for all the rest."""
    words = ["▁", "▁the", "▁cat", "s", "▁sat", ".", "a", "é", "▁你", "<unk>"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


FALLBACK = sentencepiece_like()
VOCABULARIES = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, FALLBACK], ids=["byte level", "byte fallback"])


@VOCABULARIES
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_the_pieces_are_the_whole(tokenizer: Tokenizer, skip: bool, seed: int) -> None:
    """Random ids are the worst text there is: broken characters, special tokens, runs of bytes."""
    rng = random.Random(seed)
    bytes_first = range(256) if tokenizer is FALLBACK else range(7, 270)
    ids = [rng.choice(bytes_first) if rng.random() < 0.4 else rng.randrange(tokenizer.vocab_size) for _ in range(200)]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    for size in (1, 3, 200):
        pieces = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
        text = "".join(pieces.push(ids[at : at + size]) for at in range(0, len(ids), size)) + pieces.flush()
        assert text == whole


@VOCABULARIES
def test_half_a_character_never_comes_out(tokenizer: Tokenizer) -> None:
    """An emoji is four bytes and often four tokens: the screen must not show a replacement character for a moment."""
    if tokenizer is BYTE_LEVEL:
        ids = tokenizer.encode("a🙂b你é", add_special_tokens=False)
    else:
        ids = [262, *"🙂".encode(), 262, *"你".encode(), 263]
    pieces = IncrementalDetokenizer(tokenizer)
    parts = [pieces.push([i]) for i in ids]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + pieces.flush() == tokenizer.decode(ids)


def test_a_character_that_never_ends_is_shown_at_the_end() -> None:
    """max_tokens cut an emoji in two; decoding the whole shows U+FFFD, and so do we."""
    ids = BYTE_LEVEL.encode("a🙂", add_special_tokens=False)[:-1]
    pieces = IncrementalDetokenizer(BYTE_LEVEL)
    text = "".join(pieces.push([i]) for i in ids)
    assert text == "a"
    assert text + pieces.flush() == BYTE_LEVEL.decode(ids)


@VOCABULARIES
def test_a_token_costs_the_same_late_as_early(tokenizer: Tokenizer) -> None:
    """What is kept does not grow with the answer, whatever the tokens are (empty ones, bytes that end)."""
    last = tokenizer.vocab_size - 1
    pieces = IncrementalDetokenizer(tokenizer)
    for token_id in [262, 256, 256, last, 65, 262] * 500:
        pieces.push([token_id])
        assert len(pieces._held) + len(pieces._context) <= 40


def test_special_tokens_are_left_out_or_shown() -> None:
    """`skip_special_tokens` as users know it."""
    ids = BYTE_LEVEL.encode("hi<|end_of_turn|>you", add_special_tokens=True)
    assert IncrementalDetokenizer(BYTE_LEVEL).push(ids) == "hiyou"
    assert IncrementalDetokenizer(BYTE_LEVEL, skip_special_tokens=False).push(ids) == "<|begin|>hi<|end_of_turn|>you"
    glued = IncrementalDetokenizer(FALLBACK, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert glued.push([FALLBACK.vocab_size - 2, FALLBACK.vocab_size - 1]) + glued.flush() == "<s></s>"


def feed(stops: list[str], parts: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """All parts, until a stop string was found."""
    finder, out = StopStrings(stops, include_in_output=include), ""
    for part in parts:
        text, found = finder.feed(part)
        out += text
        if found is not None:
            return out, found
    return out + finder.flush(), None


@pytest.mark.parametrize(
    ("stops", "parts", "text", "found"),
    [
        (["\n\n"], ["a\n", "\nb"], "a", "\n\n"),
        (["STOP"], ["aS", "T", "O", "x"], "aSTOx", None),
        (["STOP"], ["aST", "OP", "b"], "a", "STOP"),
        (["STOP"], ["aST"], "aST", None),
        (["aab"], ["a", "a", "a", "b"], "a", "aab"),
        (["bcd", "c"], ["abcd"], "ab", "c"),
        (["abc", "bc"], ["xabc"], "x", "abc"),
        ([], ["a", "b"], "ab", None),
    ],
)
def test_stop_strings_are_found_across_borders(
    stops: list[str], parts: list[str], text: str, found: str | None
) -> None:
    """A stop string may lie over any number of tokens, and what only began like one comes out after all."""
    assert feed(stops, parts) == (text, found)


def test_the_stop_string_itself_comes_out_when_asked_for() -> None:
    """`include_stop_str_in_output`."""
    assert feed(["STOP"], ["aST", "OPb"], include=True) == ("aSTOP", "STOP")


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_where_the_text_is_cut_changes_nothing(text: str, stops: list[str], cuts: list[int]) -> None:
    """The same answer in other batches comes in other pieces; it must end at the same place."""
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[a:b] for a, b in pairwise(edges)]
    assert feed(stops, parts) == feed(stops, list(text))
