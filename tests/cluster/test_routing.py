"""Which replica gets a request."""

from argosy.cluster.routing import ReplicaLoad, choose_replica


def load(replica_id: int, *, waiting: int = 0, running: int = 0, cached: int = 0, is_open: bool = True) -> ReplicaLoad:
    return ReplicaLoad(
        replica_id=replica_id,
        num_waiting=waiting,
        num_running=running,
        num_cached_tokens=cached,
        takes_requests=is_open,
    )


def choose(loads: list[ReplicaLoad], num_prompt_tokens: int = 0) -> int | None:
    """For a prompt of so many tokens."""
    return choose_replica(loads, num_prompt_tokens=num_prompt_tokens)


def test_the_longest_cached_prefix_wins_then_the_least_load() -> None:
    """A chat goes back to where its history is; a new one to whoever has least to do."""
    assert choose([load(0, running=1), load(1, running=4, cached=4096)], 4200) == 1
    assert choose([load(0), load(1, cached=16)], 100) == 1
    assert choose([load(0, running=3), load(1, running=2)], 100) == 1
    assert choose([load(1), load(0)], 100) == 0


def test_a_few_words_that_all_share_do_not_draw_all_to_one_replica() -> None:
    """Every chat begins with its template: one replica had 15 requests and the other none."""
    assert choose([load(0, running=2, cached=32), load(1, running=1)], 200) == 1
    running = {0: 0, 1: 0}
    for _ in range(40):
        chosen = choose([load(0, running=running[0], cached=32), load(1, running=running[1])], 200)
        assert chosen is not None
        running[chosen] += 1
    assert running[0] - running[1] <= 2


def test_a_prefix_is_worth_more_requests_the_more_of_the_prompt_it_is() -> None:
    """1,500 of 1,800 tokens: worth having 2.8 times as many requests beside one, since those are all held up less."""
    shared = [choose([load(0, running=20), load(1, running=n, cached=1500)], 1800) for n in range(20, 90)]
    assert shared == [1] * 47 + [0] * 23
    assert choose([load(0), load(1, running=3, cached=450)], 600) == 1  # few requests are no load


def test_a_second_turn_goes_back_though_its_replica_has_a_little_more_to_do() -> None:
    """With three replicas and 24 chats, two requests more somewhere sent every other turn to an empty cache."""
    assert choose([load(0), load(1, running=2, cached=448), load(2, running=1)], 600) == 1


def test_a_prefix_behind_a_queue_is_worth_nothing() -> None:
    """Computing a prompt again is sooner done than waiting for others."""
    assert choose([load(0, waiting=4, cached=512), load(1, running=9)], 600) == 1
    assert choose([load(0, waiting=9, cached=4096), load(1, waiting=9)], 4200) == 0


def test_a_few_that_wait_for_the_step_to_end_are_no_queue() -> None:
    """At 40 arrivals a second and steps of 15 ms somebody waits more often than not, and every prefix was forgotten."""
    assert choose([load(0, running=64, waiting=3, cached=4096), load(1, running=64)], 4200) == 0
    assert choose([load(0, running=64, waiting=10, cached=4096), load(1, running=64)], 4200) == 1


def test_nobody_takes_requests() -> None:
    """All drain, or there are none."""
    assert choose([load(0, is_open=False)]) is None
    assert choose([]) is None
