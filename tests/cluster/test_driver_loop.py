"""The loop between edges and ranks, met as an edge meets it: through `DriverClient`, with ranks that are threads."""

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from argosy.cluster.driver_client import DriverClient, TokenStream
from argosy.cluster.driver_loop import MAX_EDGE_PENDING_BYTES, DriverLoop, settle_garbage
from argosy.cluster.protocol.channel import Channel, encode_frame, open_socket
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ChannelClosed, ConfigError, StartupTimeout
from argosy.cluster.protocol.messages import (
    EngineInfo,
    GenerateRequest,
    Hello,
    SchedulerOutput,
    StatsRequest,
    ToEdge,
    ToRank,
    Welcome,
)
from argosy.cluster.protocol.sampling import FinishReason, TokenParams
from argosy.cluster.rank_processes import RankDoor
from argosy.placement.plan import make_plan
from argosy.workers.zero_cost_rank import ZeroCostRank, expected_token

SECRET = "of this test"


class ThreadRanks:
    """Satisfies `StartRanks` and `RankHandles`: each rank is a thread with a real connection."""

    def __init__(self) -> None:
        self.rendezvous = "127.0.0.1:1"
        self.channels: list[Channel] = []
        self.threads: list[threading.Thread] = []
        self.rows: list[int] = []  # of each step
        self.may_start = threading.Event()
        self.may_start.set()
        self.refuse: Exception | None = None

    def __call__(self, door: RankDoor, on_dead: Callable[[int, str], None]) -> "ThreadRanks":
        assert self.may_start.wait(10.0)
        if self.refuse:
            raise self.refuse
        channel = Channel.connect(door.unix, ToRank)
        channel.send(Hello(role="rank", secret=door.secret, global_rank=0))
        rank = ZeroCostRank(make_plan(1, 1, 1).ranks[0], channel)
        step = rank.step

        def noted(output: SchedulerOutput) -> list[int]:
            self.rows.append(len(output.rows))
            return step(output)

        rank.step = noted  # type: ignore[method-assign]  # the same, noted
        thread = threading.Thread(target=rank.serve)
        thread.start()
        self.channels.append(channel)
        self.threads.append(thread)
        return self

    def kill(self) -> None:
        for channel in self.channels:
            channel.close()
        for thread in self.threads:
            thread.join(5.0)


class Running:
    """A loop in its thread."""

    def __init__(self, folder: Path):
        config = ServingConfig.from_mapping({"model": "m", "max_model_len": 2048, "max_num_seqs": 64})
        info = EngineInfo(
            model="m",
            max_model_len=2048,
            vocab_size=1000,
            num_blocks=0,
            block_size=16,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            dtype="float32",
            max_logprobs=20,
            max_num_seqs=64,
        )
        self.ranks = ThreadRanks()
        self.loop = DriverLoop(config, self.ranks, info=info, folder=str(folder), secret=SECRET)
        self.thread = threading.Thread(target=self.loop.run)

    @property
    def address(self) -> str:
        return self.loop.address

    def start(self) -> "Running":
        self.thread.start()
        return self

    def stop(self) -> None:
        self.loop.stop()
        self.thread.join(10.0)
        assert not self.thread.is_alive()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    yield made
    if made.thread.ident is not None:
        made.stop()
        assert list(tmp_path.iterdir()) == []


def edge(body: Callable[[DriverClient], Coroutine[Any, Any, None]], running: Running) -> None:
    """Run `body` as an edge."""

    async def main() -> None:
        client = await DriverClient.connect(running.address, SECRET)
        try:
            async with asyncio.timeout(20.0):
                await body(client)
        finally:
            await client.close()

    asyncio.run(main())


async def tokens_of(stream: TokenStream) -> tuple[list[int], FinishReason]:
    token_ids: list[int] = []
    reason = None
    async for deltas in stream:
        assert deltas
        for delta in deltas:
            token_ids += delta.token_ids
            reason = delta.finish_reason or reason
    assert reason is not None
    return token_ids, reason


def expected(first: int, num_prompt: int, count: int) -> list[int]:
    return [expected_token(first, num_prompt + i) for i in range(count)]


def test_many_streams_share_one_connection_and_each_gets_its_own(running: Running) -> None:
    """A step carries the tokens of all of them in one message."""
    running.start()

    async def body(client: DriverClient) -> None:
        assert client.info.num_blocks == 4096
        streams = [client.submit([first, 1, 2], TokenParams(max_tokens=30)) for first in range(100)]
        found = await asyncio.gather(*map(tokens_of, streams))
        for first, (token_ids, reason) in enumerate(found):
            assert (token_ids, reason) == (expected(first, 3, 30), FinishReason.LENGTH)
        assert client.num_streams == 0
        assert (await client.stats()).healthy

    edge(body, running)


def test_requests_that_are_made_together_begin_together(running: Running) -> None:
    """More than the socket gives in one read; the driver is idle, and its first step holds all of them."""
    running.start()

    async def body(client: DriverClient) -> None:
        prompts = [[first, *range(500, 530)] for first in range(64)]
        streams = [client.submit(prompt, TokenParams(max_tokens=3)) for prompt in prompts]
        for prompt, (token_ids, _) in zip(prompts, await asyncio.gather(*map(tokens_of, streams)), strict=True):
            assert token_ids == expected(prompt[0], len(prompt), 3)
        assert running.ranks.rows == [64, 64, 64]

    edge(body, running)


def test_an_aborted_stream_still_ends_and_gives_its_blocks_back(running: Running) -> None:
    """The user closed the tab."""
    running.start()

    async def body(client: DriverClient) -> None:
        stream = client.submit([5, 1], TokenParams(max_tokens=1900))
        await anext(stream)
        stream.abort()
        assert (await tokens_of(stream))[1] is FinishReason.ABORT
        assert (await client.stats()).status == "ready"

    edge(body, running)


def test_a_rebuilt_group_continues_every_stream_exactly(running: Running) -> None:
    """The rank's connection breaks in the middle; edges see a pause and the very tokens that would have come."""
    running.start()

    async def body(client: DriverClient) -> None:
        streams = [client.submit([first, 1], TokenParams(max_tokens=1500)) for first in range(8)]
        started = [await anext(stream) for stream in streams]
        running.ranks.channels[0].close()
        for first, stream in enumerate(streams):
            token_ids = [token for delta in started[first] for token in delta.token_ids]
            rest, reason = await tokens_of(stream)
            assert (token_ids + rest, reason) == (expected(first, 2, 1500), FinishReason.LENGTH)
        assert len(running.ranks.channels) == 2
        assert running.loop.status().epoch == 1

    edge(body, running)


def test_a_refusal_comes_through_the_stream(running: Running) -> None:
    """Nothing raises at the edge that the driver decides: it is the last delta, with code and status."""
    running.start()

    async def body(client: DriverClient) -> None:
        (delta,) = await anext(client.submit([1] * 5000, TokenParams(max_tokens=1)))
        assert delta.finish_reason is FinishReason.ERROR
        assert (delta.error_code, delta.error_status) == ("context_length_exceeded", 400)

    edge(body, running)


def test_edges_that_come_early_wait_for_readiness(running: Running) -> None:
    """A replica of the HTTP door is up before the weights are: it is welcomed when they are there."""
    running.ranks.may_start.clear()
    running.start()
    hasty = asyncio.run(_connect_error(running, 0.2))
    assert isinstance(hasty, StartupTimeout)
    threading.Timer(0.2, running.ranks.may_start.set).start()
    edge(_nothing, running)


async def _nothing(client: DriverClient) -> None:
    assert client.info.model == "m"


async def _connect_error(running: Running, seconds: float, secret: str = SECRET) -> Exception:
    with pytest.raises((StartupTimeout, ChannelClosed)) as caught:
        await DriverClient.connect(running.address, secret, timeout_seconds=seconds)
    return caught.value


def test_a_wrong_secret_and_garbage_close_that_connection_and_nothing_else(running: Running) -> None:
    """Anything may knock at a TCP door."""
    running.start()
    assert isinstance(asyncio.run(_connect_error(running, 5.0, "guess")), ChannelClosed)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, encode_frame(StatsRequest()), b"\x00\x00\x00\x00"):
        stranger = open_socket(running.address, 5.0)
        stranger.settimeout(5.0)
        stranger.sendall(garbage)
        assert stranger.recv(1) == b""
        stranger.close()
    edge(_nothing, running)


def test_garbage_from_an_edge_that_is_in_ends_its_requests_only(running: Running) -> None:
    """A broken edge must not take the others' tokens with it."""
    running.start()

    async def body(client: DriverClient) -> None:
        other = Channel.connect(running.address, ToEdge)
        other.send(Hello(role="edge", secret=SECRET))
        assert isinstance(other.recv(5.0), Welcome)
        request = GenerateRequest(
            stream_id=1, request_id="x", prompt_token_ids=[9, 9], params=TokenParams(max_tokens=1900)
        )
        other.send(request)
        other.send_frame(b"\x04\x00\x00\x00junk")
        assert await tokens_of(client.submit([5, 1], TokenParams(max_tokens=9))) == (
            expected(5, 2, 9),
            FinishReason.LENGTH,
        )
        while (await client.stats()).values.get("argosy_requests_running", 0.0) > 0.0:
            await asyncio.sleep(0.01)
        other.close()

    edge(body, running)


def test_an_edge_that_stops_reading_is_dropped_and_the_others_go_on(running: Running, monkeypatch: Any) -> None:
    """Its tokens pile up to the bound, not beyond, and the loop never waits for it."""
    monkeypatch.setattr("argosy.cluster.driver_loop.MAX_EDGE_PENDING_BYTES", 100_000)
    assert MAX_EDGE_PENDING_BYTES > 100_000
    running.start()

    async def body(client: DriverClient) -> None:
        deaf = Channel.connect(running.address, ToEdge)
        deaf.send(Hello(role="edge", secret=SECRET))
        for _ in range(40):
            for _ in range(1000):
                deaf.send(StatsRequest())
            if (await client.stats()).status != "ready" or len(running.loop._edges) == 1:
                break
        while len(running.loop._edges) > 1:
            await client.stats()
        assert (await tokens_of(client.submit([5, 1], TokenParams(max_tokens=9))))[0] == expected(5, 2, 9)
        deaf.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "send", _send_or_gone)
        edge(body, running)


def _send_or_gone(self: Channel, message: object) -> None:
    with contextlib.suppress(ChannelClosed):  # dropped: what this test waits for
        self.send_frame(encode_frame(message))


def test_with_the_driver_gone_every_open_stream_ends_as_lost(running: Running) -> None:
    """The owner of a request always hears how it ended."""
    running.start()

    async def body(client: DriverClient) -> None:
        streams = [client.submit([first, 1], TokenParams(max_tokens=2000), n=2) for first in range(3)]
        await anext(streams[0])
        running.loop.stop()
        for stream in streams:
            last = {delta.index: delta async for deltas in stream for delta in deltas}
            assert set(last) == {0, 1}
            assert {delta.finish_reason for delta in last.values()} == {FinishReason.LOST}
            assert {delta.error_code for delta in last.values()} == {"request_lost"}
        assert client.closed
        with pytest.raises(ChannelClosed):
            await client.stats()
        (delta,) = await anext(client.submit([1], TokenParams(max_tokens=1)))
        assert delta.finish_reason is FinishReason.LOST

    edge(body, running)


def test_draining_lets_what_runs_end(running: Running) -> None:
    """Ctrl-C in a terminal: the answer that is being written is finished, a new one is refused."""
    running.start()

    async def body(client: DriverClient) -> None:
        stream = client.submit([5, 1], TokenParams(max_tokens=1000))
        await anext(stream)
        running.loop.stop(drain_seconds=20.0)
        token_ids, reason = await tokens_of(stream)
        assert reason is FinishReason.LENGTH
        assert token_ids[-1] == expected_token(5, 1001)
        running.thread.join(10.0)
        assert running.loop.status().state == "stopped"

    edge(body, running)


def test_a_start_that_can_not_work_ends_the_loop_with_the_error(running: Running) -> None:
    """Whoever started it reads code and text in the status."""
    running.ranks.refuse = ConfigError("tensor_parallel_size=3: no")
    running.start()
    assert running.loop.stopped.wait(10.0)
    status = running.loop.status()
    assert (status.state, status.error_code, status.error_message) == (
        "failed",
        "config_error",
        "tensor_parallel_size=3: no",
    )


def test_the_beat_goes_on_while_idle(running: Running) -> None:
    """/health looks at it: an idle loop is not a hung one."""
    running.start()
    deadline = time.monotonic() + 10.0
    while running.loop.status().state != "ready" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.loop.status().seconds_since_beat < 2.0


def test_a_burst_of_requests_does_not_make_a_driver_look_at_all_its_objects() -> None:
    """So much is made, and kept, that Python looks at everything; a driver's process has other things to do."""
    looks: list[int] = []
    before = gc.get_threshold()
    often, seldom, apart = (each + 1 for each in before)
    many = len(gc.get_objects()) // 2 + 2 * often * seldom * apart  # how old ones there are, and how often it looks

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            looks.append(info["generation"])

    try:
        for settles in (False, True):
            gc.collect()
            if settles:
                settle_garbage()
                assert gc.get_threshold()[:2] == before[:2], "young objects are looked at as ever"
            looks.clear()
            gc.callbacks.append(note)
            kept = [[place] for place in range(many)]
            gc.callbacks.remove(note)
            assert len(kept) == many
            assert (2 in looks) is not settles
            assert {0, 1} <= set(looks), "what a burst leaves is found as ever"
            assert bool(gc.get_freeze_count()) is settles, "what a start leaves is looked at again"
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
