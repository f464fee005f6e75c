"""Who is recomputed after a loss, and who has been lost too often."""

from argosy.cluster.protocol.messages import GenerateRequest
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.recovery import plan_recovery
from argosy.cluster.request import make_requests


def test_a_request_that_was_there_at_every_loss_is_given_up() -> None:
    """It may well be the cause: the ranks should not be lost to it for ever."""
    message = GenerateRequest(stream_id=0, request_id="0", prompt_token_ids=[1], params=TokenParams(max_tokens=1), n=3)
    requests = make_requests(message, arrival=0, now=0.0, max_len=9, deltas=[])
    for request, count in zip(requests, (1, 2, 3), strict=True):
        request.num_recoveries = count
    plan = plan_recovery(requests, max_recoveries=2)
    assert plan.recomputed == (requests[0], requests[1])
    assert plan.lost == (requests[2],)
