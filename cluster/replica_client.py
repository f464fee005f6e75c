"""An edge's connections to several replicas as one: each request goes where its prefix is, else where least is to do.

What a replica has cached is what this edge sent it, remembered by the names of its blocks and forgotten like those;
what it has to do is what it last said, corrected by what this edge sent since. No request waits for a question.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from argosy.cluster.driver_client import DriverClient, TokenStream
from argosy.cluster.prefix_cache import BlockHash, extend_hashes
from argosy.cluster.protocol.errors import ChannelClosed, ServingError
from argosy.cluster.protocol.messages import EngineInfo, StatsReply
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.routing import ReplicaLoad, choose_replica

_LOOK_SECONDS: Final = 0.5
_ANSWER_SECONDS: Final = 5.0
_RUNNING: Final = "argosy_requests_running"
_WAITING: Final = "argosy_requests_waiting"
_log = logging.getLogger(__name__)


class SeenPrefixes:
    """Names of the blocks that a replica is believed to hold, the longest unused forgotten first."""

    def __init__(self, most_blocks: int):
        self._names: OrderedDict[bytes, None] = OrderedDict()
        self._most = most_blocks

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks it holds."""
        for count, (name, _) in enumerate(hashes):
            if name not in self._names:
                return count
        return len(hashes)

    def add(self, hashes: Sequence[BlockHash]) -> None:
        """It computes these now. The first counts as used last: a chain is worth nothing without its beginning."""
        for name, _ in reversed(hashes):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._most:
            self._names.popitem(last=False)

    def clear(self) -> None:
        """It holds nothing any more."""
        self._names.clear()


class _Replica:
    def __init__(self, client: DriverClient, address: str):
        self.client, self.address = client, address
        self.seen = SeenPrefixes(client.info.num_blocks)
        self.is_healthy = True
        self._said, self._said_waiting, self._own_then = 0.0, 0.0, 0

    def hear(self, stats: StatsReply) -> None:
        """What it says of itself."""
        self._said, self._said_waiting = stats.values.get(_RUNNING, 0.0), stats.values.get(_WAITING, 0.0)
        self._own_then = self.client.num_streams
        self.is_healthy = stats.healthy

    def load(self, replica_id: int, hashes: Sequence[BlockHash]) -> ReplicaLoad:
        """As far as is known now: what it said, and what this edge sent or saw end since."""
        since = self.client.num_streams - self._own_then
        every = max(int(self._said + self._said_waiting) + since, self.client.num_streams)
        running = min(every, self.client.info.max_num_seqs)
        return ReplicaLoad(
            replica_id=replica_id,
            num_waiting=every - running if since else max(every - running, int(self._said_waiting)),
            num_running=running,
            num_cached_tokens=self.seen.match(hashes) * self.client.info.block_size,
            takes_requests=not self.client.closed and self.is_healthy,
        )


class ReplicaClient:
    """Used like a `DriverClient`. Belongs to the event loop that opened it."""

    def __init__(self, clients: Sequence[DriverClient], addresses: Sequence[str], secret: str = ""):
        self._replicas = [_Replica(client, address) for client, address in zip(clients, addresses, strict=True)]
        self._secret = secret
        self._watch: asyncio.Task[None] | None = None
        self._is_closing = False

    @classmethod
    async def connect(cls, addresses: Sequence[str], secret: str, *, timeout_seconds: float = 10.0) -> "ReplicaClient":
        """Connect to all of them. Raises what the first that fails raises."""
        opening = [DriverClient.connect(address, secret, timeout_seconds=timeout_seconds) for address in addresses]
        opened = await asyncio.gather(*opening, return_exceptions=True)
        clients = [client for client in opened if isinstance(client, DriverClient)]
        for problem in opened:
            if isinstance(problem, BaseException):
                for client in clients:
                    await client.close()
                raise problem
        made = cls(clients, addresses, secret)
        made._watch = asyncio.create_task(made._keep_up(), name="watch-replicas")
        return made

    @property
    def info(self) -> EngineInfo:
        """Of the first that is there: replicas serve the same model in the same way."""
        return self._any.client.info

    @property
    def closed(self) -> bool:
        """Whether all have gone."""
        return all(replica.client.closed for replica in self._replicas)

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
        return sum(replica.client.num_streams for replica in self._replicas)

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
    ) -> TokenStream:
        """Ask the replica that `routing.choose_replica` names. The stream also carries refusals."""
        replica = self._choose(prompt_token_ids, cache_salt)
        return replica.client.submit(
            prompt_token_ids,
            params,
            n=n,
            priority=priority,
            cache_salt=cache_salt,
            deadline_seconds=deadline_seconds,
            request_id=request_id,
        )

    async def stats(self, timeout_seconds: float = _ANSWER_SECONDS) -> StatsReply:
        """The figures of all replicas that answer, put together."""
        asked = [replica.client.stats(timeout_seconds) for replica in self._open]
        replies = [
            each for each in await asyncio.gather(*asked, return_exceptions=True) if isinstance(each, StatsReply)
        ]
        if not replies:
            raise ChannelClosed(f"no replica answers: {self.closed_reason}")
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
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        for replica in self._replicas:
            await replica.client.close()

    async def look(self) -> None:
        """Hear how each is, and connect again to those that went: a driver comes back at the same door."""
        for replica in self._replicas:
            if replica.client.closed:
                await self._reopen(replica)
                continue
            try:
                replica.hear(await replica.client.stats(_ANSWER_SECONDS))
            except ServingError:
                replica.is_healthy = False

    async def _reopen(self, replica: _Replica) -> None:
        with contextlib.suppress(ServingError, OSError):
            client = await DriverClient.connect(replica.address, self._secret, timeout_seconds=_ANSWER_SECONDS)
            if self._is_closing:
                await client.close()
                return
            replica.client, replica.is_healthy = client, True
            replica.seen.clear()  # a new driver knows nothing of what the old one had
            _log.info("connected again to the replica at %s", replica.address)

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self.look()

    def _choose(self, prompt_token_ids: Sequence[int], cache_salt: str) -> _Replica:
        block_size = self.info.block_size
        hashes: list[BlockHash] = []
        # the last token is always computed: a block that ends with it is of no use to this request
        extend_hashes(hashes, prompt_token_ids, block_size, cache_salt, (len(prompt_token_ids) - 1) // block_size)
        loads = [replica.load(index, hashes) for index, replica in enumerate(self._replicas)]
        chosen = choose_replica(loads)
        replica = self._any if chosen is None else self._replicas[chosen]
        replica.seen.add(hashes)
        return replica

    @property
    def _open(self) -> list[_Replica]:
        return [replica for replica in self._replicas if not replica.client.closed]

    @property
    def _any(self) -> _Replica:
        """One that is connected, or else the first, whose streams end at once with the reason."""
        return next(iter(self._open), self._replicas[0])


async def connect_engine(address: str, secret: str, *, timeout_seconds: float = 10.0) -> DriverClient | ReplicaClient:
    """Connect to an engine: its one driver, or those of all its replicas (addresses with commas between them)."""
    addresses = address.split(",")
    if len(addresses) == 1:
        return await DriverClient.connect(address, secret, timeout_seconds=timeout_seconds)
    return await ReplicaClient.connect(addresses, secret, timeout_seconds=timeout_seconds)


def merge_stats(replies: Sequence[StatsReply], num_replicas: int) -> StatsReply:
    """Sums of what can be summed; ratios are averaged, epochs the highest. Healthy while one replica is."""
    values: dict[str, float] = {}
    for name in dict.fromkeys(name for reply in replies for name in reply.values):
        every = [reply.values.get(name, 0.0) for reply in replies]
        kind = name.partition("{")[0]
        if kind.endswith(("_ratio", "_perc")):
            values[name] = sum(every) / len(every)
        else:
            values[name] = max(every) if kind == "argosy_epoch" else sum(every)
    histograms: dict[str, tuple[list[float], list[int], float]] = {}
    for reply in replies:
        for name, (bounds, counts, total) in reply.histograms.items():
            _, so_far, before = histograms.get(name, (bounds, [0] * len(counts), 0.0))
            histograms[name] = (bounds, [a + b for a, b in zip(so_far, counts, strict=True)], before + total)
    healthy = [reply for reply in replies if reply.healthy]
    all_ready = len(healthy) == num_replicas
    return StatsReply(
        values=values,
        histograms=histograms,
        healthy=bool(healthy),
        status=replies[0].status if all_ready else f"{len(healthy)} of {num_replicas} replicas are healthy",
        step_id=sum(reply.step_id for reply in replies),
        seconds_since_progress=min(reply.seconds_since_progress for reply in healthy or replies),
    )
