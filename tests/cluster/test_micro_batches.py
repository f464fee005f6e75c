"""Whose turn it is when several stages want work."""

import random

import pytest

from argosy.cluster.micro_batches import (
    MIN_PIECE,
    SMALL_PIECE,
    MicroBatches,
)
from argosy.cluster.protocol.messages import GenerateRequest
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.request import Request


def make(count: int) -> list[Request]:
    """Requests that decode."""
    message = GenerateRequest(
        stream_id=0, request_id="r", prompt_token_ids=[1], params=TokenParams(max_tokens=9), n=count
    )
    return [Request(message, index, arrival=0, arrival_seconds=0.0, end=10, deltas=[]) for index in range(count)]


def run(shares: MicroBatches, decoding: list[Request], steps: range, *, answered: int = 2) -> list[list[int]]:
    """So many steps in a row; all but the latest `answered` are known. Who was in each, by index."""
    taken = []
    for step_id in steps:
        rows = shares.take(decoding, step_id, step_id - 1 - answered, has_prompts=False)
        for request in rows:
            request.last_step_id = step_id
        taken.append([request.index for request in rows])
    return taken


def test_halves_take_turns_and_keep_their_rows() -> None:
    """All came out of one step, their prompts'; from the second step on nobody waits for a token in between."""
    requests = make(6)
    for request in requests:
        request.last_step_id = 0
    taken = run(MicroBatches(2, 100, is_async=True), requests, range(1, 7))
    assert taken == [[0, 1, 2], [3, 4, 5]] * 3


def test_when_some_have_ended_the_halves_are_even_again_at_once() -> None:
    """Four of the first half end. Two of the others wait one step longer, and nobody is in two neighbouring steps."""
    shares, requests = MicroBatches(2, 100, is_async=True), make(12)
    run(shares, requests, range(4))
    left = requests[4:]
    taken = run(shares, left, range(4, 10))
    assert taken == [[4, 5], [6, 7, 8, 9], [4, 5, 10, 11], [6, 7, 8, 9], [4, 5, 10, 11], [6, 7, 8, 9]]


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_nobody_is_forgotten_whoever_comes_and_goes(num_stages: int) -> None:
    """Random comings and goings: a request is in a step again within two rounds, and not sooner than a round while
    there are enough of them."""
    rng, shares = random.Random(num_stages), MicroBatches(num_stages, 100, is_async=True)
    decoding = make(40)
    for step_id in range(400):
        if rng.random() < 0.2:
            decoding = [request for request in decoding if rng.random() < 0.8]
        if rng.random() < 0.2:
            decoding = decoding + make(rng.randrange(8))
        enough = len(decoding) >= num_stages
        before = {id(request): request.last_step_id for request in decoding}
        rows = shares.take(decoding, step_id, step_id - 1 - num_stages, has_prompts=False)
        assert bool(rows) == bool(decoding)
        assert len(rows) <= -(-len(decoding) // min(num_stages, max(len(decoding), 1)))
        for request in rows:
            assert (
                not enough
                or before[id(request)] <= step_id - num_stages
                or all(other.last_step_id > step_id - num_stages for other in decoding)
            )
            request.last_step_id = step_id
        assert all(step_id - request.last_step_id <= 2 * num_stages for request in decoding if request.last_step_id > 0)


def test_without_asynchronous_scheduling_the_driver_knows_each_token_first() -> None:
    """Two stages, both halves under way: there is no third step until the first one was answered."""
    shares, requests = MicroBatches(2, 100, is_async=False), make(4)
    assert [len(shares.take(requests, 0, -1, has_prompts=False)), requests[0].last_step_id] == [2, -1]
    for request in requests:
        request.last_step_id = 1
    assert shares.take(requests, 2, 0, has_prompts=False) == []
    assert len(shares.take(requests, 2, 1, has_prompts=False)) == 2


def test_beside_prompts_who_has_its_token_is_in_the_next_step() -> None:
    """Everything was answered, so nobody waits for its turn in an order of steps that is no more."""
    shares, requests = MicroBatches(3, 100, is_async=True), make(6)
    for request in requests:
        request.last_step_id = 4
    assert len(shares.take(requests, 5, 4, has_prompts=True)) == 2
    assert shares.take(requests, 5, 3, has_prompts=True) == []


def test_who_waited_longest_goes_first_in_the_order_of_all() -> None:
    """Two who were passed over stand between and behind others whose tokens are as known."""
    shares, requests = MicroBatches(2, 100, is_async=True), make(4)
    for request, last in zip(requests, (3, 1, 3, 1), strict=True):
        request.last_step_id = last
    assert [one.index for one in shares.take(requests, 5, 2, has_prompts=False)] == [1, 3]


def test_pieces_of_prompts_stay_the_same_size_until_all_are_through() -> None:
    """They don't shrink with what is left, and grow when more comes; what a step holds is the limit."""
    shares = MicroBatches(2, 8192, is_async=True)
    assert [shares.prompt_budget(left, 0) for left in (16_000, 12_000, 4000, 2000)] == [1000] * 4
    assert shares.prompt_budget(200_000, 0) == 8192
    assert shares.prompt_budget(0, 0) == 8192
    assert shares.prompt_budget(600, 0) == MIN_PIECE


def test_after_a_burst_pieces_are_small_even_if_prompts_never_cease() -> None:
    """16,000 tokens at once; then there are always 300, which come as others go."""
    shares = MicroBatches(2, 8192, is_async=True)
    pieces = [shares.prompt_budget(left, 400) for left in (*range(16_000, 0, -1000), *[300] * 20)]
    assert pieces == [1000] * 16 + [SMALL_PIECE] * 20


def test_beside_rows_that_decode_pieces_are_small() -> None:
    """Their tokens read the weights anyway. 2000 prompt tokens where two stages have 4, 32 and 400 requests that decode
    between them."""
    shares, pieces = MicroBatches(2, 8192, is_async=True), []
    for num_decoding in (4, 32, 400):
        pieces.append(shares.prompt_budget(2000, num_decoding))
        shares.prompt_budget(0, num_decoding)
    assert pieces == [MIN_PIECE, 125, 125]
    assert shares.prompt_budget(100, 32) == SMALL_PIECE


def test_pieces_fill_steps_to_what_ranks_pad_them_to() -> None:
    """3,400 tokens beside 120 rows are pieces of 213. The step has 333 and would be padded to 384, so it takes 264:
    prompts are through sooner, and steps with other numbers of rows are of one size. Small pieces stay as they are, and
    nothing is filled where few rows decode, up to what a step may have."""
    shares, totals = MicroBatches(2, 8192, is_async=True), []
    for num_rows, left in ((120, 3400), (118, 3136), (122, 2870), (120, 2608)):
        totals.append(num_rows + shares.prompt_budget(left, 240, num_rows))
    assert totals == [384] * 4
    shares.prompt_budget(0, 240, 120)
    assert [shares.prompt_budget(left, 240, 120) for left in (1024, 100)] == [SMALL_PIECE] * 2
    assert MicroBatches(2, 8192, is_async=True).prompt_budget(16_000, 14, 7) == 1000
    assert MicroBatches(2, 8192, is_async=True).prompt_budget(131_000, 240, 120) == 8192


def test_what_fills_a_step_counts_as_taken() -> None:
    """1,700 tokens in pieces of 107, 136 with what fills a step of 256: gone after 13 steps, not 16. Then pieces are
    cut anew."""
    shares = MicroBatches(2, 8192, is_async=True)
    pieces = [shares.prompt_budget(max(left, 300), 240, 120) for left in range(1700, 1700 - 14 * 136, -136)]
    assert pieces == [136] * 13 + [SMALL_PIECE]


@pytest.mark.parametrize(
    ("num_decoding", "least"), [(0, MIN_PIECE), (14, MIN_PIECE), (15, SMALL_PIECE), (1500, SMALL_PIECE)]
)
def test_a_step_counts_its_share_of_rows_and_rounds_up(num_decoding: int, least: int) -> None:
    """Fifteen rows are eight in every other step."""
    assert MicroBatches(2, 8192, is_async=True).prompt_budget(1, num_decoding) == least


@pytest.mark.parametrize("num_stages", [2, 4])
def test_waiting_tokens_are_counted_as_far_as_they_make_a_difference(num_stages: int) -> None:
    """Where the count ends pieces are as large as they get; a little before it they are not."""
    shares = MicroBatches(num_stages, 8192, is_async=True)
    most = shares.most_tokens
    assert shares.prompt_budget(most - 8 * num_stages, 0) < 8192
    shares.prompt_budget(0, 0)
    assert shares.prompt_budget(most, 0) == 8192
