"""What users of `LLM` write as prompts, in all the forms they know from elsewhere."""

from collections import deque

import pytest

from argosy import SamplingParams
from argosy.cluster.protocol.errors import InvalidRequest
from argosy.deploy.prompts import (
    Prompt,
    normalise_conversations,
    normalise_params,
    normalise_priorities,
    normalise_prompts,
)


class Array:
    """What numpy, torch and pandas have in common."""

    def __init__(self, values: list[object]):
        self.tolist = lambda: values


class Number:
    """One of numpy's whole numbers, as a list made of an array has them."""

    def __init__(self, value: int):
        self._value = value

    def __index__(self) -> int:
        return self._value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hello", [Prompt("hello", None)]),
        (["a", "b"], [Prompt("a", None), Prompt("b", None)]),
        ([1, 2], [Prompt(None, [1, 2])]),
        ([[1, 2], [3]], [Prompt(None, [1, 2]), Prompt(None, [3])]),
        ({"prompt": "a", "cache_salt": "s"}, [Prompt("a", None, "s")]),
        ([{"prompt_token_ids": [1]}, "b"], [Prompt(None, [1]), Prompt("b", None)]),
        ({"prompt_token_ids": [1], "prompt": "shown only"}, [Prompt(None, [1])]),
        ([], []),
        (("a", "b"), [Prompt("a", None), Prompt("b", None)]),
        ((text for text in "ab"), [Prompt("a", None), Prompt("b", None)]),
        (deque(["a", [1]]), [Prompt("a", None), Prompt(None, [1])]),
        (range(3), [Prompt(None, [0, 1, 2])]),
        (Array([1, 2]), [Prompt(None, [1, 2])]),
        ([Array([1, 2]), "a"], [Prompt(None, [1, 2]), Prompt("a", None)]),
        ({"prompt_token_ids": Array([1, 2])}, [Prompt(None, [1, 2])]),
        (Array(["a", "b"]), [Prompt("a", None), Prompt("b", None)]),
        ([Number(1), Number(2)], [Prompt(None, [1, 2])]),
        ([[Number(1), 2], "a"], [Prompt(None, [1, 2]), Prompt("a", None)]),
    ],
)
def test_every_form_of_a_prompt(given: object, expected: list[Prompt]) -> None:
    """A bare text is one prompt, a flat list of numbers is one prompt, everything else is a list of prompts."""
    assert normalise_prompts(given) == expected


@pytest.mark.parametrize(
    "given",
    [None, 3, b"bytes", {"a", "b"}, Array([1.5]), [None], [1.5], ["a", 2], [[1, "x"]], {"text": "a"}, {"prompt": 4}],
)
def test_what_is_no_prompt_is_named_before_anything_runs(given: object) -> None:
    """The third of a thousand prompts is wrong: the error says which, and none was started."""
    with pytest.raises(InvalidRequest) as caught:
        normalise_prompts(given)
    assert caught.value.field.startswith("prompts")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1, True], r"^prompts\[1\]=True: token ids are whole numbers$"),
        (["a", [1, 2, "x"]], r"^prompts\[1\]\[2\]='x': token ids are whole numbers$"),
        ({"prompt_token_ids": [1.5]}, r"^prompts\.prompt_token_ids\[0\]=1\.5: token ids"),
    ],
)
def test_a_token_that_is_none_is_named_by_its_place(given: object, said: str) -> None:
    """A million may stand before it."""
    with pytest.raises(InvalidRequest, match=said):
        normalise_prompts(given)


def test_params_are_one_for_all_or_one_each() -> None:
    """A list of another length is a mistake that would silently pair wrong ones."""
    default, other = SamplingParams(), SamplingParams(max_tokens=3)
    assert normalise_params(None, default, 2) == [default, default]
    assert normalise_params(other, default, 2) == [other, other]
    assert normalise_params([default, other], default, 2) == [default, other]
    with pytest.raises(InvalidRequest, match="there are 3 prompts"):
        normalise_params([other], default, 3)
    for given, said in (
        ({"max_tokens": 3}, r"^sampling_params=\{'max_tokens': 3\}: must be SamplingParams or a list of them, as "),
        ("hot", r"^sampling_params='hot': must be SamplingParams or a list of them"),
        ([default, 0.5], r"^sampling_params\[1\]=0\.5: must be SamplingParams$"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            normalise_params(given, default, 2)


def test_priorities_are_numbers_for_each_prompt() -> None:
    """None is nobody's priority; a wrong length would go to the wrong prompt."""
    assert normalise_priorities(None, 2) == [0, 0]
    assert normalise_priorities([2, 1], 2) == [2, 1]
    with pytest.raises(InvalidRequest):
        normalise_priorities([1], 2)


def test_a_conversation_or_several() -> None:
    """`chat` takes one list of messages or a list of lists."""
    one = [{"role": "user", "content": "hi"}]
    assert normalise_conversations(one) == [one]
    assert normalise_conversations([one, one]) == [one, one]
    for wrong in ("hi", [], [[]], [{"content": "hi"}], [3]):
        with pytest.raises(InvalidRequest):
            normalise_conversations(wrong)


def test_messages_are_read_as_by_http() -> None:
    """Templates would be given the parts as they are: an image was left out without a word."""
    parts = [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert normalise_conversations(parts) == [[{"role": "system", "content": "a\nb"}]]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(
        InvalidRequest, match=r"messages\[0\]\.content\[0\]\.type=image_url: this model reads text only"
    ):
        normalise_conversations(image)
    for role, shown in (("", "''"), ("u" * 33, "'uuuu")):
        with pytest.raises(InvalidRequest, match=rf"^messages\[0\]\.role={shown}.*: must be 'system', 'user', "):
            normalise_conversations([{"role": role, "content": "x"}])
    with pytest.raises(InvalidRequest, match=r"messages\[1\]\[0\]\.content"):
        normalise_conversations(conversation for conversation in (parts, image))
