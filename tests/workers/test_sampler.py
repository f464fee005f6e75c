"""The sampler beside a slow and obvious one, in the words of the request's own fields."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from argosy.cluster.protocol.messages import NewRequest
from argosy.cluster.protocol.sampling import TokenParams
from argosy.workers.sampler import NOT_FINITE, NOTHING_ALLOWED, Sampler

VOCAB = 50
CPU = torch.device("cpu")


def request(handle: int, prompt: Sequence[int], output: Sequence[int] = (), **params: Any) -> NewRequest:
    """A request as the driver would send it, with so much generated already."""
    token_ids = [*prompt, *output]
    made = TokenParams(max_tokens=100, **params)
    return NewRequest(handle, token_ids, len(prompt), 0, [0], made)


class Bench:
    """A sampler with its requests, and the history that a batch would give it."""

    def __init__(self, *requests: NewRequest, max_num_seqs: int = 16):
        self.sampler = Sampler(max_num_seqs, VOCAB, CPU)
        self.tokens = {r.handle: list(r.token_ids) for r in requests}
        for r in requests:
            self.sampler.add(r)

    def sample(self, logits: torch.Tensor, handles: Sequence[int], *, keep: bool = False):
        """Draw for these handles; `keep` appends what was drawn."""
        positions = np.array([len(self.tokens[h]) for h in handles])
        sampled = self.sampler.sample(
            logits.clone(), np.array(handles), positions, lambda h, start, end: self.tokens[h][start:end]
        )
        if keep:
            for h, token_id in zip(handles, sampled.token_ids_S.tolist(), strict=True):
                self.tokens[h].append(token_id)
        return sampled


def naive_process(logits: list[float], r: NewRequest) -> list[float]:
    """What the fields say, one token at a time."""
    p, out = r.params, list(r.token_ids[r.num_prompt_tokens :])
    values = list(logits)
    if p.allowed_token_ids:
        values = [v if i in p.allowed_token_ids else -math.inf for i, v in enumerate(values)]
    for word in p.bad_word_ids:
        if len(word) == 1 or out[-(len(word) - 1) :] == list(word[:-1]):
            values[word[-1]] = -math.inf
    if len(out) < p.min_tokens:
        for i in (*p.eos_token_ids, *p.stop_token_ids):
            values[i : i + 1] = [-math.inf] * len(values[i : i + 1])
    for i, bias in p.logit_bias:
        values[i : i + 1] = [v + bias for v in values[i : i + 1]]
    counts = Counter(out)
    for i in range(VOCAB):
        if i in counts or i in r.token_ids[: r.num_prompt_tokens]:
            values[i] = values[i] / p.repetition_penalty if values[i] > 0 else values[i] * p.repetition_penalty
        values[i] -= p.frequency_penalty * counts[i]
        values[i] -= p.presence_penalty * (i in counts)
    return values


RULES = [
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5, "frequency_penalty": -0.7},
    {"repetition_penalty": 0.6, "presence_penalty": -1.0, "frequency_penalty": 0.3},
    {"min_tokens": 9, "eos_token_ids": (3,), "stop_token_ids": (5, 7, 400)},
    {"min_tokens": 2, "eos_token_ids": (3,)},
    {"logit_bias": ((4, 3.5), (9, -100.0), (2, 100.0), (77, 1.0))},
    {"allowed_token_ids": (1, 8, 30)},
    # the last word begins in the prompt: only the output counts
    {"bad_word_ids": ((6,), (11, 12), (5, 11, 13), (9, 14), (9, 9, 15), (11, 2, 9, 9, 21))},
    {
        "allowed_token_ids": (1, 8, 30, 31),
        "bad_word_ids": ((30,),),
        "logit_bias": ((31, 5.0),),
        "repetition_penalty": 1.3,
    },
    {},
]


def test_logits_are_changed_as_the_fields_say() -> None:
    """Ten requests with different wishes in one batch, some of them resumed in the middle of their answers."""
    torch.manual_seed(0)
    requests = [
        request(h, [1, 2, 3, 4 + h], [2, 9, 9, 5, 11][: 5 - h % 2 * 2], temperature=0.0, **rules)
        for h, rules in enumerate(RULES)
    ]
    bench = Bench(*requests)
    logits = torch.randn(len(requests), VOCAB) * 3
    expected = torch.tensor([naive_process(row.tolist(), r) for row, r in zip(logits, requests, strict=True)])
    positions = np.array([len(r.token_ids) for r in requests])
    got = logits.clone()
    bench.sampler.processor.process(got, np.arange(len(RULES)), positions, lambda h, a, b: bench.tokens[h][a:b])
    torch.testing.assert_close(got, expected)
    assert bench.sample(logits, range(len(RULES))).token_ids_S.tolist() == expected.argmax(dim=1).tolist()


def test_penalties_follow_what_is_drawn() -> None:
    """Counts are kept from step to step; after some steps they are what a fresh start from the tokens would give."""
    torch.manual_seed(1)
    params = {"repetition_penalty": 1.4, "frequency_penalty": 0.9, "presence_penalty": 0.4, "temperature": 0.0}
    bench = Bench(*(request(h, [1, 2, h], **params) for h in range(6)), request(9, [1], temperature=0.0))
    for step in range(12):
        handles = [0, 2, 9, 5, 1] if step % 2 else [5, 4, 3, 9]
        logits = torch.randn(len(handles), VOCAB)
        now = {h: request(h, bench.tokens[h][: 1 if h == 9 else 3], bench.tokens[h][1 if h == 9 else 3 :],
                          **({} if h == 9 else params)) for h in handles}  # fmt: skip
        expected = [int(np.argmax(naive_process(row.tolist(), now[h]))) for row, h in zip(logits, handles, strict=True)]
        assert bench.sample(logits, handles, keep=True).token_ids_S.tolist() == expected


def naive_distribution(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """softmax, then each filter on the sorted list."""
    p = torch.softmax(logits.double() / temperature, dim=0).numpy()
    p[p < min_p * p.max()] = 0.0
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0.0
    share, total = 0.0, p.sum()
    for i in order:
        if share >= top_p * total:
            p[i] = 0.0
        share += p[i]
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.3, 7, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1),
     (0.9, 20, 0.9, 0.02)],
)  # fmt: skip
def test_draws_have_the_distribution_asked_for(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Many draws against the probabilities, by chi-square; nothing outside of the kept set."""
    torch.manual_seed(2)
    logits = torch.randn(VOCAB) * 1.5
    rows, rounds = (1000, 100) if top_p == 1.0 else (200, 100)  # the reference does top_p row by row
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    bench = Bench(*(request(h, [1], seed=h * 7919, **params) for h in range(rows)), max_num_seqs=rows)
    batch = logits.expand(rows, VOCAB)
    counts = np.zeros(VOCAB)
    for position in range(1, rounds + 1):
        sampled = bench.sampler.sample(batch.clone(), np.arange(rows), np.full(rows, position), lambda *_: [])
        counts += np.bincount(sampled.token_ids_S.numpy(), minlength=VOCAB)
    expected = naive_distribution(logits, temperature, top_k, top_p, min_p) * rows * rounds
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom), chi_square


def test_a_request_draws_the_same_with_any_batch_mates() -> None:
    """The same seed, position and logits: alone, in a crowd, in another row, after being sent again."""
    torch.manual_seed(3)
    wish = {"temperature": 0.9, "top_p": 0.95, "seed": 2**40 + 17}
    logits = torch.randn(8, VOCAB)
    alone = [Bench(request(0, [1] * n, **wish)).sample(logits[n : n + 1], [0]).token_ids_S.item() for n in range(1, 8)]
    others = [request(h, [2, 3], temperature=0.5 * h, seed=h, repetition_penalty=1.0 + h / 10) for h in range(1, 6)]
    crowd = []
    for n in range(1, 8):
        bench = Bench(*others, request(9, [1] * n, **wish))
        rows = torch.cat([torch.randn(3, VOCAB), logits[n : n + 1], torch.randn(2, VOCAB)])
        crowd.append(bench.sample(rows, [1, 2, 3, 9, 4, 5]).token_ids_S.tolist()[3])
    assert alone == crowd
    assert len(set(alone)) > 2
    other_seed = [
        Bench(request(0, [1] * n, **{**wish, "seed": 5})).sample(logits[n : n + 1], [0]).token_ids_S.item()
        for n in range(1, 8)
    ]
    assert alone != other_seed


def test_parameters_are_those_of_the_handle_even_when_it_changes_hands() -> None:
    """Row 0 is greedy, then finished, then a random request gets its handle: the cached columns must not survive."""
    torch.manual_seed(4)
    bench = Bench(request(0, [1], temperature=0.0), request(1, [1], temperature=1.5, seed=3))
    logits = torch.randn(2, VOCAB)
    handles, positions = np.array([0, 1]), np.array([1, 1])
    first = bench.sampler.sample(logits.clone(), handles, positions, lambda *_: [])
    assert first.token_ids_S[0] == logits[0].argmax()
    bench.sampler.forget(0)
    bench.sampler.add(request(0, [1], temperature=1.5, seed=3))
    second = bench.sampler.sample(logits[1].expand(2, -1).clone(), handles, positions, lambda *_: [])
    assert second.token_ids_S[0] == second.token_ids_S[1] == first.token_ids_S[1]


def test_logprobs_are_raw() -> None:
    """Before penalties and temperature; with rank, the most likely ones, the whole vocabulary, and named ids."""
    torch.manual_seed(5)
    bench = Bench(
        request(0, [1], temperature=0.0, logprobs=3, logit_bias=((7, 100.0),)),
        request(1, [1], temperature=0.0),
        request(2, [1], temperature=2.0, seed=1, logprobs=0, repetition_penalty=1.9),
        request(3, [1], temperature=0.0, logprobs=-1),
        request(4, [1], temperature=0.0, logprob_token_ids=(11, 4)),
    )
    logits = torch.randn(5, VOCAB) * 2
    sampled = bench.sample(logits, range(5))
    assert sampled.logprobs is not None
    figures = dict(sampled.logprobs.to_messages())
    assert sorted(figures) == [0, 2, 3, 4]
    raw = torch.log_softmax(logits, dim=-1)
    ids = sampled.token_ids_S.tolist()
    assert ids[0] == 7
    for row, figure in figures.items():
        assert figure.top_ids[0] == ids[row]
        assert figure.rank == int((raw[row] > raw[row, ids[row]]).sum()) + 1
        torch.testing.assert_close(torch.tensor(figure.top_logprobs), raw[row, figure.top_ids])
    assert figures[0].top_ids[1:] == raw[0].topk(3).indices.tolist()
    assert len(figures[2].top_ids) == 1
    assert figures[3].top_ids[1:] == raw[3].argsort(descending=True).tolist()
    assert figures[4].top_ids[1:] == [11, 4]


@pytest.mark.parametrize(
    "wishes",
    [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9},
     {"temperature": 0.7, "top_k": 4}, {"temperature": 1.0, "min_p": 0.1},
     {"temperature": 1.0, "top_k": 4, "top_p": 0.5, "min_p": 0.01}],
    ids="-".join,
)  # fmt: skip
def test_a_sick_row_fails_alone(wishes: dict[str, float]) -> None:
    """A NaN or infinity in one row, or a wish that leaves nothing: that row fails, its neighbours draw as ever, and
    whatever is filtered, the rank lives."""
    torch.manual_seed(6)
    requests = [request(h, [1], seed=h, **wishes) for h in range(4)]
    impossible = request(4, [1], allowed_token_ids=(3,), bad_word_ids=((3,),), **wishes)
    logits = torch.randn(5, VOCAB)
    healthy = Bench(*requests, impossible).sample(logits, range(5)).token_ids_S.tolist()
    logits[1, 7], logits[2, 9] = math.nan, math.inf
    sick = Bench(*requests, impossible).sample(logits, range(5)).token_ids_S.tolist()
    assert healthy[4] == NOTHING_ALLOWED
    assert sick == [healthy[0], NOT_FINITE, NOT_FINITE, healthy[3], NOTHING_ALLOWED]


def test_plain_greedy_takes_the_first_of_equals() -> None:
    """The fast path: one argmax over the batch, ties to the lowest id as on every device."""
    bench = Bench(*(request(h, [1], temperature=0.0) for h in range(3)))
    logits = torch.zeros(3, VOCAB)
    logits[1, [4, 9]] = 2.0
    logits[2, 6] = math.nan
    assert bench.sampler.is_greedy
    assert bench.sample(logits, range(3)).token_ids_S.tolist() == [0, 4, NOT_FINITE]
