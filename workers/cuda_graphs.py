"""Decode steps as CUDA graphs: recorded once for a ladder of batch sizes, replayed with one small copy from the host.

R rows of a step, padded to a recorded size; N handles; B blocks a row; G groups of layers with tables of their own;
V vocabulary.

What a decode step needs to know of a request lives on the device, in tables by handle: its last token, how many of its
tokens are computed, its blocks. The host sends which handles are in the step and which new block each row opens; the
first kernel of the graph makes all inputs from that. Small steps with prompts have graphs of their own
(`prompt_graphs`); the rest runs eagerly and leaves the tables up to date. A graph saves the launches, several
milliseconds a step for a model of 32 layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from argosy.cluster.protocol.kv_groups import window_blocks
from argosy.cluster.protocol.messages import SchedulerOutput
from argosy.kernels import step_ops
from argosy.placement.step_memory import ladder, shared_ladder
from argosy.workers.attention.base import AttentionMetadata
from argosy.workers.input_batch import InputBatch
from argosy.workers.prompt_graphs import Kind, PromptGraphs
from argosy.workers.recording import Graph, Recorder, Rehearsal, borrow
from argosy.workers.step_inputs import StepInputs

LEAST_SHARED_TOKENS = 256  # of a prefix that is worth a launch of its own a layer
LEAST_SHARED_READS = 1 << 16  # rows times tokens
MOST_SHARED_BLOCKS = 512  # that the host compares
MOST_UNEVEN = 1.5  # times the mean context: the longest of rows that are even
PLAIN, SHARES, EVEN = range(3)  # what a recorded step may count on: nothing, a prefix in common, contexts of one length
HANDLES, TOKENS, SHARED, ORDER, NEW_BLOCKS = range(5)  # rows of the control; the last for each group of layers
NUM_CONTROL_BUFFERS = 4  # steps whose control may be on its way to the device at once, at least
Forward = Callable[[Tensor | None, Tensor | None, Tensor, AttentionMetadata], Tensor]


@dataclass(slots=True)
class RecordedStep:
    """One batch size: what is replayed, and the tensors it leaves its results in."""

    graph: Graph
    greedy_graph: Graph | None
    metadata: AttentionMetadata
    result: Tensor  # logits [R, V] on the last stage, hidden states [R, D] before it


class DecodeTables:
    """What the device remembers of each request, and the fixed tensors that decode steps read and write."""

    def __init__(self, batch: InputBatch, max_rows: int, windows: Sequence[int] = (0,)):
        """`windows`: of the groups of layers (`protocol.kv_groups`), whose tables are made as far as they reach."""
        device, num = batch.device, len(batch.num_computed_N)
        self.batch, self.max_rows = batch, max_rows
        self._reach_blocks = [window_blocks(window, batch.block_size) if window else 0 for window in windows]
        num_groups = len(windows)
        self.num_computed_N = torch.zeros(num, dtype=torch.int32, device=device)
        self.block_table_NGB = torch.zeros((num, num_groups, batch.max_blocks), dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        # handles | tokens that aren't the last ones sampled | tokens of a prefix that a row shares | rows with long
        # contexts first | new blocks of each group
        count, num_controls = max(NUM_CONTROL_BUFFERS, batch.max_steps_in_flight + 1), NEW_BLOCKS + num_groups
        self._controls = [
            torch.full((num_controls, max_rows), -1, dtype=torch.int32, pin_memory=pinned) for _ in range(count)
        ]
        event: Any = torch.cuda.Event  # torch gives it no types
        self._sent = [event() for _ in self._controls] if pinned else []
        self._turn = 0
        self.control_CR = torch.full((num_controls, max_rows), -1, dtype=torch.int32, device=device)
        self.token_ids_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.positions_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.slots_GR = torch.full((num_groups, max_rows), -1, dtype=torch.int64, device=device)
        self.context_len_R = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.block_table_GRB = torch.zeros((num_groups, max_rows, batch.max_blocks), dtype=torch.int32, device=device)
        self.sampled_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.query_start_R1 = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._row_of_N = np.zeros(num, dtype=np.int64)
        self._places_R = np.arange(max_rows, dtype=np.int32)

    def clear(self) -> None:
        """All rows are padding."""
        self.control_CR.fill_(-1)
        self.control_CR[ORDER] = torch.arange(self.max_rows, dtype=torch.int32, device=self.control_CR.device)

    def new_blocks(self, output: SchedulerOutput, handles_R: np.ndarray) -> np.ndarray | None:
        """The blocks each row opens with this step's token, -1 for none: [G, R]; None if blocks came in another way."""
        num_groups = self.batch.num_groups
        blocks_GR = np.full((num_groups, len(handles_R)), -1, dtype=np.int32)
        if not output.new_blocks:
            return blocks_GR
        self._row_of_N[handles_R] = np.arange(len(handles_R))
        size, batch = self.batch.block_size, self.batch
        for handle, block_ids in output.new_blocks:
            row = self._row_of_N[handle]
            opens = batch.num_computed_N[handle] // size
            if len(block_ids) != num_groups or handles_R[row] != handle or batch.num_blocks_N[handle] - 1 != opens:
                return None
            blocks_GR[:, row] = block_ids
        return blocks_GR

    def shared_tokens(self, handles_R: np.ndarray, start_R: np.ndarray) -> np.ndarray | None:
        """Tokens at the front that a row has in the same whole blocks as others, 0 if it has not; None: not worth it.

        Of several prefixes the one of most rows, and of that as much as saves most.
        """
        size, table_NB = self.batch.block_size, self.batch.block_table_NGB[:, 0]
        limit_R = np.minimum(start_R // size, MOST_SHARED_BLOCKS)
        least = -(-LEAST_SHARED_TOKENS // size)
        candidates = np.flatnonzero(limit_R >= least)
        block_ids, inverse, counts = np.unique(
            table_NB[handles_R[candidates], least - 1], return_inverse=True, return_counts=True
        )
        if not len(block_ids) or counts.max() * MOST_SHARED_BLOCKS * size < LEAST_SHARED_READS:
            return None
        candidates = candidates[inverse == counts.argmax()]
        limit_M = limit_R[candidates]
        blocks_MB = table_NB[handles_R[candidates], : limit_M.max()]
        differ_MB = blocks_MB != blocks_MB[0]
        equal_M = np.where(differ_MB.any(axis=1), differ_MB.argmax(axis=1), blocks_MB.shape[1])
        equal_M = np.minimum(equal_M, limit_M)
        lengths_M = np.sort(equal_M)[::-1]
        saved_M = lengths_M * np.arange(len(lengths_M))  # one row has to read it anyway
        length = lengths_M[saved_M.argmax()]
        if length < least or saved_M.max() * size < LEAST_SHARED_READS:
            return None
        shared_R = np.zeros(len(handles_R), dtype=np.int32)
        shared_R[candidates[equal_M >= length]] = length * size
        return shared_R

    def send(
        self,
        handles_R: np.ndarray,
        blocks_GR: np.ndarray,
        num_padded: int,
        order_R: np.ndarray,
        shared_R: np.ndarray | None = None,
        tokens_R: np.ndarray | None = None,
    ) -> None:
        """One copy to the device. `order_R`: rows with long contexts first; `tokens_R`: next tokens, -1: as sampled."""
        turn = self._turn = (self._turn + 1) % len(self._controls)
        if self._sent:
            self._sent[turn].synchronize()
        control, count = self._controls[turn], len(handles_R)
        host = control.numpy()
        host[0, :count] = handles_R
        host[0, count:num_padded] = -1
        host[ORDER, :count] = order_R
        host[ORDER, count:num_padded] = self._places_R[count:num_padded]
        host[NEW_BLOCKS:, :count] = blocks_GR
        host[TOKENS, :count] = -1 if tokens_R is None else tokens_R
        if shared_R is not None:
            host[SHARED, :count] = shared_R
            host[SHARED, count:num_padded] = 0
        self.control_CR.copy_(control, non_blocking=True)
        if self._sent:
            self._sent[turn].record()

    def prepare(self, num_rows: int) -> None:
        """Inputs of a step of so many (padded) rows, from the control and the tables."""
        rows, last = slice(0, num_rows), len(self._reach_blocks) - 1
        for group, reach_blocks in enumerate(self._reach_blocks):
            step_ops.prepare_decode(
                self.control_CR[HANDLES, rows], self.control_CR[NEW_BLOCKS + group, rows],
                self.control_CR[TOKENS, rows], self.batch.last_token_N, self.num_computed_N,
                self.block_table_NGB[:, group], self.token_ids_R[rows], self.positions_R[rows],
                self.slots_GR[group, rows], self.context_len_R[rows], self.block_table_GRB[group, rows],
                block_size=self.batch.block_size, reach_blocks=reach_blocks, advances=group == last,
            )  # fmt: skip

    def metadata(self, num_rows: int, max_context_len: int, kind: int = PLAIN) -> AttentionMetadata:
        """Of a decode step of so many rows, in the fixed tensors."""
        metadata, *others = [
            AttentionMetadata(
                num_rows=num_rows,
                num_decode_rows=num_rows,
                query_start_R1=self.query_start_R1[: num_rows + 1],
                context_len_R=self.context_len_R[:num_rows],
                block_table_RB=self.block_table_GRB[group, :num_rows],
                slot_mapping_T=self.slots_GR[group, :num_rows],
                max_query_len=1,
                max_context_len=max_context_len,
                order_R=self.control_CR[ORDER, :num_rows],
                shared_len_R=self.control_CR[SHARED, :num_rows] if kind == SHARES else None,
                even=kind == EVEN,
            )
            for group in range(self.batch.num_groups)
        ]
        metadata.others = tuple(others)
        return metadata

    def take_over(self, inputs: StepInputs) -> None:
        """After a step that was built on the host: its rows' counts and blocks."""
        metadata = inputs.metadata
        assert inputs.handles_device_R is not None
        tables = [one.block_table_RB for one in (metadata, *metadata.others)]
        self.learn(inputs.handles_device_R, metadata.context_len_R, tables)

    def learn(self, handles_R: Tensor, num_computed_R: Tensor, tables_RB: Sequence[Tensor]) -> None:
        """What the host knows: computed tokens (int32), and the blocks in use in the tables of each group."""
        self.num_computed_N.index_copy_(0, handles_R, num_computed_R)
        for group, table_RB in enumerate(tables_RB):
            self.block_table_NGB[handles_R, group, : table_RB.shape[1]] = table_RB


class CUDAGraphRunner:
    """Runs the steps in which every row computes one token and samples one."""

    def __init__(
        self,
        batch: InputBatch,
        forward: Forward,
        compute_logits: Callable[[Tensor], Tensor] | None,
        *,
        max_rows: int,
        max_model_len: int,
        hidden_size: int,
        dtype: torch.dtype,
        is_first_stage: bool,
        choose: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        windows: Sequence[int] = (0,),
        even_pays: Callable[[int], bool] = lambda num_rows: False,
    ):
        """`forward`: (tokens, hidden, positions, metadata) -> hidden. No `compute_logits` before the last stage.

        `choose`: from a rank's share of the logits to (ids, their logits), where nobody gathers all of them.
        `even_pays`: whether so many rows with contexts of about one length are worth a recorded step of their own.
        """
        self.batch, self.forward, self.compute_logits = batch, forward, compute_logits
        self.max_rows, self.max_model_len, self.is_first_stage = max_rows, max_model_len, is_first_stage
        self.choose, self.tables = choose, DecodeTables(batch, max_rows, windows)
        self.hidden_RD = torch.zeros((max_rows, hidden_size), dtype=dtype, device=batch.device)
        self.sizes = ladder(max_rows)
        self.shared_sizes = shared_ladder(max_rows) if batch.device.type == "cuda" else []
        self.even_sizes = [size for size in self.sizes if even_pays(size)]
        self._recorded: dict[tuple[int, int], RecordedStep] = {}  # by size and kind
        self._size_of = [_sizes_of(sizes, max_rows) for sizes in (self.sizes, self.shared_sizes)]
        self.prompts: PromptGraphs | None = None  # recorded with the others
        self._last_rows: object = ()
        self._order_R = np.zeros(0, dtype=np.int64)  # of the rows in progress, see `DecodeTables.send`
        self._shared_R: np.ndarray | None = None  # of the step in progress, see `DecodeTables.shared_tokens`
        self._is_even = False

    # ------------------------------------------------------------------------------------------------- recording

    @torch.inference_mode()
    def record(self, recorder: Recorder | Rehearsal, on_progress: Callable[[float], None] | None = None) -> None:
        """Record all sizes, largest first, so that the smaller ones reuse its memory. Takes seconds.

        All rows are padding while recording: nothing is written to the cache.
        """
        self.tables.clear()
        kinds = ((PLAIN, self.sizes), (SHARES, self.shared_sizes), (EVEN, self.even_sizes))
        steps = [(size, kind) for kind, sizes in kinds for size in sizes]
        work = [partial(self._record_size, *step) for step in sorted(steps, reverse=True)]
        if self.prompts is not None:
            work += [partial(self.prompts.record, kind) for kind in reversed(self.prompts.kinds)]
        with recorder.recording():
            for done, record in enumerate(work, start=1):
                record(recorder)
                if on_progress is not None:
                    on_progress(done / len(work))

    def _record_size(self, size: int, kind: int, recorder: Recorder | Rehearsal) -> None:
        metadata = self.tables.metadata(size, self.max_model_len, kind)

        def compute() -> Tensor:
            for one in (metadata, *metadata.others):
                one.scratch.clear()
            return self._compute(size, metadata)

        graph, result = recorder.record(compute)
        greedy = None
        if self.compute_logits is not None:
            greedy, _ = recorder.record(lambda: self._sample_greedy(size, result))
        self._recorded[size, kind] = RecordedStep(graph, greedy, metadata, borrow(result))

    def _compute(self, size: int, metadata: AttentionMetadata) -> Tensor:
        tables = self.tables
        tables.prepare(size)
        tokens = tables.token_ids_R[:size] if self.is_first_stage else None
        hidden = None if self.is_first_stage else self.hidden_RD[:size]
        hidden_RD = self.forward(tokens, hidden, tables.positions_R[:size], metadata)
        return hidden_RD if self.compute_logits is None else self.compute_logits(hidden_RD)

    def _sample_greedy(self, size: int, logits_RV: Tensor) -> None:
        if self.choose is None:
            self.remember(logits_RV, step_ops.argmax_rows(logits_RV), size)
        else:
            ids_R, values_R = self.choose(logits_RV)
            self.remember(values_R, ids_R, size)

    def remember(self, logits_RV: Tensor, token_ids_R: Tensor, num_rows: int) -> Tensor:
        """Keep what was sampled for the next step. Returns the ids, those of failed rows below 0."""
        out_R = self.tables.sampled_R[:num_rows]
        step_ops.remember_tokens(
            self.tables.control_CR[HANDLES, :num_rows], token_ids_R, logits_RV, self.batch.last_token_N, out_R
        )
        return out_R

    # --------------------------------------------------------------------------------------------------- a step

    def begin(self, output: SchedulerOutput) -> StepInputs | None:
        """Send the step's control, if it is one of ours; None: run it another way. Call after `batch.apply`."""
        count = len(output.rows)
        if (
            output.new_requests
            or output.partial
            or not 0 < count <= self.max_rows
            or (output.num_tokens and sum(output.num_tokens) != len(output.num_tokens))
        ):
            return None
        same_rows, self._last_rows = output.rows == self._last_rows, output.rows
        batch = self.batch
        handles_R = batch.handles_of(output.rows)
        blocks_GR = self.tables.new_blocks(output, handles_R)
        if blocks_GR is None:
            return None
        start_R = batch.num_computed_N[handles_R]
        if not same_rows:
            self._shared_R = self.tables.shared_tokens(handles_R, start_R) if self.shared_sizes else None
            self._order_R = np.argsort(-start_R, kind="stable")  # all grow by one token until the rows change
            self._is_even = is_even(start_R)
        size = self._size(count)
        tokens_R = None if same_rows else batch.known_tokens(handles_R, start_R)  # a prompt's last piece may be one
        self.tables.send(handles_R, blocks_GR, size, self._order_R, self._shared_R, tokens_R)
        return StepInputs(
            handles_R=handles_R,
            num_tokens_R=None,
            end_R=start_R + 1,
            num_tokens=count,
            token_ids_T=self.tables.token_ids_R[:count],
            positions_T=self.tables.positions_R[:count],
            metadata=self._recorded[size, self._kind(size)].metadata,
            sample_rows_S=None,
            hidden_rows_S=None,
            handles_device_R=None,
            sample_handles_device_S=None,
            same_rows=same_rows,
        )

    def begin_prompts(self, output: SchedulerOutput) -> tuple[StepInputs, Kind] | None:
        """As `begin`, for a small step with prompts: what to hand to `prompts.run`."""
        self._last_rows = ()  # they are new to the next decode step
        return None if self.prompts is None else self.prompts.begin(output)

    def take_over(self, inputs: StepInputs) -> None:
        """After a step that was run another way: bring the device's tables up to date."""
        self._last_rows = ()
        self.tables.take_over(inputs)

    def _size(self, num_rows: int) -> int:
        return int(self._size_of[self._shared_R is not None][num_rows])

    def _kind(self, size: int) -> int:
        if self._shared_R is not None:
            return SHARES
        return EVEN if self._is_even and (size, EVEN) in self._recorded else PLAIN

    def _step(self, num_rows: int) -> RecordedStep:
        size = self._size(num_rows)
        return self._recorded[size, self._kind(size)]

    @property
    def handles_R(self) -> Tensor:
        """Handles of the step in progress, on the device (int32); -1 is padding."""
        return self.tables.control_CR[HANDLES]

    def run(self, num_rows: int) -> Tensor:
        """Replay the forward pass. Logits or hidden states of the rows; they last until the next step."""
        recorded = self._step(num_rows)
        recorded.graph.replay()
        return recorded.result[:num_rows]

    def run_greedy(self, num_rows: int) -> Tensor:
        """After `run`: replay the choice of the most likely tokens. Ids, below 0 where a row failed."""
        recorded = self._step(num_rows)
        assert recorded.greedy_graph is not None
        recorded.greedy_graph.replay()
        return self.tables.sampled_R[:num_rows]


def is_even(lengths_R: np.ndarray) -> bool:
    """Whether no context is much longer than the others: a program for each would be waited for alone."""
    return int(lengths_R.max()) * len(lengths_R) <= MOST_UNEVEN * int(lengths_R.sum())


def _sizes_of(sizes: list[int], max_rows: int) -> np.ndarray:
    """The recorded size for each number of rows."""
    return np.asarray([next((size for size in sizes if size >= num_rows), 0) for num_rows in range(max_rows + 1)])
