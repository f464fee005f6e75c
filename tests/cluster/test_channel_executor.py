"""A group of ranks, from hello to loss, with ranks that are threads of this test."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from argosy.cluster.channel_executor import ChannelExecutor
from argosy.cluster.clock import ManualClock, MonotonicClock
from argosy.cluster.executor import ExecutorEvent, RanksLost, RanksReady
from argosy.cluster.poller import Poller
from argosy.cluster.protocol.channel import Channel
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import (
    ChannelClosed,
    ConfigError,
    PlacementImpossible,
    ServingError,
    StartupTimeout,
    WeightError,
    WorkerFailed,
    WorkerLost,
)
from argosy.cluster.protocol.messages import (
    Hello,
    ModelRunnerOutput,
    NewRequest,
    SchedulerOutput,
    StopWorker,
    ToRank,
    WorkerError,
)
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.rank_processes import RankDoor
from argosy.placement.plan import make_plan
from argosy.workers.zero_cost_rank import ZeroCostRank, expected_token


class ThreadRanks:
    """Satisfies `StartRanks` and `RankHandles`: each rank is a thread with a real connection."""

    def __init__(self, num_ranks: int, blocks: tuple[int, ...] = ()):
        self.plan = make_plan(num_ranks, num_ranks, 1)
        self.blocks = blocks or (4096,) * num_ranks
        self.rendezvous = "127.0.0.1:1"
        self.ranks: dict[int, ZeroCostRank] = {}
        self.door: RankDoor | None = None
        self.on_dead: Callable[[int, str], None] = lambda rank, why: None
        self.refuse: Exception | None = None
        self.silent: set[int] = set()  # these never say hello
        self.num_kills = 0
        self.killed = threading.Event()
        self._threads: list[threading.Thread] = []

    def __call__(self, door: RankDoor, on_dead: Callable[[int, str], None]) -> "ThreadRanks":
        self.door, self.on_dead = door, on_dead
        if self.refuse is not None:
            raise self.refuse
        for rank in self.plan.ranks:
            if rank.global_rank in self.silent:
                continue
            channel = Channel.connect(door.unix, ToRank)
            channel.send(Hello(role="rank", secret=door.secret, global_rank=rank.global_rank))
            stand_in = ZeroCostRank(rank, channel, self.blocks[rank.global_rank])
            self.ranks[rank.global_rank] = stand_in
            thread = threading.Thread(target=stand_in.serve)
            thread.start()
            self._threads.append(thread)
        return self

    def kill(self) -> None:
        self.num_kills += 1
        for rank in self.ranks.values():
            rank.channel.close()
        for thread in self._threads:
            thread.join(5.0)
        self.killed.set()


def config(tp: int = 1, **more: object) -> ServingConfig:
    return ServingConfig.from_mapping({"model": "m", "tensor_parallel_size": tp, "max_model_len": 1024, **more})


@pytest.fixture
def poller() -> Iterator[Poller]:
    made = Poller()
    yield made
    made.close()


Start = Callable[..., ChannelExecutor]


@pytest.fixture
def start(poller: Poller, tmp_path: Path) -> Iterator[Start]:
    """An executor that was told to start epoch 0; stopped at the end."""
    made: list[ChannelExecutor] = []

    def begin(ranks: ThreadRanks, settings: ServingConfig, clock: object = None) -> ChannelExecutor:
        executor = ChannelExecutor(
            config=settings,
            start_ranks=ranks,
            poller=poller,
            clock=clock or MonotonicClock(),  # type: ignore[arg-type]  # or a test's
            folder=str(tmp_path),
        )
        made.append(executor)
        executor.start(0)
        return executor

    yield begin
    for executor in made:
        executor.stop()
    assert list(tmp_path.iterdir()) == []


def next_event(executor: ChannelExecutor) -> ExecutorEvent:
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        if events := executor.poll(0.1):
            assert len(events) == 1
            return events[0]
    raise AssertionError("no event")


def step(step_id: int, *, new: bool = False, epoch: int = 0) -> SchedulerOutput:
    request = NewRequest(
        handle=3,
        token_ids=[50, 1],
        num_prompt_tokens=2,
        num_computed_tokens=0,
        block_ids=[1],
        params=TokenParams(max_tokens=9),
    )
    return SchedulerOutput(
        step_id=step_id, epoch=epoch, rows=[3], num_tokens=[2] if new else [], new_requests=[request] if new else []
    )


def lost_error(event: ExecutorEvent) -> ServingError:
    assert isinstance(event, RanksLost), event
    return event.error


def test_the_least_of_what_the_ranks_have_room_for_becomes_everybodys(start: Start) -> None:
    """One GPU of a group holds somebody else's process: block ids must mean the same on all of them."""
    event = next_event(start(ThreadRanks(3, blocks=(900, 700, 800)), config(3)))
    assert isinstance(event, RanksReady)
    assert (event.epoch, event.num_blocks) == (0, 700)


def test_steps_are_answered_in_order_by_one_rank_for_all(start: Start) -> None:
    """Two steps are in flight; every rank gets each, the answering one replies."""
    ranks = ThreadRanks(2)
    executor = start(ranks, config(2))
    next_event(executor)
    executor.submit(step(0, new=True))
    executor.submit(step(1))
    answers: list[ExecutorEvent] = []
    while len(answers) < 2:
        answers += executor.poll(5.0)
    assert [(a.step_id, list(a.token_ids)) for a in answers if isinstance(a, ModelRunnerOutput)] == [
        (0, [expected_token(50, 2)]),
        (1, [expected_token(50, 3)]),
    ]
    assert executor.num_steps_in_flight == 0


def test_a_dead_rank_ends_the_whole_group_once_and_the_next_epoch_comes_up(start: Start) -> None:
    """Its peers would hang in a collective; what they still say belongs to an epoch that is over."""
    ranks = ThreadRanks(2)
    executor = start(ranks, config(2))
    next_event(executor)
    ranks.ranks[1].channel.close()
    error = lost_error(next_event(executor))
    assert isinstance(error, WorkerLost)
    assert (error.global_rank, error.epoch) == (1, 0)
    assert ranks.killed.wait(5.0)
    assert executor.poll(0.0) == []
    executor.submit(step(7))  # the driver had it ready: it goes nowhere, and nothing breaks
    executor.start(1)
    event = next_event(executor)
    assert isinstance(event, RanksReady)
    assert event.epoch == 1


def test_a_rank_that_hangs_is_found_by_its_silence(start: Start) -> None:
    """Its process lives and its connection stands; only the step deadline tells."""
    clock = ManualClock()
    executor = start(ThreadRanks(1), config(1, step_deadline_seconds=7.0), clock)
    next_event(executor)
    clock.advance(100.0)  # idle: silence means nothing
    assert executor.poll(0.0) == []
    executor._ranks[0].send_frame = lambda frame: None  # type: ignore[method-assign]  # the step never arrives
    executor.submit(step(0, new=True))
    clock.advance(6.9)
    assert executor.poll(0.0) == []
    clock.advance(0.2)
    assert isinstance(lost_error(next_event(executor)), WorkerLost)


def test_a_rank_that_never_comes_is_a_timeout_that_names_it(start: Start) -> None:
    """Rank 1's node is stuck: the start ends at its deadline and says who was missing."""
    clock, ranks = ManualClock(), ThreadRanks(2)
    ranks.silent = {1}
    executor = start(ranks, config(2, start_deadline_seconds=30.0), clock)
    while executor.start_progress()[1] < 0.5:
        executor.poll(0.1)
    clock.advance(31.0)
    error = lost_error(next_event(executor))
    assert isinstance(error, StartupTimeout)
    assert "rank 1" in str(error)


def test_a_process_that_ends_while_starting_says_why(start: Start) -> None:
    """An import error in the rank: no hello will ever come, and nobody waits for the deadline."""
    ranks = ThreadRanks(2)
    ranks.silent = {1}
    executor = start(ranks, config(2))
    while executor.start_progress()[1] < 0.5:
        executor.poll(0.1)
    ranks.on_dead(1, "exit status 1; it said last: ImportError: no torch")
    error = lost_error(next_event(executor))
    assert isinstance(error, WorkerFailed)
    assert "no torch" in str(error)


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        ("weight_error", "model.safetensors: lm_head: missing", WeightError),
        ("config_error", "dtype='int3': unknown", ConfigError),
        ("out_of_memory", "no room for the activations", WorkerFailed),
    ],
)
def test_what_a_rank_reports_comes_out_as_our_error_with_its_text(
    start: Start, code: str, message: str, kind: type[ServingError]
) -> None:
    """The person who started it reads one line, the same as if it had been raised here."""
    ranks = ThreadRanks(2)
    executor = start(ranks, config(2))
    next_event(executor)
    ranks.ranks[1].channel.send(WorkerError(global_rank=1, epoch=0, code=code, message=message))
    error = lost_error(next_event(executor))
    assert type(error) is kind
    assert message in str(error)


def test_a_cache_too_small_for_one_request_is_refused_with_the_length_that_fits(start: Start) -> None:
    """Better at the start than with the first long prompt."""
    error = lost_error(next_event(start(ThreadRanks(1, blocks=(63,)), config(1))))
    assert isinstance(error, ConfigError)
    assert "--max-model-len 1008" in str(error)
    assert "--kv-cache-memory-bytes" in str(error)


def test_no_room_at_all_is_a_matter_of_placement(start: Start) -> None:
    """The weights took it all."""
    error = lost_error(next_event(start(ThreadRanks(1, blocks=(0,)), config(1))))
    assert isinstance(error, PlacementImpossible)


def test_a_start_that_raises_is_an_event_like_any_other(start: Start) -> None:
    """No room in the cluster, or a mistake in the starter: the driver hears of it and stays alive."""
    for refusal in (PlacementImpossible("needs 4 GPU, has 2"), RuntimeError("oops")):
        ranks = ThreadRanks(1)
        ranks.refuse = refusal
        error = lost_error(next_event(start(ranks, config(1))))
        assert isinstance(error, PlacementImpossible)
        assert str(refusal) in str(error)


def test_strangers_stay_outside(start: Start) -> None:
    """A wrong secret, a rank we have, one of an older epoch, garbage: each costs only its own connection."""
    ranks = ThreadRanks(1)
    executor = start(ranks, config(1))
    next_event(executor)
    assert ranks.door is not None
    for hello in (
        Hello(role="rank", secret="guess", global_rank=0),
        Hello(role="rank", secret=ranks.door.secret, global_rank=0),
        Hello(role="edge", secret=ranks.door.secret),
        StopWorker(),
    ):
        stranger = Channel.connect(ranks.door.unix, ToRank)
        stranger.send(hello)
        gone = threading.Event()

        def read(stranger: Channel = stranger, gone: threading.Event = gone) -> None:
            with pytest.raises(ChannelClosed):
                stranger.recv(5.0)
            gone.set()

        reader = threading.Thread(target=read)
        reader.start()
        while reader.is_alive():
            assert executor.poll(0.05) == []
        assert gone.is_set()
    executor.submit(step(0, new=True))
    assert isinstance(next_event(executor), ModelRunnerOutput)


def test_nobody_takes_a_ranks_place_without_the_secret(start: Start) -> None:
    """Rank 1 is late; whoever says to be it is asked for the secret of this very epoch."""
    ranks = ThreadRanks(2)
    ranks.silent = {1}
    executor = start(ranks, config(2))
    while executor.start_progress()[1] < 0.5:
        executor.poll(0.1)
    assert ranks.door is not None
    stranger = Channel.connect(ranks.door.unix, ToRank)
    stranger.send(Hello(role="rank", secret="0" * 64, global_rank=1))
    for _ in range(5):
        assert executor.poll(0.05) == []
    assert executor.start_progress()[1] == 0.5
    with pytest.raises(ChannelClosed):
        stranger.recv(5.0)


def test_stop_lets_ranks_leave_and_gives_back_what_they_held(start: Start) -> None:
    """First by word, then the handles are told to clean up; a second stop does nothing."""
    ranks = ThreadRanks(2)
    executor = start(ranks, config(2))
    next_event(executor)
    executor.stop()
    executor.stop()
    assert ranks.num_kills == 1
    assert not any(thread.is_alive() for thread in ranks._threads)
