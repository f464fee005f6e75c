"""Requests find the replica that has their prefix, else the one with least to do; one that went is done without."""

import asyncio
from collections.abc import Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

from argosy.cluster.known_replica import SeenPrefixes, merge_stats
from argosy.cluster.prefix_cache import BlockHash, extend_hashes
from argosy.cluster.prefix_news import PrefixNews
from argosy.cluster.protocol.errors import ChannelClosed
from argosy.cluster.protocol.messages import EngineInfo, StatsReply
from argosy.cluster.protocol.sampling import TokenParams
from argosy.cluster.replica_client import ReplicaClient

INFO = EngineInfo(
    model="m", max_model_len=4096, vocab_size=100, num_blocks=8, block_size=4, tensor_parallel_size=1,
    pipeline_parallel_size=1, dtype="float32", max_logprobs=0, max_num_seqs=2,
)  # fmt: skip


class FakeDriver:
    """A replica's connection that counts what it is asked."""

    def __init__(self) -> None:
        self.info, self.closed, self.closed_reason = INFO, False, ""
        self.num_streams = 0
        self.prompts: list[Sequence[int]] = []
        self.said: dict[str, float] = {}
        self.status = "ready"
        self.news = PrefixNews()

    def submit(self, prompt_token_ids: Sequence[int], params: TokenParams, **_: Any) -> SimpleNamespace:
        self.num_streams += 1
        self.prompts.append(prompt_token_ids)
        return SimpleNamespace(can_move=False)

    def leave(self, most: int, reason: str) -> int:
        left = min(most, self.num_streams)
        self.num_streams -= left
        return left

    async def stats(self, timeout_seconds: float = 1.0, *, known_names: int = -1) -> StatsReply:
        if self.closed:
            raise ChannelClosed("gone")
        names, number = self.news.since(known_names) if known_names >= 0 else (b"", -1)
        return StatsReply(
            values=self.said, status=self.status, healthy=self.status == "ready", new_names=names, known_names=number
        )

    async def close(self) -> None:
        self.closed = True


def replicas(count: int) -> tuple[ReplicaClient, list[FakeDriver]]:
    drivers = [FakeDriver() for _ in range(count)]
    return ReplicaClient(drivers, [f"unix:{i}" for i in range(count)]), drivers  # type: ignore[arg-type]  # stand-ins


def ask(client: ReplicaClient, *prompts: Sequence[int], salt: str = "") -> None:
    async def submit() -> None:
        for prompt in prompts:
            client.submit(prompt, TokenParams(max_tokens=1), cache_salt=salt)

    asyncio.run(submit())


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


CHAT, OTHER = list(range(13)), list(range(50, 63))


def test_a_door_hears_what_another_one_sent() -> None:
    """The second turn of a chat comes in at any door; what its replica lost with its ranks is not believed any more."""
    client, (first, second) = replicas(2)
    hashes: list[BlockHash] = []
    extend_hashes(hashes, CHAT, INFO.block_size, "", len(CHAT) // INFO.block_size)
    for digest, _ in hashes:
        second.news.add(digest)
    run(client.look())
    ask(client, [*CHAT, 1, 2, 3, 4])
    assert (len(first.prompts), len(second.prompts)) == (0, 1)
    second.num_streams, second.news = 0, PrefixNews()  # an empty cache
    run(client.look())
    ask(client, [*CHAT, 5, 6, 7, 8])
    assert (len(first.prompts), len(second.prompts)) == (1, 1)


def test_new_conversations_are_dealt_out_and_come_back_to_their_replica() -> None:
    """Equal load goes in turn; a longer form of a known prompt goes where its blocks are."""
    client, (first, second) = replicas(2)
    ask(client, CHAT, OTHER)
    assert (first.prompts, second.prompts) == ([CHAT], [OTHER])
    first.num_streams = second.num_streams = 0
    ask(client, [*OTHER, 1, 2, 3, 4])
    assert len(second.prompts) == 2


def test_a_full_replica_loses_even_those_whose_prefix_it_has() -> None:
    """Beyond `max_num_seqs` requests would wait there; computing the prompt again is sooner done."""
    client, (first, second) = replicas(2)
    ask(client, CHAT)
    first.num_streams = 3
    ask(client, [*CHAT, 7])
    assert len(second.prompts) == 1


def test_what_other_edges_sent_counts_too() -> None:
    """The replica says how much it has to do, whoever asked."""
    client, (first, second) = replicas(2)
    first.said = {"argosy_requests_running": 2.0, "argosy_requests_waiting": 5.0}
    run(client.look())
    ask(client, CHAT)
    assert (len(first.prompts), len(second.prompts)) == (0, 1)


def test_a_replica_without_ranks_is_left_by_as_many_as_others_have_room_for() -> None:
    """Two rows each: the others take four requests in all, with those they have; the rest wait where they are."""
    client, drivers = replicas(3)
    drivers[0].num_streams, drivers[0].status = 9, "rebuilding"
    drivers[1].num_streams = 3
    drivers[2].said = {"argosy_requests_running": 2.0, "argosy_requests_waiting": 1.0}
    run(client.look())
    assert drivers[0].num_streams == 7
    ask(client, CHAT)
    assert not drivers[0].prompts
    drivers[1].status = drivers[2].status = "rebuilding"
    run(client.look())
    assert (drivers[0].num_streams, client.num_open) == (7, 3)


def test_tenants_with_their_own_salt_don_t_meet() -> None:
    """Nor does the router tell them, by where it sends them, what others asked."""
    client, (first, second) = replicas(2)
    ask(client, CHAT, salt="a")
    first.num_streams = 1
    ask(client, CHAT, salt="b")
    assert len(second.prompts) == 1


def test_a_replica_that_went_gets_nothing_and_one_is_enough() -> None:
    """Only when all are gone is the client closed."""
    client, (first, second) = replicas(2)
    run(first.close())
    ask(client, CHAT, CHAT, OTHER)
    assert len(second.prompts) == 3
    assert not client.closed
    assert run(client.stats()).status == "1 of 2 replicas are healthy"
    run(second.close())
    assert client.closed


def test_what_is_remembered_is_bounded_and_chains_lose_their_ends_first() -> None:
    """A replica forgets blocks; so does what is believed of it."""
    seen = SeenPrefixes(most_blocks=3)
    chain = [(bytes([i]), b"") for i in range(3)]
    seen.add(chain)
    seen.add([(b"x", b"")])
    assert seen.match(chain) == 2
    seen.clear()
    assert seen.match(chain) == 0


def test_figures_of_replicas_are_put_together() -> None:
    """Counts add up, ratios don't."""
    one = StatsReply(values={"argosy_steps_total": 3.0, "argosy_kv_usage_ratio": 0.5, "argosy_epoch": 0.0,
                             'argosy_rank_memory_bytes{rank="0",place="host",purpose="kv"}': 5.0},
                     histograms={"h": ([1.0], [1, 2], 4.0)})  # fmt: skip
    two = StatsReply(values={"argosy_steps_total": 4.0, "argosy_kv_usage_ratio": 0.1, "argosy_epoch": 2.0},
                     histograms={"h": ([1.0], [0, 5], 6.0)}, healthy=False)  # fmt: skip
    both = merge_stats([one, two], 2)
    assert both.values == {"argosy_steps_total": 7.0, "argosy_kv_usage_ratio": 0.3, "argosy_epoch": 2.0,
                           'argosy_rank_memory_bytes{replica="0",rank="0",place="host",purpose="kv"}': 5.0}  # fmt: skip
    assert both.histograms == {"h": ([1.0], [1, 7], 10.0)}
    assert (both.healthy, both.status) == (True, "1 of 2 replicas are healthy")
