"""How long silence is believed."""

from argosy.cluster.step_deadline import LEAST_SECONDS, NUM_NEEDED, NUM_RECENT, StepDeadline, StepsInFlight


def test_only_the_limit_holds_before_enough_steps_are_known() -> None:
    """The first steps of a fresh engine may be slow for many reasons."""
    deadline = StepDeadline(60.0)
    for _ in range(NUM_NEEDED - 1):
        deadline.observe(0.005, 1)
    assert deadline.allowed_seconds(1) == 60.0
    deadline.observe(0.005, 1)
    assert deadline.allowed_seconds(1) == LEAST_SECONDS


def test_a_long_prompt_after_quick_decodes_is_given_its_time() -> None:
    """Decodes of 20 ms, then a chunk of 2048 tokens: twenty times what that many tokens took one by one, at most 60."""
    deadline = StepDeadline(60.0)
    for _ in range(100):
        deadline.observe(0.02, 1)
    assert deadline.allowed_seconds(1) == LEAST_SECONDS
    assert deadline.allowed_seconds(50) == 20.0
    assert deadline.allowed_seconds(2048) == 60.0


def test_slow_steps_raise_the_deadline_until_they_are_forgotten() -> None:
    """One step of two seconds counts as long as it is among the recent ones."""
    deadline = StepDeadline(600.0)
    for _ in range(NUM_NEEDED):
        deadline.observe(2.0, 1000)
    assert deadline.allowed_seconds(1) == 40.0
    for _ in range(NUM_RECENT):
        deadline.observe(0.001, 1)
    assert deadline.allowed_seconds(1) == LEAST_SECONDS


def test_a_short_limit_stays_the_limit() -> None:
    """Tests and impatient operators set a second."""
    deadline = StepDeadline(1.0)
    for _ in range(NUM_NEEDED):
        deadline.observe(0.5, 1)
    assert deadline.allowed_seconds(1) == 1.0


def test_silence_counts_from_the_answer_before() -> None:
    """A step waits behind the one that was sent before it; an answer to another step is none."""
    steps = StepsInFlight(60.0)
    steps.sent(1, 10, now=100.0)
    steps.sent(2, 10, now=101.0)
    assert (len(steps), steps.next_deadline()) == (2, 160.0)
    assert not steps.answered(2, now=102.0)
    assert steps.answered(1, now=150.0)
    assert (len(steps), steps.next_deadline()) == (1, 210.0)
    assert steps.answered(2, now=151.0)
    assert not steps.answered(2, now=152.0)
    steps.sent(3, 10, now=900.0)
    assert steps.next_deadline() == 960.0
    steps.clear()
    assert len(steps) == 0
