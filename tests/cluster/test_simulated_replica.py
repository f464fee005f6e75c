"""One replica in virtual time: the real scheduler's life with a price list, and leaps that change nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.swap import NO_SWAP, SwapCosts
from argosy.cluster.simulated_cluster import Arrival, SimulatedCluster
from argosy.cluster.simulated_replica import SimulatedReplica, StepSize


def config(**given: object) -> ServingConfig:
    """Small numbers, so that blocks, chunks and rows meet their borders."""
    return ServingConfig.from_mapping({"model": "m", "max_num_seqs": 8, "max_num_batched_tokens": 32, "block_size": 4}
                                      | given)  # fmt: skip


def prices(stages: int = 1, *, fixed: float = 0.01) -> Callable[[StepSize], Sequence[float]]:
    """A step takes a fixed time a stage, and a little for tokens and for what is looked back on."""

    def seconds(size: StepSize) -> list[float]:
        more = 1e-4 * size.prefill_tokens + 1e-5 * size.num_decodes + 1e-7 * size.context_tokens
        return [fixed + more + 1e-6 * stage for stage in range(stages)]

    return seconds


def simulate(
    arrivals: Sequence[Arrival], *, leaps: bool = True, num_blocks: int = 64, stages: int = 1, replicas: int = 1,
    swap: SwapCosts = NO_SWAP, shared_reads: float = 0.75, **given: object,
) -> SimulatedCluster:  # fmt: skip
    """Run to the end; the books must balance afterwards."""
    settled = config(pipeline_parallel_size=stages, **given)
    each = [
        SimulatedReplica(
            number,
            settled,
            num_blocks,
            prices(stages),
            num_stages=stages,
            leaps=leaps,
            swap=swap,
            shared_reads=shared_reads,
        )
        for number in range(replicas)
    ]
    block_size = settled.cache.block_size if leaps else None
    cluster = SimulatedCluster(each, sample_seconds=0.05, max_model_len=10_000, block_size=block_size)
    cluster.run(arrivals)
    for replica in each:
        replica.scheduler.check()
        assert replica.num_running == replica.num_waiting == 0
        assert replica.scheduler.blocks.pool.num_held == replica.scheduler.host.pool.num_held == 0
    return cluster


def facts(cluster: SimulatedCluster) -> tuple[object, ...]:
    """Everything that a report is made of."""
    records = cluster.records
    return (
        *(list(column) for column in (records.arrival, records.ttft, records.tpot, records.end, records.cached)),
        *(list(column) for column in (records.replica, records.output_len)),
        cluster.samples,
        list(cluster.stage_figures()),
        cluster.now,
        [(replica.num_steps, replica.metrics.preemptions) for replica in cluster.replicas],
    )


def test_a_lone_request_takes_its_prompt_and_a_step_a_token() -> None:
    """8 tokens in, 5 out, with prices that can be added up by hand."""
    cluster = simulate([Arrival(1.0, 8, 5)])
    prompt = 0.01 + 8e-4
    steps = [0.01 + 1e-5 + 1e-7 * context for context in (9, 10, 11, 12)]
    assert cluster.records.ttft[0] == pytest.approx(prompt)
    assert cluster.records.end[0] == pytest.approx(1.0 + prompt + sum(steps))
    assert cluster.records.tpot[0] == pytest.approx(sum(steps) / 4)
    assert cluster.records.output_len[0] == 5


def test_a_late_arrival_joins_at_the_next_step() -> None:
    """Continuous batching: B comes while A decodes and does not wait for A's end."""
    cluster = simulate([Arrival(0.0, 8, 60), Arrival(0.2, 8, 4)])
    end_of = dict(zip(cluster.records.arrival, cluster.records.end, strict=True))
    assert end_of[0.2] < 0.3 < end_of[0.0]


def test_a_prompt_that_can_never_fit_is_refused() -> None:
    """And is counted; the others go on."""
    cluster = simulate([Arrival(0.0, 500, 5), Arrival(0.0, 8, 2)], num_blocks=16)
    assert cluster.records.num_refused == 1
    assert len(cluster.records.end) == 1


def test_too_little_memory_preempts_and_all_still_end() -> None:
    """Eight rows grow into 20 blocks of 4 tokens."""
    cluster = simulate([Arrival(0.0, 8, 30) for _ in range(8)], num_blocks=20)
    assert cluster.replicas[0].metrics.preemptions > 0
    assert list(cluster.records.output_len) == [30] * 8


def test_shared_prefixes_are_found_in_the_cache() -> None:
    """The second of two alike prompts computes only its own part."""
    cluster = simulate([Arrival(0.0, 24, 2, prefix=0, prefix_len=20), Arrival(5.0, 24, 2, prefix=0, prefix_len=20)])
    assert list(cluster.records.cached) == [0, 20]
    assert cluster.records.ttft[1] < cluster.records.ttft[0]


def test_stages_work_side_by_side() -> None:
    """Two stages that each take as long as one step: the pair of micro-batches keeps both busy."""
    many = [Arrival(0.0, 8, 100) for _ in range(8)]
    two = simulate(many, stages=2)
    busy = [busy / active for _, _, busy, active in two.stage_figures()]
    assert min(busy) > 0.85
    alone = simulate([Arrival(0.0, 8, 100)], stages=2)
    assert max(busy / active for _, _, busy, active in alone.stage_figures()) < 0.6


arrival = st.builds(
    Arrival,
    st.floats(0.0, 3.0),
    st.integers(1, 70),
    st.integers(1, 60),
    st.integers(-1, 2),
    st.integers(0, 40),
)


@given(
    st.lists(arrival, min_size=1, max_size=25),
    st.integers(18, 80),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from(["fcfs", "priority"]),
)
@settings(max_examples=60, deadline=None)
def test_leaping_gives_what_stepping_gives(
    arrivals: list[Arrival], num_blocks: int, async_scheduling: bool, replicas: int, policy: str
) -> None:
    """To the bit: every time, every sample, every count, whatever comes when; blocks named or hashed."""
    ordered = sorted(arrivals, key=lambda one: one.seconds)
    given: Any = {
        "num_blocks": num_blocks,
        "async_scheduling": async_scheduling,
        "replicas": replicas,
        "policy": policy,
    }
    leapt, stepped = (simulate(ordered, leaps=leaps, **given) for leaps in (True, False))
    assert facts(leapt) == facts(stepped)


def test_plain_stretches_are_leapt_over() -> None:
    """A lone long answer is where the time of a simulation would go."""
    cluster = simulate([Arrival(0.0, 8, 400)], num_blocks=128, block_size=16)
    replica = cluster.replicas[0]
    assert replica.num_leapt > 0.7 * replica.num_steps
    assert replica.num_steps == 400


def test_the_same_arrivals_give_the_same_figures() -> None:
    """Order must not depend on hashing or on the wall clock."""
    arrivals = [Arrival(0.01 * number, 10 + number % 7, 20, number % 3, 8) for number in range(60)]
    assert facts(simulate(arrivals, replicas=3)) == facts(simulate(arrivals, replicas=3))


SWAP = SwapCosts(num_host_blocks=400, block_bytes=100, out_seconds=2e-4, in_seconds=3e-4, token_seconds=1e-3)


@pytest.mark.parametrize("stages", [1, 2])
def test_swapping_computes_nothing_twice_and_takes_the_link_s_time(stages: int) -> None:
    """Eight prefixes that the device has room for one by one, and answers that outgrow it."""
    arrivals = [Arrival(0.001 * i, 90, 30, prefix=i % 8, prefix_len=80) for i in range(48)]
    again = simulate(arrivals, num_blocks=70, stages=stages)
    swapped = simulate(arrivals, num_blocks=70, stages=stages, swap=SWAP)
    metrics, before = swapped.replicas[0].metrics, again.replicas[0].metrics
    assert before.tokens_recomputed > 0
    assert metrics.tokens_recomputed == 0
    assert metrics.host_hits > 1000
    assert metrics.swap_seconds["in"] == pytest.approx(3e-4 * metrics.swap_blocks["in"])
    assert swapped.now < again.now


def test_leaps_change_nothing_with_a_host_tier() -> None:
    """What is on its way in holds a leap up: it may arrive in between."""
    arrivals = [Arrival(0.02 * i, 40 + i % 7, 60, prefix=i % 5, prefix_len=30) for i in range(40)]
    leapt, stepped = (simulate(arrivals, num_blocks=60, leaps=leaps, swap=SWAP) for leaps in (True, False))
    assert facts(leapt) == facts(stepped)
    assert leapt.replicas[0].metrics.swap_blocks == stepped.replicas[0].metrics.swap_blocks
    assert min(leapt.replicas[0].metrics.swap_blocks.values()) > 10
    assert leapt.replicas[0].num_leapt > 0


def test_a_prefix_that_decodes_have_in_common_is_read_once() -> None:
    """Twelve answers over one beginning: with its reads shared every token comes sooner; others are as they were."""
    alike = [Arrival(0.0, 33, 40, 5, 32) for _ in range(12)]
    apart = [Arrival(0.0, 33, 40) for _ in range(12)]
    once, each = (simulate(alike, num_blocks=400, shared_reads=share) for share in (1.0, 0.0))
    assert once.now < each.now
    assert list(once.records.cached) == list(each.records.cached)
    saved = each.now - once.now
    assert saved == pytest.approx(39 * 11 * 32 * 1e-7, rel=0.1)  # steps, rows but one, tokens, seconds a token
    plain, same = (simulate(apart, num_blocks=400, shared_reads=share).now for share in (1.0, 0.0))
    assert plain == same
