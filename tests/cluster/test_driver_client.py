"""What an edge writes to the driver: requests of one pass of its event loop together, and in order."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from argosy.cluster.driver_client import DriverClient, TokenStream
from argosy.cluster.protocol.channel import FrameReader
from argosy.cluster.protocol.messages import AbortRequest, Burst, Drain, EngineInfo, FromEdge, GenerateRequest
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.replica_client import ReplicaClient

INFO = EngineInfo(
    model="m", max_model_len=64, vocab_size=400, num_blocks=9, block_size=16, tensor_parallel_size=1,
    pipeline_parallel_size=1, dtype="float32", max_logprobs=0, max_num_seqs=64,
)  # fmt: skip


class Written:
    """In the place of a transport."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.pieces.append(bytes(data))

    def close(self) -> None:
        """Nothing is open."""


def written_by(body: Callable[[DriverClient], None], passes: int = 1) -> list[list[Any]]:
    """The messages of each write, of `body` called in so many passes of the event loop."""

    async def main() -> list[bytes]:
        client, transport = DriverClient(), Written()
        client._transport = transport  # type: ignore[assignment]  # a stand-in
        for _ in range(passes):
            body(client)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return transport.pieces

    return [read(piece) for piece in asyncio.run(main())]


def read(piece: bytes) -> list[Any]:
    """The messages of one write."""
    reader = FrameReader(FromEdge)
    reader.feed(piece)
    messages = []
    while (message := reader.next()) is not None:
        messages.append(message)
    assert not reader.num_waiting_bytes, "a message was cut in two"
    return messages


def names(*pieces: list[Any]) -> list[str]:
    """Short: r1 a request, ( and ) a burst, a1 an abort."""
    said = []
    for message in itertools.chain(*pieces):
        if isinstance(message, GenerateRequest):
            said.append(f"r{message.stream_id}")
        elif isinstance(message, Burst):
            said.append("(" if message.begins else ")")
        else:
            said.append(f"a{message.stream_id}" if isinstance(message, AbortRequest) else type(message).__name__)
    return said


def submit(client: DriverClient, num_tokens: int = 3) -> TokenStream:
    return client.submit([300] * num_tokens, TokenParams(max_tokens=2))


def submit_many(count: int, num_tokens: int = 3) -> Callable[[DriverClient], None]:
    def body(client: DriverClient) -> None:
        for _ in range(count):
            submit(client, num_tokens)

    return body


def test_a_request_alone_is_one_write_and_no_burst() -> None:
    """Three passes, a request in each."""
    assert [names(piece) for piece in written_by(submit_many(1), passes=3)] == [["r1"], ["r2"], ["r3"]]


def test_requests_of_one_pass_are_a_burst() -> None:
    """The driver hears at once that there will be more, and where they end."""
    pieces = written_by(submit_many(4), passes=2)
    assert names(*pieces) == ["(", "r1", "r2", "r3", "r4", ")", "(", "r5", "r6", "r7", "r8", ")"]
    assert len(pieces) == 4


def test_what_fills_a_step_is_not_kept_until_the_last() -> None:
    """A thousand prompts are megabytes: the driver can begin with the first of them."""
    pieces = written_by(submit_many(100, 1000))
    assert names(*pieces) == ["(", *(f"r{place}" for place in range(1, 101)), ")"]
    assert 3 < len(pieces) < 30
    assert names(pieces[1])[0] == "r2"


def test_other_words_come_behind_the_requests_before_them() -> None:
    """An abort that overtakes its request would be for nobody."""

    def body(client: DriverClient) -> None:
        first = submit(client)
        first.abort()
        streams = [submit(client) for _ in range(3)]
        streams[0].abort()
        submit(client)
        client.drain()
        submit(client)

    said = names(*written_by(body))
    assert said == ["r1", "a1", "(", "r2", "r3", "r4", ")", "a2", "r5", Drain.__name__, "r6"]


def test_each_of_several_replicas_gets_a_burst_of_its_own() -> None:
    """Six requests over two replicas by load: each driver hears how many of them are its own."""

    async def main() -> list[list[str]]:
        clients, transports = [DriverClient(), DriverClient()], [Written(), Written()]
        for client, transport in zip(clients, transports, strict=True):
            client._transport, client.info = transport, INFO  # type: ignore[assignment]  # a stand-in
        edge = ReplicaClient(clients, ["unix:0", "unix:1"])
        for _ in range(6):
            edge.submit([1, 2, 3], TokenParams(max_tokens=2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return [names(*map(read, transport.pieces)) for transport in transports]

    assert asyncio.run(main()) == [["(", "r1", "r2", "r3", ")"]] * 2


def test_a_connection_that_breaks_before_the_flush_ends_its_streams() -> None:
    """What was held goes nowhere, and nobody waits for it."""

    async def main() -> None:
        client, transport = DriverClient(), Written()
        client._transport = transport  # type: ignore[assignment]  # a stand-in
        streams = [submit(client) for _ in range(3)]
        written = len(transport.pieces)
        client.connection_lost("it broke")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(transport.pieces) == written
        for stream in streams:
            (delta,) = await anext(stream)
            assert delta.finish_reason == "lost"
        assert submit(client).finished

    asyncio.run(main())
