"""The life of one request."""

from typing import Any

import pytest

from argosy.cluster.protocol.errors import InvariantBroken
from argosy.cluster.protocol.messages import GenerateRequest
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.request import Request, RequestStatus, make_requests


def message(**fields: Any) -> GenerateRequest:
    params = TokenParams(max_tokens=40, seed=2**63 - 1, eos_token_ids=(2,), prompt_logprobs=1)
    return GenerateRequest(stream_id=1, request_id="ab", prompt_token_ids=[5, 6, 7], params=params, **fields)


def one(**fields: Any) -> Request:
    return make_requests(message(**fields), arrival=1, now=0.0, max_len=100, deltas=[])[0]


def test_an_illegal_change_tells_the_story_so_far() -> None:
    """A finished request can't come back."""
    request = one()
    request.move(RequestStatus.RUNNING, "started in step 3")
    request.move(RequestStatus.FINISHED, "ended: stop")
    with pytest.raises(InvariantBroken, match=r"started in step 3.*ended: stop"):
        request.move(RequestStatus.WAITING, "by mistake")


def test_prefill_decode_and_recompute_are_one_number() -> None:
    """Also while the driver doesn't know the token that a step in flight will bring."""
    request = one()
    request.block_ids = [0, 1]
    assert request.num_uncomputed_tokens == 3
    request.set_computed(2, 8)
    assert request.num_uncomputed_tokens == 1
    request.set_computed(3, 8)  # the first token is in flight
    assert request.num_uncomputed_tokens == 1
    request.set_computed(0, 8)
    request.token_ids += [8, 9]
    assert request.num_uncomputed_tokens == 5


def test_the_step_loop_looks_up_at_the_end_of_the_table_and_before_the_last_token() -> None:
    """Between these it only counts down."""
    request = one()
    request.block_ids = [0, 1]
    request.set_computed(3, 8)
    assert (request.boundary, request.countdown) == (8, 5)
    request.block_ids = list(range(11))
    request.set_computed(4, 44)
    assert request.boundary == 41 == request.end - 2
    request.watched = request.quiet_watch
    request.set_computed(41, 44)
    assert request.boundary == 42
    assert 12345 in request.watched, "the next step brings the last token"
    request.set_computed(42, 44)
    assert request.is_fully_scheduled


def test_answers_of_one_message_have_seeds_in_a_row_that_stay_64_bits_wide() -> None:
    """Index 0 draws as a request with n = 1 would."""
    first, second = make_requests(message(n=2), arrival=1, now=0.0, max_len=100, deltas=[])
    assert first.params.seed == 2**63 - 1
    assert second.params.seed == -(2**63)
    assert first.prompt_logprobs == [None, None, None]
    assert second.params.prompt_logprobs is None


def test_what_was_generated_elsewhere_counts_as_answer() -> None:
    """A request that is resumed knows its penalties, its minimum and its position."""
    request = one(generated_token_ids=[[8, 9]])
    assert (request.num_prompt_tokens, request.num_output_tokens, request.end) == (3, 2, 43)
    assert request.token_ids == [5, 6, 7, 8, 9]
