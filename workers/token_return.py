"""How the first stage of a pipeline gets the tokens that the last one samples, without the driver in between.

    last stage    after each step that sampled: the table of last tokens, by handle, is sent
    first stage   takes it before the first step that needs a token of that step, not sooner, in the same order

A table of a later step holds all that an earlier one held for whoever is still in need of it, so it simply replaces
what was there. What was not needed (its request has ended) is taken all the same: before a step when as many are
outstanding as there may be steps in flight, since then the oldest was sampled for certain; or while there is nothing
else to do.

N handles; R rows of a step; S rows that sample.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from argosy.placement.stage_transport import StageTransport
from argosy.workers.input_batch import InputBatch
from argosy.workers.step_inputs import IntArray, StepInputs


@dataclass(slots=True)
class _Outstanding:
    """A step that sampled, and whose tokens were not taken yet."""

    handles_S: IntArray
    positions_S: IntArray
    tenants_S: IntArray  # whose handles they were


class TokenReturn:
    """One end of the way back: the sending one on the last stage, the receiving one on the first."""

    def __init__(self, batch: InputBatch, transport: StageTransport):
        self._batch, self._transport = batch, transport
        self._outstanding: deque[_Outstanding] = deque()
        self._num_sampled_steps = self._num_taken = 0
        self._step_of_N = np.zeros(len(batch.num_computed_N), dtype=np.int64)  # the step that sampled a handle last
        self._table_N = torch.zeros_like(batch.last_token_N)

    def send(self) -> None:
        """On the last stage: the step's tokens stand in the table."""
        self._transport.send_tokens(self._batch.last_token_N)

    @property
    def is_outstanding(self) -> bool:
        """Whether there are tokens to take."""
        return bool(self._outstanding)

    def prepare(self, handles_R: IntArray) -> None:
        """On the first stage, before a step of these rows: take what it needs."""
        batch = self._batch
        waits_R = batch.num_computed_N[handles_R] >= batch.num_known_N[handles_R]
        needed = int(self._step_of_N[handles_R][waits_R].max(initial=0))
        most = self._transport.max_steps_in_flight
        while self._outstanding and (self._num_taken < needed or len(self._outstanding) >= most):
            self.take()

    def note(self, inputs: StepInputs) -> None:
        """On the first stage, after a step: its tokens will come."""
        if not inputs.num_sampled:
            return
        handles_S = inputs.sample_handles_S
        self._num_sampled_steps += 1
        self._step_of_N[handles_S] = self._num_sampled_steps
        tenants_S = self._batch.tenant_N[handles_S]
        self._outstanding.append(_Outstanding(handles_S, inputs.sample_positions_S, tenants_S))

    def take(self) -> None:
        """On the first stage: the tokens of the oldest step. On a CPU it waits for them."""
        step = self._outstanding.popleft()
        self._num_taken += 1
        batch = self._batch
        if batch.lives_on_device:
            self._transport.receive_tokens(batch.last_token_N)
            return
        table_N = self._transport.receive_tokens(self._table_N).numpy()
        own_S = batch.tenant_N[step.handles_S] == step.tenants_S  # others have moved in: their tokens are their own
        handles_S = step.handles_S[own_S]
        batch.append(handles_S, step.positions_S[own_S], table_N[handles_S])
