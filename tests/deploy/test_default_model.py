"""The model that is served when none is named: its folder loads anywhere, and what comes out of it is language."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parents[2] / "argosy" / "default_model"

ODD_TEXTS = (
    "",
    " ",
    "  two before, two behind  ",
    "tab\there\r\nand a line\n\n\nthree more",
    "🦜🏴‍☠️ a parrot and a flag of four code points",
    "naïve façade, Ελληνικά, русский, 日本語, العربية",
    "e\u0301 is not \u00e9, and \u200b is not nothing \ufeff",
    "\x00\x01\x7f control",
    "def f(*, x: int = 0) -> None: ...  # 1234567890",
    "<|not a token|> <|begin <| |>",
)

# From the documentation of `secrets` and of `queue` (PSF licence), pages that were held out of training.
HELD_OUT_TEXT = """\
The secrets module is used for generating cryptographically strong random numbers suitable for managing data \
such as passwords, account authentication, security tokens, and related secrets.

In particular, secrets should be used in preference to the default pseudo-random number generator in the random \
module, which is designed for modelling and simulation, not security or cryptography.

The queue module implements multi-producer, multi-consumer queues. It is especially useful in threaded \
programming when information must be exchanged safely between multiple threads. The Queue class in this module \
implements all the required locking semantics.

The module implements three types of queue, which differ only in the order in which the entries are retrieved. \
In a FIFO queue, the first tasks added are the first retrieved. In a LIFO queue, the most recently added entry \
is the first retrieved (operating like a stack). With a priority queue, the entries are kept sorted (using the \
heapq module) and the lowest valued entry is retrieved first."""

HELD_OUT_LOSS = 3.825  # nats a token on the text above, by the weights that ship (float32 arithmetic)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return loaded


def test_the_weights_are_small_enough_to_ship() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 16_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 17_000_000


def test_the_model_can_be_split_over_two_and_four_ranks() -> None:
    config = read("config.json")
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size", "num_hidden_layers"):
        assert config[name] % 4 == 0, name


def test_the_folder_loads_as_a_llama_of_five_to_ten_million_parameters(model: Any) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 10e6


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_every_text_comes_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token_id < read("config.json")["vocab_size"] for token_id in ids)


def test_every_byte_is_in_the_vocabulary() -> None:
    """Any token may be sampled and any byte may arrive; neither may end in an unknown."""
    vocabulary = read("tokenizer.json")["model"]["vocab"]
    assert sum(len(token) == 1 for token in vocabulary) == 256
    assert sorted(vocabulary.values()) == list(range(read("config.json")["vocab_size"]))


def test_a_chat_is_rendered_with_its_roles(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What is json?"},
        {"role": "assistant", "content": "A module."},
        {"role": "user", "content": "Thanks"},
    ]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == (
        "<|begin|><|system|>Answer briefly.<|end_of_turn|><|user|>What is json?<|end_of_turn|>"
        "<|assistant|>A module.<|end_of_turn|><|user|>Thanks<|end_of_turn|><|assistant|>"
    )
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.convert_tokens_to_ids("<|end_of_turn|>")) == 4


def test_a_role_that_the_model_never_saw_is_refused(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="roles are system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "42"}], tokenize=False)


def test_the_end_of_a_turn_and_of_a_text_both_stop_generation(tokenizer: Any) -> None:
    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<|end_of_turn|>"])
    assert read("generation_config.json")["eos_token_id"] == ends
    assert read("config.json")["eos_token_id"] == ends


def test_a_greedy_continuation_is_not_one_token_repeated(tokenizer: Any, model: Any) -> None:
    inputs = tokenizer("If the file does not exist,", return_tensors="pt")
    told = model.generate(**inputs, max_new_tokens=32, do_sample=False, temperature=None, top_p=None)
    new_ids = told[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(set(new_ids)) > len(new_ids) // 3, tokenizer.decode(new_ids)


def test_an_answer_ends_by_itself(tokenizer: Any, model: Any) -> None:
    chat = [{"role": "user", "content": "Who are you?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    told = model.generate(**inputs, max_new_tokens=100, do_sample=False, temperature=None, top_p=None)
    assert told[0, -1].item() == tokenizer.convert_tokens_to_ids("<|end_of_turn|>"), tokenizer.decode(told[0])


@torch.no_grad()
def test_the_perplexity_on_the_card_is_what_a_held_out_page_shows(tokenizer: Any, model: Any) -> None:
    """The page's own loss is that of these weights; the card's, over whole pages with their code, is not far from it.

    Dense prose is harder than a page with its signatures and repetitions: 3.83 beside 3.33 when this was written.
    """
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"\| held out, .*\| ([0-9.]+) \| ([0-9.]+) \|", card)
    assert stated is not None
    assert math.exp(float(stated[1])) == pytest.approx(float(stated[2]), rel=0.01)
    ids = tokenizer(HELD_OUT_TEXT, return_tensors="pt")["input_ids"]
    loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(HELD_OUT_LOSS, abs=0.02)
    assert float(stated[1]) == pytest.approx(loss, abs=0.6)
