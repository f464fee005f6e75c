"""From logits to token ids and logprobs, each a function of its own request alone.

S rows that sample, V vocabulary, L rows that want logprobs, M logprobs a row. A draw is keyed by (seed, position of the
token in its request), so the same request draws the same in any batch and after a preemption.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from argosy.cluster.protocol import sampling
from argosy.cluster.protocol.messages import NewRequest, TokenLogprobs
from argosy.kernels import step_ops
from argosy.workers.logits import IntArray, LogitProcessor

NOT_FINITE, NOTHING_ALLOWED = -1, -2  # in place of a token id
MAX_GATHERED = 8  # batches whose columns are kept
FAILURES = {
    NOT_FINITE: "a logit is not a finite number: the model gave such a one, or repetition_penalty made it",
    NOTHING_ALLOWED: sampling.NOTHING_ALLOWED,
}


@dataclass(slots=True)
class LogprobTensors:
    """Raw logprobs of some rows: places among the rows that sampled, and tensors still on the device."""

    places: list[int]
    num_top: list[int]  # for each, how many of the most likely it wants
    wanted_ids: list[Sequence[int]]
    token_ids_L: Tensor
    token_logprobs_L: Tensor
    ranks_L: Tensor
    top_ids_LM: Tensor
    top_logprobs_LM: Tensor
    wanted_logprobs: list[Tensor]

    def to_messages(self) -> list[tuple[int, TokenLogprobs]]:
        """The figures as they go to the driver."""
        columns = (self.token_ids_L, self.token_logprobs_L, self.ranks_L, self.top_ids_LM, self.top_logprobs_LM)
        ids, logprobs, ranks, top_ids, top_logprobs = (column.tolist() for column in columns)
        answer = []
        for i, place in enumerate(self.places):
            row_ids, row_logprobs = [ids[i], *top_ids[i][: self.num_top[i]]], [logprobs[i]]
            row_logprobs += top_logprobs[i][: self.num_top[i]]
            if self.wanted_ids[i]:
                row_ids += self.wanted_ids[i]
                row_logprobs += self.wanted_logprobs[i].tolist()
            answer.append((place, TokenLogprobs(ranks[i], row_ids, row_logprobs)))
        return answer


@dataclass(slots=True)
class Sampled:
    """What a step drew, on the device; token ids below 0 are `FAILURES`."""

    token_ids_S: Tensor
    logprobs: LogprobTensors | None = None


def gather_logprobs(
    logits_LV: Tensor,
    token_ids_L: Tensor,
    places: list[int],
    num_top: list[int],
    wanted_ids: list[Sequence[int]],
) -> LogprobTensors:
    """Logprobs of the given tokens, their rank, the most likely ones (-1: all), and those of `wanted_ids`."""
    logprobs_LV = logits_LV.float().log_softmax(dim=-1)
    vocab_size = logprobs_LV.shape[1]
    num_top = [vocab_size if count < 0 else min(count, vocab_size) for count in num_top]
    token_logprobs_L1 = logprobs_LV.gather(1, token_ids_L[:, None])
    top = logprobs_LV.topk(max(num_top, default=0), dim=-1)
    wanted_ids = [[i for i in ids if i < vocab_size] for ids in wanted_ids]
    wanted = [
        row[torch.tensor(ids, device=row.device)] if ids else row[:0]
        for row, ids in zip(logprobs_LV, wanted_ids, strict=True)
    ]
    return LogprobTensors(
        places=places,
        num_top=num_top,
        wanted_ids=wanted_ids,
        token_ids_L=token_ids_L,
        token_logprobs_L=token_logprobs_L1[:, 0],
        ranks_L=(logprobs_LV > token_logprobs_L1).sum(dim=-1) + 1,
        top_ids_LM=top.indices,
        top_logprobs_LM=top.values,
        wanted_logprobs=wanted,
    )


class Sampler:
    """How each request wants its tokens, by handle, and the draw for a step's rows."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device, *, gives_logprobs: bool = True):
        """`gives_logprobs` is False on ranks that draw but don't answer."""
        num = max_num_seqs
        self.device, self.vocab_size = device, vocab_size
        self.processor = LogitProcessor(num, vocab_size, device)
        self._gives_logprobs = gives_logprobs
        self._temperature_N = np.zeros(num, dtype=np.float32)
        self._top_k_N = np.zeros(num, dtype=np.int32)
        self._top_p_N = np.ones(num, dtype=np.float32)
        self._min_p_N = np.zeros(num, dtype=np.float32)
        self._seed_N = np.zeros(num, dtype=np.int64)
        self._has_filter_N = np.zeros(num, dtype=np.bool_)
        self._wants_logprobs: dict[int, tuple[int, Sequence[int]]] = {}
        self._needs_logits: dict[int, None] = {}
        self._random: dict[int, None] = {}
        self._gathered: dict[int, _Gathered] = {}  # by the identity of the array of handles

    def add(self, request: NewRequest) -> None:
        """Remember how the request wants its tokens."""
        handle, params = request.handle, request.params
        self.forget(handle)
        self._temperature_N[handle] = params.temperature
        self._top_k_N[handle] = min(params.top_k, self.vocab_size)
        self._top_p_N[handle] = params.top_p
        self._min_p_N[handle] = params.min_p
        self._seed_N[handle] = params.seed
        self._has_filter_N[handle] = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        if params.temperature > 0.0:
            self._random[handle] = None
        if params.logprobs is not None or params.logprob_token_ids:
            self._needs_logits[handle] = None
            if self._gives_logprobs:
                self._wants_logprobs[handle] = (params.logprobs or 0, params.logprob_token_ids)
        self.processor.add(request)

    def forget(self, handle: int) -> None:
        """The request is over, or comes back in full."""
        self._gathered.clear()
        self._random.pop(handle, None)
        self._wants_logprobs.pop(handle, None)
        self._needs_logits.pop(handle, None)
        self.processor.forget(handle)

    @property
    def is_greedy(self) -> bool:
        """Whether every known request takes the most likely token of logits as they are, and wants nothing else.

        The same on all ranks of a group, also those that give no logprobs: they choose together, or gather the logits.
        """
        return not self._random and self.processor.is_idle and not self._needs_logits

    def sample(
        self,
        logits_SV: Tensor,
        handles_S: IntArray,
        positions_S: IntArray,
        history: Callable[[int, int, int], Sequence[int]],
    ) -> Sampled:
        """Draw one token for each row. Spends `logits_SV`, which may have 16 bits on a GPU.

        An array of handles that comes again must not have been changed: what was made from it is kept.
        """
        if self.is_greedy:
            return Sampled(_greedy(logits_SV))
        wants = self._rows_with_logprobs(handles_S)
        if wants or not self.processor.is_idle:
            logits_SV = logits_SV.float()
        raw_LV = logits_SV[torch.tensor([row for row, _, _ in wants], device=self.device)] if wants else None
        if not self.processor.is_idle:
            self.processor.process(logits_SV, handles_S, positions_S, history)
        token_ids_S = self._draw(logits_SV, handles_S, positions_S)
        if not self.processor.is_idle:
            self.processor.count(handles_S, token_ids_S.clamp(min=0))
        if raw_LV is None:
            return Sampled(token_ids_S)
        rows = [row for row, _, _ in wants]
        num_top = [count for _, count, _ in wants]
        wanted_ids = [ids for _, _, ids in wants]
        token_ids_L = token_ids_S[torch.tensor(rows, device=self.device)].clamp(min=0)
        return Sampled(token_ids_S, gather_logprobs(raw_LV, token_ids_L, rows, num_top, wanted_ids))

    def _rows_with_logprobs(self, handles_S: IntArray) -> list[tuple[int, int, Sequence[int]]]:
        if not self._wants_logprobs:
            return []
        asked = ((row, self._wants_logprobs.get(handle)) for row, handle in enumerate(handles_S.tolist()))
        return [(row, *want) for row, want in asked if want is not None]

    def _draw(self, logits_SV: Tensor, handles_S: IntArray, positions_S: IntArray) -> Tensor:
        gathered = self._gather(handles_S)
        if not gathered.any_random:
            return _greedy(logits_SV)
        position_S = to_device(np.ascontiguousarray(positions_S), self.device)
        token_ids_S = step_ops.sample_rows(
            logits_SV, *gathered.columns, position_S, any_random=True, any_filter=gathered.any_filter
        )
        return _judge(logits_SV, token_ids_S)

    def _gather(self, handles_S: IntArray) -> "_Gathered":
        """How these rows want their tokens. Steady micro-batches take turns, so a few are kept."""
        found = self._gathered.get(id(handles_S))
        if found is not None and found.handles_S is handles_S:
            return found
        if len(self._gathered) >= MAX_GATHERED:
            self._gathered.clear()
        tables = (self._temperature_N, self._top_k_N, self._top_p_N, self._min_p_N, self._seed_N)
        temperature, top_k, top_p, min_p, seed = (to_device(table[handles_S], self.device) for table in tables)
        random_S = self._temperature_N[handles_S] > 0.0
        made = _Gathered(
            handles_S,
            (temperature, top_k, top_p, min_p, seed),
            any_random=bool(random_S.any()),
            any_filter=bool((random_S & self._has_filter_N[handles_S]).any()),
        )
        self._gathered[id(handles_S)] = made
        return made


@dataclass(slots=True, frozen=True)
class _Gathered:
    """The columns of some rows, on the device; the array is kept, so that no other gets its identity."""

    handles_S: IntArray
    columns: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # temperature, top_k, top_p, min_p, seed
    any_random: bool
    any_filter: bool


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor. To a GPU through pinned memory: from pageable memory the copy would wait for the step."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _greedy(logits_SV: Tensor) -> Tensor:
    """The most likely token of each row, the first of equals; `FAILURES` where there is none."""
    if logits_SV.device.type != "cpu":
        return _judge(logits_SV, step_ops.argmax_rows(logits_SV))
    # numpy finds 32 maxima of 8192 in 19 us where torch's max and argmax take 220 to 260 on one core (torch 2.13)
    logits: npt.NDArray[np.float32] = logits_SV.numpy()
    ids = logits.argmax(axis=1)
    best = logits[np.arange(len(ids)), ids]
    if not np.isfinite(best).all():
        ids[~np.isfinite(best)] = NOT_FINITE
        ids[best == -np.inf] = NOTHING_ALLOWED
    return torch.from_numpy(ids)


def mark_failures(token_ids_S: Tensor, best_S: Tensor) -> Tensor:
    marked_S = torch.where(torch.isfinite(best_S), token_ids_S, NOT_FINITE)
    return torch.where(best_S == float("-inf"), NOTHING_ALLOWED, marked_S)


def _judge(logits_SV: Tensor, token_ids_S: Tensor) -> Tensor:
    """`mark_failures` by the best logit; on a GPU by that of the drawn token: the kernels choose nan and inf first."""
    on_cpu = logits_SV.device.type == "cpu"
    best_S = logits_SV.amax(dim=-1) if on_cpu else logits_SV.gather(1, token_ids_S[:, None])[:, 0]
    return mark_failures(token_ids_S, best_S)
