"""Log probabilities of prompts, for the requests that asked: of each chunk the tokens that follow its own."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from argosy.cluster.protocol.messages import NewRequest
from argosy.workers.input_batch import InputBatch
from argosy.workers.long_steps import LongHidden
from argosy.workers.sampler import LogprobTensors, gather_logprobs
from argosy.workers.step_inputs import StepInputs

ROWS_AT_ONCE = 256  # prompt positions whose logits exist at the same time


class PromptLogprobs:
    """Who asked for how many. False while nobody does: then steps may leave out what no token is drawn from."""

    def __init__(self, batch: InputBatch, device: torch.device, *, answers: bool):
        self._batch, self._device, self._answers = batch, device, answers
        self._asked: dict[int, int] = {}  # handle -> how many

    def __bool__(self) -> bool:
        return bool(self._asked)

    def add(self, request: NewRequest) -> None:
        """A request has come; its handle may have been another's."""
        self._asked.pop(request.handle, None)
        if request.params.prompt_logprobs is not None:
            self._asked[request.handle] = request.params.prompt_logprobs

    def forget(self, handle: int) -> None:
        """Its request is over."""
        self._asked.pop(handle, None)

    def make(
        self, compute_logits: Callable[[Tensor], Tensor], inputs: StepInputs, hidden_TD: Tensor | LongHidden
    ) -> list[tuple[int, int, LogprobTensors]]:
        """For rows that asked: (handle, first position, figures). On all TP ranks, since logits are gathered; only the
        one that answers makes figures of them.
        """
        counts_R = np.ones(inputs.num_rows, dtype=np.int64) if inputs.num_tokens_R is None else inputs.num_tokens_R
        figures = []
        for handle, end, count, query_end in zip(
            inputs.handles_R.tolist(),
            inputs.end_R.tolist(),
            counts_R.tolist(),
            np.cumsum(counts_R).tolist(),
            strict=True,
        ):
            if handle not in self._asked:
                continue
            first, last = end - count + 1, min(end + 1, int(self._batch.num_prompt_N[handle]))
            for start in range(first, last, ROWS_AT_ONCE):
                stop = min(start + ROWS_AT_ONCE, last)
                at = query_end - count + start - first
                logits = compute_logits(hidden_TD[at : at + stop - start])
                if self._answers:
                    token_ids = self._batch.token_ids_NL[handle, start:stop].astype(np.int64)
                    ids, num = torch.from_numpy(token_ids).to(self._device), stop - start
                    num_top = [self._asked[handle]] * num
                    figures.append((handle, start, gather_logprobs(logits, ids, list(range(num)), num_top, [()] * num)))
        return figures
