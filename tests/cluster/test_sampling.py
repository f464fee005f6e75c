"""What `SamplingParams` takes, changes and refuses: vLLM's names, defaults and rules."""

import math
from typing import Any

import msgspec
import pytest

from argosy import SamplingParams
from argosy.cluster.protocol.errors import InvalidRequest
from argosy.cluster.protocol.sampling import MAX_LOGIT_BIAS, MAX_N, MIN_TEMPERATURE, TokenParams

make_params: Any = SamplingParams  # as callers without a type checker may use it


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", MAX_N + 1), ("n", True), ("n", 1.5),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("top_p", 0.0), ("top_p", 1.01), ("top_k", -2), ("min_p", 1.5),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0.0),
        ("seed", 2**63), ("max_tokens", 0), ("min_tokens", -1), ("min_tokens", 17),
        ("stop", [""]), ("stop", 5), ("stop", ["a", 1]), ("stop_token_ids", [-1]), ("stop_token_ids", "12"),
        ("allowed_token_ids", []), ("logit_bias", {"a": 1.0}), ("logit_bias", {1: math.nan}), ("logit_bias", [1]),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)),
        ("bad_words", [""]), ("logprobs", -2), ("prompt_logprobs", 1.0),
        ("structured_outputs", {"json": {}}), ("flat_logprobs", True), ("thinking_token_budget", 5),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_served_is_named(field: str, value: object) -> None:
    """The error says which field, what was given and what would do."""
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert caught.value.fix


def test_values_are_brought_into_one_form() -> None:
    """A lone stop string, -1 for "none", keys of JSON, tiny temperatures, and greedy without filters."""
    params = SamplingParams(stop="end", top_k=-1, seed=-1, temperature=0.001, logit_bias={"7": 300})
    assert params.stop == ("end",)
    assert (params.top_k, params.seed, params.temperature) == (0, None, MIN_TEMPERATURE)
    assert params.logit_bias == {7: 100.0}
    greedy = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.2)
    assert greedy.is_greedy
    assert (greedy.top_p, greedy.top_k, greedy.min_p) == (1.0, 0, 0.0)


@pytest.mark.parametrize(
    ("field", "value"), [("top_p", 0.0), ("top_p", 7.0), ("top_k", -5), ("min_p", -1.0), ("top_p", "x")]
)
def test_what_greedy_answers_don_t_need_is_checked_all_the_same(field: str, value: object) -> None:
    """A wrong value passed without a word until somebody set another temperature."""
    with pytest.raises(InvalidRequest, match=f"{field}="):
        make_params(temperature=0, **{field: value})


@pytest.mark.parametrize("field", ["max_tokens", "logprobs", "top_k", "prompt_logprobs"])
def test_a_number_that_is_too_large_is_told_the_bound(field: str) -> None:
    """`max_tokens=2147483648: must be an integer from 1` was what it is."""
    with pytest.raises(InvalidRequest, match="to 2147483647"):
        make_params(**{field: 2**31})


def test_greedy_answers_are_one() -> None:
    """Several would all be equal."""
    with pytest.raises(InvalidRequest, match="n=2"):
        SamplingParams(temperature=0, n=2)


def test_stop_strings_need_text() -> None:
    """Without detokenizing there is nothing to find them in."""
    with pytest.raises(InvalidRequest, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_names_of_vllm_with_their_defaults_load() -> None:
    """A script that spells out what it does not use runs."""
    assert SamplingParams(structured_outputs=None, flat_logprobs=False, skip_clone=True) == SamplingParams(
        skip_clone=True
    )


def test_a_copy_with_changes_is_checked_again() -> None:
    """`replace` is a door like any other."""
    params = SamplingParams(max_tokens=5)
    assert params.replace(max_tokens=7).max_tokens == 7
    with pytest.raises(InvalidRequest):
        params.replace(top_p=7)


def test_both_forms_survive_the_wire() -> None:
    """msgpack there and back."""
    for params in (SamplingParams(stop=["a", "b"], logit_bias={3: 1.5}), TokenParams(max_tokens=3, seed=9, min_p=0.5)):
        data = msgspec.msgpack.encode(params)
        assert msgspec.msgpack.decode(data, type=type(params)) == params


def test_only_untouched_logits_are_plain() -> None:
    """What the ranks' fast path asks."""
    assert TokenParams(max_tokens=1).is_plain
    assert not TokenParams(max_tokens=1, min_tokens=1).is_plain
    assert not TokenParams(max_tokens=1, logit_bias=((3, 1.0),)).is_plain


def test_values_can_be_assigned_and_are_checked_all_the_same() -> None:
    """As vLLM's users write it; a refused value leaves the one from before, a copy has a life of its own."""
    params = SamplingParams(top_p=0.9)
    other = params.clone()
    params.max_tokens = 5
    params.stop = "end"
    params.temperature = 0
    assert params.is_greedy
    params.temperature = 0.7
    assert other == SamplingParams(top_p=0.9)
    for field, value in (("max_tokens", 0), ("top_p", 2.0), ("stop", [1]), ("min_tokens", 6), ("logit_bias", {"x": 1})):
        with pytest.raises(InvalidRequest, match=field):
            setattr(params, field, value)
    assert params == SamplingParams(top_p=0.9, max_tokens=5, stop="end", temperature=0.7)
    with pytest.raises(InvalidRequest, match="did you mean 'max_tokens'"):
        params.max_token = 3


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("tempature", "did you mean 'temperature'"),
        ("max_new_token", "did you mean 'max_tokens'"),
        ("best_of", "is not served; ask for n answers"),
        ("guided_decoding", "structured output is not supported yet"),
        ("zzz", "there is no such field; leave it out"),
    ],
)
def test_a_name_that_is_no_field_is_told_with_the_nearest_one(field: str, said: str) -> None:
    """As any other mistake: field, value, fix. Python's own words for it name neither the value nor a way out."""
    with pytest.raises(InvalidRequest) as caught:
        make_params(**{field: 0.5})
    assert (caught.value.field, caught.value.value) == (field, "0.5")
    assert said in caught.value.fix


def test_fields_are_given_by_name() -> None:
    """A lone 0.7 might be meant as the temperature, and would be n."""
    with pytest.raises(InvalidRequest, match=r"n=0\.7: has no name: write SamplingParams\(n=\.\.\.\)"):
        make_params(0.7)


def test_switches_take_true_and_false_alone() -> None:
    """The text "no" counts as true in Python."""
    for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output", "skip_clone"):
        with pytest.raises(InvalidRequest, match=f"{name}='no': must be true or false"):
            make_params(**{name: "no"})
    with pytest.raises(InvalidRequest, match=r"ignore_eos=1\.0: must be true or false"):
        make_params(ignore_eos=1.0)
    with pytest.raises(InvalidRequest, match="skip_reading_prefix_cache='no': must be true or false"):
        make_params(skip_reading_prefix_cache="no")
    with pytest.raises(InvalidRequest, match="output_kind=7"):
        make_params(output_kind=7)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", "hot", "temperature='hot': must be a finite number from 0"),
        ("top_p", "0.9", "top_p='0.9': must be a finite number above 0 to 1"),
        ("n", "2", "n='2': must be an integer from 1 to 128"),
        ("max_tokens", [5], "max_tokens=[5]: must be an integer from 1"),
        ("min_p", None, "min_p=None: must be a finite number from 0 to 1"),
        ("stop_token_ids", "1,2", "stop_token_ids='1,2': must be a list of token ids (integers from 0)"),
        ("logit_bias", {5: "up"}, "logit_bias='up': must be a finite number"),
        ("logit_bias", "5", "logit_bias='5': must map token ids to numbers from -100 to 100"),
        ("bad_words", "rude", "bad_words='rude': must be a list of non-empty strings"),
        ("extra_args", 5, "extra_args=5: must map names to values"),
        ("output_kind", "delta", "output_kind='delta': must be one of RequestOutputKind.CUMULATIVE, "
                                 "RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_told_with_field_value_and_fix(field: str, value: object, said: str) -> None:
    """Text stands in quotes: without them `top_p=0.9: must be a number` would be a riddle."""
    with pytest.raises(InvalidRequest) as caught:
        make_params(**{field: value})
    assert str(caught.value) == said


def test_both_ends_of_a_range_are_said() -> None:
    """Half of a range is no help to whoever left it at the other end."""
    with pytest.raises(InvalidRequest, match="from -9223372036854775808 to 9223372036854775807"):
        SamplingParams(seed=2**70)


def test_a_number_without_bounds_is_asked_for_in_whole_words() -> None:
    """It was "must be a finite number any"."""
    with pytest.raises(InvalidRequest, match=r"must be a finite number$"):
        SamplingParams(logit_bias={1: math.inf})
