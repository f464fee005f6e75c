"""Many replicas behind the router in virtual time."""

import random

import pytest

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.request import Request
from argosy.cluster.routing import ReplicaLoad, choose_replica
from argosy.cluster.simulated_cluster import Arrival, SimulatedCluster
from argosy.cluster.simulated_replica import SimulatedReplica, StepSize

CONFIG = ServingConfig.from_mapping({"model": "m", "max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 4})


def seconds(size: StepSize) -> list[float]:
    """A step of any size takes about as long."""
    return [0.01 + 1e-5 * (size.num_decodes + size.prefill_tokens)]


def make(replicas: int) -> SimulatedCluster:
    """Alike replicas of one stage."""
    each = [SimulatedReplica(number, CONFIG, 200, seconds) for number in range(replicas)]
    return SimulatedCluster(each, sample_seconds=0.1, max_model_len=1000)


def test_load_is_spread_over_all_replicas() -> None:
    """Sixteen at once on four replicas of four rows: four each."""
    cluster = make(4)
    cluster.run([Arrival(0.0, 8, 20) for _ in range(16)])
    counts = [list(cluster.records.replica).count(number) for number in range(4)]
    assert counts == [4, 4, 4, 4]


def test_a_known_prefix_draws_its_requests() -> None:
    """Where the prompt's head lies cached, as long as nobody waits there."""
    cluster = make(4)
    cluster.run([Arrival(float(number), 44, 2, prefix=number % 2, prefix_len=40) for number in range(12)])
    homes = list(cluster.records.replica)
    assert len(set(homes[::2])) == len(set(homes[1::2])) == 1
    assert sum(cluster.records.cached) == 10 * 40


def test_requests_of_one_moment_begin_in_one_step() -> None:
    """Four prompts of 16 tokens fill a step of 64: one first token for all, and not one that comes before."""
    cluster = make(1)
    cluster.run([Arrival(1.0, 16, 3) for _ in range(4)])
    assert len(set(cluster.records.ttft)) == 1
    assert cluster.records.ttft[0] == pytest.approx(0.01 + 1e-5 * 64)
    assert cluster.replicas[0].num_steps == 3


def test_a_prefix_draws_those_that_are_sent_together_with_it() -> None:
    """Whoever sends them knows where the first went, though nothing is computed yet."""
    cluster = make(2)
    cluster.run([Arrival(0.0, 44, 2, prefix=prefix, prefix_len=40) for prefix in (0, 1, 1, 0)])
    homes = list(cluster.records.replica)
    assert sorted(homes) == [0, 0, 1, 1]
    assert sum(cluster.records.cached) == 2 * 40


class AskingAll(SimulatedCluster):
    """Asks `choose_replica` about every replica, as a router would that can afford it."""

    def _choose(self, request: Request, prefix: int) -> int:
        loads = [
            ReplicaLoad(
                replica_id=place,
                num_waiting=replica.num_waiting,
                num_running=replica.num_running,
                kv_usage=replica.kv_usage,
                num_cached_tokens=replica.cached_tokens(request) if prefix >= 0 else 0,
            )
            for place, replica in enumerate(self.replicas)
        ]
        chosen = choose_replica(loads, num_prompt_tokens=request.num_prompt_tokens)
        assert chosen is not None
        return chosen


@pytest.mark.parametrize("seed", range(4))
def test_asking_few_replicas_finds_what_asking_all_finds(seed: int) -> None:
    """Thousands of replicas can't each be asked for every request; the answer must be the same."""
    rng = random.Random(seed)
    now, arrivals = 0.0, []
    for _ in range(150):
        now += rng.random() * 0.05
        arrivals.append(Arrival(now, rng.randint(1, 90), rng.randint(1, 40), rng.randint(-1, 4), rng.randint(0, 60)))
    few = make(7)
    few.run(arrivals)
    every = AskingAll([SimulatedReplica(n, CONFIG, 200, seconds) for n in range(7)], sample_seconds=0.1,
                      max_model_len=1000)  # fmt: skip
    every.run(arrivals)
    assert list(few.records.replica) == list(every.records.replica)
    assert list(few.records.end) == list(every.records.end)


def test_samples_stay_few_however_long_it_takes() -> None:
    """A day in samples of a tenth of a second would be a million."""
    cluster = make(1)
    cluster.run([Arrival(10.0 * number, 4, 2) for number in range(200)])
    assert 60 <= len(cluster.samples) < 240
    times = [sample.seconds for sample in cluster.samples]
    assert times == sorted(times)
    assert cluster.samples[-1].output_tokens <= 400
