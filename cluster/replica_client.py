"""An edge's connections to several replicas as one: each request goes where its prefix is, or where less is to do.

What a replica has cached is what this edge sent it and, twice a second, what it says that came in from others, too,
remembered by the names of its blocks and forgotten like those; what it has to do is what it last said, corrected by
what this edge sent since. No request waits for a question.
A request whose replica went on without it moves to another one, or waits for the next life of its own. One whose
replica lost its ranks moves as well, where another has room: starting ranks takes longer than computing it again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Final

from argosy.cluster.driver_client import DriverClient, TokenStream
from argosy.cluster.known_replica import KnownReplica, merge_stats
from argosy.cluster.moving_stream import MovingStream
from argosy.cluster.prefix_cache import BlockHash, extend_hashes
from argosy.cluster.protocol.errors import ChannelClosed, ServingError
from argosy.cluster.protocol.messages import EngineInfo, StatsReply
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.routing import choose_replica

_LOOK_SECONDS: Final = 0.5
_ANSWER_SECONDS: Final = 5.0
MAX_MOVES: Final = 3  # as `max_recoveries`: a request that was there at so many losses may be their cause
_log = logging.getLogger(__name__)


class ReplicaClient:
    """Used like a `DriverClient`. Belongs to the event loop that opened it.

    `patience_seconds`: how long it stays open without any replica, because whoever looks after them starts them again.
    """

    def __init__(
        self,
        clients: Sequence[DriverClient],
        addresses: Sequence[str],
        secret: str = "",
        *,
        patience_seconds: float = 0.0,
        max_moves: int = MAX_MOVES,
    ):
        self._patience_seconds, self._max_moves = patience_seconds, max_moves
        self._gone_at: float | None = None  # when the last replica was found gone
        self._came_back = asyncio.Event()
        self._num_waiting = 0  # requests for which no replica is there
        self._replicas = [KnownReplica(client, address) for client, address in zip(clients, addresses, strict=True)]
        self._secret = secret
        self._watch: asyncio.Task[None] | None = None
        self._is_closing = False

    @classmethod
    async def connect(
        cls,
        addresses: Sequence[str],
        secret: str,
        *,
        timeout_seconds: float = 10.0,
        patience_seconds: float = 0.0,
        max_moves: int = MAX_MOVES,
    ) -> "ReplicaClient":
        """Connect to all of them. Raises what the first that fails raises."""
        opening = [DriverClient.connect(address, secret, timeout_seconds=timeout_seconds) for address in addresses]
        opened = await asyncio.gather(*opening, return_exceptions=True)
        clients = [client for client in opened if isinstance(client, DriverClient)]
        for problem in opened:
            if isinstance(problem, BaseException):
                for client in clients:
                    await client.close()
                raise problem
        made = cls(clients, addresses, secret, patience_seconds=patience_seconds, max_moves=max_moves)
        made._watch = asyncio.create_task(made._keep_up(), name="watch-replicas")
        return made

    @property
    def info(self) -> EngineInfo:
        """Of the first that is there: replicas serve the same model in the same way."""
        return self._any.client.info

    @property
    def closed(self) -> bool:
        """Whether all have gone, and for longer than its patience."""
        return not self._open and (self._is_closing or self._seconds_of_patience() <= 0)

    @property
    def num_open(self) -> int:
        """Replicas that are connected."""
        return len(self._open)

    @property
    def closed_reason(self) -> str:
        """Why, once all have."""
        return "; ".join(f"{replica.address}: {replica.client.closed_reason}" for replica in self._replicas)

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return sum(replica.client.num_streams for replica in self._replicas) + self._num_waiting

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: TokenParams,
        *,
        n: int = 1,
        priority: int = 0,
        cache_salt: str = "",
        deadline_seconds: float | None = None,
        request_id: str | None = None,
    ) -> MovingStream:
        """Ask the replica that `routing.choose_replica` names. The stream also carries refusals."""
        return MovingStream(
            self,
            prompt_token_ids,
            params,
            max_moves=self._max_moves,
            n=n,
            deadline_seconds=deadline_seconds,
            priority=priority,
            cache_salt=cache_salt,
            request_id=request_id,
        )

    def ask(
        self,
        prompt_token_ids: Sequence[int],
        params: TokenParams,
        *,
        cache_salt: str = "",
        generated_token_ids: Sequence[Sequence[int]] = (),
        **options: Any,
    ) -> TokenStream | None:
        """For `MovingStream`: a stream of the best replica; None when none is there."""
        replica = self._choose(prompt_token_ids, cache_salt)
        if replica is None:
            return None
        return replica.client.submit(
            prompt_token_ids, params, cache_salt=cache_salt, generated_token_ids=generated_token_ids, **options
        )

    async def wait_until_open(self, seconds: float | None) -> bool:
        """For `MovingStream`: until some replica is there, within patience, `seconds`, and a bound on who waits."""
        most = sum(replica.client.info.max_num_seqs for replica in self._replicas)
        while not self._open:
            left = self._seconds_of_patience()
            left = left if seconds is None else min(left, seconds)
            if left <= 0 or self._is_closing or self._num_waiting >= most:
                return False
            self._num_waiting += 1
            began = asyncio.get_running_loop().time()
            try:
                with contextlib.suppress(TimeoutError):  # nobody came back: the caller sees
                    async with asyncio.timeout(left):
                        await self._came_back.wait()
            finally:
                self._num_waiting -= 1
            if seconds is not None:
                seconds -= asyncio.get_running_loop().time() - began
        return True

    def gave_up(self, source: TokenStream) -> None:
        """For `MovingStream`: the replica behind `source` told its requests that it can't go on."""
        for replica in self._replicas:
            if replica.client is source.client:
                replica.gave_up = True

    async def stats(self, timeout_seconds: float = _ANSWER_SECONDS) -> StatsReply:
        """The figures of all replicas that answer, put together."""
        asked = [replica.client.stats(timeout_seconds) for replica in self._open]
        replies = [
            each for each in await asyncio.gather(*asked, return_exceptions=True) if isinstance(each, StatsReply)
        ]
        if not replies:
            raise ChannelClosed(f"no replica answers: {self.closed_reason or 'they are being started again'}")
        return merge_stats(replies, len(self._replicas))

    async def reset_prefix_cache(self, timeout_seconds: float = _ANSWER_SECONDS) -> bool:
        """Forget all cached prefixes everywhere; False when blocks were in use somewhere."""
        for replica in self._replicas:
            replica.seen.clear()
        done = await asyncio.gather(*(replica.client.reset_prefix_cache(timeout_seconds) for replica in self._open))
        return all(done)

    def drain(self) -> None:
        """Tell all to take no new requests."""
        for replica in self._open:
            replica.client.drain()

    async def close(self) -> None:
        """End all connections."""
        self._is_closing = True
        self._came_back.set()
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # called off by us
                await self._watch
        for replica in self._replicas:
            await replica.client.close()

    def give_up(self) -> None:
        """Nobody starts a driver any more that is gone, or goes: whoever waits for one ends as lost."""
        self._patience_seconds = 0.0
        self._came_back.set()

    async def look(self) -> None:
        """Hear how each is, and connect again to those that went: a driver comes back at the same door."""
        await asyncio.gather(*map(self._look_at, self._replicas))
        self._relieve()
        self._seconds_of_patience()

    def _relieve(self) -> None:
        """Requests of a replica whose ranks are being started again move to those that run, as far as they have room;
        the others wait for those ranks."""
        room = sum(replica.room() for replica in self._open if not replica.is_rebuilding)
        for replica in self._open:
            if replica.is_rebuilding and room and (moved := replica.client.leave(room, "its ranks are started again")):
                room -= moved
                _log.info("%d requests leave the replica at %s while its ranks are started", moved, replica.address)

    async def _look_at(self, replica: KnownReplica) -> None:
        if replica.client.closed:
            await self._reopen(replica)
            return
        try:
            known_names = replica.known_names if len(self._replicas) > 1 else -1
            replica.hear(await replica.client.stats(_ANSWER_SECONDS, known_names=known_names))
            replica.gave_up = replica.gave_up and not replica.is_healthy
        except ServingError:
            replica.is_healthy = False

    async def _reopen(self, replica: KnownReplica) -> None:
        with contextlib.suppress(ServingError, OSError):  # still away: looked for again
            client = await DriverClient.connect(replica.address, self._secret, timeout_seconds=_ANSWER_SECONDS)
            if self._is_closing:
                await client.close()
                return
            replica.client, replica.is_healthy, replica.gave_up = client, True, False
            replica.seen.clear()  # a new driver knows nothing of what the old one had
            replica.known_names = 0
            _log.info("connected again to the replica at %s", replica.address)
            self._came_back.set()
            self._came_back = asyncio.Event()

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self.look()

    def _choose(self, prompt_token_ids: Sequence[int], cache_salt: str) -> KnownReplica | None:
        if not (open_ones := self._open):
            self._seconds_of_patience()
            return None
        if len(self._replicas) == 1:
            return open_ones[0]
        block_size = self.info.block_size
        hashes: list[BlockHash] = []
        # the last token is always computed: a block that ends with it is of no use to this request
        extend_hashes(hashes, prompt_token_ids, block_size, cache_salt, (len(prompt_token_ids) - 1) // block_size)
        loads = [replica.load(index, hashes) for index, replica in enumerate(self._replicas)]
        chosen = choose_replica(loads, num_prompt_tokens=len(prompt_token_ids))
        replica = open_ones[0] if chosen is None else self._replicas[chosen]
        replica.seen.add(hashes)
        return replica

    def _seconds_of_patience(self) -> float:
        """What is left of it; all of it while some replica is there."""
        if self._open:
            self._gone_at = None
        if self._open or not self._patience_seconds:
            return self._patience_seconds
        now = asyncio.get_running_loop().time()
        if self._gone_at is None:
            self._gone_at = now
        return self._patience_seconds - (now - self._gone_at)

    @property
    def _open(self) -> list[KnownReplica]:
        return [replica for replica in self._replicas if replica.is_open]

    @property
    def _any(self) -> KnownReplica:
        """One that is connected, or else the first."""
        return next(iter(self._open), self._replicas[0])


async def connect_engine(
    address: str,
    secret: str,
    *,
    timeout_seconds: float = 10.0,
    patience_seconds: float = 0.0,
    max_moves: int = MAX_MOVES,
) -> DriverClient | ReplicaClient:
    """Connect to an engine: its one driver, or those of all its replicas (addresses with commas between them).

    With patience, requests outlive their driver: they go on at another one, or at its next life.
    """
    addresses = address.split(",")
    if len(addresses) == 1 and not patience_seconds:
        return await DriverClient.connect(address, secret, timeout_seconds=timeout_seconds)
    return await ReplicaClient.connect(
        addresses, secret, timeout_seconds=timeout_seconds, patience_seconds=patience_seconds, max_moves=max_moves
    )
