"""Steps of very many tokens: layer by layer, in each layer slice by slice, the hidden states of other slices in the
host's memory. What a step needs on the device then depends on a slice, not on the step.

    slices of layer 5     0     1     2     3     4     5
    from the host               2 ..  3 ..  4 ..  5 ..  0 of layer 6
    to the host                 0 ..  1 ..  2 ..  3 ..           each way has a stream; three buffers, in turn

A slice attends to those before it through the cache, as a chunk of a prompt attends to earlier chunks: the order of the
work is another, what is computed is the same. Weights pass by once a step and not once a chunk, which is what it is
good for where they come from the host as well.

T = tokens of the step, C = tokens of a slice, D = model width, S = rows that sample.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.errors import ConfigError
from argosy.cluster.protocol.ledger import gib
from argosy.placement.plan import RankInfo
from argosy.placement.rank_memory import SLICE_BUFFERS, slice_setting
from argosy.placement.stage_transport import StageTransport
from argosy.workers.attention.base import AttentionBackend, AttentionMetadata
from argosy.workers.forward_context import ForwardContext
from argosy.workers.host_memory import check_host_room, pinned_bytes
from argosy.workers.kv_cache import KVCache
from argosy.workers.step_inputs import IntArray, StepInputs

NUM_BUFFERS = SLICE_BUFFERS  # one that is computed, one on its way in, one on its way out


@dataclass(slots=True)
class Slice:
    """A part of a step's tokens: a step of its own for one layer."""

    first: int
    last: int
    positions_T: Tensor
    token_ids_T: Tensor
    metadata: AttentionMetadata
    sampled: IntArray  # which of the rows that sample have their last token here
    places: list[int]  # where in the slice those tokens are

    @property
    def num_tokens(self) -> int:
        """Tokens of the slice."""
        return self.last - self.first


class LongHidden:
    """What a long step leaves for the sampler: the states that are sampled from, and all on demand."""

    def __init__(self, sampled_SD: Tensor, read: Callable[[slice], Tensor]):
        self.sampled_SD, self._read = sampled_SD, read

    def __getitem__(self, tokens: slice) -> Tensor:
        """Final states of these tokens; only of a step that was run with `keeps_all`, until the next one."""
        return self._read(tokens)


class LongSteps:
    """Runs them on one rank: its layers, its place in the pipeline."""

    def __init__(
        self,
        model: Any,
        rank: RankInfo,
        transport: StageTransport,
        *,
        slice_tokens: int,
        max_tokens: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """`model`: has `in_turn`, `enter`, `through` and `leave`. `max_tokens`: of the longest step."""
        self.model, self.rank, self.transport = model, rank, transport
        self.slice_tokens, self.device = slice_tokens, device
        self.host_bytes = max_tokens * width * dtype.itemsize
        self._host_TD = pinned_bytes(self.host_bytes, device).view(dtype).view(max_tokens, width)
        shape = (NUM_BUFFERS, slice_tokens, width)
        self._buffers_NCD = torch.zeros(shape, dtype=dtype, device=device)
        self._in: Any = None  # the streams of the link; None on a CPU
        self._out: Any = None
        if device.type == "cuda":
            make: Any = torch.cuda.Stream  # torch gives these no types
            make_event: Any = torch.cuda.Event
            self._in, self._out = make(device), make(device)
            self._arrived, self._computed, self._stored = ([make_event() for _ in range(NUM_BUFFERS)] for _ in range(3))

    @property
    def buffer_bytes(self) -> int:
        """On the device."""
        return self._buffers_NCD.nbytes

    def takes(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens is one for us; the same on all stages."""
        return num_tokens > self.slice_tokens

    def run(
        self, inputs: StepInputs, backend: AttentionBackend, kv_cache: KVCache, *, keeps_all: bool = False
    ) -> LongHidden | None:
        """The step's pass through this stage; None where the next stage goes on. `keeps_all`: see `LongHidden`."""
        slices = list(cut(inputs, self.slice_tokens))
        contexts = [ForwardContext(backend, kv_cache, part.metadata) for part in slices]
        parks = len(slices) > NUM_BUFFERS  # fewer have a buffer each
        num_layers = self.rank.last_layer - self.rank.first_layer
        sampled_SD = self._buffers_NCD.new_empty((inputs.num_sampled, self._buffers_NCD.shape[2]))
        self._begin()
        for number, layer in enumerate(self.model.in_turn()):
            for place, part in enumerate(slices):
                turn = number * len(slices) + place
                buffer = turn % NUM_BUFFERS if parks else place
                x_CD = self._buffers_NCD[buffer, : part.num_tokens]
                if number == 0:
                    self._await_stored(buffer)
                    self._enter(part, x_CD)
                elif parks:
                    self._await_arrived(buffer)
                following = turn + 1
                if parks and len(slices) <= following < num_layers * len(slices):
                    self._load(slices[following % len(slices)], following % NUM_BUFFERS)
                is_end = number == num_layers - 1
                rows = self._asked_rows(part) if is_end and self.rank.is_last_stage and not keeps_all else None
                made_XD = self.model.through(layer, x_CD, part.positions_T, contexts[place], rows)
                if is_end:
                    self._leave(part, made_XD, sampled_SD, is_whole=rows is None)
                if keeps_all if is_end else parks:
                    self._store(part, buffer)
                else:
                    self._let_go(buffer)
        if not self.rank.is_last_stage:
            return None
        return LongHidden(sampled_SD, self._read)

    def _enter(self, part: Slice, x_CD: Tensor) -> None:
        """A slice comes to this stage."""
        if self.rank.is_first_stage:
            x_CD.copy_(self.model.enter(part.token_ids_T, part.positions_T))
        else:
            self.transport.receive(part.num_tokens, x_CD)

    def _asked_rows(self, part: Slice) -> Tensor:
        """The places that are sampled from: what the last layer's products are made for."""
        return torch.tensor(part.places, dtype=torch.int64, device=self.device)

    def _leave(self, part: Slice, made_XD: Tensor, sampled_SD: Tensor, *, is_whole: bool) -> None:
        """A slice has been through all layers of this stage: all of its tokens, or those that are sampled from."""
        if not self.rank.is_last_stage:
            if self._out is not None and part.first // self.slice_tokens % NUM_BUFFERS == NUM_BUFFERS - 1:
                self.transport.flush()  # or copies of all slices would wait on the card for the next stage
            self.transport.send(made_XD, changes=True)
        elif len(part.sampled):
            asked_XD = made_XD[part.places] if is_whole else made_XD
            sampled_SD[part.sampled[0] : part.sampled[-1] + 1] = self.model.leave(asked_XD)

    # -------------------------------------------------------------------------------------------------- to and fro

    def _begin(self) -> None:
        if self._in is not None:
            main = torch.cuda.current_stream(self.device)
            main.wait_stream(self._out)  # of the step before
            self._in.wait_stream(main)
            for stored in self._stored:
                stored.record(main)

    def _load(self, part: Slice, buffer: int) -> None:
        """Behind the store that the buffer was last used for, and so behind all stores of the layer before."""
        target, source = self._buffers_NCD[buffer, : part.num_tokens], self._host_TD[part.first : part.last]
        if self._in is None:
            target.copy_(source)
            return
        self._in.wait_event(self._stored[buffer])
        with torch.cuda.stream(self._in):
            target.copy_(source, non_blocking=True)
            self._arrived[buffer].record(self._in)

    def _store(self, part: Slice, buffer: int) -> None:
        target, source = self._host_TD[part.first : part.last], self._buffers_NCD[buffer, : part.num_tokens]
        if self._out is None:
            target.copy_(source)
            return
        self._computed[buffer].record(torch.cuda.current_stream(self.device))
        self._out.wait_event(self._computed[buffer])
        with torch.cuda.stream(self._out):
            target.copy_(source, non_blocking=True)
            self._stored[buffer].record(self._out)

    def _let_go(self, buffer: int) -> None:
        """What is in it was computed with, and goes nowhere."""
        if self._out is not None:
            self._stored[buffer].record(torch.cuda.current_stream(self.device))

    def _await_arrived(self, buffer: int) -> None:
        if self._in is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[buffer])

    def _await_stored(self, buffer: int) -> None:
        if self._out is not None:
            torch.cuda.current_stream(self.device).wait_event(self._stored[buffer])

    def _read(self, tokens: slice) -> Tensor:
        if self._out is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._out)
        states_CD: Tensor = self.model.leave(self._host_TD[tokens].to(self.device, non_blocking=True))
        return states_CD


def slice_tokens_of(config: ServingConfig, model: object, token_bytes: int) -> int | None:
    """Tokens of a slice, if there can be longer steps and their hidden states may go to the host; None otherwise.

    Raises `ConfigError` where less of the host's memory is given than the longest step needs, and for models that are
    not ours; `PlacementImpossible` where the host has not so much.
    """
    given, longest = config.offload.activation_offload_gb, config.scheduler.max_num_batched_tokens
    slice_tokens = slice_setting(config)
    if slice_tokens is None:
        return None
    if not hasattr(model, "enter"):
        if given == "auto":
            return None
        raise ConfigError(
            f"activation_offload_gb={given}: the layers of this model are not ours, and its steps can't be cut; leave "
            f"it out, or keep steps short with max_num_batched_tokens={slice_tokens}"
        )
    needed = longest * token_bytes
    if given != "auto" and needed > given * 2**30:
        raise ConfigError(
            f"activation_offload_gb={given}: hidden states of max_num_batched_tokens={longest} are {gib(needed)}; give "
            f"that much (or auto), or lower max_num_batched_tokens to {int(given * 2**30) // token_bytes}"
        )
    fix = "lower --max-num-batched-tokens"
    ranks = config.parallel.tensor_parallel_size
    check_host_room(needed, f"activation_offload_gb={given}", fix, num_ranks=ranks)
    return slice_tokens


def cut(inputs: StepInputs, slice_tokens: int) -> Iterator[Slice]:
    """The step in slices; a row that goes on in the next one has, for this one, no tokens after it."""
    whole = inputs.metadata
    count_R = np.ones(inputs.num_rows, dtype=np.int64) if inputs.num_tokens_R is None else inputs.num_tokens_R
    end_R = np.cumsum(count_R)
    start_R = end_R - count_R
    sampling_S = np.arange(inputs.num_rows) if inputs.sample_rows_S is None else inputs.sample_rows_S
    last_token_S = end_R[sampling_S] - 1
    for first in range(0, inputs.num_tokens, slice_tokens):
        last = min(first + slice_tokens, inputs.num_tokens)
        low = int(np.searchsorted(end_R, first, side="right"))
        high = int(np.searchsorted(start_R, last, side="left"))
        rows = slice(low, high)
        own_R = np.minimum(end_R[rows], last) - np.maximum(start_R[rows], first)
        context_R = inputs.end_R[rows] - (end_R[rows] - np.minimum(end_R[rows], last))
        is_longer = own_R > 1
        sampled = np.flatnonzero((last_token_S >= first) & (last_token_S < last))
        device = whole.slot_mapping_T.device
        metadata = AttentionMetadata(
            num_rows=high - low,
            num_decode_rows=int(is_longer.argmax()) if is_longer.any() else high - low,
            query_start_R1=_on(device, np.concatenate(([0], np.cumsum(own_R)))),
            context_len_R=_on(device, context_R),
            block_table_RB=whole.block_table_RB[rows],
            slot_mapping_T=whole.slot_mapping_T[first:last],
            max_query_len=int(own_R.max()),
            max_context_len=int(context_R.max()),
            num_context_tokens=int(context_R[is_longer.argmax() :].sum()) if is_longer.any() else 0,
        )
        metadata.others = tuple(
            replace(
                metadata, block_table_RB=other.block_table_RB[rows], slot_mapping_T=other.slot_mapping_T[first:last],
                scratch={},
            )
            for other in whole.others
        )  # fmt: skip
        yield Slice(
            first=first,
            last=last,
            positions_T=inputs.positions_T[first:last],
            token_ids_T=inputs.token_ids_T[first:last],
            metadata=metadata,
            sampled=sampled,
            places=(last_token_S[sampled] - first).tolist(),
        )


def _on(device: torch.device, numbers: IntArray) -> Tensor:
    """int32 there; a copy that nobody waits for."""
    made = torch.from_numpy(numbers.astype(np.int32))
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made
