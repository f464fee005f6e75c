"""Small steps with prompts as CUDA graphs: recorded for a few numbers of tokens, padded up to the next.

A step of a question's 64 tokens beside a few decode rows takes the host longer to launch, kernel by kernel, than the
card to compute. A recorded one is a copy and a launch. Its tokens are those of the decode rows, then those of the
prompts, as in any step; its rows have fixed places, so that both attention kernels know where to look:

    tokens   d0 d1 d2 | p0 p0 p0 p0 p0 | p1 p1 p1 | . . . .               padded to T
    rows     d0 d1 d2 . . . . .        | p0 p1 . . . . . .                 D places, then P

All that differs from step to step is in one buffer that the host fills and sends. Block tables are taken from those
that the device keeps by handle (`DecodeTables`). What has no recording runs eagerly: more tokens or rows than there are
places for, prompts whose log probabilities are asked for, latent attention.

T tokens, R = D + P rows, S rows that sample, G groups of layers, B blocks, N handles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from argosy.cluster.protocol.messages import SchedulerOutput
from argosy.placement.step_memory import LONG_UNIT, PROMPT_DECODES, prompt_places
from argosy.workers.attention.base import AttentionMetadata
from argosy.workers.input_batch import InputBatch
from argosy.workers.recording import Graph, Recorder, Rehearsal, borrow
from argosy.workers.step_inputs import IntArray, Staging, StepInputs

NUM_STAGING_BUFFERS = 3  # steps whose copy to the device may be under way at once, at least
MOST_TABLE_ENTRIES = 1 << 20  # of a step's block tables, for each group of layers: longer ones go to eager steps
# Of a decode row in steps with many places for rows: no context is cut into pieces there, and a longer one would be
# waited for alone. Such steps go kernel by kernel, too.
MOST_DECODE_CONTEXT = 8192
Kind = tuple[int, int]  # tokens, places for decode rows


class Forward(Protocol):
    """The model's pass through this stage."""

    def __call__(
        self,
        token_ids_T: Tensor | None,
        hidden_TD: Tensor | None,
        positions_T: Tensor,
        metadata: AttentionMetadata,
        asked_rows_S: Tensor | None,
    ) -> Tensor:
        """Hidden states: of all tokens, or of those that are asked for."""


class Tables(Protocol):
    """What the device knows of requests by handle: `cuda_graphs.DecodeTables`."""

    block_table_NGB: Tensor

    def learn(self, handles_R: Tensor, num_computed_R: Tensor, tables_RB: Sequence[Tensor]) -> None:
        """Take over what the host knows."""


class Fixed(NamedTuple):
    """The parts of the buffer that recorded steps read: arrays to be filled on the host, tensors on the device."""

    tokens_T: Any
    positions_T: Any
    slots_GT: Any
    hidden_rows_R: Any  # of the rows that sample, the places of their last tokens
    handles_R: Any
    context_R: Any  # int32, 0: no row is there
    starts_R1: Any  # int32
    order_D: Any  # int32, decode rows with long contexts first


@dataclass(slots=True)
class RecordedPrompts:
    """One kind of step: what is replayed, and where it leaves hidden states."""

    graph: Graph
    result: Tensor


class PromptGraphs:
    """Records and replays these steps on one rank. Rows are laid out so that prompts begin at the same place in all
    kinds: the places of fewer decode rows are the last of those of more."""

    def __init__(
        self,
        batch: InputBatch,
        tables: Tables,
        forward: Forward,
        kinds: Sequence[Kind],
        *,
        max_model_len: int,
        hidden_size: int,
        dtype: torch.dtype,
        is_first_stage: bool,
        is_last_stage: bool,
    ):
        """`kinds`: see `step_memory.recorded_kinds`; not empty."""
        self.batch, self.tables, self.forward, self.kinds = batch, tables, forward, sorted(kinds)
        self.is_first_stage, self.is_last_stage, self.max_model_len = is_first_stage, is_last_stage, max_model_len
        self._most_tokens = max(tokens for tokens, _ in kinds)
        self._most_decodes = max(decodes for _, decodes in kinds)
        self._num_rows = self._most_decodes + max(prompt_places(tokens) for tokens, _ in kinds)
        shape = (0 if is_first_stage else self._most_tokens, hidden_size)
        self._hidden_TD = torch.zeros(shape, dtype=dtype, device=batch.device)
        self._staging = self._make_staging()
        self._turn = 0
        staging = self._staging[0]
        staging.begin()
        self._take(staging)
        tensors = staging.send()
        self._fixed = Fixed(*tensors)._replace(slots_GT=tensors[2].view(batch.num_groups, -1))
        self._recorded: dict[Kind, RecordedPrompts] = {}

    def _make_staging(self) -> list[Staging]:
        """On the device all have the same memory: a step's copy comes behind the replay that reads the one before."""
        batch, num_rows, device = self.batch, self._num_rows, self.batch.device
        capacity = 8 * ((2 + batch.num_groups) * self._most_tokens + 4 * num_rows)
        self._most_entries = batch.num_groups * min(num_rows * batch.max_blocks, MOST_TABLE_ENTRIES)
        capacity += 4 * (4 * num_rows + self._most_entries) + 1024
        if device.type == "cpu":
            return [Staging(capacity, device)]
        twin = torch.zeros(capacity, dtype=torch.uint8, device=device)
        count = max(NUM_STAGING_BUFFERS, batch.max_steps_in_flight + 1)
        return [Staging(capacity, device, twin) for _ in range(count)]

    def _take(self, staging: Staging) -> Fixed:
        """The parts that lie at the same place in each step, on the host, as they are where nothing is."""
        tokens, groups, rows = self._most_tokens, self.batch.num_groups, self._num_rows
        fixed = Fixed(
            tokens_T=staging.take(tokens, True),
            positions_T=staging.take(tokens, True),
            slots_GT=staging.take(groups * tokens, True).reshape(groups, tokens),
            hidden_rows_R=staging.take(rows, True),
            handles_R=staging.take(rows, True),
            context_R=staging.take(rows, False),
            starts_R1=staging.take(rows + 1, False),
            order_D=staging.take(self._most_decodes, False),
        )
        for part in fixed:
            part.fill(0)
        fixed.slots_GT.fill(-1)
        fixed.order_D[:] = np.arange(self._most_decodes)
        return fixed

    # -------------------------------------------------------------------------------------------------- recording

    def record(self, kind: Kind, recorder: Recorder | Rehearsal) -> None:
        """One kind, with no rows at all: nothing is written to the cache. Within `Recorder.recording`."""
        graph, result = recorder.record(lambda: self._compute(kind))
        self._recorded[kind] = RecordedPrompts(graph, borrow(result))

    def _metadata(self, kind: Kind, table_RGB: Tensor) -> AttentionMetadata:
        num_tokens, num_decodes = kind
        fixed, first = self._fixed, self._most_decodes - num_decodes
        last = self._most_decodes + prompt_places(num_tokens)
        metadata, *others = [
            AttentionMetadata(
                num_rows=num_decodes + prompt_places(num_tokens),
                num_decode_rows=num_decodes,
                query_start_R1=fixed.starts_R1[first : last + 1],
                context_len_R=fixed.context_R[first:last],
                block_table_RB=table_RGB[:, group],
                slot_mapping_T=fixed.slots_GT[group, :num_tokens],
                max_query_len=num_tokens,
                max_context_len=self.max_model_len,
                order_R=fixed.order_D[:num_decodes],
                is_padded=True,
            )
            for group in range(self.batch.num_groups)
        ]
        metadata.others = tuple(others)
        return metadata

    def _compute(self, kind: Kind) -> Tensor:
        """What is recorded, from what the host sent to hidden states: of the rows that sample on the last stage."""
        num_tokens, num_decodes = kind
        fixed, batch, first = self._fixed, self.batch, self._most_decodes - num_decodes
        rows = slice(first, self._most_decodes + prompt_places(num_tokens))
        metadata = self._metadata(kind, self.tables.block_table_NGB[fixed.handles_R[rows]])
        tokens_T = hidden_TD = asked_S = None
        if self.is_first_stage:
            tokens_T = fixed.tokens_T[:num_tokens]
            head = tokens_T[:num_decodes]
            last_token = batch.last_token_N[fixed.handles_R[first : self._most_decodes]]
            head.copy_(torch.where(head < 0, last_token, head))
        else:
            hidden_TD = self._hidden_TD[:num_tokens]
        if self.is_last_stage:
            asked_S = fixed.hidden_rows_R[: num_decodes + prompt_places(num_tokens)]
        made_XD = self.forward(tokens_T, hidden_TD, fixed.positions_T[:num_tokens], metadata, asked_S)
        if asked_S is not None and made_XD.shape[0] == num_tokens:  # more than may be asked for: it gave all of them
            return made_XD[asked_S]
        return made_XD

    # --------------------------------------------------------------------------------------------------- a step

    def begin(self, output: SchedulerOutput) -> tuple[StepInputs, Kind] | None:
        """Send the step's inputs, if there is a recording for it; None: run it another way. After `batch.apply`."""
        num_rows = len(output.rows)
        num_tokens_R = np.asarray(output.num_tokens or [1] * num_rows, dtype=np.int64)
        is_longer = num_tokens_R > 1
        num_decodes = int(is_longer.argmax()) if is_longer.any() else num_rows
        kind = self.kind_of(int(num_tokens_R.sum()), num_decodes, num_rows - num_decodes)
        if kind is None:
            return None
        handles_R = self.batch.handles_of(output.rows)
        end_R = self.batch.num_computed_N[handles_R] + num_tokens_R
        if self.batch.num_groups * num_rows * -(-int(end_R.max()) // self.batch.block_size) > self._most_entries:
            return None
        has_many = kind[0] >= LONG_UNIT or kind[1] > PROMPT_DECODES[-1]
        if has_many and int(end_R[:num_decodes].max(initial=0)) > MOST_DECODE_CONTEXT:
            return None
        return self._send(output, num_tokens_R, num_decodes, kind), kind

    def kind_of(self, num_tokens: int, num_decodes: int, num_prompts: int) -> Kind | None:
        """The smallest recorded step for so many tokens of so many rows; None: there is none, or far too large."""
        for kind in self.kinds:
            size, decodes = kind
            if size >= num_tokens and decodes >= num_decodes and prompt_places(size) >= num_prompts:
                return kind if size - num_tokens < LONG_UNIT else None
        return None

    def _send(self, output: SchedulerOutput, num_tokens_R: IntArray, num_decodes: int, kind: Kind) -> StepInputs:
        batch, num_groups = self.batch, self.batch.num_groups
        handles_R = batch.handles_of(output.rows)
        num_rows, num_tokens = len(handles_R), int(num_tokens_R.sum())
        start_R = batch.num_computed_N[handles_R]
        end_R = start_R + num_tokens_R
        sample_rows_S = None
        if output.partial:
            sampling = np.ones(num_rows, dtype=np.bool_)
            sampling[list(output.partial)] = False
            sample_rows_S = np.flatnonzero(sampling)
        self._turn = (self._turn + 1) % len(self._staging)
        staging = self._staging[self._turn]
        staging.begin()
        fixed = self._take(staging)
        query_end_R = np.cumsum(num_tokens_R)
        batch.lay_tokens(
            handles_R, num_tokens_R, fixed.tokens_T[:num_tokens], fixed.positions_T[:num_tokens],
            fixed.slots_GT[:, :num_tokens],
        )  # fmt: skip
        first = self._most_decodes - kind[1]
        for rows, part in ((slice(0, num_decodes), first), (slice(num_decodes, num_rows), self._most_decodes)):
            places = slice(part, part + len(handles_R[rows]))
            fixed.handles_R[places] = handles_R[rows]
            fixed.context_R[places] = end_R[rows]
            fixed.starts_R1[places] = query_end_R[rows] - num_tokens_R[rows]
            fixed.starts_R1[places.stop :] = query_end_R[rows.stop - 1] if rows.stop else 0
        fixed.order_D[:num_decodes] = np.argsort(-start_R[:num_decodes], kind="stable")
        sampling_R = slice(None) if sample_rows_S is None else sample_rows_S
        handles_S, last_S = handles_R[sampling_R], query_end_R[sampling_R] - 1
        fixed.hidden_rows_R[: len(last_S)] = last_S
        staging.take(num_rows, True)[:] = handles_R
        staging.take(len(handles_S), True)[:] = handles_S
        staging.take(num_rows, False)[:] = end_R
        num_blocks = -(-int(end_R.max()) // batch.block_size)
        batch.lay_blocks(
            handles_R, staging.take(num_groups * num_rows * num_blocks, False).reshape(num_groups, num_rows, -1)
        )
        handles, sample_handles, ends, table = staging.send()[len(fixed) :]
        self.tables.learn(handles, ends, list(table.view(num_groups, num_rows, -1)))
        return StepInputs(
            handles_R=handles_R,
            num_tokens_R=num_tokens_R,
            end_R=end_R,
            num_tokens=num_tokens,
            token_ids_T=self._fixed.tokens_T[:num_tokens],
            positions_T=self._fixed.positions_T[:num_tokens],
            metadata=self._metadata(kind, self.tables.block_table_NGB),
            sample_rows_S=sample_rows_S,
            hidden_rows_S=self._fixed.hidden_rows_R[: len(last_S)],
            handles_device_R=handles,
            sample_handles_device_S=sample_handles,
            same_rows=False,
        )

    def hidden_TD(self, num_tokens: int) -> Tensor:
        """Where the stage before puts the hidden states of so many tokens."""
        return self._hidden_TD[:num_tokens]

    def run(self, kind: Kind, inputs: StepInputs) -> Tensor:
        """Replay the forward pass. Hidden states of the step's tokens, or on the last stage of those that sample; they
        last until the next step."""
        recorded = self._recorded[kind]
        recorded.graph.replay()
        return recorded.result[: inputs.num_sampled if self.is_last_stage else inputs.num_tokens]
