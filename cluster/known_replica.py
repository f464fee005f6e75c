"""What an edge knows of one replica: what it sent there, what it heard from there, and whether it can be asked."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import msgspec

from argosy.cluster.driver_client import DriverClient
from argosy.cluster.prefix_cache import BlockHash
from argosy.cluster.prefix_news import NAME_BYTES
from argosy.cluster.protocol.messages import StatsReply
from argosy.cluster.routing import ReplicaLoad

_RUNNING: Final = "argosy_requests_running"
_WAITING: Final = "argosy_requests_waiting"
REBUILDING: Final = "rebuilding"


class SeenPrefixes:
    """Names of the blocks that a replica is believed to hold, the longest unused forgotten first."""

    def __init__(self, most_blocks: int):
        self._names: OrderedDict[bytes, None] = OrderedDict()
        self._most = most_blocks

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks it holds."""
        for count, (digest, _) in enumerate(hashes):
            if digest[:NAME_BYTES] not in self._names:
                return count
        return len(hashes)

    def learn(self, names: bytes) -> None:
        """It has these by now, whoever sent them: names end to end, in the order in which they came in."""
        for at in range(0, len(names), NAME_BYTES):
            self._names.setdefault(names[at : at + NAME_BYTES])
        self._forget()

    def add(self, hashes: Sequence[BlockHash]) -> None:
        """It computes these now. The first counts as used last: a chain is worth nothing without its beginning."""
        for digest, _ in reversed(hashes):
            name = digest[:NAME_BYTES]
            self._names[name] = None
            self._names.move_to_end(name)
        self._forget()

    def _forget(self) -> None:
        while len(self._names) > self._most:
            self._names.popitem(last=False)

    def clear(self) -> None:
        """It holds nothing any more."""
        self._names.clear()


class KnownReplica:
    """One replica, behind the connection that it has now."""

    def __init__(self, client: DriverClient, address: str):
        self.client, self.address = client, address
        self.seen = SeenPrefixes(client.info.num_blocks // len(client.info.kv_windows))
        self.is_healthy = True
        self.gave_up = False  # it told its requests so, and is about to go
        self.is_rebuilding = False  # its ranks were lost and are being started again; its driver is well
        self.known_names = 0  # the number of the next name to ask for
        self._said, self._said_waiting, self._own_then = 0.0, 0.0, 0

    @property
    def is_open(self) -> bool:
        """Whether it can be asked."""
        return not self.client.closed and not self.gave_up

    def hear(self, stats: StatsReply) -> None:
        """What it says of itself."""
        self._said, self._said_waiting = stats.values.get(_RUNNING, 0.0), stats.values.get(_WAITING, 0.0)
        self._own_then = self.client.num_streams
        self.is_healthy, self.is_rebuilding = stats.healthy, stats.status == REBUILDING
        if stats.known_names >= 0:
            if stats.known_names < self.known_names:
                self.seen.clear()  # its ranks were started again, with an empty cache
            self.seen.learn(stats.new_names)
            self.known_names = stats.known_names

    def room(self) -> int:
        """How many more requests it may be given that have to move: it runs so many at once, and as many may wait."""
        load = self.load(0, ())
        most = 2 * self.client.info.max_num_seqs
        return max(0, most - load.num_running - load.num_waiting) if load.takes_requests else 0

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
            takes_requests=self.is_open and self.is_healthy,
        )


def _with_replica(reply: StatsReply, number: int) -> StatsReply:
    """Figures of single ranks say of which replica: there is nothing to sum."""
    values = {
        name.replace("{", f'{{replica="{number}",', 1) if name.startswith("argosy_rank_") else name: value
        for name, value in reply.values.items()
    }
    return msgspec.structs.replace(reply, values=values)


def merge_stats(replies: Sequence[StatsReply], num_replicas: int) -> StatsReply:
    """Sums of what can be summed; ratios are averaged, epochs the highest. Healthy while one replica is."""
    values: dict[str, float] = {}
    if len(replies) > 1:
        replies = [_with_replica(reply, number) for number, reply in enumerate(replies)]
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
