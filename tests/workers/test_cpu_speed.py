"""What the CPU path does for speed must not be seen in the answers: pieces of a prompt, copies of weights, threads."""

import itertools
import os
import runpy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from argosy.workers import openmp
from argosy.workers.attention import torch_backend
from argosy.workers.device import FIRST_TRIAL, LONGEST_PAUSE, TRIAL_STEPS, ThreadChoice
from argosy.workers.quantization.base import LinearLayer, UnquantizedMethod, count_products, empty_parameter


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As a rank with two cores has them; the number before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(("num_queries", "length"), [(2, 2), (5, 90), (61, 61), (61, 200), (130, 131)])
def test_a_prompt_in_pieces_sees_what_it_sees_as_a_whole(
    num_queries: int, length: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt's queries are taken 16 at a time here, behind a prefix and with a sliding window."""
    monkeypatch.setattr(torch_backend, "CHUNK_LOGITS", 1)
    torch.manual_seed(0)
    q_QNH, k_LKH, v_LKH = torch.randn(num_queries, 6, 8), torch.randn(length, 2, 8), torch.randn(length, 2, 8)
    got_QD = torch_backend._attend_in_chunks(q_QNH, k_LKH, v_LKH, scale=0.3, window=window)
    query_Q1, key_L = torch.arange(length - num_queries, length)[:, None], torch.arange(length)
    seen_QL = (key_L <= query_Q1) & (key_L > query_Q1 - (window or length))
    k_NLH, v_NLH = (x.transpose(0, 1).repeat_interleave(3, 0) for x in (k_LKH, v_LKH))
    want_NQH = F.scaled_dot_product_attention(q_QNH.transpose(0, 1), k_NLH, v_NLH, attn_mask=seen_QL, scale=0.3)
    torch.testing.assert_close(got_QD, want_NQH.transpose(0, 1).reshape(num_queries, -1))


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 16, 17])
@pytest.mark.parametrize(
    ("num_out", "num_in", "bias"), [(96, 32, True), (96, 32, False), (1024, 520, True), (32, 96, True)]
)
def test_a_product_is_the_same_by_whichever_copy_of_the_weight(
    num_out: int, num_in: int, bias: bool, num_tokens: int
) -> None:
    """Few tokens read the transposed copy, many the plain or the packed weight; (1024, 520) is packed."""
    torch.manual_seed(0)
    method, layer = UnquantizedMethod(), LinearLayer()
    method.create(layer, num_in, num_out, bias=bias, dtype=torch.float32)
    weight, added = torch.randn(num_out, num_in), torch.randn(num_out)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    if bias:
        layer.bias = torch.nn.Parameter(added, requires_grad=False)
    method.finish(layer)
    assert (layer.transposed_weight is not None) == (num_out > num_in)
    x_TI = torch.randn(num_tokens, num_in)
    torch.testing.assert_close(
        method.apply(layer, x_TI), F.linear(x_TI, weight, added if bias else None), atol=1e-4, rtol=1e-4
    )


def test_products_are_counted_once_whatever_copies_they_have() -> None:
    """A step's work is guessed from them."""
    method, layer = UnquantizedMethod(), LinearLayer()
    method.create(layer, 8, 16, bias=True, dtype=torch.float32)
    layer.weight = empty_parameter(16, 8, dtype=torch.float32)
    assert count_products(torch.nn.ModuleList([layer])) == (1, 128)


@pytest.mark.usefixtures("two_threads")
def test_small_steps_leave_the_other_cores_alone() -> None:
    """5 M parameters: a decode step is over before a second thread is awake, a prompt of 512 tokens is not."""
    choice = ThreadChoice(2, num_products=17, num_weights=4_200_000, itemsize=4)
    choice.choose(1)
    assert torch.get_num_threads() == 1
    choice.choose(512)
    assert torch.get_num_threads() == 2
    large = ThreadChoice(2, num_products=97, num_weights=415_000_000, itemsize=2)
    choice.choose(1)
    large.choose(1)
    assert torch.get_num_threads() == 2


class _Machine:
    """Steps of so many seconds on one thread and on two."""

    def __init__(self, one: float, two: float):
        self.seconds = {1: one, 2: two}
        self.now = 0.0
        self.choice = ThreadChoice(2, num_products=17, num_weights=4_200_000, itemsize=4, learns=True, clock=self.clock)

    def clock(self) -> float:
        return self.now

    def run(self, num_steps: int, num_tokens: int = 32) -> list[int]:
        """How many threads each step had."""
        threads = []
        for _ in range(num_steps):
            self.choice.choose(num_tokens)
            threads.append(torch.get_num_threads())
            self.now += self.seconds[threads[-1]]
            self.choice.finished()
        return threads


@pytest.mark.usefixtures("two_threads")
def test_a_machine_that_is_idle_gives_small_steps_its_second_core() -> None:
    """32 rows begin on one thread; after one trial they share, and the other way is tried ever more rarely."""
    machine = _Machine(one=11e-3, two=7e-3)
    assert machine.run(TRIAL_STEPS) == [1] * TRIAL_STEPS
    machine.run(FIRST_TRIAL)
    later = machine.run(2000)
    assert later.count(1) < 40


@pytest.mark.usefixtures("two_threads")
def test_trials_of_the_worse_way_come_half_as_often_each_time() -> None:
    """16, 32, 64 ... steps from one trial to the next, up to 512, while nothing speaks for the other way."""
    machine = _Machine(one=11e-3, two=7e-3)
    machine.run(FIRST_TRIAL)  # with its trial: from now on it shares
    threads = machine.run(3000)
    begins = [step for step in range(1, len(threads)) if threads[step - 1 : step + 1] == [2, 1]]
    pauses = [after - before for before, after in itertools.pairwise(begins)]
    assert pauses[:5] == [32, 64, 128, 256, 512]
    assert set(pauses[5:]) == {LONGEST_PAUSE}
    assert all(threads[step : step + TRIAL_STEPS] == [1] * TRIAL_STEPS for step in begins)


@pytest.mark.usefixtures("two_threads")
def test_the_step_that_wakes_the_threads_is_not_held_against_them() -> None:
    """It takes a tenth of a second longer, once a trial; the others are what steps will be."""
    machine = _Machine(one=11e-3, two=7e-3)
    before = 1
    for _ in range(10 * FIRST_TRIAL):
        machine.choice.choose(32)
        now = torch.get_num_threads()
        machine.now += machine.seconds[now] + (0.1 if now > before else 0.0)
        machine.choice.finished()
        before = now
    assert machine.run(100).count(2) > 90


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "3000"),
        ({"GOMP_SPINCOUNT": "17"}, "17"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "17"}, "17"),
    ],
)
def test_who_sets_how_long_threads_spin_has_the_last_word(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some 40 us else; read before torch is imported."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(openmp.__file__)
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)


@pytest.mark.usefixtures("two_threads")
def test_a_machine_that_gets_busy_is_noticed_and_each_kind_of_step_for_itself() -> None:
    """Two threads wait for each other there; a prompt that is faster with both keeps them."""
    machine = _Machine(one=11e-3, two=7e-3)
    machine.run(1000)
    machine.seconds = {1: 12e-3, 2: 20e-3}
    machine.run(600)
    assert machine.run(400).count(2) < 40
    machine.seconds = {1: 60e-3, 2: 40e-3}
    assert machine.run(200, num_tokens=512).count(1) < 40


@pytest.mark.usefixtures("two_threads")
def test_a_rank_that_waits_for_others_goes_by_arithmetic() -> None:
    """Its seconds are theirs, too."""
    choice = ThreadChoice(2, num_products=17, num_weights=4_200_000, itemsize=4)
    for _ in range(100):
        choice.choose(32)
        assert torch.get_num_threads() == 1
        choice.finished()
