"""What a client is told of a request that the driver ended with an error."""

import pytest

from argosy.cluster.protocol.messages import TokenDelta
from argosy.cluster.protocol.sampling import NOTHING_ALLOWED, FinishReason
from argosy.deploy.openai.errors import error_body, status_of
from argosy.deploy.remote_errors import rebuild_error


@pytest.mark.parametrize(
    ("code", "status", "message", "shown"),
    [
        ("row_failed", 400, NOTHING_ALLOWED, NOTHING_ALLOWED),
        ("row_failed", 500, "a logit is not a finite number", "a logit is not a finite number"),
        ("worker_failed", 500, "rank 3 on 10.0.0.7: secret", "the engine can't answer now"),
    ],
)
def test_a_request_s_own_failure_is_told_and_that_of_a_machine_is_not(
    code: str, status: int, message: str, shown: str
) -> None:
    """It was "the engine can't answer now" for wishes that contradict each other, too."""
    delta = TokenDelta(
        1, 0, (), finish_reason=FinishReason.ERROR, error_code=code, error_message=message, error_status=status
    )
    error = rebuild_error(delta)
    assert status_of(error) == status
    told = error_body(error)["error"]
    assert told["code"] == code
    assert shown in told["message"]
    assert "secret" not in told["message"]
