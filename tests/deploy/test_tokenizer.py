"""Text to ids and back, as transformers does it, without transformers."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import argosy
from argosy.cluster.protocol.errors import ConfigError, InvalidRequest, WeightError
from argosy.deploy.token_params import read_generation_config
from argosy.deploy.tokenizer import Tokenizer

DEFAULT_MODEL = Path(argosy.__file__).parent / "default_model"
TEXTS = ["Hello there", " two  spaces ", "naïve café 你好 🙂", "a\nb\tc", "<|user|>not a turn<|end_of_turn|>", ""]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_folder(folder: Path, settings: dict[str, Any]) -> Path:
    """A byte-level BPE folder with two special tokens, one of them known to tokenizer_config.json alone."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["the quick brown fox"] * 4,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Builds a folder with given settings."""
    return lambda **settings: make_folder(tmp_path, settings)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The embedded model's."""
    return Tokenizer.load(DEFAULT_MODEL)


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True},
        {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "add_bos_token": False},
    ],
)
def test_ids_and_text_are_those_of_transformers(folder: Callable[..., Path], settings: dict[str, Any]) -> None:
    """A user who counted tokens with transformers must find the same count here."""
    from transformers import AutoTokenizer

    path = folder(**settings)
    ours, theirs = Tokenizer.load(path), AutoTokenizer.from_pretrained(str(path))
    for text in ["the quick fox", " spaced  out", "naïve 🙂", "</s> inside", ""]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), (text, special)
            for skip in (True, False):
                want = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(ids, skip_special_tokens=skip) == want
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


def test_the_default_model_reads_and_talks_as_in_transformers(tokenizer: Tokenizer) -> None:
    """Ids, special tokens and the chat prompt of the embedded model."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(DEFAULT_MODEL))
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye {{ 7 * 7 }}"},
    ]
    for prompt in (True, False):
        want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == want
    want = theirs.apply_chat_template(messages[:3], tokenize=False, continue_final_message=True)
    got = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=False, continue_final_message=True)
    assert got == want
    for tokenize in (True, False):
        want = theirs.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        got = tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=True, enable_thinking=False
        )
        assert got == want


def test_what_is_no_option_of_ours_goes_to_the_template() -> None:
    """As scripts ask a model not to think aloud."""
    tokenizer = Tokenizer.load(
        DEFAULT_MODEL, chat_template="{{ messages[0].content }} {{ enable_thinking }} {{ depth }}"
    )
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, enable_thinking=False, template_kwargs={"depth": 3}) == "Hi False 3"


def test_loading_needs_neither_torch_nor_transformers() -> None:
    """An edge process starts in well under a second because of this."""
    code = (
        "import sys; from argosy.deploy.tokenizer import Tokenizer; "
        f"Tokenizer.load({str(DEFAULT_MODEL)!r}).encode('x'); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60, check=False).returncode == 0


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    """JSON can say "\\ud800"; the tokenizer's library would answer with an error of its own."""
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_a_large_text_is_encoded_off_the_event_loop(tokenizer: Tokenizer) -> None:
    """While somebody's long prompt is encoded, the streams of the others go on."""
    text = "The quick brown fox. " * 20_000

    async def main() -> tuple[list[int], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        ids = await tokenizer.encode_async(text)
        ticking.cancel()
        return ids, ticks

    ids, ticks = asyncio.run(main())
    assert ids == tokenizer.encode(text)
    assert ticks > 1  # on the loop itself it would be none at all; how many, is up to the machine


def test_bytes_and_lower_bound_are_true(tokenizer: Tokenizer) -> None:
    """Every byte of the text is in the tokens' bytes, and no text has fewer tokens than we say."""
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.least_num_tokens(text) <= len(ids)


def test_a_template_is_a_program_in_a_sandbox(folder: Callable[..., Path]) -> None:
    """A template that reaches for Python's insides gets nothing; the client gets a 400 and no traceback."""
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InvalidRequest, match="can't render"):
        Tokenizer.load(folder(), chat_template=escape).apply_chat_template([{"role": "user", "content": "x"}])
    changing = "{% set _ = messages.append(1) %}\n{{ messages }}"
    with pytest.raises(InvalidRequest, match="can't render"):
        Tokenizer.load(folder(), chat_template=changing).apply_chat_template([{"role": "user", "content": "x"}])


def test_what_a_template_refuses_is_the_senders_mistake(folder: Callable[..., Path]) -> None:
    """Many templates want the roles to alternate, and say so."""
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    with pytest.raises(InvalidRequest, match="user first"):
        Tokenizer.load(folder(), chat_template=strict).apply_chat_template([{"role": "system", "content": "x"}])


def test_template_sources_and_arguments(folder: Callable[..., Path], tmp_path: Path) -> None:
    """The operator's file wins over the folder's, a jinja file over tokenizer_config.json; tools pick "tool_use"."""
    messages = [{"role": "user", "content": "x"}]
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    path = folder(chat_template=named, bos_token="<s>")
    both = Tokenizer.load(path)
    assert both.apply_chat_template(messages) == "plain"
    assert both.apply_chat_template(messages, tools=[{"a": "<é>"}]) == '[{"a": "<é>"}]'
    (path / "chat_template.jinja").write_text(TEMPLATE + "{{ bos_token }}{{ documents[0].text }}{{ thinking }}")
    text = Tokenizer.load(path).apply_chat_template(
        messages, documents=[{"text": "D"}], template_kwargs={"thinking": False}
    )
    assert text == "[user]x[assistant]<s>DFalse"
    override = tmp_path / "mine.jinja"
    override.write_text("{% generation %}mine{% endgeneration %}")
    assert Tokenizer.load(path, chat_template=str(override)).apply_chat_template(messages) == "mine"
    with pytest.raises(ConfigError, match="neither"):
        Tokenizer.load(path, chat_template=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "kwargs", [{"messages": "x"}, {"a": [1]}, {"a b": 1}, {"x": "y" * 2000}, {"raise_exception": "x"}]
)
def test_template_arguments_of_a_request_are_plain_values_of_its_own(
    tokenizer: Tokenizer, kwargs: dict[str, Any]
) -> None:
    """A request may switch things in a template, not replace what we put there."""
    with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], template_kwargs=kwargs)


def test_broken_folders_are_refused_in_one_line_that_names_the_file(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Whoever copied a folder by halves learns which file is to blame."""
    path = folder(chat_template="{% for %}")
    with pytest.raises(WeightError, match=r"tokenizer_config\.json: default"):
        Tokenizer.load(path)
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightError, match=r"tokenizer_config\.json"):
        Tokenizer.load(path)
    (path / "tokenizer_config.json").write_text("{}")
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(WeightError, match=r"tokenizer\.json"):
        Tokenizer.load(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightError, match=r"neither config\.json nor a tokenizer: name a model's folder"):
        Tokenizer.load(tmp_path / "empty")  # somebody named the folder above: the tokenizer is not what is missing
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(WeightError, match="no tokenizer"):
        Tokenizer.load(tmp_path / "empty")


def test_a_folder_without_tokenizer_json_goes_through_transformers(tmp_path: Path) -> None:
    """Old GPT-2 folders have vocab.json and merges.txt."""
    source = make_folder(tmp_path, {})
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (old / "config.json").write_text('{"model_type": "gpt2"}')
    text = "the quick brown fox"
    assert Tokenizer.load(old).encode(text) == Tokenizer.load(source).encode(text)


@pytest.mark.parametrize("text", ['{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "[]", "{", "{\xff}"])
def test_a_file_of_the_folder_that_is_no_object_is_named(text: str, tmp_path: Path) -> None:
    """A download that broke off, or somebody's joke: brackets without end."""
    folder = tmp_path / "model"
    shutil.copytree(DEFAULT_MODEL, folder)
    (folder / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightError, match=r"tokenizer_config\.json"):
        Tokenizer.load(str(folder))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightError, match=r"chat_template\.json"):
        Tokenizer.load(str(folder))
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(WeightError, match=r"chat_template\.jinja"):
        Tokenizer.load(str(folder))
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightError, match=r"generation_config\.json"):
        read_generation_config(tmp_path)
