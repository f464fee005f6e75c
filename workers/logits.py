"""What requests do to their logits before the draw: allowed lists, bad words, bans, bias, penalties; in this order.

S rows that sample, V vocabulary, P places of the penalty tables. Temperature and the filters belong to the draw itself
(`kernels.step_ops.sample_rows`). Only rows that ask for something pay for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from argosy.cluster.protocol.messages import NewRequest
from argosy.cluster.protocol.sampling import TokenParams

IntArray = npt.NDArray[np.int64]
NEGATIVE_INFINITY = float("-inf")
FIRST_PENALTY_PLACES = 4  # the tables double when more requests with penalties run at once


@dataclass(frozen=True, slots=True)
class LogitRules:
    """What one request does to its logits, as arrays made once."""

    num_prompt_tokens: int
    allowed_ids: IntArray | None
    banned_ids: IntArray  # bad words of one token
    bad_words: tuple[tuple[int, ...], ...]  # of several: the last is banned after the others
    min_tokens: int
    end_ids: IntArray  # banned before min_tokens
    bias_ids: IntArray
    bias_values: npt.NDArray[np.float32]

    @classmethod
    def from_params(cls, params: TokenParams, num_prompt_tokens: int, vocab_size: int) -> "LogitRules":
        """Ids beyond the vocabulary can't be drawn, so bans and biases on them say nothing and are left out."""
        words = [word for word in params.bad_word_ids if word and word[-1] < vocab_size]
        bias = [(token_id, value) for token_id, value in params.logit_bias if token_id < vocab_size]
        allowed = _ids(params.allowed_token_ids, vocab_size)
        return cls(
            num_prompt_tokens=num_prompt_tokens,
            allowed_ids=allowed if params.allowed_token_ids else None,
            banned_ids=_ids([word[0] for word in words if len(word) == 1], vocab_size),
            bad_words=tuple(tuple(word) for word in words if len(word) > 1),
            min_tokens=params.min_tokens,
            end_ids=_ids([*params.eos_token_ids, *params.stop_token_ids], vocab_size),
            bias_ids=np.asarray([token_id for token_id, _ in bias], dtype=np.int64),
            bias_values=np.asarray([value for _, value in bias], dtype=np.float32),
        )


class Penalties:
    """Which tokens the prompt has and how often each was generated, for requests with penalties only."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device):
        self.vocab_size, self.device = vocab_size, device
        self.place_N = np.full(max_num_seqs, -1, dtype=np.int64)
        self._free: list[int] = []
        self._in_prompt_PV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._count_PV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._factors_P3 = torch.zeros((0, 3), dtype=torch.float32, device=device)

    def add(self, request: NewRequest) -> None:
        """Count what the request has so far, if it has a penalty."""
        params, handle = request.params, request.handle
        factors = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        self.forget(handle)
        if factors == (1.0, 0.0, 0.0):
            return
        if not self._free:
            self._grow()
        place = self._free.pop()
        self.place_N[handle] = place
        self._factors_P3[place] = torch.tensor(factors)
        token_ids = torch.as_tensor(request.token_ids, dtype=torch.int64).clamp_(0, self.vocab_size - 1)
        prompt, output = token_ids[: request.num_prompt_tokens], token_ids[request.num_prompt_tokens :]
        self._in_prompt_PV[place] = False
        self._in_prompt_PV[place, prompt.to(self.device)] = True
        self._count_PV[place] = torch.bincount(output, minlength=self.vocab_size).to(self.device, torch.int32)

    def forget(self, handle: int) -> None:
        """The request's place may be given to another."""
        if (place := int(self.place_N[handle])) >= 0:
            self._free.append(place)
            self.place_N[handle] = -1

    def apply(self, logits_SV: Tensor, handles_S: IntArray) -> None:
        """Repetition (prompt and output), then frequency and presence (output), in place."""
        places_S = self.place_N[handles_S]
        rows_K = np.flatnonzero(places_S >= 0)
        if not len(rows_K):
            return
        rows, places = self._on_device(rows_K), self._on_device(places_S[rows_K])
        logits_KV, count_KV, factors_K3 = logits_SV[rows], self._count_PV[places], self._factors_P3[places]
        repetition_K1, frequency_K1, presence_K1 = factors_K3[:, :1], factors_K3[:, 1:2], factors_K3[:, 2:]
        generated_KV = count_KV > 0
        scaled_KV = torch.where(logits_KV > 0, logits_KV / repetition_K1, logits_KV * repetition_K1)
        logits_KV = torch.where(generated_KV | self._in_prompt_PV[places], scaled_KV, logits_KV)
        logits_KV -= frequency_K1 * count_KV
        logits_KV -= presence_K1 * generated_KV
        logits_SV[rows] = logits_KV

    def count(self, handles_S: IntArray, token_ids_S: Tensor) -> None:
        """Tokens were drawn. They may lie on the device; the host need not know them."""
        places_S = self.place_N[handles_S]
        rows_K = np.flatnonzero(places_S >= 0)
        if len(rows_K):
            where = (self._on_device(places_S[rows_K]), token_ids_S[self._on_device(rows_K)])
            self._count_PV.index_put_(where, torch.ones((), dtype=torch.int32, device=self.device), accumulate=True)

    def _on_device(self, values: IntArray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _grow(self) -> None:
        old = self._count_PV.shape[0]
        new = min(max(FIRST_PENALTY_PLACES, 2 * old), len(self.place_N))
        for name in ("_in_prompt_PV", "_count_PV", "_factors_P3"):
            table = getattr(self, name)
            bigger = torch.zeros((new, table.shape[1]), dtype=table.dtype, device=self.device)
            bigger[:old] = table
            setattr(self, name, bigger)
        self._free.extend(range(new - 1, old - 1, -1))


class LogitProcessor:
    """The rules of all requests that have any."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device):
        self.vocab_size, self.device = vocab_size, device
        self._rules: dict[int, LogitRules] = {}
        self._penalties = Penalties(max_num_seqs, vocab_size, device)

    @property
    def is_idle(self) -> bool:
        """Whether no request has rules: the steps of plain requests pay nothing."""
        return not self._rules

    @property
    def needs_history(self) -> bool:
        """Whether some rule looks at the ids generated so far, which then must be known to the host."""
        return any(rules.bad_words for rules in self._rules.values())

    def add(self, request: NewRequest) -> None:
        """Take up a request, if its logits are to be changed."""
        self._rules.pop(request.handle, None)
        self._penalties.add(request)
        if not request.params.is_plain:
            rules = LogitRules.from_params(request.params, request.num_prompt_tokens, self.vocab_size)
            self._rules[request.handle] = rules

    def forget(self, handle: int) -> None:
        """The request is over."""
        if self._rules.pop(handle, None) is not None:
            self._penalties.forget(handle)

    def process(
        self,
        logits_SV: Tensor,
        handles_S: IntArray,
        positions_S: IntArray,
        history: Callable[[int, int, int], Sequence[int]],
    ) -> None:
        """Change the rows of requests with rules, in place.

        `positions_S` is the index of the token to be drawn; `history(handle, start, end)` gives known token ids.
        """
        bans = _Edits()
        biases = _Edits()
        values: list[npt.NDArray[np.float32]] = []
        for row, (handle, position) in enumerate(zip(handles_S.tolist(), positions_S.tolist(), strict=True)):
            if (rules := self._rules.get(handle)) is None:
                continue
            if rules.allowed_ids is not None:
                allowed = torch.from_numpy(rules.allowed_ids).to(self.device)
                kept = logits_SV[row, allowed]
                logits_SV[row] = NEGATIVE_INFINITY
                logits_SV[row, allowed] = kept
            bans.add(row, rules.banned_ids)
            for word in rules.bad_words:
                start = position - len(word) + 1
                if start >= rules.num_prompt_tokens and tuple(history(handle, start, position)) == word[:-1]:
                    bans.add(row, np.asarray(word[-1:], dtype=np.int64))
            if position - rules.num_prompt_tokens < rules.min_tokens:
                bans.add(row, rules.end_ids)
            if len(rules.bias_ids):
                biases.add(row, rules.bias_ids)
                values.append(rules.bias_values)
        if bans.ids:
            logits_SV[bans.where(self.device)] = NEGATIVE_INFINITY
        if biases.ids:
            added = torch.from_numpy(np.concatenate(values)).to(self.device)
            logits_SV.index_put_(biases.where(self.device), added, accumulate=True)
        self._penalties.apply(logits_SV, handles_S)

    def count(self, handles_S: IntArray, token_ids_S: Tensor) -> None:
        """Tokens were drawn."""
        self._penalties.count(handles_S, token_ids_S)


class _Edits:
    """Places in the logits, gathered over rows so that they are written at once."""

    def __init__(self) -> None:
        self.rows: list[IntArray] = []
        self.ids: list[IntArray] = []

    def add(self, row: int, token_ids: IntArray) -> None:
        if len(token_ids):
            self.rows.append(np.full(len(token_ids), row, dtype=np.int64))
            self.ids.append(token_ids)

    def where(self, device: torch.device) -> tuple[Tensor, Tensor]:
        rows, ids = np.concatenate(self.rows), np.concatenate(self.ids)
        return torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device)


def _ids(token_ids: Sequence[int], vocab_size: int) -> IntArray:
    return np.asarray([token_id for token_id in token_ids if 0 <= token_id < vocab_size], dtype=np.int64)
