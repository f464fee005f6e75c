"""Steps that move through stages in virtual time."""

import pytest

from argosy.cluster.protocol.messages import NewRequest, SchedulerOutput
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.stage_clock import StageClock, StepSize

PARAMS = TokenParams(max_tokens=9)


def step(
    step_id: int, *rows: int, new: int = 0, num_tokens: tuple[int, ...] = (), partial: tuple[int, ...] = ()
) -> SchedulerOutput:
    """A step of these rows, which are new with prompts of so many tokens."""
    requests = [NewRequest(row, [1] * new, new, 0, [], PARAMS) for row in rows] if new else []
    return SchedulerOutput(
        step_id=step_id, epoch=0, rows=rows, new_requests=requests, num_tokens=num_tokens, partial=partial
    )


def test_stages_work_side_by_side_and_a_row_waits_for_its_token() -> None:
    """Two requests: while stage 1 has the first, stage 0 has the second. The first one's next step could start at 4,
    when stage 0 is free, and does at 4.5: its token left stage 1 at 4 and takes half a second on the way."""
    clock = StageClock(2, lambda stage, size: 2.0, hop_seconds=0.5)
    assert clock.run(step(0, 0, new=1), now=0.0) == 4.5  # 0-2, over, 2.5-4.5
    assert clock.run(step(1, 1, new=1), now=0.0) == 6.5  # 2-4, over, 4.5-6.5
    assert clock.run(step(2, 0), now=0.0) == 9.5  # 5-7: the token of step 0 came at 5
    assert clock.spans[0] == [(0.0, 2.0), (2.0, 4.0), (5.0, 7.0)]
    assert clock.idle_shares(0.0, 8.0) == pytest.approx([0.25, 1.0 - 4.5 / 8.0])


def test_pieces_of_a_prompt_follow_each_other_without_a_token() -> None:
    """Only the last one samples; sizes are counted."""
    sizes: list[StepSize] = []
    clock = StageClock(1, lambda stage, size: sizes.append(size) or 1.0)  # type: ignore[func-returns-value]  # append gives None
    clock.run(step(0, 3, new=10, num_tokens=(6,), partial=(0,)), now=1.0)
    assert clock.run(step(1, 3, num_tokens=(4,)), now=1.0) == 3.0
    assert sizes == [StepSize(6, 1, 0, 6), StepSize(4, 1, 1, 10)]
