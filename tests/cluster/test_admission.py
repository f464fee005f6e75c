"""What is refused before anything is allocated."""

from typing import Any

import pytest

from argosy.cluster.admission import check_num_logprobs, check_request
from argosy.cluster.protocol.errors import ContextTooLong, InvalidRequest
from argosy.cluster.protocol.messages import GenerateRequest
from argosy.cluster.protocol.sampling import TokenParams


def check(prompt: list[int], **fields: Any) -> None:
    own = {name: fields.pop(name) for name in tuple(fields) if name in GenerateRequest.__struct_fields__}
    message = GenerateRequest(
        stream_id=0,
        request_id="0",
        prompt_token_ids=prompt,
        params=TokenParams(**{"max_tokens": 5, **fields}),
        **own,
    )
    check_request(message, vocab_size=100, max_model_len=32, max_logprobs=5)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [100]}),
        ("prompt", {"prompt": [-1]}),
        ("n", {"n": 0}),
        ("n", {"n": 129}),
        ("max_tokens", {"max_tokens": 0}),
        ("priority", {"priority": 2**40}),
        ("cache_salt", {"cache_salt": "x" * 2000}),
        ("deadline_seconds", {"deadline_seconds": 0.0}),
        ("deadline_seconds", {"deadline_seconds": float("nan")}),
        ("stop_token_ids", {"stop_token_ids": (100,)}),
        ("eos_token_ids", {"eos_token_ids": (-2,)}),
        ("allowed_token_ids", {"allowed_token_ids": (5, 2**31)}),
        ("logit_bias", {"logit_bias": ((100, 1.0),)}),
        ("logit_bias", {"logit_bias": tuple((1, 1.0) for _ in range(1025))}),
        ("bad_words", {"bad_word_ids": ((1, 2), (3, 100))}),
        ("logprob_token_ids", {"logprob_token_ids": (101,)}),
        ("logprobs", {"logprobs": 6}),
        ("seed", {"seed": 2**63}),
        ("prompt_logprobs", {"prompt_logprobs": -2}),
        ("generated_token_ids", {"generated_token_ids": [[1], [2]]}),
        ("generated_token_ids", {"generated_token_ids": [[100]]}),
    ],
)
def test_a_value_that_cannot_be_served_is_named(field: str, fields: dict[str, Any]) -> None:
    """Ids are compared with the width of the logits in one place, whatever list they come in."""
    with pytest.raises(InvalidRequest) as caught:
        check(**{"prompt": [1, 2], **fields})
    assert caught.value.field == field


@pytest.mark.parametrize("length", [32, 33, 1000])
def test_a_prompt_must_leave_room_for_one_token(length: int) -> None:
    """31 tokens fit a model of 32."""
    check([1] * 31)
    with pytest.raises(ContextTooLong):
        check([1] * length)


def test_what_was_generated_elsewhere_counts_for_the_length() -> None:
    """A resumed request may be full, not more than full."""
    check([1] * 20, generated_token_ids=[[1] * 12])
    with pytest.raises(ContextTooLong):
        check([1] * 20, generated_token_ids=[[1] * 13])


@pytest.mark.parametrize(
    ("most", "taken", "refused"),
    [
        (-1, (0, 5, -1, 1000), ()),
        (20, (0, 20), (21, -1)),
        (100, (100, -1), (101,)),
        (10**6, (5, -1, 1000), (10**6 + 1,)),
    ],
)
def test_log_probabilities_up_to_the_server_s_bound(
    most: int, taken: tuple[int, ...], refused: tuple[int, ...]
) -> None:
    """-1 asks for the whole vocabulary of 100 tokens; the server's -1 bounds nothing."""
    for count in taken:
        check_num_logprobs("logprobs", count, 100, most)
    for count in refused:
        with pytest.raises(InvalidRequest, match=f"logprobs={count}: at most {most}"):
            check_num_logprobs("logprobs", count, 100, most)
    with pytest.raises(InvalidRequest, match="or -1: the whole vocabulary"):
        check_num_logprobs("logprobs", -2, 100, most)
