"""When the first stage takes which step's tokens, and whose they are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from argosy.cluster.protocol.messages import NewRequest, SchedulerOutput
from argosy.cluster.protocol.sampling import TokenParams
from argosy.workers.input_batch import InputBatch
from argosy.workers.token_return import TokenReturn
from argosy.workers.worker import Worker

PARAMS = TokenParams(max_tokens=10)
NUM = 4


class Wire:
    """The last stage's tables, in the order in which they were sent."""

    def __init__(self, max_steps_in_flight: int):
        self.max_steps_in_flight = max_steps_in_flight
        self.sent: list[list[int]] = []
        self.num_received = 0

    def send_tokens(self, table_N: torch.Tensor) -> None:
        """One step's."""
        self.sent.append(table_N.tolist())

    def receive_tokens(self, into_N: torch.Tensor) -> torch.Tensor:
        """The oldest; a test in which it wasn't sent yet would hang in life."""
        into_N.copy_(torch.tensor(self.sent[self.num_received]))
        self.num_received += 1
        return into_N


class FirstStage:
    """The host's side of the first of two stages; what the last one samples is said by the test."""

    def __init__(self, max_steps_in_flight: int = 3):
        self.wire = Wire(max_steps_in_flight)
        self.batch = InputBatch(
            max_num_seqs=NUM, max_model_len=60, max_num_batched_tokens=64, block_size=4, vocab_size=100,
            device=torch.device("cpu"), max_steps_in_flight=max_steps_in_flight,
        )  # fmt: skip
        self.back = TokenReturn(self.batch, self.wire)  # type: ignore[arg-type]  # a stand-in
        self.table, self._step_id = [0] * NUM, 0

    def step(
        self,
        rows: list[int],
        sampled: list[int],
        *,
        new: dict[int, list[int]] | None = None,
        partial: tuple[int, ...] = (),
    ) -> list[int]:
        """The step's input tokens. `sampled`: what the last stage will have drawn, in row order."""
        requests = [NewRequest(handle, ids, len(ids), 0, [handle], PARAMS) for handle, ids in (new or {}).items()]
        counts = [len((new or {}).get(handle, [0])) for handle in rows]
        output = SchedulerOutput(
            step_id=self._step_id, epoch=0, rows=rows, num_tokens=counts, new_requests=requests, partial=partial
        )
        self._step_id += 1
        self.batch.apply(output)
        self.back.prepare(self.batch.handles_of(rows))
        inputs = self.batch.build(output)
        self.batch.advance(inputs)
        self.back.note(inputs)
        for handle, token_id in zip(inputs.sample_handles_S.tolist(), sampled, strict=True):
            self.table[handle] = token_id
        if sampled:
            self.wire.send_tokens(torch.tensor(self.table))
        return inputs.token_ids_T.tolist()


def test_tokens_are_taken_when_they_are_needed_and_not_before() -> None:
    """Two halves take turns: the third step needs the tokens of the first, which were drawn while the second ran."""
    first = FirstStage()
    assert first.step([0], [50], new={0: [9, 8]}) == [9, 8]
    assert first.step([1], [60], new={1: [7]}) == [7]
    assert first.wire.num_received == 0
    assert first.step([0], [51]) == [50]
    assert first.wire.num_received == 1
    assert first.step([1], [61]) == [60]
    assert first.step([0, 1], [52, 62]) == [51, 61]
    assert first.wire.num_received == 4
    assert first.batch.token_ids_NL[0, :4].tolist() == [9, 8, 50, 51]


def test_tokens_that_nobody_needs_are_taken_before_too_many_are_on_the_way() -> None:
    """Prompts alone, of requests that want one token: no step ever needs what they drew."""
    first = FirstStage(max_steps_in_flight=3)
    for step in range(6):
        first.step([step % NUM], [step], new={step % NUM: [1, 2]})
        assert len(first.wire.sent) - first.wire.num_received <= 3
    assert first.back.is_outstanding
    while first.back.is_outstanding:
        first.back.take()
    assert first.wire.num_received == len(first.wire.sent)


def test_a_late_token_of_the_tenant_before_is_not_written_to_the_next_one() -> None:
    """A request is over, its handle is given away at once, and then its last token arrives."""
    first = FirstStage()
    first.step([0, 1], [50, 60], new={0: [9, 8], 1: [7]})
    first.step([0], [40], new={0: [1, 2, 3, 4]})
    assert first.step([1], [61]) == [60]  # takes the first step's tokens: 50 was the other request's
    assert first.batch.token_ids_NL[0, :5].tolist() == [1, 2, 3, 4, 0]
    assert first.step([0, 1], [41, 62]) == [40, 61]


def test_pieces_of_a_prompt_sample_nothing_and_nothing_is_sent() -> None:
    """Both ends know from the message that the step draws no token."""
    first = FirstStage()
    assert first.step([0], [], new={0: [9, 8]}, partial=(0,)) == [9, 8]
    assert not first.back.is_outstanding


def test_the_last_stage_sends_the_table_as_it_is_after_the_step() -> None:
    """What it writes there later is of later steps."""
    wire = Wire(3)
    batch = FirstStage().batch
    back = TokenReturn(batch, wire)  # type: ignore[arg-type]  # a stand-in
    batch.append(np.array([2, 0]), np.array([5, 6]), np.array([33, 44]))
    back.send()
    batch.append(np.array([2]), np.array([6]), np.array([55]))
    assert wire.sent == [[44, 0, 33, 0]]


class SlowDriver:
    """A channel whose next message comes after so many seconds; no time passes in the test."""

    def __init__(self, silence_seconds: float):
        self.silence_seconds = silence_seconds

    def recv(self, timeout_seconds: float | None = None) -> str:
        """The message, or the end of patience."""
        if timeout_seconds is not None and timeout_seconds < self.silence_seconds:
            raise TimeoutError
        return "a step"


@pytest.mark.parametrize(("silence_seconds", "takes"), [(0.3, False), (60.0, True)])
def test_tokens_of_steps_under_way_are_left_alone_between_long_steps(silence_seconds: float, takes: bool) -> None:
    """The driver sends a step when one was answered. While steps take 300 ms, that silence is no idleness: to take
    the latest step's tokens then would make the next one wait for it, and stages would run one after the other."""
    taken: list[bool] = []
    worker = object.__new__(Worker)
    worker.channel = SlowDriver(silence_seconds)  # type: ignore[assignment]  # a stand-in
    worker.runner = SimpleNamespace(  # type: ignore[assignment]  # a stand-in
        device=torch.device("cuda"), has_tokens_to_take=True, take_tokens=lambda: taken.append(True)
    )
    assert worker._next_message() == "a step"
    assert bool(taken) == takes
