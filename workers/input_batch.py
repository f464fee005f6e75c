"""From a `SchedulerOutput` to the tensors of one step; requests are remembered between steps by their handle.

Letters: N handles (rows of the tables), R rows of the step, T tokens of the step, S rows that sample, B blocks a row,
G groups of layers (`protocol.kv_groups`), each of which has tables of its own.

The tables are numpy on the host, one row a handle, allocated once. A step is gathered from them with a fixed number of
numpy calls, whatever its size, into one packed staging buffer (pinned where there is a GPU) that goes to the device in
one copy. A token that was sampled by a step still in flight on a GPU is not known to the host: the row is given -1 and
`last_token_N` on the device fills it in. On the first of several pipeline stages it comes from the last one
(`token_return`); stages between don't know tokens, and nothing they compute depends on them.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from argosy.cluster.protocol.messages import NewRequest, SchedulerOutput
from argosy.workers.attention.base import AttentionMetadata
from argosy.workers.step_inputs import IntArray, Staging, StepInputs

NUM_STAGING_BUFFERS = 3  # steps whose copy to the device may be under way at once, at least


class InputBatch:
    """The requests this rank knows, and the tensors of each step."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        max_steps_in_flight: int = 2,
        num_groups: int = 1,
    ):
        """`max_steps_in_flight`: so many steps may be under way at once; `num_groups`: of layers."""
        self.num_groups = num_groups
        self.block_size, self.vocab_size, self.device = block_size, vocab_size, device
        self.max_steps_in_flight = max_steps_in_flight
        self.max_blocks = -(-(max_model_len + 1) // block_size)
        num = max_num_seqs
        # one token more than the model's length: a step in flight when a request reaches it may still append one.
        # zeros: pages are taken from the system only when touched.
        self.token_ids_NL = np.zeros((num, max_model_len + 2), dtype=np.int32)
        self.num_known_N = np.zeros(num, dtype=np.int64)  # token ids in the table above
        self.num_prompt_N = np.zeros(num, dtype=np.int64)
        self.num_computed_N = np.zeros(num, dtype=np.int64)
        self.tenant_N = np.zeros(num, dtype=np.int64)  # counts the requests that had this handle
        self.num_blocks_N = np.zeros(num, dtype=np.int64)
        self.block_table_NGB = np.zeros((num, num_groups, self.max_blocks), dtype=np.int32)
        self._flat_tokens = self.token_ids_NL.reshape(-1)
        self._flat_blocks = self.block_table_NGB.reshape(-1)
        self.active: dict[int, NewRequest] = {}
        self.poisoned: dict[int, str] = {}  # handles that can't be computed, and why
        self.lives_on_device = device.type != "cpu"
        self.last_token_N = torch.zeros(num, dtype=torch.int64, device=device)
        self._last_tokens = self.last_token_N.numpy() if not self.lives_on_device else np.zeros(0, dtype=np.int64)
        self._query_start_R1 = torch.arange(num + 1, dtype=torch.int32, device=device)
        capacity = 8 * ((3 + num_groups) * max_num_batched_tokens + (5 + num_groups) * num + 64)
        capacity += 4 * num * (num_groups * self.max_blocks + 3)
        count = max(NUM_STAGING_BUFFERS, max_steps_in_flight) if self.lives_on_device else 1
        self._staging = [Staging(capacity, device) for _ in range(count)]
        self._step = 0
        self._last_rows: Sequence[int] = ()
        self._last_was_decode = False
        # rows of the latest steps and the same as arrays: steps of several micro-batches take turns
        self._known_rows: deque[tuple[Sequence[int], IntArray]] = deque(maxlen=max_steps_in_flight)

    # ------------------------------------------------------------------------------------------------- remembering

    def apply(self, output: SchedulerOutput) -> None:
        """Take over the differences of a step: forget, take up, append blocks."""
        for handle in output.finished:
            self.active.pop(handle, None)
            self.poisoned.pop(handle, None)
        if output.finished or output.new_requests:
            self._last_rows = ()
        for request in output.new_requests:
            self._add(request)
        for handle, block_ids in output.new_blocks:
            self._append_blocks(handle, block_ids)

    def _add(self, request: NewRequest) -> None:
        handle, count = request.handle, len(request.token_ids)
        token_ids = np.asarray(request.token_ids, dtype=np.int64)
        self.active[handle] = request
        self.tenant_N[handle] += 1
        self.poisoned.pop(handle, None)
        if count == 0 or token_ids.min() < 0 or token_ids.max() >= self.vocab_size:
            # the doors refuse such a request; here it must cost nobody else the step
            self.poisoned[handle] = f"a token id is outside of the vocabulary of {self.vocab_size}"
            token_ids = np.clip(token_ids, 0, self.vocab_size - 1)
        self.token_ids_NL[handle, :count] = token_ids
        self.num_known_N[handle] = count
        self.num_prompt_N[handle] = request.num_prompt_tokens
        self.num_computed_N[handle] = request.num_computed_tokens
        self.num_blocks_N[handle] = 0
        self._append_blocks(handle, request.block_ids)

    def _append_blocks(self, handle: int, block_ids: Sequence[int]) -> None:
        """`block_ids` place by place, one for each group."""
        start, num_groups = int(self.num_blocks_N[handle]), self.num_groups
        self.num_blocks_N[handle] = end = start + len(block_ids) // num_groups
        if num_groups == 1:
            self.block_table_NGB[handle, 0, start:end] = block_ids
        else:
            self.block_table_NGB[handle, :, start:end] = np.asarray(block_ids, dtype=np.int32).reshape(-1, num_groups).T

    # ----------------------------------------------------------------------------------------------------- a step

    def build(self, output: SchedulerOutput) -> StepInputs:
        """The tensors of the step. Call after `apply`."""
        same_rows = output.rows == self._last_rows
        self._last_rows = output.rows
        handles_R = self.handles_of(output.rows)
        staging = self._staging[self._step % len(self._staging)]
        self._step += 1
        staging.begin()
        one_each = not output.num_tokens or len(output.num_tokens) == sum(output.num_tokens)
        was_decode, self._last_was_decode = self._last_was_decode, one_each and not output.partial
        if self._last_was_decode:
            return self._build_decode(handles_R, staging, same_rows and was_decode)
        return self._build_mixed(output, handles_R, staging)

    def handles_of(self, rows: Sequence[int]) -> IntArray:
        """The rows as an array, which nobody changes."""
        for known, handles_R in self._known_rows:
            if known == rows:
                return handles_R
        made: IntArray = np.asarray(rows, dtype=np.int64)
        self._known_rows.append((rows, made))
        return made

    def _build_decode(self, handles_R: IntArray, staging: Staging, same_rows: bool) -> StepInputs:
        """One token a row: the path of most steps, so the views of a steady batch are made once."""
        num_rows, size = len(handles_R), self.block_size
        start_R = self.num_computed_N[handles_R]
        end_R = start_R + 1
        max_context = int(end_R.max())
        parts = staging.layout(num_rows, -(-max_context // size), self.num_groups)
        tokens_T, positions_T, slots_GT, lengths_R, table_GRB, handles_out_R = parts
        token_base_R = handles_R * self.token_ids_NL.shape[1]
        block_base_R = handles_R * (self.num_groups * self.max_blocks)
        tokens_T[:] = self._flat_tokens[token_base_R + start_R]
        if self.lives_on_device:
            tokens_T[start_R >= self.num_known_N[handles_R]] = -1
            handles_out_R[:] = handles_R
        positions_T[:] = start_R
        block_R, offset_R = np.divmod(start_R, size)
        block_R += block_base_R
        for group in range(self.num_groups):
            np.multiply(self._flat_blocks[block_R + group * self.max_blocks], size, out=slots_GT[group])
            table_GRB[group] = self.block_table_NGB[handles_R, group, : table_GRB.shape[2]]
        slots_GT += offset_R
        lengths_R[:] = end_R
        return self._inputs(staging, max_context, handles_R, None, end_R, 1, num_rows, None, same_rows)

    def _build_mixed(self, output: SchedulerOutput, handles_R: IntArray, staging: Staging) -> StepInputs:
        num_rows = len(handles_R)
        num_tokens_R = (
            np.asarray(output.num_tokens, dtype=np.int64) if output.num_tokens else np.ones(num_rows, dtype=np.int64)
        )
        start_R = self.num_computed_N[handles_R]
        query_end_R = np.cumsum(num_tokens_R)
        num_tokens = int(query_end_R[-1])
        tokens_T, positions_T = staging.take(num_tokens, True), staging.take(num_tokens, True)
        slots_GT = staging.take(self.num_groups * num_tokens, True).reshape(self.num_groups, -1)
        self.lay_tokens(handles_R, num_tokens_R, tokens_T, positions_T, slots_GT)
        max_context = self._stage_rows(staging, handles_R, start_R + num_tokens_R)
        query_start_R1 = staging.take(num_rows + 1, False)
        query_start_R1[0] = 0
        query_start_R1[1:] = query_end_R
        sampling = np.ones(num_rows, dtype=np.bool_)
        sampling[list(output.partial)] = False
        sample_rows_S = np.flatnonzero(sampling) if output.partial else None
        hidden_rows = query_end_R if sample_rows_S is None else query_end_R[sample_rows_S]
        staging.take(len(hidden_rows), True)[:] = hidden_rows - 1
        if self.lives_on_device:
            sampling_R = handles_R if sample_rows_S is None else handles_R[sample_rows_S]
            staging.take(len(sampling_R), True)[:] = sampling_R
        is_longer = num_tokens_R > 1
        num_decode_rows = int(is_longer.argmax()) if is_longer.any() else num_rows
        if self.lives_on_device:
            staging.take(num_decode_rows, False)[:] = np.argsort(-start_R[:num_decode_rows], kind="stable")
        return self._inputs(
            staging, max_context, handles_R, num_tokens_R, start_R + num_tokens_R, int(num_tokens_R.max()),
            num_decode_rows, sample_rows_S, False,
        )  # fmt: skip

    def known_tokens(self, handles_R: IntArray, start_R: IntArray) -> IntArray | None:
        """Tokens of these requests at these places, -1 where only the device knows them; None: the host knows none."""
        known_R = start_R < self.num_known_N[handles_R]
        if not known_R.any():
            return None
        token_ids_R = self._flat_tokens[handles_R * self.token_ids_NL.shape[1] + start_R]
        return np.where(known_R, token_ids_R, -1)

    def lay_tokens(
        self, handles_R: IntArray, num_tokens_R: IntArray, tokens_T: IntArray, positions_T: IntArray, slots_GT: IntArray
    ) -> None:
        """Write the next tokens of these requests, so many of each, their positions and their places in the cache.

        A token that only the device knows is -1.
        """
        size, stride = self.block_size, self.max_blocks
        first_R = np.cumsum(num_tokens_R) - num_tokens_R
        positions_T[:] = np.arange(len(positions_T))
        positions_T += np.repeat(self.num_computed_N[handles_R] - first_R, num_tokens_R)
        handles_T = np.repeat(handles_R, num_tokens_R)
        tokens_T[:] = self._flat_tokens[handles_T * self.token_ids_NL.shape[1] + positions_T]
        if self.lives_on_device:
            tokens_T[positions_T >= self.num_known_N[handles_T]] = -1
        block_T = positions_T // size
        entry_T = handles_T * (self.num_groups * stride) + block_T
        for group in range(self.num_groups):
            slots_GT[group] = self._flat_blocks[entry_T + group * stride]
        slots_GT *= size
        slots_GT += positions_T - block_T * size

    def _stage_rows(self, staging: Staging, handles_R: IntArray, end_R: IntArray) -> int:
        """Stages lengths, block table (and handles, if the device needs them). Returns the longest context."""
        staging.take(len(end_R), False)[:] = end_R
        max_context = int(end_R.max())
        num_blocks = -(-max_context // self.block_size)
        table_GRB = staging.take(self.num_groups * len(end_R) * num_blocks, False)
        self.lay_blocks(handles_R, table_GRB.reshape(self.num_groups, -1, num_blocks))
        staging.take(len(handles_R) if self.lives_on_device else 0, True)[:] = handles_R if self.lives_on_device else ()
        return max_context

    def lay_blocks(self, handles_R: IntArray, table_GRB: IntArray) -> None:
        """Write the first blocks of these requests, for each group."""
        for group in range(self.num_groups):
            table_GRB[group] = self.block_table_NGB[handles_R, group, : table_GRB.shape[2]]

    def _inputs(
        self,
        staging: Staging,
        max_context: int,
        handles_R: IntArray,
        num_tokens_R: IntArray | None,
        end_R: IntArray,
        max_query_len: int,
        num_decode_rows: int,
        sample_rows_S: IntArray | None,
        same_rows: bool,
    ) -> StepInputs:
        tensors = staging.send()
        token_ids_T, positions_T, slots, context_len_R, block_table = tensors[:5]
        num_rows = len(handles_R)
        slots_GT = slots.view(self.num_groups, -1)
        table_GRB = block_table.view(self.num_groups, num_rows, -1)
        handles_device_R = tensors[5] if self.lives_on_device else None
        if handles_device_R is not None:
            # only rows of one token can wait for a token that is still on the device
            head = token_ids_T[:num_decode_rows]
            head.copy_(torch.where(head < 0, self.last_token_N[handles_device_R[:num_decode_rows]], head))
        query_start_R1 = self._query_start_R1[: num_rows + 1] if num_tokens_R is None else tensors[6]
        metadata, *others = [
            AttentionMetadata(
                num_rows=num_rows,
                num_decode_rows=num_decode_rows,
                query_start_R1=query_start_R1,
                context_len_R=context_len_R,
                block_table_RB=table_GRB[group],
                slot_mapping_T=slots_GT[group],
                max_query_len=max_query_len,
                max_context_len=max_context,
                num_context_tokens=0 if num_tokens_R is None else int(end_R[num_decode_rows:].sum()),
                order_R=tensors[9] if len(tensors) > 9 else None,
            )
            for group in range(self.num_groups)
        ]
        metadata.others = tuple(others)
        return StepInputs(
            handles_R=handles_R,
            num_tokens_R=num_tokens_R,
            end_R=end_R,
            num_tokens=token_ids_T.shape[0],
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            metadata=metadata,
            sample_rows_S=sample_rows_S,
            hidden_rows_S=None if num_tokens_R is None else tensors[7],
            handles_device_R=handles_device_R,
            sample_handles_device_S=tensors[8] if len(tensors) > 8 else handles_device_R,
            same_rows=same_rows,
        )

    def forget_rows(self) -> None:
        """A step was run that was not built here: the next one's rows are not those of the one before it."""
        self._last_rows, self._last_was_decode = (), False

    def advance(self, inputs: StepInputs) -> None:
        """The step's tokens are computed."""
        self.num_computed_N[inputs.handles_R] = inputs.end_R

    def append_sampled(self, inputs: StepInputs, token_ids_S: IntArray) -> None:
        """Remember what the step sampled, on the host."""
        self.append(inputs.sample_handles_S, inputs.sample_positions_S, token_ids_S)

    def append(self, handles_S: IntArray, positions_S: IntArray, token_ids_S: IntArray) -> None:
        """These have so many tokens before this one. For whoever keeps its tokens on the host."""
        if not self.lives_on_device:
            self._last_tokens[handles_S] = token_ids_S
        self._flat_tokens[handles_S * self.token_ids_NL.shape[1] + positions_S] = token_ids_S
        self.num_known_N[handles_S] = positions_S + 1

    def append_sampled_device(self, inputs: StepInputs, token_ids_S: Tensor) -> None:
        """Remember what the step sampled, on the device; the host does not learn it here."""
        assert inputs.sample_handles_device_S is not None
        self.last_token_N.index_copy_(0, inputs.sample_handles_device_S, token_ids_S)

    def check(self) -> None:
        """Counts agree: what is computed has tokens and blocks."""
        for handle in self.active:
            computed, known = int(self.num_computed_N[handle]), int(self.num_known_N[handle])
            assert computed <= known or self.lives_on_device, (handle, computed, known)
            assert computed <= int(self.num_blocks_N[handle]) * self.block_size, (handle, computed)
