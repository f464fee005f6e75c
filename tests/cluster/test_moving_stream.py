"""A request outlives the driver that works on it: the next one goes on with the token that would have come."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from argosy.cluster.moving_stream import MovingStream
from argosy.cluster.protocol.messages import TokenDelta
from argosy.cluster.protocol.sampling import FinishReason, TokenParams
from argosy.cluster.replica_client import ReplicaClient
from tests.cluster.test_driver_loop import SECRET, Running, expected

PROMPT = [7, 1, 2]


@pytest.fixture
def make_driver(tmp_path: Path) -> Iterator[Callable[[str], Running]]:
    """Drivers with a rank each, at the door of that name; those that run are ended."""
    made: list[Running] = []

    def make(name: str) -> Running:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        made.append(Running(folder).start())
        return made[-1]

    yield make
    for running in made:
        if running.thread.is_alive():
            running.stop()


def as_edge(
    drivers: list[Running], body: Callable[[ReplicaClient], Awaitable[None]], *, patience: float = 20.0, moves: int = 3
) -> None:
    """Run `body` as an edge of all of them."""

    async def main() -> None:
        addresses = [driver.address for driver in drivers]
        client = await ReplicaClient.connect(addresses, SECRET, patience_seconds=patience, max_moves=moves)
        try:
            async with asyncio.timeout(60.0):
                await body(client)
        finally:
            await client.close()

    asyncio.run(main())


async def some(stream: MovingStream, count: int) -> list[TokenDelta]:
    """Deltas until `count` tokens came."""
    found: list[TokenDelta] = []
    while sum(len(delta.token_ids) for delta in found) < count:
        found += await anext(stream)
    return found


async def rest(stream: MovingStream) -> list[TokenDelta]:
    return [delta async for deltas in stream for delta in deltas]


def tokens(deltas: list[TokenDelta], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.token_ids]


def working_on(client: ReplicaClient, drivers: list[Running]) -> tuple[Running, Running]:
    """The driver that has the one request, and the other."""
    busy = [replica.client.num_streams > 0 for replica in client._replicas]
    return (drivers[0], drivers[1]) if busy[0] else (drivers[1], drivers[0])


def test_a_stream_goes_on_at_another_replica_without_a_gap_or_a_repeat(make_driver: Callable[[str], Running]) -> None:
    """A driver is killed while it answers; its reader sees one answer, and at the end that it was recovered."""
    drivers = [make_driver("a"), make_driver("b")]

    async def body(client: ReplicaClient) -> None:
        stream = client.submit(PROMPT, TokenParams(max_tokens=1500))
        before = await some(stream, 5)
        lost, _ = working_on(client, drivers)
        await asyncio.to_thread(lost.stop)
        after = await rest(stream)
        every = before + after
        assert tokens(every) == expected(7, 3, 1500)
        assert len(tokens(before)) < 1500
        last = every[-1]
        assert (last.finish_reason, last.num_recoveries, last.error_code) == (FinishReason.LENGTH, 1, "")
        assert [delta.finish_reason for delta in every[:-1]] == [None] * (len(every) - 1)
        scheduled, first, end = last.timing
        assert 0 <= scheduled <= first <= end
        assert [delta.num_cached_tokens for delta in every if delta.num_cached_tokens is not None] == [0]

    as_edge(drivers, body)


def test_all_requests_of_a_lost_replica_move(make_driver: Callable[[str], Running]) -> None:
    """Load on both, several answers a request, one driver killed: every answer is whole."""
    drivers = [make_driver("a"), make_driver("b")]

    async def body(client: ReplicaClient) -> None:
        streams = [client.submit([first, 1, 2], TokenParams(max_tokens=600), n=1 + first % 2) for first in range(40)]
        begun = [await some(stream, 1) for stream in streams]
        await asyncio.to_thread(drivers[0].stop)
        ends = await asyncio.gather(*map(rest, streams))
        moved = 0
        for first, (start, end) in enumerate(zip(begun, ends, strict=True)):
            for index in range(1 + first % 2):
                assert tokens(start + end, index) == expected(first, 3, 600)
            moved += max(delta.num_recoveries for delta in start + end)
        assert moved > 5

    as_edge(drivers, body)


def test_the_only_replica_comes_back_at_its_door(make_driver: Callable[[str], Running]) -> None:
    """One driver, killed and started again: its requests wait for its next life, as those do that come meanwhile."""
    drivers = [make_driver("a")]

    async def body(client: ReplicaClient) -> None:
        stream = client.submit(PROMPT, TokenParams(max_tokens=1500), n=2)
        before = await some(stream, 5)
        await asyncio.to_thread(drivers[0].stop)
        later = client.submit([9, 9], TokenParams(max_tokens=20))
        reading = asyncio.gather(rest(stream), rest(later))
        await asyncio.sleep(0.3)
        assert not reading.done()
        assert not client.closed
        make_driver("a")
        after, others = await reading
        assert [tokens(before + after, index) for index in (0, 1)] == [expected(7, 3, 1500)] * 2
        assert tokens(others) == expected(9, 2, 20)

    as_edge(drivers, body)


def test_an_answer_that_had_ended_is_not_begun_again(make_driver: Callable[[str], Running]) -> None:
    """Of two answers one was called off at a stop string: only the other one moves."""
    drivers = [make_driver("a"), make_driver("b")]

    async def body(client: ReplicaClient) -> None:
        stream = client.submit(PROMPT, TokenParams(max_tokens=1500), n=2)
        before = await some(stream, 6)
        stream.abort(0)
        while not any(delta.index == 0 and delta.finish_reason is FinishReason.ABORT for delta in before):
            before += await anext(stream)
        lost, _ = working_on(client, drivers)
        await asyncio.to_thread(lost.stop)
        after = await rest(stream)
        assert {delta.index for delta in after} == {1}
        assert tokens(before + after, 1) == expected(7, 3, 1500)

    as_edge(drivers, body)


def test_a_wait_without_a_replica_has_an_end(make_driver: Callable[[str], Running]) -> None:
    """Nobody starts the driver again: the reader hears so, in time, with what the request's own deadline says first."""
    drivers = [make_driver("a")]

    async def body(client: ReplicaClient) -> None:
        streams = [
            client.submit(PROMPT, TokenParams(max_tokens=1500)),
            client.submit(PROMPT, TokenParams(max_tokens=1500), deadline_seconds=0.6),
        ]
        begun = [await some(stream, 1) for stream in streams]
        await asyncio.to_thread(drivers[0].stop)
        for stream, start, code in zip(streams, begun, ("channel_closed", "deadline_exceeded"), strict=True):
            last = (start + await rest(stream))[-1]
            assert (last.finish_reason, last.error_code) == (FinishReason.ERROR, code)
        assert client.closed

    as_edge(drivers, body, patience=1.5)


def test_who_learns_that_no_driver_comes_back_waits_no_longer(make_driver: Callable[[str], Running]) -> None:
    """The cluster that would start one has ended. Patience was for ten minutes."""
    drivers = [make_driver("a")]

    async def body(client: ReplicaClient) -> None:
        stream = client.submit(PROMPT, TokenParams(max_tokens=1500))
        begun = await some(stream, 1)
        await asyncio.to_thread(drivers[0].stop)
        ending = asyncio.create_task(rest(stream))
        await asyncio.sleep(0.05)
        client.give_up()
        async with asyncio.timeout(60):
            last = (begun + await ending)[-1]
        assert (last.finish_reason, last.error_code) == (FinishReason.ERROR, "channel_closed")
        assert client.closed

    as_edge(drivers, body, patience=600.0)


def test_a_replica_that_says_it_gave_up_is_left_at_once(make_driver: Callable[[str], Running]) -> None:
    """Its connection still stands for a moment; what it worked on goes on elsewhere, and nothing new is sent there."""
    drivers = [make_driver("a"), make_driver("b")]

    async def body(client: ReplicaClient) -> None:
        stream = client.submit(PROMPT, TokenParams(max_tokens=1500))
        before = await some(stream, 5)
        source = stream._source
        assert source is not None
        source.push(
            TokenDelta(
                stream_id=source.stream_id, index=0, token_ids=(), finish_reason=FinishReason.ERROR,
                error_code="worker_failed", error_message="three groups in a row did not come up", error_status=503,
            )
        )  # fmt: skip
        after = await rest(stream)
        assert tokens(before + after) == expected(7, 3, 1500)
        assert after[-1].num_recoveries == 1
        assert client.num_open == 1
        await client.look()  # it answers, and is well: what it said was not the end of it
        assert client.num_open == 2

    as_edge(drivers, body)


def test_requests_of_a_replica_that_lost_a_rank_do_not_wait_for_the_next_group(
    make_driver: Callable[[str], Running],
) -> None:
    """A rank dies and its group takes its time to come up: the driver is well, and its requests go on elsewhere, those
    that had begun and those that came too late to know. The next ones stay away until the ranks are back."""
    drivers = [make_driver("a"), make_driver("b")]

    async def body(client: ReplicaClient) -> None:
        streams = [client.submit([first, 1, 2], TokenParams(max_tokens=1200), n=1 + first % 2) for first in range(12)]
        begun = [await some(stream, 1) for stream in streams]
        lost = drivers[0]
        lost.ranks.may_start.clear()
        await asyncio.to_thread(lost.ranks.kill)
        late = [client.submit([50 + first, 1], TokenParams(max_tokens=20)) for first in range(4)]
        ends = await asyncio.gather(*map(rest, streams))
        for first, (start, end) in enumerate(zip(begun, ends, strict=True)):
            for index in range(1 + first % 2):
                assert tokens(start + end, index) == expected(first, 3, 1200)
        assert max(delta.num_recoveries for end in ends for delta in end) == 1
        for first, stream in enumerate(late):
            assert tokens(await rest(stream)) == expected(50 + first, 2, 20)
        assert lost.loop.status().state == "rebuilding"
        assert (await client._replicas[0].client.stats()).values["argosy_requests_waiting"] == 0  # called off there
        lost.ranks.may_start.set()
        while not client._replicas[0].is_healthy:
            await asyncio.sleep(0.05)
        assert tokens(await rest(client.submit(PROMPT, TokenParams(max_tokens=9)))) == expected(7, 3, 9)

    as_edge(drivers, body)


def test_who_has_used_up_its_moves_waits_for_the_ranks(make_driver: Callable[[str], Running]) -> None:
    """Its driver holds it, and may compute it again as often as it is allowed to there: nobody takes that away."""
    drivers = [make_driver("a"), make_driver("b")]

    async def body(client: ReplicaClient) -> None:
        stream = client.submit(PROMPT, TokenParams(max_tokens=1200))
        before = await some(stream, 2)
        lost, _ = working_on(client, drivers)
        lost.ranks.may_start.clear()
        await asyncio.to_thread(lost.ranks.kill)
        after = asyncio.create_task(rest(stream))
        while not any(replica.is_rebuilding for replica in client._replicas):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)
        assert not after.done()
        lost.ranks.may_start.set()
        assert tokens(before + await after) == expected(7, 3, 1200)

    as_edge(drivers, body, moves=0)


def test_a_request_that_was_there_too_often_is_lost(make_driver: Callable[[str], Running]) -> None:
    """It may be what kills them: with its moves used up, the others are spared."""
    drivers = [make_driver("a"), make_driver("b")]

    async def body(client: ReplicaClient) -> None:
        stream = client.submit(PROMPT, TokenParams(max_tokens=1500))
        await some(stream, 2)
        lost, _ = working_on(client, drivers)
        await asyncio.to_thread(lost.stop)
        last = (await rest(stream))[-1]
        assert (last.finish_reason, last.error_code) == (FinishReason.LOST, "request_lost")

    as_edge(drivers, body, moves=0)
